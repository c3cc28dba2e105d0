"""Objectives: what is learnt. `objective("masked", rate=0.2)` builds one; `OBJECTIVES` lists them by name."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from .base import Objective
from .bidirectional import BidirectionalObjective
from .bidirectional_model import BidirectionalForPreTraining
from .causal import CausalObjective
from .masked import MaskedObjective
from .next_sentence import NextSentenceObjective
from .permutation import PermutationObjective
from .replaced_token import ReplacedTokenObjective
from .replaced_token_model import ReplacedTokenForPreTraining
from .sentence_order import SentenceOrderObjective
from .sentence_pair_model import SentencePairForPreTraining
from .span import SpanObjective

_KINDS = (
    *(CausalObjective, MaskedObjective, SpanObjective, ReplacedTokenObjective, PermutationObjective),
    *(SentenceOrderObjective, NextSentenceObjective, BidirectionalObjective),
)
OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in _KINDS}
"""Name → class; a new objective is one file and one entry."""

__all__ = [
    "OBJECTIVES", "BidirectionalForPreTraining", "Objective", "ReplacedTokenForPreTraining", "SentencePairForPreTraining",
    "objective", "table",
]  # fmt: skip


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


def table() -> str:
    """The table of objectives and families in Markdown, from the registry and the stock families that are covered.

    A mark says that the family learns the objective, in one of its reading directions.
    """
    from ..registry import FAMILIES
    from .families import STOCK, stock_config, variants

    kinds = {row.model_type: variants(row) for row in FAMILIES} | {name: [stock_config(name)] for name in STOCK}
    lines = ["| | " + " | ".join(f"`{name}`" for name in OBJECTIVES) + " |", "|---" * (len(OBJECTIVES) + 1) + "|"]
    for name, configs in kinds.items():
        marks = ["✓" if any(kind.fits(config) for config in configs) else "" for kind in OBJECTIVES.values()]
        if any(marks):
            lines.append(f"| `{name}` | " + " | ".join(marks) + " |")
    return "\n".join(lines)
