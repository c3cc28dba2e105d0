"""Classes: their weights in the loss, what is counted of their predictions, and the entities that tags make up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import Row
from ..errors import UsageProblem, did_you_mean
from ..objectives.base import IGNORED
from .base import ClassWeights

_ENTITY_TAG = re.compile(r"O|[BIES]-.+")
Entity = tuple[str, int, int]


def confusion_matrix(predicted: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Counts `(classes, classes)`, float64: row = label, column = prediction; `predicted` and `wanted` are `(items,)`."""
    return torch.bincount(wanted * classes + predicted, minlength=classes * classes).view(classes, classes).double()


def class_metrics(confusion: Tensor) -> dict[str, float]:
    """Accuracy and macro F1 of a confusion matrix `(classes, classes)`; classes that don't occur are left out."""
    right = confusion.diagonal()
    total = confusion.sum(0) + confusion.sum(1)
    occurring = total > 0
    f1 = (2 * right[occurring] / total[occurring]).mean()
    return {"accuracy": float(right.sum() / confusion.sum()), "macro_f1": float(f1)}


def class_weights(wanted: ClassWeights, names: Sequence[str], rows: Sequence[Row]) -> tuple[float, ...]:
    """One weight a class, 1 on average over the labels of the training rows, so that the learning rate keeps its meaning.

    Args:
        wanted: `balanced` (labels / (classes * labels of the class), scikit-learn's rule) or weights by class name;
            classes that are not named weigh 1 before the average is taken.
        names: the classes in the order of their ids.
        rows: encoded training rows with `labels`.

    Raises:
        UsageProblem: an unknown word or class, or a weight that is not positive.
    """
    labels = np.concatenate([np.atleast_1d(row["labels"]) for row in rows])
    counts = np.bincount(labels[labels != IGNORED], minlength=len(names))
    if wanted == "balanced":
        weights = 1 / np.maximum(counts, 1)
    elif isinstance(wanted, Mapping):
        weights = np.array([wanted.get(name, 1.0) for name in names], float)
        _check_weights(wanted, names)
    else:
        raise UsageProblem(f"objective.class_weights must be `balanced` or a weight for each class, got {wanted!r}")
    return tuple((weights * counts.sum() / (weights * counts).sum()).tolist())


def _check_weights(wanted: Mapping[str, float], names: Sequence[str]) -> None:
    for name, weight in wanted.items():
        if name not in names:
            raise UsageProblem(f"objective.class_weights: no class {name!r}{did_you_mean(name, names)}")
        if not weight > 0:
            raise UsageProblem(f"objective.class_weights.{name} must be above 0, got {weight}")


@dataclass(frozen=True)
class WeightedLoss:
    """Cross-entropy with a weight for each class, as Trainer's `compute_loss_func`.

    The sum is divided by the number of labels, not by their weights: then a batch accumulated in parts has exactly the
    loss of the whole, and since the weights are 1 on average the two agree in expectation.

    Args:
        weights: one a class.
    """

    weights: tuple[float, ...]

    def __call__(self, outputs: Mapping[str, Any], labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Loss, 0-dimensional.

        Args:
            outputs: the model's, with `logits` `[…, classes]`.
            labels: `[…]` class ids, −100 where nothing is predicted.
            num_items_in_batch: labels of the whole accumulated batch; None counts those given.
        """
        logits = outputs["logits"].float()
        labels = labels.to(logits.device).reshape(-1)
        weight = torch.tensor(self.weights, device=logits.device, dtype=logits.dtype)
        total = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels, weight, ignore_index=IGNORED, reduction="sum"
        )
        return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def entity_kinds(names: Sequence[str]) -> list[str]:
    """Kinds of entities among tags written as IOB or IOBES (`B-place`, `I-place`, `O`); empty for any other tags."""
    if not all(_ENTITY_TAG.fullmatch(name) for name in names):
        return []
    return sorted({name.partition("-")[2] for name in names} - {""})


def entities(tags: Sequence[str]) -> set[Entity]:
    """Entities of one row as (kind, first word, word after the last), by the rules of the CoNLL evaluation.

    An `I-` or `E-` without a beginning, or of another kind than its beginning, begins an entity of its own.
    """
    found: set[Entity] = set()
    begun, before, kind = None, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, now = tag.partition("-")
        fresh = prefix in "BSO" or before in "ESO" or now != kind
        if begun is not None and fresh:
            found.add((kind, begun, place))
            begun = None
        if prefix != "O" and fresh:
            begun = place
        before, kind = prefix, now
    return found


def entity_counts(predicted: Sequence[str], wanted: Sequence[str], kinds: Sequence[str]) -> Tensor:
    """Counts `(kinds, 3)` of one row, float64: right, predicted and wanted entities."""
    counts = np.zeros((len(kinds), 3))
    guesses, facts = entities(predicted), entities(wanted)
    for column, group in enumerate((guesses & facts, guesses, facts)):
        for kind, _, _ in group:
            counts[kinds.index(kind), column] += 1
    return torch.from_numpy(counts)


def entity_metrics(counts: Tensor) -> dict[str, float]:
    """Micro-averaged `precision`, `recall` and `f1` of counts `(kinds, 3)`; 0 where there is nothing to divide by."""
    right, predicted, wanted = (float(value) for value in counts.sum(0))
    return {
        "precision": right / max(predicted, 1.0),
        "recall": right / max(wanted, 1.0),
        "f1": 2 * right / max(predicted + wanted, 1.0),
    }
