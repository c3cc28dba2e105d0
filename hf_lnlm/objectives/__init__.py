"""Objectives: what is learnt. `objective("masked", rate=0.2)` builds one; `OBJECTIVES` lists them by name."""

from __future__ import annotations

from typing import Any

from .base import BaseObjective, Objective, built
from .bidirectional import BidirectionalObjective
from .causal import CausalObjective
from .denoising import DenoisingObjective
from .masked import MaskedObjective
from .next_sentence import NextSentenceObjective
from .permutation import PermutationObjective
from .replaced_token import ReplacedTokenObjective
from .sentence_order import SentenceOrderObjective
from .span import SpanObjective

_KINDS = (
    *(CausalObjective, MaskedObjective, SpanObjective, DenoisingObjective, ReplacedTokenObjective),
    *(PermutationObjective, SentenceOrderObjective, NextSentenceObjective, BidirectionalObjective),
)
OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in _KINDS}
"""Name → class; a new objective is one file and one entry."""

__all__ = ["OBJECTIVES", "BaseObjective", "Objective", "objective", "table"]


def objective(name: str, **options: Any) -> Objective:
    """Build an objective by name.

    Args:
        name: A key of `OBJECTIVES`.
        options: Fields of the objective's class.

    Raises:
        ValueError: An unknown name or option; names the known ones.

    >>> objective("masked", rate=0.2).rate
    0.2
    """
    return built(OBJECTIVES, "objective", name, options)


def table() -> str:
    """The table of objectives and families in Markdown, from the registry and the stock families that are covered.

    A mark says that the family learns the objective, in one of its reading directions. Families with the same marks share
    a row; those without any, which learn from labels alone, have the last.
    """
    from ..registry import FAMILIES
    from .families import STOCK, stock_config, variants

    kinds = {row.model_type: variants(row) for row in FAMILIES} | {name: [stock_config(name)] for name in STOCK}
    lines = ["| | " + " | ".join(f"`{name}`" for name in OBJECTIVES) + " |", "|---" * (len(OBJECTIVES) + 1) + "|"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, configs in kinds.items():
        fits = (any(kind.fits(config) for config in configs) for kind in OBJECTIVES.values())
        rows.setdefault(tuple("✓" if fit else "" for fit in fits), []).append(f"`{name}`")
    for marks in sorted(rows, key=lambda marks: not any(marks)):
        lines.append(f"| {', '.join(rows[marks])} | {' | '.join(marks)} |")
    return "\n".join(lines)
