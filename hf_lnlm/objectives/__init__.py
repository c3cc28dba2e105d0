"""Objectives: what is learnt. `objective("masked", rate=0.2)` builds one; `OBJECTIVES` lists them by name."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from .base import Objective
from .causal import CausalObjective
from .masked import MaskedObjective
from .replaced_token import ReplacedTokenObjective
from .span import SpanObjective

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind for kind in (CausalObjective, MaskedObjective, SpanObjective, ReplacedTokenObjective)
}
"""Name → class; a new objective is one file and one entry."""

__all__ = ["OBJECTIVES", "Objective", "objective"]


def objective(name: str, **options: Any) -> Objective:
    """Builds an objective by name.

    Args:
        name: A key of `OBJECTIVES`.
        options: Fields of the objective's class.

    Raises:
        ValueError: An unknown name or option; names the known ones.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}{_hint(name, OBJECTIVES)}")
    known = [field.name for field in fields(OBJECTIVES[name])]
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "no options"
            raise ValueError(f"objective {name!r} has {listed}, got {option!r}{_hint(option, known)}")
    return OBJECTIVES[name](**options)


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
