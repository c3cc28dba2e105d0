"""What may be in a config's fields, read off its annotations and its own refusals, for property tests."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from hypothesis import strategies as st

from hf_lnlm.registry import Family

from .cases import tiny_fields

INHERITED = frozenset(
    {
        "vocab_size",
        "num_labels",
        "problem_type",
        "id2label",
        "label2id",
        "dtype",
        "architectures",
        "chunk_size_feed_forward",
    }
)
HUGE = (10**9, 10**12, 10**30, 2**63)
NOT_A_NUMBER = (float("nan"), float("inf"), float("-inf"))


def own_fields(family: Family) -> dict[str, Any]:
    """Return the fields that the package's classes declare for a family, name → resolved annotation."""
    hints: dict[str, Any] = {}
    for cls in reversed(family.config_class.__mro__):
        if cls.__module__.startswith("hf_lnlm."):
            declared = inspect.get_annotations(cls)
            hints |= {name: hint for name, hint in declared.items() if typing.get_origin(hint) is not typing.ClassVar}
    names = {field.name for field in dataclasses.fields(family.config_class)}
    return {name: hint for name, hint in hints.items() if name in names and not name.startswith("_")}


def kinds(hint: Any) -> set[type]:
    """Return the plain types that an annotation allows: `float | int | None` → {float, int, NoneType}."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(kinds(part) for part in typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    return {typing.get_origin(hint) or hint}


def choices(family: Family, name: str) -> list[str]:
    """Return the values that a string field lists when it refuses one."""
    try:
        family.config_class(**(tiny_fields(family.model_type) | {name: "no such choice"}))
    except ValueError as refusal:
        listed = re.search(r"one of (?P<values>.*?), got", str(refusal))
        return [] if listed is None else [value.strip(" '\"") for value in listed["values"].split(",")]
    return []


def plausible(family: Family, name: str, hint: Any) -> st.SearchStrategy[Any] | None:
    """Return small values that a field may well accept, or None for fields that are left alone."""
    allowed, default = kinds(hint), getattr(family.config_class, name, None)
    options: list[st.SearchStrategy[Any]] = []
    if bool in allowed:
        options.append(st.booleans())
    elif float in allowed:
        high = 0.6 if "dropout" in name or name.endswith("_drop") else 2.0
        options.append(st.sampled_from([0.0, 0.1, 0.5, high, 1.0 if high > 1 else 0.25]))
    elif int in allowed:
        options.append(st.integers(0, 60) if name.endswith("_token_id") else st.sampled_from([1, 2, 3, 4, 8, 16]))
    if str in allowed and (found := choices(family, name)):
        options.append(st.sampled_from(found))
    if type(None) in allowed and options and default is None:
        options.append(st.none())
    return st.one_of(options) if options else None


def plausible_fields(family: Family) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of a few changed fields on top of the tiny config."""
    found = {
        name: plausible(family, name, hint)
        for name, hint in own_fields(family).items()
        if not name.endswith("vocab_size")
    }
    known = {name: strategy for name, strategy in found.items() if strategy is not None and name != "backend"}
    changes = st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4, unique=True)
    return changes.flatmap(lambda names: st.fixed_dictionaries({name: known[name] for name in names}))


def impossible(name: str, hint: Any) -> list[Any]:
    """Return values that a field must refuse: another type, or out of any range it may have."""
    allowed = kinds(hint)
    wrong: list[Any] = [object(), {"a": 1}, b"bytes"][:: 2 if dict in allowed else 1]
    if str not in allowed:
        wrong.append("many")
    elif not name.endswith(("_path", "_name", "_text")):
        wrong.append("no such choice")
    if bool in allowed:
        return [*wrong, "true", 2]
    if list not in allowed:
        wrong.append([[1]])
    if int in allowed and name.endswith(("_size", "_layers", "_heads", "_labels")):
        wrong += [0, -1, *HUGE]
    if int in allowed and float not in allowed:
        wrong += [-5, 1.5, *HUGE[1:], *NOT_A_NUMBER]
    if float in allowed:
        wrong += [*HUGE[1:], *NOT_A_NUMBER]
    if "dropout" in name:
        wrong += [-0.5, 1.0, 1]
    if type(None) not in allowed:
        wrong.append(None)
    return wrong


def impossible_fields(family: Family) -> list[tuple[str, Any]]:
    """Return every (field, value) that a family's config must refuse."""
    found = [(name, value) for name, hint in own_fields(family).items() for value in impossible(name, hint)]
    return [*found, ("num_labels", 10**12), ("num_labels", 0)]
