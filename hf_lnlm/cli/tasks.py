"""Tasks with labels that `finetune` and `evaluate` know; a new one is a class here and a row of `TASKS`.

A task has the same outside as an objective (`auto_class`, `collator`, `sums`, `summary`; its fields are its options),
and besides it turns rows with labels into token ids.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import Row, label_names
from ..objectives.base import IGNORED, Batch, pad_id, pad_rows, require_labels
from .recipe import DataSection


@dataclass(frozen=True)
class Task(ABC):
    """Base of the tasks.

    Class attributes: `name`, `title`; `auto_class`, the Auto class that learns it; `lora_type`, peft's name for it;
    `language`, whether the exponential of its loss is a perplexity.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    auto_class: ClassVar[str]
    lora_type: ClassVar[str]
    language: ClassVar[bool] = False

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
            " ".join(_words(row[column])) if _is_list(row[column]) else str(row[column])
            for row in rows
            for column in columns
        )

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows as token ids.

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

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function from encoded rows to a batch padded on the right; nothing in it is random."""
        return LabelledCollator(tokenizer, bookkeeping)

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
        lengths = [len(row["input_ids"]) for row in rows]
        uneven = len(set(lengths)) > 1
        ids = pad_rows([row["input_ids"] for row in rows], pad_id(self.tokenizer, uneven))
        batch = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(pad_rows([np.ones(length, int) for length in lengths], 0)),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = torch.from_numpy(pad_rows([row["token_type_ids"] for row in rows], 0))
        if isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        else:
            batch["labels"] = torch.from_numpy(pad_rows([row["labels"] for row in rows], IGNORED))
            require_labels(batch["labels"].numpy(), batch["labels"].numel(), "no word of them has a token")
        return batch


def _confusion(predicted: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Counts `[classes, classes]`: row = label, column = prediction."""
    return torch.bincount(wanted * classes + predicted, minlength=classes * classes).view(classes, classes).double()


def _class_metrics(confusion: Tensor) -> dict[str, float]:
    """Accuracy and macro F1 of a confusion matrix `[classes, classes]`; classes that don't occur are left out."""
    right = confusion.diagonal()
    total = confusion.sum(0) + confusion.sum(1)
    occurring = total > 0
    f1 = (2 * right[occurring] / total[occurring]).mean()
    return {"accuracy": float(right.sum() / confusion.sum()), "macro_f1": float(f1)}


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()


@dataclass(frozen=True)
class SequenceClassification(Task):
    """One class for a text or a pair of texts."""

    name: ClassVar[str] = "sequence_classification"
    title: ClassVar[str] = "Class of a text"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    lora_type: ClassVar[str] = "SEQ_CLS"

    def columns(self, data: DataSection) -> list[str]:
        """Text, perhaps the pair's second text, and label."""
        return [data.text_column, *([data.pair_column] if data.pair_column else []), data.label_column]

    def labels(self, rows: Sequence[Row], data: DataSection) -> list[str]:
        """Classes of the label column."""
        return label_names(row[data.label_column] for row in rows)

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids`, `labels` (a class id) and, for models that tell texts apart, `token_type_ids`."""
        encoded, cut = [], 0
        kinds = getattr(config, "type_vocab_size", 0) > 1 and data.pair_column is not None
        for number, row in enumerate(rows, start=1):
            pair = str(row[data.pair_column]) if data.pair_column else None
            found = tokenizer(str(row[data.text_column]), pair, truncation=True, max_length=length, verbose=False)
            if not found["input_ids"]:
                raise ValueError(f"row {number}: column {data.text_column!r} holds no text")
            label = _label_id(row[data.label_column], config, number)
            encoded.append({"input_ids": found["input_ids"], "labels": label})
            if kinds and "token_type_ids" in found:
                encoded[-1]["token_type_ids"] = found["token_type_ids"]
            cut += len(found["input_ids"]) >= length and bool(found.encodings[0].overflowing)
        return encoded, cut

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll (nats) and confusion matrix `[classes, classes]`; `logits` is `[batch, classes]`."""
        labels = batch["labels"]
        confusion = _confusion(logits.argmax(-1), labels, logits.shape[-1])
        return {"nll": _nll(logits, labels), "confusion": confusion}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a text), `accuracy`, `macro_f1`."""
        return {"loss": float(sums["nll"] / sums["confusion"].sum()), **_class_metrics(sums["confusion"])}


def _label_id(value: Any, config: Any, number: int) -> int:
    known = config.label2id
    if str(value) not in known:
        raise ValueError(f"row {number}: label {str(value)!r} is none of the training labels: {', '.join(known)}")
    return int(known[str(value)])


@dataclass(frozen=True)
class TokenClassification(Task):
    """One tag for each word of a text.

    Words are joined by spaces and tokenised as running text, as in pre-training; a word's first token predicts its tag.

    Args:
        label_all_pieces: train on every token of a word instead of the first only.
    """

    name: ClassVar[str] = "token_classification"
    title: ClassVar[str] = "Tag of each word"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    lora_type: ClassVar[str] = "TOKEN_CLS"

    label_all_pieces: bool = False

    def columns(self, data: DataSection) -> list[str]:
        """Words and tags."""
        return [data.tokens_column, data.tags_column]

    def labels(self, rows: Sequence[Row], data: DataSection) -> list[str]:
        """Tags that occur."""
        return label_names(tag for row in rows for tag in _words(row[data.tags_column]))

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids` and `labels` (a tag's id at the first token of each word, −100 elsewhere)."""
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            words, tags = _words(row[data.tokens_column]), _words(row[data.tags_column])
            if len(words) != len(tags):
                raise ValueError(f"row {number}: {len(words)} words but {len(tags)} tags")
            options = {"truncation": True, "max_length": length, "return_offsets_mapping": True, "verbose": False}
            found = tokenizer(" ".join(words), **options)
            owners = token_words(words, found["offset_mapping"])
            ids = [_label_id(tag, config, number) for tag in tags]
            labels = self._labels(owners, ids)
            if any(label != IGNORED for label in labels):
                encoded.append({"input_ids": found["input_ids"], "labels": labels})
            cut += len(set(owners) - {-1}) < len(words)
        if not encoded:
            raise ValueError(f"none of {len(rows)} rows has a word with a token")
        return encoded, cut

    def _labels(self, owners: Sequence[int], ids: Sequence[int]) -> list[int]:
        first = [word >= 0 and (index == 0 or owners[index - 1] != word) for index, word in enumerate(owners)]
        wanted = [word >= 0 and (self.label_all_pieces or begins) for word, begins in zip(owners, first)]
        return [ids[word] if wants else IGNORED for word, wants in zip(owners, wanted)]

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll and confusion matrix over predicted words; `logits` is `[batch, tokens, tags]`."""
        counted = batch["labels"] != IGNORED
        chosen, labels = logits[counted], batch["labels"][counted]
        return {"nll": _nll(chosen, labels), "confusion": _confusion(chosen.argmax(-1), labels, logits.shape[-1])}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a word), `accuracy`, `macro_f1` over words."""
        return {"loss": float(sums["nll"] / sums["confusion"].sum()), **_class_metrics(sums["confusion"])}


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__iter__")


def _words(value: Any) -> list[str]:
    """A list of words from a list, or from text with spaces (CSV has no lists)."""
    return value.split() if isinstance(value, str) else [str(item) for item in value]


def token_words(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Which word each token belongs to.

    Args:
        words: joined by single spaces they are the text.
        offsets: (start, end) of each token in characters; (0, 0) for special tokens.

    Returns:
        For each token the number of its word, −1 if it is in none; a token over several words belongs to the first.
    """
    starts: list[int] = []
    ends: list[int] = []
    at = 0
    for text in words:
        starts.append(at)
        ends.append(at + len(text))
        at += len(text) + 1
    owners: list[int] = []
    for start, end in offsets:
        word = bisect.bisect_right(ends, start)
        owners.append(word if end > start and word < len(words) and starts[word] < end else -1)
    return owners


@dataclass(frozen=True)
class TextToText(Task):
    """A target text for a source text, by an encoder and a decoder."""

    name: ClassVar[str] = "text_to_text"
    title: ClassVar[str] = "Target text of a source text"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    lora_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    language: ClassVar[bool] = True

    prefix: str = ""

    def columns(self, data: DataSection) -> list[str]:
        """Source and target."""
        return [data.source_column, data.target_column]

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids` and `labels`, both with the tokenizer's end token."""
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            source = self._ended(self.prefix + str(row[data.source_column]), tokenizer)
            target = self._ended(str(row[data.target_column]), tokenizer)
            if len(source) < 2 or len(target) < 2:
                raise ValueError(f"row {number}: an empty source or target")
            cut += max(len(source), len(target)) > length
            encoded.append({"input_ids": _shortened(source, length), "labels": _shortened(target, length)})
        return encoded, cut

    @staticmethod
    def _ended(text: str, tokenizer: Any) -> list[int]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll, tokens, right tokens, wholly right targets; `logits` is `[batch, tokens, vocabulary]`."""
        labels = batch["labels"]
        counted = labels != IGNORED
        right = (logits.argmax(-1) == labels) & counted
        return {
            "nll": _nll(logits[counted], labels[counted]),
            "tokens": counted.sum().double(),
            "correct": right.sum().double(),
            "whole": (right.sum(-1) == counted.sum(-1)).sum().double(),
            "rows": torch.tensor(float(len(labels)), dtype=torch.float64),
        }

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a token), `perplexity`, `accuracy` of tokens, `exact` share of targets right in every token.

        All given the target's earlier tokens, as in training.
        """
        loss = float(sums["nll"] / sums["tokens"])
        right = {"accuracy": sums["correct"] / sums["tokens"], "exact": sums["whole"] / sums["rows"]}
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0))), **{k: float(v) for k, v in right.items()}}


def _shortened(ids: list[int], length: int) -> list[int]:
    """At most `length` ids, the end token kept."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (SequenceClassification, TokenClassification, TextToText)}
"""Name → class; a new task is one class and one entry."""
