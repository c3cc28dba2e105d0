"""Rows with labels for a run: read, checked and told about; the classes of its head, and whether a checkpoint's stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..data.cells import class_names
from ..data.labelled import LabelledRows, Rows, load_rows, read_cells
from ..data.published import published_columns
from ..data.readers import FileOptions
from ..errors import UsageProblem
from ..hub.card import auto_class
from ..objectives.base import IGNORED
from ..tasks.base import Task
from .output import SHOWN, say, tell_skipped, warn
from .recipe import Recipe

DEFAULT_SHARE = 0.1
"""Share of labelled rows set aside where the recipe says nothing."""

LONGEST_ROW = 256
"""Tokens of a labelled row, unless data.block_size says otherwise or the model holds fewer."""


def read_rows(recipe: Recipe, objective: Task, classes: Sequence[str] | None = None) -> LabelledRows:
    """The recipe's rows, each cell as what it means; where nothing says what validates, a tenth is set aside.

    Args:
        recipe: names source and columns; columns of public corpora are written into it.
        objective: the task.
        classes: of the checkpoint that is measured: other labels count as its errors. None for training, where
            `model.labels`, if given, are all the labels there are.

    Raises:
        ValueError: a row is bad, and `data.skip_bad_rows` is not set; names its place.
    """
    data = recipe.data
    rows = _loaded(recipe, objective)
    if missing := [column for column in objective.columns(data) if column not in rows.train[0]]:
        changed = published_columns(objective.name, rows.train[0], data)
        vars(data).update(changed)
        if changed:
            say(f"columns    {', '.join(objective.columns(data))} (no {missing[0]!r} there)")
    known = recipe.model.labels or () if classes is None else classes
    reader = objective.reading(known, only=classes is None)
    rows = read_cells(rows, partial(reader.read, data=data), data.skip_bad_rows, partial(reader.outliers, data=data))
    _tell(rows, reader.notes([*rows.train, *(rows.validation or [])], data))
    return rows


def _loaded(recipe: Recipe, objective: Task) -> LabelledRows:
    data = recipe.data
    options = FileOptions(data.encoding, data.errors, quoted=data.quoted, skip_bad_rows=data.skip_bad_rows)
    common: dict[str, Any] = {"task": objective.name, "options": options, "limit": data.limit}
    common["seed"] = int(recipe.training.get("seed", 0))
    if data.validation == 0:
        return replace(load_rows(data.source, (), **common), validation=None)
    rows = load_rows(data.source, (), validation=data.validation, **common)
    if rows.validation is None:
        data.validation = DEFAULT_SHARE
        say(f"held out   {DEFAULT_SHARE:.0%} of the rows for validation, by seed {common['seed']}")
        rows = load_rows(data.source, (), validation=data.validation, **common)
    return rows


def _tell(rows: LabelledRows, notes: Sequence[str]) -> None:
    tell_skipped(rows.skipped, len(rows.train) + len(rows.validation or []))
    for note in notes:
        warn(note)


def label_order(recipe: Recipe, objective: Task, rows: LabelledRows, config: Any = None) -> list[str]:
    """Names of the classes in the order of their ids, written into the recipe; empty for a task without classes.

    The recipe's own, if it has any; else those that the source keeps, and all that rows of either side hold.

    Args:
        recipe: perhaps with `model.labels`.
        objective: the task.
        rows: as `read_rows` gave them.
        config: of the checkpoint to go on from; where its classes are the same, its order counts.

    Raises:
        UsageProblem: there is one class only.
        ValueError: the labels are fractions.
    """
    data = recipe.data
    train, held = (Counter(objective.labels(side, data)) for side in (rows.train, rows.validation or []))
    if not train and not held:
        return []
    names = recipe.model.labels
    if not names:
        kept = list(rows.names.get(objective.label_column(data), []))
        names = kept + class_names((train.keys() | held.keys()) - set(kept))
        if fresh := sorted(held.keys() - train.keys() - set(kept)):
            listed = ", ".join(f"{name!r} ({held[name]})" for name in fresh[:SHOWN])
            warn(f"only the validation rows hold {listed}{' …' * (len(fresh) > SHOWN)}: taken as classes all the same")
    if len(names) == 1:
        raise UsageProblem(f"the training rows have one label only: {names[0]!r}")
    recipe.model.labels = names if config is None else in_order_of(config, names)
    return recipe.model.labels


def classes_of(config: Any) -> list[str]:
    """Names of a config's classes in the order of their ids; numbers where they have none."""
    names = [config.id2label[number] for number in sorted(config.id2label)]
    unnamed = names == [f"LABEL_{number}" for number in range(len(names))]
    return [str(number) for number in range(len(names))] if unnamed else names


def in_order_of(config: Any, names: list[str]) -> list[str]:
    """The names in the order of a checkpoint's classes if it has the same, else as they are."""
    known = classes_of(config)
    return known if set(known) == set(names) else names


def replaces_head(config: Any, objective: Task, names: Sequence[str]) -> bool:
    """Whether a checkpoint has a head for the task, but for other classes; says so.

    Args:
        config: the checkpoint's.
        objective: the task.
        names: the classes to learn, in order.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if auto_class(architecture) != objective.auto_class or objective.auto_class not in _HEADS_OF_CLASSES:
        return False
    known = classes_of(config)
    before, now = problem_type(config), objective.problem_type
    if now is not None and before != now:
        warn(f"the checkpoint's head is for {before}, the task is {now}: it gets a new head")
        return True
    if not names or known == list(names):
        return False
    told = [", ".join(side[:SHOWN]) + " …" * (len(side) > SHOWN) for side in (known, list(names))]
    warn(f"the checkpoint tells {told[0]} apart, the rows hold {told[1]}: it gets a new head")
    return True


_HEADS_OF_CLASSES = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")


def problem_type(config: Any) -> str:
    """What a sequence classifier's loss is; as transformers tells it where the config doesn't say."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def encoded(
    encode: Callable[..., Any], rows: list[dict[str, Any]] | None, recipe: Recipe, tokenizer: Any, config: Any
) -> Any:
    """`rows` as a dataset of token ids, or None for None; says how many were cut.

    Args:
        encode: the task's `encode` or `encode_held`.
        rows: as read.
        recipe: names columns and the longest row.
        tokenizer, config: of the model.
    """
    if rows is None:
        return None
    length = int(recipe.data.block_size or LONGEST_ROW)
    found, cut = encode(rows, recipe.data, tokenizer, config, length)
    if cut:
        warn(f"{cut} of {len(rows)} rows are longer than data.block_size={length} tokens and were cut")
    return Rows(found)


def tell_strange_labels(rows: Sequence[dict[str, Any]], config: Any) -> None:
    """Say which labels a model has no class for.

    Args:
        rows: encoded for measuring.
        config: the model's.

    Raises:
        UsageProblem: it has one for none of them.
    """
    found = [row.get("strange", ()) for row in rows]
    counts = Counter(name for item in found for name in ([item] if isinstance(item, str) else item) if name)
    if not counts:
        return
    listed = ", ".join(f"{name!r} ({count})" for name, count in counts.most_common(SHOWN))
    listed += " …" * (len(counts) > SHOWN)
    if not any(_has_known_label(row["labels"]) for row in rows):
        raise UsageProblem(
            f"no label is a class of the checkpoint: it knows {', '.join(classes_of(config))}, not {listed}"
        )
    warn(f"{counts.total()} labels are no class of the checkpoint and count as its errors: {listed}")


def _has_known_label(labels: Any) -> bool:
    if not isinstance(labels, list):
        return labels != IGNORED
    return any(label > 0 if isinstance(label, float) else label != IGNORED for label in labels)
