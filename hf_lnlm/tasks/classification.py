"""Classes of texts and of words."""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..data.cells import class_cell, tags_cell, text_cell, words_cell
from ..data.labelled import Row
from ..data.section import DataSection
from ..objectives.base import IGNORED, Batch
from .base import (
    ClassWeights,
    LabelledCollator,
    Task,
    label_id,
    place_of,
    probabilities,
    summed_nll,
    tells_texts_apart,
)
from .classification_metrics import (
    WeightedLoss,
    class_metrics,
    class_weights,
    confusion_matrix,
    entity_counts,
    entity_kinds,
    entity_metrics,
)


@dataclass(frozen=True)
class NamedClasses(Task):
    """A task whose labels are names of classes.

    A label that the model has no class for counts as an error of the model where it is measured: it gets an id behind the
    model's own, which no prediction reaches.
    """

    strange: tuple[str, ...] = field(default=(), init=False)

    def measuring(self, rows: Sequence[Row]) -> Self:
        """The task with the names of the labels that the model has no class for."""
        found = (row.get("strange", ()) for row in rows)
        names = {name for item in found for name in ([item] if isinstance(item, str) else item)} - {""}
        return self._with(strange=tuple(sorted(names)))

    @property
    def measured_classes(self) -> tuple[str, ...]:
        """The classes of the model, then the labels that it has none for."""
        return self.classes + self.strange

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function from encoded rows to a batch padded on the right; nothing in it is random."""
        strange = {name: len(self.classes) + number for number, name in enumerate(self.strange)}
        return LabelledCollator(tokenizer, bookkeeping, strange)


@dataclass(frozen=True)
class ClassTask(NamedClasses):
    """A task whose head has one logit a class and one right one.

    Args:
        class_weights: what a class weighs in the training loss: `balanced`, or a weight by its name; None for equal
            weights. What is measured is never weighted.
    """

    class_weights: ClassWeights = None
    weights: tuple[float, ...] = field(default=(), init=False)

    def weighted(self, rows: Sequence[Row]) -> Self:
        """The task with the weights of its classes, from encoded training rows; itself where it has none."""
        if self.class_weights is None:
            return self
        return self._with(weights=class_weights(self.class_weights, self.classes, rows))

    def loss_function(self) -> Callable[..., Tensor] | None:
        """The weighted loss, or None where classes weigh the same."""
        return WeightedLoss(self.weights) if self.weights else None

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll (nats) of the known labels and confusion matrix `(classes, classes)`.

        Args:
            logits: `(batch, classes)` or `(batch, tokens, classes)`.
            batch: the collator's.
        """
        wanted = measured_labels(batch)
        counted = wanted != IGNORED  # not so the rows that fill up a process's last batch
        logits, labels = logits[counted], wanted[counted]
        known = labels < logits.shape[-1]
        confusion = confusion_matrix(logits.argmax(-1), labels, logits.shape[-1] + len(self.strange))
        return {"nll": summed_nll(logits[known], labels[known]), "confusion": confusion, "known": known.sum().double()}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a label that the model has a class for), `accuracy`, `macro_f1`."""
        return {"loss": float(sums["nll"] / sums["known"].clamp(min=1)), **class_metrics(sums["confusion"])}


def measured_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """The labels of a batch, with ids behind the model's own for those that it has no class for."""
    strange = batch.get("strange")
    if strange is None:
        return batch["labels"]
    strange = strange.to(batch["labels"].device)
    return torch.where(strange == IGNORED, batch["labels"], strange)


@dataclass(frozen=True)
class TextTask(Task):
    """What is told of a text or a pair of texts as a whole."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    lora_type: ClassVar[str] = "SEQ_CLS"

    @abstractmethod
    def target(self, label: Any, config: Any) -> tuple[Any, Any]:
        """What an encoded row has as `labels`, and the names in them that the model has no class for, if any."""

    @abstractmethod
    def label_cell(self, value: Any) -> Any:
        """What a cell of the label column means."""

    def cells(self, data: DataSection) -> dict[str, Callable[[Any], Any]]:
        """Text, perhaps the pair's second text, and label."""
        texts = [data.text_column, *([data.pair_column] if data.pair_column else [])]
        return dict.fromkeys(texts, text_cell) | {data.label_column: self.label_cell}

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids`, `labels`, `number` and, for models that tell texts apart, `token_type_ids`."""
        encoded, cut = self.encode_held(rows, data, tokenizer, config, length)
        for number, (row, found) in enumerate(zip(rows, encoded), start=1):
            if strange := found.get("strange"):
                name = strange if isinstance(strange, str) else strange[0]
                raise ValueError(unknown_label(name, config, place_of(row, number)))
        return encoded, cut

    def encode_held(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows as for training; a label that the model has no class for is kept as `strange`."""
        encoded, cut = [], 0
        kinds = tells_texts_apart(config) and data.pair_column is not None
        options = {"truncation": True, "max_length": length, "verbose": False}
        texts = [row[data.text_column] for row in rows]
        pairs = [row[data.pair_column] for row in rows] if data.pair_column else None
        found: Any = tokenizer(texts, pairs, **options) if rows else {"input_ids": []}
        for index, (row, ids) in enumerate(zip(rows, found["input_ids"])):
            if not ids:
                raise ValueError(f"{place_of(row, index + 1)}: column {data.text_column!r} holds no token")
            labels, strange = self.target(row[data.label_column], config)
            encoded.append({"input_ids": ids, "labels": labels, "number": index})
            if strange:
                encoded[-1]["strange"] = strange
            if kinds and "token_type_ids" in found:
                encoded[-1]["token_type_ids"] = found["token_type_ids"][index]
            cut += len(ids) >= length and bool(found.encodings[index].overflowing)
        return encoded, cut


def unknown_label(name: str, config: Any, place: str) -> str:
    """That a model has no class of that name."""
    return f"{place}: label {name!r} is none of the training labels: {', '.join(config.label2id)}"


@dataclass(frozen=True)
class SequenceClassification(ClassTask, TextTask):
    """One class for a text or a pair of texts."""

    name: ClassVar[str] = "sequence_classification"
    title: ClassVar[str] = "Class of a text"
    problem_type: ClassVar[str] = "single_label_classification"

    def label_cell(self, value: Any) -> str:
        """One class."""
        return class_cell(value, self.classes, self.only)

    def labels(self, rows: Sequence[Row], data: DataSection) -> Iterator[str]:
        """Classes of the label column."""
        return (row[data.label_column] for row in rows)

    def target(self, label: str, config: Any) -> tuple[int, str]:
        """The class's id."""
        found = label_id(label, config)
        return (IGNORED, label) if found is None else (found, "")

    def predictions(self, logits: Tensor, encoded: Sequence[Row]) -> list[dict[str, Any]]:
        """`label`, its `score` (a probability) and `scores` by class; `logits` is `(batch, classes)`."""
        shares = probabilities(logits)
        best = logits.argmax(-1).tolist()
        return [
            {"label": self.classes[at], "score": row[at], "scores": dict(zip(self.classes, row))}
            for at, row in zip(best, shares)
        ]


@dataclass(frozen=True)
class TokenClassification(ClassTask):
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

    def read_inputs(self, row: Row, data: DataSection) -> Row:
        """A row whose tags are asked for; where it has no words, those of its text at white space are."""
        words = {} if data.tokens_column in row else {data.tokens_column: row.get(data.text_column)}
        return super().read_inputs(row if None in words.values() else {**row, **words}, data)

    def encode_inputs(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids`, `words` (how many there are) and `labels`: at a word's first token its number.

        Raises:
            ValueError: a row has no word with a token; names it.
        """
        first = replace(self, label_all_pieces=False)
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            words = row[data.tokens_column]
            found, short = first._encoded(words, words, list(range(len(words))), tokenizer, length)
            if found is None:
                raise ValueError(f"{place_of(row, number)}: none of its words has a token")
            encoded.append(found | {"words": len(words)})
            cut += short
        return encoded, cut

    def predictions(self, logits: Tensor, encoded: Sequence[Row]) -> list[dict[str, Any]]:
        """`tags` and their `scores`, one a word; None for a word that was cut off or has no token.

        Args:
            logits: `(batch, tokens, tags)`.
            encoded: the batch's rows.
        """
        found = []
        for shares, best, row in zip(probabilities(logits), logits.argmax(-1).tolist(), encoded):
            tags: list[str | None] = [None] * row["words"]
            scores: list[float | None] = [None] * row["words"]
            for word, chances, tag in zip(row["labels"], shares, best):
                if word != IGNORED:
                    tags[word], scores[word] = self.classes[tag], chances[tag]
            found.append({"tags": tags, "scores": scores})
        return found

    def cells(self, data: DataSection) -> dict[str, Callable[[Any], Any]]:
        """Words and tags."""
        return {
            data.tokens_column: words_cell,
            data.tags_column: partial(tags_cell, known=self.classes, only=self.only),
        }

    def read(self, row: Row, data: DataSection) -> Row:
        """A row with its words and as many tags.

        Raises:
            ValueError: a column is missing, holds something else, or the numbers differ.
        """
        found = super().read(row, data)
        words, tags = len(found[data.tokens_column]), len(found[data.tags_column])
        if words != tags:
            raise ValueError(f"{words} words but {tags} tags")
        return found

    def label_column(self, data: DataSection) -> str:
        """The column of tags."""
        return data.tags_column

    def labels(self, rows: Sequence[Row], data: DataSection) -> Iterator[str]:
        """Tags that occur."""
        return (tag for row in rows for tag in row[data.tags_column])

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids` and `labels` (a tag's id at the first token of each word, −100 elsewhere)."""
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            words, tags = row[data.tokens_column], row[data.tags_column]
            ids = [label_id(tag, config) for tag in tags]
            if None in ids:
                raise ValueError(unknown_label(tags[ids.index(None)], config, place_of(row, number)))
            found, short = self._encoded(words, tags, ids, tokenizer, length)
            encoded += [found] if found else []
            cut += short
        if not encoded:
            raise ValueError(f"none of {len(rows)} rows has a word with a token")
        return encoded, cut

    def encode_held(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows with one label a word, at its first token: words are measured, not their pieces."""
        first = replace(self, label_all_pieces=False)
        encoded, cut = [], 0
        for row in rows:
            words, tags = row[data.tokens_column], row[data.tags_column]
            found, short = first._encoded(words, tags, [label_id(tag, config) for tag in tags], tokenizer, length)
            encoded += [found] if found else []
            cut += short
        if not encoded:
            raise ValueError(f"none of {len(rows)} rows has a word with a token")
        return encoded, cut

    def _encoded(
        self, words: list[str], tags: list[str], ids: list[int | None], tokenizer: Any, length: int
    ) -> tuple[Row | None, bool]:
        """(row, whether it was cut); None for one whose words have no token. Tags without an id are kept as `strange`."""
        options = {"truncation": True, "max_length": length, "return_offsets_mapping": True, "verbose": False}
        found = tokenizer(" ".join(words), **options)
        owners = token_words(words, found["offset_mapping"])
        cut = len(set(owners) - {-1}) < len(words)
        labels = self._labels(owners, [IGNORED if number is None else number for number in ids])
        row: Row = {"input_ids": found["input_ids"], "labels": labels}
        strange = self._labels(owners, [0 if number is None else IGNORED for number in ids])
        if any(mark != IGNORED for mark in strange):
            row["strange"] = ["" if mark == IGNORED else tags[owner] for mark, owner in zip(strange, owners)]
        return row if {*labels, *strange} != {IGNORED} else None, cut

    def _labels(self, owners: Sequence[int], ids: Sequence[int]) -> list[int]:
        first = [word >= 0 and (index == 0 or owners[index - 1] != word) for index, word in enumerate(owners)]
        wanted = [word >= 0 and (self.label_all_pieces or begins) for word, begins in zip(owners, first)]
        return [ids[word] if wants else IGNORED for word, wants in zip(owners, wanted)]

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll and confusion matrix over predicted words, and counts of entities `(kinds, 3)` if tags make up any.

        Args:
            logits: `(batch, tokens, tags)`.
            batch: the collator's.
        """
        found = super().sums(logits, batch)
        names = self.measured_classes
        if not (kinds := entity_kinds(names)):
            return found
        counts = torch.zeros(len(kinds), 3, dtype=torch.float64)
        for guesses, facts in zip(logits.argmax(-1).tolist(), measured_labels(batch).tolist()):
            pairs = [(names[guess], names[fact]) for guess, fact in zip(guesses, facts) if fact >= 0]
            counts += entity_counts([guess for guess, _ in pairs], [fact for _, fact in pairs], kinds)
        return found | {"entities": counts.to(logits.device)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a word), `accuracy`, `macro_f1` over words; of entities `precision`, `recall` and `f1`.

        An entity counts as right if its kind, its first and its last word are (CoNLL's rule).
        """
        return super().summary(sums) | (entity_metrics(sums["entities"]) if "entities" in sums else {})


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
