"""What a cell means: text, words, a class, a number, choices or answers; anything else is refused, never turned into text.

Each function takes a raw value and raises a `ValueError` that goes on where "column 'x'" leaves off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_LABEL = ("-1", "-100", "-", "")
"""How published corpora write that nobody gave a label: `datasets` and GLUE by −1, SNLI by `-`."""

_FRACTION = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?")
_SEPARATORS = "|;,"


@dataclass(frozen=True)
class Fault:
    """What stands where a row should: why there is none."""

    reason: str


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Fault):
        return f"a mapping whose {value.reason}"
    if isinstance(value, str):
        return "text"
    return "a list" if hasattr(value, "__iter__") and not isinstance(value, bytes) else f"{type(value).__name__}"


def text_cell(value: Any, *, empty: bool = False) -> str:
    """Text as it stands.

    Args:
        value: The cell.
        empty: Whether it may be empty or blank.
    """
    if not isinstance(value, str):
        raise ValueError(f"must hold text, got {kind_of(value)}")
    if not empty and not value.strip():
        raise ValueError("holds no text")
    if not value.isascii() and (lone := re.search("[\ud800-\udfff]", value)):
        raise ValueError(f"must hold text, got half a character (U+{ord(lone[0]):04X} at character {lone.start()})")
    return value


def words_cell(value: Any) -> list[str]:
    """Words from a list, or from text with spaces (CSV has no lists)."""
    if isinstance(value, str):
        return text_cell(value).split()
    found = [_item(text_cell, item, number) for number, item in enumerate(_listed(value, "words"), start=1)]
    if not found:
        raise ValueError("holds no word")
    return found


def tags_cell(value: Any, known: Sequence[str] = (), only: bool = True) -> list[str]:
    """Classes of words, from a list or from text with spaces; `-` is a tag like any other."""
    items = value.split() if isinstance(value, str) else _listed(value, "tags")
    codes = tuple(code for code in NO_LABEL if code != "-")
    return [
        _item(lambda item: class_cell(item, known, only, codes), item, at) for at, item in enumerate(items, start=1)
    ]


def class_cell(value: Any, known: Sequence[str] = (), only: bool = True, codes: Sequence[str] = NO_LABEL) -> str:
    """The name of a class: text, a whole number, true or false.

    Args:
        value: The cell.
        known: Classes; all are if empty.
        only: Whether there are no others.
        codes: What stands for no label, unless it is known.
    """
    if isinstance(value, str):
        text_cell(value, empty=True)
    elif isinstance(value, float) or not isinstance(value, int):
        raise ValueError(f"must hold a class (a name or a whole number), got {kind_of(value)}")
    name = str(value)
    if name in known:
        return name
    if name.strip() in codes:
        raise ValueError(f"holds {value!r}, which stands for no label unless it is one of model.labels (--labels)")
    if known and only:
        raise ValueError(f"holds {name!r}, which is none of the labels {', '.join(known)}")
    return name


def classes_cell(value: Any, known: Sequence[str] = (), only: bool = True) -> list[str]:
    """Names of classes: a list, perhaps empty, or text that separates them by `|`, `;` or `,`; each once."""
    if isinstance(value, str):
        separator = next((mark for mark in _SEPARATORS if mark in value), ",")
        items: Iterable[Any] = [name.strip() for name in value.split(separator)] if value.strip() else ()
    else:
        items = _listed(value, "classes")
    names = [_item(lambda item: class_cell(item, known, only), item, at) for at, item in enumerate(items, start=1)]
    return list(dict.fromkeys(names))


def number_cell(value: Any) -> float:
    """A finite number, or text that reads as one."""
    try:
        found = math.nan if isinstance(value, bool) else float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        found = None
    if found is None or not math.isfinite(found):
        said = repr(value) if isinstance(value, str) else kind_of(value)
        raise ValueError(f"must hold a finite number, got {said}")
    return found


def choices_cell(value: Any) -> tuple[list[str], list[str]]:
    """(texts, their names) of two choices or more; names are empty where a choice has none.

    Choices are a list of texts, or as in ARC `{"text": […], "label": […]}` or a list of `{"text": …, "label": …}`.
    """
    names: Any = []
    if isinstance(value, Mapping):
        names, value = value.get("label", []), value.get("text")
    elif not isinstance(value, (str, bytes)) and hasattr(value, "__iter__"):
        value = list(value)
        if value and all(isinstance(item, Mapping) and "text" in item for item in value):
            names = [item["label"] for item in value if "label" in item]
            value = [item["text"] for item in value]
    texts = [_item(text_cell, item, number) for number, item in enumerate(_listed(value, "choices"), start=1)]
    if len(texts) < 2:
        raise ValueError(f"must be a list of 2 choices or more, got {len(texts)}")
    names = [str(name) for name in names]
    if names and (len(names) != len(texts) or len(set(names)) < len(names)):
        raise ValueError(f"must name each of {len(texts)} choices differently, got the names {', '.join(names)}")
    return texts, names


def answers_cell(value: Any) -> list[tuple[int | None, str]]:
    """(start or None, answer) of every answer; none for a question without one.

    Answers are written as in SQuAD, `{"text": […], "answer_start": […]}` or a list of `{"text": …, "answer_start": …}`,
    as a list of texts, or as one text.
    """
    if isinstance(value, str):
        return [(None, text_cell(value))] if value else []
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        texts, starts = ([texts], [starts]) if isinstance(texts, str) else (texts, starts)
        texts = list(_listed(texts, "answers"))
        starts = [None] * len(texts) if starts is None else list(_listed(starts, "starts"))
        if len(starts) != len(texts):
            raise ValueError(f"holds {len(texts)} answers but {len(starts)} starts")
        pairs = list(zip(starts, texts))
    else:
        items = list(_listed(value, "answers"))
        pairs = [(i.get("answer_start"), i.get("text")) if isinstance(i, Mapping) else (None, i) for i in items]
    return [(_start(start), _item(text_cell, text, number)) for number, (start, text) in enumerate(pairs, start=1)]


def _start(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"must give whole numbers as starts of answers, got {kind_of(value)}")
    return value


def _listed(value: Any, what: str) -> Iterable[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise ValueError(f"must hold a list of {what}, got {kind_of(value)}")
    return value


def _item(read: Callable[[Any], str], value: Any, number: int) -> str:
    """An item of a list; its error names the item."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{error} as item {number}") from None


def class_names(values: Iterable[Any], known: Sequence[str] = ()) -> list[str]:
    """The classes among label values, in order: numbers by value, names by alphabet with `O` (no entity) first.

    Args:
        values: Cells.
        known: The only classes there are, in their order; all if empty.

    Raises:
        ValueError: A value that is no class, or a column of fractions.
    """
    found = {class_cell(value, known) for value in values}
    if known:
        return list(known)
    numeric = all(_FRACTION.fullmatch(name) for name in found)
    fractions = sorted(name for name in found if not name.lstrip("+-").isdigit()) if numeric else []
    if fractions:
        raise ValueError(
            f"holds fractions ({', '.join(fractions[:3])}{' …' * (len(fractions) > 3)}): scores are no classes; the task "
            "regression learns them"
        )
    if all(name.lstrip("-").isdigit() for name in found):
        return sorted(found, key=int)
    return sorted(found, key=lambda name: (name != "O", name))
