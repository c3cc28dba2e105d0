"""A target text for a source text, learnt by an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..data.cells import text_cell
from ..data.labelled import Row
from ..data.section import DataSection
from ..objectives.base import IGNORED
from .base import Task, place_of, summed_nll
from .generation_metrics import WrittenMetrics, generation_fields


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

    def cells(self, data: DataSection) -> dict[str, Callable[[Any], Any]]:
        """Source and target."""
        return {data.source_column: text_cell, data.target_column: text_cell}

    def label_column(self, data: DataSection) -> str:
        """The column of targets."""
        return data.target_column

    def texts(self, rows: Sequence[Row], data: DataSection) -> Iterator[str]:
        """Sources and targets."""
        return (row[column] for row in rows for column in self.cells(data))

    def read_inputs(self, row: Row, data: DataSection) -> Row:
        """A row whose target is asked for; where it has no source, its text is."""
        text = {} if data.source_column in row else {data.source_column: row.get(data.text_column)}
        return super().read_inputs(row if None in text.values() else {**row, **text}, data)

    def encode_inputs(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids`, with the tokenizer's end token."""
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            source = self._ended(self.prefix + row[data.source_column], tokenizer)
            if len(source) < 2:
                raise ValueError(f"{place_of(row, number)}: a source without a token")
            cut += len(source) > length
            encoded.append({"input_ids": _shortened(source, length)})
        return encoded, cut

    def encode(
        self, rows: Sequence[Row], data: DataSection, tokenizer: Any, config: Any, length: int
    ) -> tuple[list[Row], int]:
        """Rows `input_ids` and `labels`, both with the tokenizer's end token."""
        encoded, cut = [], 0
        for number, row in enumerate(rows, start=1):
            source = self._ended(self.prefix + row[data.source_column], tokenizer)
            target = self._ended(row[data.target_column], tokenizer)
            if len(source) < 2 or len(target) < 2:
                raise ValueError(f"{place_of(row, number)}: a source or target without a token")
            cut += max(len(source), len(target)) > length
            encoded.append({"input_ids": _shortened(source, length), "labels": _shortened(target, length)})
        return encoded, cut

    @staticmethod
    def _ended(text: str, tokenizer: Any) -> list[int]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def sums(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summed nll, tokens, right tokens, wholly right targets; `logits` is `(batch, tokens, vocabulary)`."""
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
