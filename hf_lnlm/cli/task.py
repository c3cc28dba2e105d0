"""What a task with labels is, and what several tasks share.

A task has the same outside as an objective (`auto_class`, `collator`, `sums`, `summary`; its fields are its options),
and besides it turns rows with labels into token ids.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import Row
from ..objectives.base import IGNORED, Batch, pad_id, pad_rows, require_labels
from .recipe import DataSection

ClassWeights = str | dict[str, float] | None
"""`balanced`, or a weight for each class; None for equal ones."""


@dataclass(frozen=True)
class Task(ABC):
    """Base of the tasks.

    Class attributes: `name`, `title`; `auto_class`, the Auto class that learns it; `lora_type`, peft's name for it;
    `language`, whether the exponential of its loss is a perplexity.
    `classes` are the names of the classes in the order of their ids, once `bound` to a model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    auto_class: ClassVar[str]
    lora_type: ClassVar[str]
    language: ClassVar[bool] = False

    classes: tuple[str, ...] = field(default=(), init=False)

    def bound(self, config: Any) -> Self:
        """The task with the names of the classes that a model's config gives."""
        names = getattr(config, "id2label", None) or {}
        return self._with(classes=tuple(names[number] for number in sorted(names)))

    def _with(self, **values: Any) -> Self:
        """A copy with other values of fields that are no options."""
        changed = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(changed, name, value)
        return changed

    @abstractmethod
    def columns(self, data: DataSection) -> list[str]:
        """Columns that every row must have, by the names that the recipe gives them."""

    def labels(self, rows: Sequence[Row], data: DataSection) -> list[str]:
        """Class names found in `rows`, in the order of their ids; empty for a task without classes."""
        return []

    def texts(self, rows: Sequence[Row], data: DataSection) -> Iterator[str]:
        """All text of `rows`, for building a tokenizer."""
        columns = [column for column in self.columns(data) if column not in (data.label_column, data.tags_column)]
        return (
            " ".join(words_of(row[column])) if is_list(row[column]) else str(row[column])
            for row in rows
            for column in columns
        )

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows as token ids, for training.

        Args:
            rows: as read.
            data: names of the columns.
            tokenizer: a fast tokenizer.
            config: the model's, with its label map.
            length: most tokens of a row.

        Returns:
            Encoded rows (`input_ids`, `labels`, …), and how many had to be cut.

        Raises:
            ValueError: naming the row and what is wrong with it.
        """

    def encode_held(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows as token ids, for measuring; as for training unless a task says otherwise."""
        return self.encode(rows, data, tokenizer, config, length)

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function from encoded rows to a batch padded on the right; nothing in it is random."""
        return LabelledCollator(tokenizer, bookkeeping)

    def weighted(self, rows: Sequence[Row]) -> Self:
        """The task with the weights of its classes, from encoded training rows; itself where it has none."""
        return self

    def measuring(self, rows: Sequence[Row]) -> Self:
        """The task with what it must know of the encoded rows that it will be measured on; most need nothing."""
        return self

    def loss_function(self) -> Callable[..., Tensor] | None:
        """What replaces the model's own loss, as Trainer's `compute_loss_func`; None keeps the model's."""
        return None

    def generation(self) -> dict[str, Any]:
        """Arguments of Seq2SeqTrainer where evaluation writes texts; empty where it does not."""
        return {}

    def rater(self, tokenizer: Any) -> Callable[[Any], dict[str, float]] | None:
        """Trainer's `compute_metrics` for what was written; None where nothing is."""
        return None

    def logits(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """What is measured of a model's outputs."""
        return outputs.get("logits")

    @abstractmethod
    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the metrics; tensors that are added over batches.

        Args:
            logits: `[batch, classes]` or `[batch, tokens, classes]`.
            batch: the collator's.
        """

    @abstractmethod
    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of added-up sums."""


@dataclass(frozen=True)
class LabelledCollator:
    """Pads `input_ids`, `token_type_ids` and (where it is a list) `labels` on the right.

    Args:
        tokenizer: gives the pad token's id.
        bookkeeping: unused; an objective's collator has it.
    """

    tokenizer: Any
    bookkeeping: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch: integers `[batch, tokens]`, class labels `[batch]`."""
        batch = padded_inputs(rows, self.tokenizer)
        if isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        else:
            batch["labels"] = torch.from_numpy(pad_rows([row["labels"] for row in rows], IGNORED))
            require_labels(batch["labels"].numpy(), batch["labels"].numel(), "no word of them has a token")
        return batch


def padded_inputs(rows: Sequence[Row], tokenizer: Any) -> Batch:
    """`input_ids`, `attention_mask` and, where rows have them, `token_type_ids`, each `[batch, longest]`."""
    lengths = [len(row["input_ids"]) for row in rows]
    uneven = len(set(lengths)) > 1
    ids = pad_rows([row["input_ids"] for row in rows], pad_id(tokenizer, uneven))
    batch = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(pad_rows([np.ones(length, int) for length in lengths], 0)),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = torch.from_numpy(pad_rows([row["token_type_ids"] for row in rows], 0))
    return batch


def tells_texts_apart(config: Any) -> bool:
    """Whether a model has an embedding for the second text of a pair."""
    return getattr(config, "type_vocab_size", 0) > 1


def label_id(value: Any, config: Any, number: int) -> int:
    """The id of a class.

    Raises:
        ValueError: the training rows had no such class; names the row.
    """
    known = config.label2id
    if str(value) not in known:
        raise ValueError(f"row {number}: label {str(value)!r} is none of the training labels: {', '.join(known)}")
    return int(known[str(value)])


def is_list(value: Any) -> bool:
    """Whether a value is a list rather than text."""
    return not isinstance(value, str) and hasattr(value, "__iter__")


def words_of(value: Any) -> list[str]:
    """A list of words from a list, or from text with spaces (CSV has no lists)."""
    return value.split() if isinstance(value, str) else [str(item) for item in value]


def summed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats, float64; `logits` `[items, classes]`, `labels` `[items]`."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()
