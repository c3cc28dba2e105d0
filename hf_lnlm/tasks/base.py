"""What a task with labels is, and what several tasks share.

A task is an objective (its fields are its options) that turns rows with labels into token ids.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import Row
from ..data.readers import Record
from ..data.section import DataSection
from ..objectives.base import IGNORED, BaseObjective, Batch, pad_id, pad_rows, require_labels

ClassWeights = str | dict[str, float] | None
"""`balanced`, or a weight for each class; None for equal ones."""


@dataclass(frozen=True)
class Task(BaseObjective):
    """Base of the tasks; `classes` are the names of the classes in the order of their ids, once `bound` to a model."""

    labelled: ClassVar[bool] = True
    language: ClassVar[bool] = False
    problem_type: ClassVar[str | None] = None
    """What a sequence classifier's loss is, as transformers' configs say it; None for other heads."""
    unanswered: ClassVar[Any] = ""
    """What stands in a row for the answer that is asked for."""

    classes: tuple[str, ...] = field(default=(), init=False)
    only: bool = field(default=True, init=False)

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

    def columns(self, data: DataSection) -> list[str]:
        """Columns that every row must have, by the names that the recipe gives them."""
        return list(self.cells(data))

    def reading(self, classes: Sequence[str], only: bool) -> Self:
        """The task that reads rows knowing classes: its only ones in training, some of them where it is measured."""
        return self._with(classes=tuple(classes), only=only)

    @abstractmethod
    def cells(self, data: DataSection) -> dict[str, Callable[[Any], Any]]:
        """The columns that every row must have, by the recipe's names, each with what reads its cells (`data.cells`)."""

    def read(self, row: Row, data: DataSection) -> Row:
        """A row with its cells as what they mean.

        Raises:
            ValueError: a column is missing or holds something else; names it.
        """
        return self._read(row, self.cells(data))

    def _read(self, row: Row, cells: Mapping[str, Callable[[Any], Any]]) -> Row:
        found = dict(row)
        for column, read in cells.items():
            if column not in row:
                raise ValueError(f"no column {column!r}; its columns are {', '.join(map(str, row)) or 'none'}")
            try:
                found[column] = read(row[column])
            except ValueError as error:
                raise ValueError(f"column {column!r} {error}") from None
        return found

    def inputs(self, data: DataSection) -> dict[str, Callable[[Any], Any]]:
        """The columns of `cells` that a row must have where its answer is asked for."""
        return {column: read for column, read in self.cells(data).items() if column != self.label_column(data)}

    def read_inputs(self, row: Row, data: DataSection) -> Row:
        """A row whose answer is asked for; what it may hold as an answer is not read.

        Raises:
            ValueError: a column is missing or holds something else; names it.
        """
        return self._read(row, self.inputs(data)) | {self.label_column(data): self.unanswered}

    def outliers(self, rows: Sequence[Row], data: DataSection) -> dict[int, str]:
        """Rows that are bad only beside the others: index → what is wrong; most tasks have none."""
        return {}

    def notes(self, rows: Sequence[Row], data: DataSection) -> list[str]:
        """What was mended in rows, in words."""
        return []

    def labels(self, rows: Sequence[Row], data: DataSection) -> Iterator[str]:
        """The classes that `rows` hold, as often as they hold them; none for a task without classes."""
        return iter(())

    def label_column(self, data: DataSection) -> str:
        """The column that holds the classes."""
        return data.label_column

    def head_fields(self, names: Sequence[str]) -> dict[str, Any]:
        """The config fields of a head for these classes; none for a head without classes."""
        kind = {"problem_type": self.problem_type} if self.problem_type else {}
        if not names:
            return kind
        ids = dict(enumerate(names))
        return {"num_labels": len(names), "id2label": ids, "label2id": {n: i for i, n in ids.items()}} | kind

    def texts(self, rows: Sequence[Row], data: DataSection) -> Iterator[str]:
        """All text of rows that were read, for building a tokenizer."""
        columns = [column for column in self.cells(data) if column != self.label_column(data)]
        return (" ".join(row[c]) if isinstance(row[c], list) else row[c] for row in rows for c in columns)

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows as token ids, for training.

        Args:
            rows: as `read` gave them.
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

    def encode_inputs(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows whose answers are asked for as token ids, one for each; see `encode`."""
        return self.encode_held(rows, data, tokenizer, config, length)

    def predictions(self, logits: Tensor, encoded: Sequence[Row]) -> list[dict[str, Any]]:
        """What a model says of rows.

        Args:
            logits: as `sums` takes them.
            encoded: the batch's rows, as `encode_inputs` gave them.

        Returns:
            For each row plain values by name: `label` and `scores`, `tags`, `answer` …; probabilities are rounded to
            six places.
        """
        raise NotImplementedError(f"{self.name} writes its answers")

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function from encoded rows to a batch padded on the right; nothing in it is random."""
        return LabelledCollator(tokenizer, bookkeeping)

    def weighted(self, rows: Sequence[Row]) -> Self:
        """The task with the weights of its classes, from encoded training rows; itself where it has none."""
        return self

    def measuring(self, rows: Sequence[Row]) -> Self:
        """The task with what it must know of the encoded rows that it will be measured on; most need nothing."""
        return self


@dataclass(frozen=True)
class LabelledCollator:
    """Pads `input_ids`, `token_type_ids` and (where it is a list of ids) `labels` on the right.

    Args:
        tokenizer: gives the pad token's id.
        bookkeeping: adds `example`, the number of each row, and `strange`, ids of labels that the model has no class for.
        strange: names of those labels → ids behind the model's own.
    """

    tokenizer: Any
    bookkeeping: bool = False
    strange: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch: integers `(batch, tokens)`, class labels `(batch,)`."""
        batch = padded_inputs(rows, self.tokenizer)
        labels = [row["labels"] for row in rows]
        if isinstance(labels[0], list) and not (labels[0] and isinstance(labels[0][0], float)):
            batch["labels"] = torch.from_numpy(pad_rows(labels, IGNORED))
            if not self.strange:
                require_labels(batch["labels"].numpy(), batch["labels"].numel(), "no word of them has a token")
        else:
            batch["labels"] = torch.tensor(labels)
        if self.bookkeeping and "number" in rows[0]:
            batch["example"] = torch.tensor([row["number"] for row in rows])
        return batch | self._strange(rows) if self.bookkeeping and self.strange else batch

    def _strange(self, rows: Sequence[Row]) -> Batch:
        names = [row.get("strange", "") for row in rows]
        if isinstance(rows[0]["labels"], int):
            return {"strange": torch.tensor([self.strange.get(name, IGNORED) for name in names])}
        if isinstance(rows[0]["labels"][0], float):
            return {"strange": torch.tensor([[float(name in found) for name in self.strange] for found in names])}
        ids = [[self.strange.get(n, IGNORED) for n in row.get("strange", ("",) * len(row["labels"]))] for row in rows]
        return {"strange": torch.from_numpy(pad_rows(ids, IGNORED))}


def padded_inputs(rows: Sequence[Row], tokenizer: Any) -> Batch:
    """`input_ids`, `attention_mask` and, where rows have them, `token_type_ids`, each `(batch, longest)`."""
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


def probabilities(logits: Tensor) -> list[Any]:
    """Softmax over the last dimension as nested lists, computed in float64, six places."""
    return logits.detach().double().softmax(-1).cpu().numpy().round(6).tolist()


def tells_texts_apart(config: Any) -> bool:
    """Whether a model has an embedding for the second text of a pair."""
    return getattr(config, "type_vocab_size", 0) > 1


def label_id(name: str, config: Any) -> int | None:
    """The id of a class, None if the model has none of that name; its number where the model's classes have no names."""
    known = config.label2id
    found = known.get(name, known.get(f"LABEL_{name}"))
    return None if found is None else int(found)


def place_of(row: Row, number: int) -> str:
    """Where a row stands, or its number where it doesn't know."""
    return str(row.place) if isinstance(row, Record) else f"row {number}"


def summed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats, float64; `logits` `(items, classes)`, `labels` `(items,)`."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()
