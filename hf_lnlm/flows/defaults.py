"""What a run does where the user says nothing: one table of defaults by family and kind of learning.

Rates and tokenizers at size `tiny` are, where a row says that it is measured, those that did best on a part held out of the
training file (`python -m tests.learning.defaults`, kept in `model_cards/results/defaults.json`). For `small` and `base`,
which are unmeasured, a rate is `tiny`'s times the ratio of the sizes' general rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..registry import FAMILIES
from .recipe import Recipe
from .sizes import SIZES

KINDS = {
    "causal": "causal",
    "masked": "masked",
    "sequence_classification": "classification",
    "token_classification": "tagging",
}
"""Objective or task → the kind of learning that the table goes by."""


@dataclass(frozen=True)
class Default:
    """One row of the table, for a model from scratch.

    Attributes:
        learning_rate: at size `tiny`.
        tokenizer: kind of a new tokenizer.
        epochs: at most; labelled rows only.
        batch_size: rows.
        measured: whether the rate is the best of a committed sweep.
    """

    learning_rate: float
    tokenizer: str = "bpe"
    epochs: float = 8.0
    batch_size: int = 16
    measured: bool = False


TABLE = {(row.model_type, kind): Default(**given) for row in FAMILIES for kind, given in row.defaults.items()}
"""Family and kind of learning → what is taken, from the families' rows; others take the size's general values."""

BEST: dict[str, Any] = {
    "load_best_model_at_end": True,
    "early_stopping_patience": 3,
    "eval_steps": 0.1,
    "save_steps": 0.1,
}
"""Of fine-tuning: stop after three evaluations without a better one, and keep the best."""

_SCHEDULED = ("max_steps", "eval_steps", "save_steps", "eval_strategy", "save_strategy", "num_train_epochs", *BEST)

LORA_RATE, LORA_WARM_UP = 2e-3, 0.1
"""Adapters: their rate, and the share of steps over which it rises."""


def default_of(recipe: Recipe) -> Default | None:
    """The table's row for a model from scratch; None for a checkpoint, another objective or an unlisted family."""
    kind = KINDS.get(str(recipe.objective.name))
    return None if recipe.model.family is None or kind is None else TABLE.get((recipe.model.family, kind))


def learning_rate(recipe: Recipe) -> float:
    """Rate of a model from scratch: the table's, scaled by size, or the size's own."""
    rate, tiny = (float(SIZES[size].training["learning_rate"]) for size in (recipe.model.size or "tiny", "tiny"))
    row = default_of(recipe)
    return rate if row is None else row.learning_rate * rate / tiny


def tokenizer_kind(recipe: Recipe) -> str:
    """Kind of a new tokenizer."""
    row = default_of(recipe)
    return "bpe" if row is None else row.tokenizer


def keeps_best(recipe: Recipe, metric: str) -> dict[str, Any]:
    """Training arguments by which fine-tuning stops when it no longer improves; none where the recipe has its own plan.

    A recipe that says how long to train, or when to measure or save, is taken at its word.

    Args:
        recipe: before its defaults are filled in.
        metric: what is to improve.
    """
    if recipe.data.validation == 0 or any(name in recipe.training for name in _SCHEDULED):
        return {}
    return BEST | {"metric_for_best_model": metric}
