"""One line where a run has learnt nothing: it answers no better than the commonest class, or equal odds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..objectives.base import IGNORED
from .output import warn

NEAR = 0.01
"""Accuracy, or share of the loss of equal odds, by which a run must be better than chance."""


def tell_chance(metrics: Mapping[str, float], setup: Any) -> str | None:
    """Say that a run ended at chance, if it did; returns the line.

    Args:
        metrics: of the validation data, such as `accuracy`, or `loss` in nats a token.
        setup: of the run, see `flows.run.TrainingSetup`.
    """
    labelled = getattr(setup.objective, "labelled", False)
    line = _of_labels(metrics, setup) if labelled else _of_text(metrics, setup)
    if line is not None:
        warn(f"the run ended at chance: {line}; try another learning rate, more steps or more data")
    return line


def _of_labels(metrics: Mapping[str, float], setup: Any) -> str | None:
    """Accuracy of single labels against the share of the commonest class in the validation rows."""
    rows = getattr(setup.validation, "rows", None)
    labels: Counter[int] = Counter()
    for row in rows if rows is not None and "accuracy" in metrics else ():
        given = row.get("labels")
        values = given if isinstance(given, list) else [given]
        labels.update(value for value in values if type(value) is int and value != IGNORED)
    if len(labels) < 2:
        return None
    share = max(labels.values()) / labels.total()
    if metrics["accuracy"] > share + NEAR:
        return None
    return f"accuracy {metrics['accuracy']:.3f}, and the commonest class alone makes {share:.3f}"


def _of_text(metrics: Mapping[str, float], setup: Any) -> str | None:
    """Loss a token against that of equal odds over the vocabulary."""
    size = getattr(setup.model.config, "vocab_size", None)
    plain = getattr(setup.objective, "name", None) in ("causal", "masked")
    if not (plain and isinstance(size, int) and size > 1 and "loss" in metrics):
        return None
    equal = math.log(size)
    return f"loss {metrics['loss']:.3f}, equal odds are {equal:.3f}" if metrics["loss"] > equal * (1 - NEAR) else None
