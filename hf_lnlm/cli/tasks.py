"""Tasks with labels that `finetune` and `evaluate` know; a new one is a class here or beside, and a row of `TASKS`."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..data.labelled import Row, label_names
from ..objectives.base import IGNORED
from .answers import MultipleChoice, QuestionAnswering
from .classes import (
    WeightedLoss,
    class_metrics,
    class_weights,
    confusion_matrix,
    entity_counts,
    entity_kinds,
    entity_metrics,
)
from .recipe import DataSection
from .task import ClassWeights, Task, label_id, summed_nll, tells_texts_apart, words_of
from .written import WrittenMetrics, generation_fields


@dataclass(frozen=True)
class ClassTask(Task):
    """A task whose head has one logit a class.

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


@dataclass(frozen=True)
class SequenceClassification(ClassTask):
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
        kinds = tells_texts_apart(config) and data.pair_column is not None
        for number, row in enumerate(rows, start=1):
            pair = str(row[data.pair_column]) if data.pair_column else None
            found = tokenizer(str(row[data.text_column]), pair, truncation=True, max_length=length, verbose=False)
            if not found["input_ids"]:
                raise ValueError(f"row {number}: column {data.text_column!r} holds no text")
            label = label_id(row[data.label_column], config, number)
            encoded.append({"input_ids": found["input_ids"], "labels": label})
            if kinds and "token_type_ids" in found:
                encoded[-1]["token_type_ids"] = found["token_type_ids"]
            cut += len(found["input_ids"]) >= length and bool(found.encodings[0].overflowing)
        return encoded, cut

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll (nats) and confusion matrix `[classes, classes]`; `logits` is `[batch, classes]`."""
        counted = batch["labels"] != IGNORED  # not so the rows that fill up a process's last batch
        logits, labels = logits[counted], batch["labels"][counted]
        confusion = confusion_matrix(logits.argmax(-1), labels, logits.shape[-1])
        return {"nll": summed_nll(logits, labels), "confusion": confusion}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a text), `accuracy`, `macro_f1`."""
        return {"loss": float(sums["nll"] / sums["confusion"].sum()), **class_metrics(sums["confusion"])}


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

    def columns(self, data: DataSection) -> list[str]:
        """Words and tags."""
        return [data.tokens_column, data.tags_column]

    def labels(self, rows: Sequence[Row], data: DataSection) -> list[str]:
        """Tags that occur."""
        return label_names(tag for row in rows for tag in words_of(row[data.tags_column]))

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids` and `labels` (a tag's id at the first token of each word, −100 elsewhere)."""
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            words, tags = words_of(row[data.tokens_column]), words_of(row[data.tags_column])
            if len(words) != len(tags):
                raise ValueError(f"row {number}: {len(words)} words but {len(tags)} tags")
            options = {"truncation": True, "max_length": length, "return_offsets_mapping": True, "verbose": False}
            found = tokenizer(" ".join(words), **options)
            owners = token_words(words, found["offset_mapping"])
            ids = [label_id(tag, config, number) for tag in tags]
            labels = self._labels(owners, ids)
            if any(label != IGNORED for label in labels):
                encoded.append({"input_ids": found["input_ids"], "labels": labels})
            cut += len(set(owners) - {-1}) < len(words)
        if not encoded:
            raise ValueError(f"none of {len(rows)} rows has a word with a token")
        return encoded, cut

    def encode_held(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows with one label a word, at its first token: words are measured, not their pieces."""
        return replace(self, label_all_pieces=False).encode(rows, data, tokenizer, config, length)

    def _labels(self, owners: Sequence[int], ids: Sequence[int]) -> list[int]:
        first = [word >= 0 and (index == 0 or owners[index - 1] != word) for index, word in enumerate(owners)]
        wanted = [word >= 0 and (self.label_all_pieces or begins) for word, begins in zip(owners, first)]
        return [ids[word] if wants else IGNORED for word, wants in zip(owners, wanted)]

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll and confusion matrix over predicted words; `logits` is `[batch, tokens, tags]`."""
        counted = batch["labels"] != IGNORED
        chosen, labels = logits[counted], batch["labels"][counted]
        confusion = confusion_matrix(chosen.argmax(-1), labels, logits.shape[-1])
        return {"nll": summed_nll(chosen, labels), "confusion": confusion, **self._entities(logits, batch["labels"])}

    def _entities(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Counts of entities `[kinds, 3]`, if the tags make up any."""
        kinds = entity_kinds(self.classes)
        if not kinds:
            return {}
        counts = torch.zeros(len(kinds), 3, dtype=torch.float64)
        for guesses, facts in zip(logits.argmax(-1).tolist(), labels.tolist()):
            pairs = [(self.classes[guess], self.classes[fact]) for guess, fact in zip(guesses, facts) if fact >= 0]
            counts += entity_counts([guess for guess, _ in pairs], [fact for _, fact in pairs], kinds)
        return {"entities": counts.to(logits.device)}

    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats a word), `accuracy`, `macro_f1` over words; of entities `precision`, `recall` and `f1`.

        An entity counts as right if its kind, its first and its last word are (CoNLL's rule).
        """
        found = {"loss": float(sums["nll"] / sums["confusion"].sum()), **class_metrics(sums["confusion"])}
        return found | (entity_metrics(sums["entities"]) if "entities" in sums else {})


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
    """A target text for a source text, by an encoder and a decoder.

    Args:
        prefix: put before every source, as T5 tells tasks apart.
        generate: let evaluation write texts and rate them (summaries, translations); slow, so not by default.
        num_beams: of beam search, 1 for greedy.
        max_new_tokens: most tokens of a written text.
    """

    name: ClassVar[str] = "text_to_text"
    title: ClassVar[str] = "Target text of a source text"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    lora_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    language: ClassVar[bool] = True

    prefix: str = ""
    generate: bool = False
    num_beams: int = 1
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"num_beams and max_new_tokens must be at least 1, got {self.num_beams} and {self.max_new_tokens}"
            )

    def generation(self) -> dict[str, Any]:
        """Arguments of Seq2SeqTrainer if evaluation is to write texts."""
        return generation_fields(self.num_beams, self.max_new_tokens) if self.generate else {}

    def rater(self, tokenizer: Any) -> Callable[[Any], dict[str, float]] | None:
        """Rates written texts, if any are: BLEU, chrF, ROUGE-L and the share that is exact."""
        return WrittenMetrics(tokenizer) if self.generate else None

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
            "nll": summed_nll(logits[counted], labels[counted]),
            "tokens": counted.sum().double(),
            "correct": right.sum().double(),
            "whole": ((right.sum(-1) == counted.sum(-1)) & counted.any(-1)).sum().double(),
            "rows": counted.any(-1).sum().double(),
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


TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (SequenceClassification, TokenClassification, QuestionAnswering, MultipleChoice, TextToText)
}
"""Name → class; a new task is one class and one entry."""
