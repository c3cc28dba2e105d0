"""Denoising: the text is written from what is left of it after spans are hidden and its sentences shuffled.

[1] Lewis et al. 2020, "BART: Denoising sequence-to-sequence pre-training for natural language generation, translation, and
    comprehension", §2.2 (text infilling, sentence permutation) and §3 (30 % of the tokens, spans of 3).

Glossary: L tokens of a row; n = round(L · rate) hidden ones; spans, whose lengths are Poisson(mean_span) until they sum to
n, the last one cut. Each span, one of no tokens too, becomes a single mask. Sentences end with a token whose text ends with
`.`, `!`, `?` or a line's end; they are shuffled first.

Deviations: spans are of tokens, not of whole words; two spans never touch, so that no two masks of hidden text stand side
by side; a row draws at most n spans, so that its inputs are never longer than its targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .base import Collator, Direction, Objective, RewritingCollator, Row

SENTENCE_ENDS = (".", "!", "?", "\n")


class DenoisingCollator(RewritingCollator):
    """Rows → `input_ids` `(batch, tokens)` and `labels` `(batch, targets)`, both with the end token."""

    @cached_property
    def ends_sentence(self) -> np.ndarray:
        """Which ids end a sentence, bool `(vocabulary,)`."""
        texts = self.tokenizer.batch_decode([[number] for number in range(len(self.tokenizer))])
        return np.array([text.rstrip(" ").endswith(SENTENCE_ENDS) for text in texts])

    def rewritten(self, row: Row, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets); refused are rows of fewer than two tokens."""
        if len(ids) < 2:
            raise ValueError(f"a row for denoising needs 2 tokens or more, got {len(ids)}")
        goal, random = self.objective, self.random(row, "denoising")
        left = permuted(ids, self.ends_sentence, random) if goal.permute_sentences else ids
        lengths = span_lengths(min(round(len(ids) * goal.rate), len(ids) - 1), goal.mean_span, random)
        left = infilled(left, lengths, self.tokenizer.mask_token_id, random)
        return np.append(left, self.tokenizer.eos_token_id), np.append(ids, self.tokenizer.eos_token_id)


@dataclass(frozen=True)
class DenoisingObjective(Objective):
    """BART's text infilling and sentence permutation.

    Args:
        rate: Share of tokens in spans, 0 or more and less than 1.
        mean_span: Mean length of a span, above 0.
        permute_sentences: Whether a row's sentences are shuffled.
    """

    name: ClassVar[str] = "denoising"
    title: ClassVar[str] = "Text infilling and sentence permutation"
    paper: ClassVar[str] = "Lewis et al. 2020"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    direction: ClassVar[Direction] = "encoder-decoder"
    batches: ClassVar[type[Collator]] = DenoisingCollator

    rate: float = 0.3
    mean_span: float = 3.0
    permute_sentences: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be 0 or more and less than 1, got {self.rate}")
        if not 0 < self.mean_span <= 1000:
            raise ValueError(f"mean_span must be above 0 and at most 1000, got {self.mean_span}")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without a mask or an end token."""
        for kind in ("mask", "eos"):
            if getattr(tokenizer, f"{kind}_token_id") is None:
                raise ValueError(
                    f"objective 'denoising' needs tokenizer.{kind}_token, and the tokenizer has none: set it first"
                )

    def raw_length(self, length: int) -> int:
        """The largest number of raw tokens whose inputs and targets, their ends included, have `length` tokens at most."""
        if length < 3:
            raise ValueError(f"length must be 3 or more for denoising, got {length}")
        return length - 1

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of raw text that fill targets of `length` tokens."""
        return {"length": self.raw_length(length)}


def permuted(ids: np.ndarray, ends: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Shuffle sentences.

    Args:
        ids: Tokens, `(length,)`.
        ends: Which ids end a sentence, bool `(vocabulary,)`; the last token ends one anyway.
        random: Draws the order.
    """
    borders = np.flatnonzero(ends[ids][:-1]) + 1
    sentences = np.split(ids, borders)
    return np.concatenate([sentences[at] for at in random.permutation(len(sentences))])


def span_lengths(hidden: int, mean: float, random: np.random.Generator) -> np.ndarray:
    """Lengths of spans that hide `hidden` tokens together, `(spans,)`; at most `hidden` spans, of which some are empty."""
    drawn = random.poisson(mean, size=hidden)
    total = drawn.cumsum()
    if hidden and total[-1] < hidden:  # the last span takes what is left
        drawn[-1] += hidden - total[-1]
        return drawn
    kept = int(np.searchsorted(total, hidden)) + 1 if hidden else 0
    drawn = drawn[:kept]
    if kept:
        drawn[-1] -= total[kept - 1] - hidden
    return drawn


def infilled(ids: np.ndarray, lengths: np.ndarray, mask: int, random: np.random.Generator) -> np.ndarray:
    """Replace spans by one mask each.

    Args:
        ids: Tokens, `(length,)`.
        lengths: Of the spans, in tokens; one of no tokens puts a mask between two others.
        mask: The mask's id.
        random: Draws the places: each way to lay out spans that do not touch is equally likely, if they fit so.
    """
    spans, kept = lengths[lengths > 0], len(ids) - int(lengths.sum())
    slots = kept + 1
    if len(spans) > slots:  # more spans than places between the tokens that stay: they are joined
        spans = np.array([spans.sum()])
    places = np.sort(random.permutation(slots)[: len(spans)])
    before = np.diff(np.concatenate([[0], places]))
    written, at = [], 0
    for gap, span in zip(before, spans, strict=True):
        written += [*ids[at : at + gap], mask]
        at += gap + span
    written += [*ids[at:]]
    for _ in range(int((lengths == 0).sum())):
        written.insert(int(random.integers(len(written) + 1)), mask)
    return np.array(written, np.int64)
