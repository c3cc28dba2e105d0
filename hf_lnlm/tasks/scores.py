"""What a text gets other than one class: a number (regression), or any number of classes (multi-label)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..data.cells import classes_cell, number_cell
from ..data.labelled import Row
from ..data.section import DataSection
from .base import label_id
from .classification import NamedClasses, TextTask
from .classification_metrics import entity_metrics


def _counted(batch: Mapping[str, Tensor]) -> Tensor:
    """Rows that don't merely fill up a process's last batch, `(batch,)`."""
    example = batch.get("example")
    return torch.ones(len(batch["labels"]), dtype=torch.bool) if example is None else example.cpu() >= 0


@dataclass(frozen=True)
class Regression(TextTask):
    """A number for a text or a pair of texts, learnt by squared error."""

    name: ClassVar[str] = "regression"
    title: ClassVar[str] = "Number for a text"
    problem_type: ClassVar[str] = "regression"
    unanswered: ClassVar[Any] = 0.0

    measured: int = field(default=0, init=False)

    def label_cell(self, value: Any) -> float:
        """A finite number."""
        return number_cell(value)

    def target(self, label: float, config: Any) -> tuple[float, None]:
        """The number."""
        return label, None

    def head_fields(self, names: Sequence[str]) -> dict[str, Any]:
        """The config fields of a head with one output."""
        return {"num_labels": 1, "problem_type": self.problem_type}

    def predictions(self, logits: Tensor, encoded: Sequence[Row]) -> list[dict[str, Any]]:
        """`value`, the number; `logits` is `(batch, 1)`."""
        return [{"value": value} for value in logits.reshape(-1).float().tolist()]

    def measuring(self, rows: Sequence[Row]) -> Self:
        """The task with the number of rows that it will be measured on."""
        return self._with(measured=len(rows))

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Prediction, number and whether they are known of every measured row, `(rows, 3)`: ranks need all of them.

        Args:
            logits: `(batch, 1)`.
            batch: the collator's, with `example`.
        """
        counted = _counted(batch)
        pairs = torch.stack([logits.reshape(-1), batch["labels"].reshape(-1), torch.ones_like(logits).reshape(-1)], -1)
        table = torch.zeros(self.measured, 3, dtype=torch.float64)
        table[batch["example"].cpu()[counted]] = pairs.detach().cpu().double()[counted]
        return {"table": table.to(logits.device)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (mean squared error), `rmse`, Pearson's and Spearman's correlation (0 where either side is constant)."""
        table = sums["table"].cpu().numpy()
        guesses, facts = table[table[:, 2] > 0, :2].T
        error = float(np.mean((guesses - facts) ** 2))
        ranked = correlation(ranks(guesses), ranks(facts))
        return {"loss": error, "rmse": error**0.5, "pearson": correlation(guesses, facts), "spearman": ranked}


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two arrays `(rows,)`; 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of values `(rows,)`; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


@dataclass(frozen=True)
class MultiLabelClassification(NamedClasses, TextTask):
    """Any number of classes for a text or a pair of texts, each told from its own logit."""

    name: ClassVar[str] = "multi_label_classification"
    title: ClassVar[str] = "Classes of a text"
    problem_type: ClassVar[str] = "multi_label_classification"
    unanswered: ClassVar[Any] = ()

    def label_cell(self, value: Any) -> list[str]:
        """Classes, perhaps none."""
        return classes_cell(value, self.classes, self.only)

    def labels(self, rows: Sequence[Row], data: DataSection) -> Iterator[str]:
        """Classes of all lists."""
        return (name for row in rows for name in row[data.label_column])

    def target(self, label: list[str], config: Any) -> tuple[list[float], tuple[str, ...]]:
        """One for each class of the row, zero for the others."""
        ids = {label_id(name, config) for name in label}
        strange = tuple(name for name in label if label_id(name, config) is None)
        return [float(number in ids) for number in range(config.num_labels)], strange

    def predictions(self, logits: Tensor, encoded: Sequence[Row]) -> list[dict[str, Any]]:
        """`labels`, those above one half, and `scores` (a probability each) by class; `logits` is `(batch, classes)`."""
        shares = logits.detach().double().sigmoid().cpu().numpy().round(6).tolist()
        return [
            {"labels": [name for name, held in zip(self.classes, mine) if held], "scores": dict(zip(self.classes, row))}
            for mine, row in zip((logits > 0).tolist(), shares)
        ]

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll (nats), rows, rows without an error, and counts `(classes, 3)`: right, predicted and wanted.

        Args:
            logits: `(batch, classes)`.
            batch: the collator's.
        """
        counted = _counted(batch).to(logits.device)
        logits, wanted = logits[counted].float(), batch["labels"].to(logits.device)[counted].float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        guesses = (logits > 0).double()
        if (strange := batch.get("strange")) is not None:
            unreached = strange.to(logits.device)[counted].float()
            guesses, wanted = (torch.cat(pair, -1) for pair in ((guesses, unreached * 0), (wanted, unreached)))
        counts = torch.stack([(guesses * wanted).sum(0), guesses.sum(0), wanted.double().sum(0)], -1)
        right = (guesses == wanted).all(-1).double().sum()
        return {"nll": loss.double().sum(), "rows": counted.sum().double(), "right": right, "counts": counts}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a decision), `accuracy` (rows without an error), `micro_f1` and `macro_f1` over classes."""
        counts = sums["counts"]
        right, predicted, wanted = counts.unbind(-1)
        f1 = 2 * right / (predicted + wanted).clamp(min=1)
        return {
            "loss": float(sums["nll"] / (sums["rows"] * (len(counts) - len(self.strange)))),
            "accuracy": float(sums["right"] / sums["rows"]),
            "micro_f1": entity_metrics(counts)["f1"],
            "macro_f1": float(f1.mean()),
        }
