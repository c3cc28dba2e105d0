"""Span corruption: spans of text are replaced by sentinels, and the decoder writes what was there.

[1] Raffel et al. 2020, "Exploring the limits of transfer learning with a unified text-to-text transformer", §3.1.4 and
    §3.3.4.

Glossary: L raw tokens of a row; n = round(L · rate) noise tokens; k = max(1, round(n / mean_span)) spans. Noise and
kept tokens are each cut into k random non-empty parts and alternate, starting with kept text. Inputs are the kept text
with one sentinel a span, then eos; targets are each span behind its sentinel, then eos. Sentinels descend from the
highest id (`<extra_id_0>`, `<extra_id_1>` …) and no closing sentinel ends the targets.

A row whose inputs are to have 128, 256, 512, 1024 tokens takes 141, 284, 568, 1137 raw tokens and gives 29, 58, 114,
229 targets: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..data.tokenizers import sentinel_ids
from .base import Collator, Direction, Objective, RewritingCollator, Row


class SpanCollator(RewritingCollator):
    """Rows → `input_ids` `(batch, tokens)` and `labels` `(batch, targets)`."""

    @cached_property
    def sentinels(self) -> np.ndarray:
        """Ids of `<extra_id_0>`, `<extra_id_1>` …, `(sentinels,)`."""
        return np.array(sentinel_ids(self.tokenizer), np.int64)

    def rewritten(self, row: Row, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets); refused are rows of fewer than two tokens or more spans than sentinels."""
        noise, spans = self.objective.noise(len(ids))
        self.objective._need_sentinels(spans, len(self.sentinels), len(ids))
        random = self.random(row, "span")
        is_noise = noise_mask(len(ids), noise, spans, random)
        eos = self.tokenizer.eos_token_id
        return fold(ids, is_noise, self.sentinels, eos), fold(ids, ~is_noise, self.sentinels, eos)


@dataclass(frozen=True)
class SpanObjective(Objective):
    """T5's span corruption.

    Args:
        rate: Share of tokens in spans, between 0 and 1.
        mean_span: Mean length of a span, 1 or more.
    """

    name: ClassVar[str] = "span"
    title: ClassVar[str] = "Span corruption"
    paper: ClassVar[str] = "Raffel et al. 2020"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    direction: ClassVar[Direction] = "encoder-decoder"
    batches: ClassVar[type[Collator]] = SpanCollator

    rate: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1 (exclusive), got {self.rate}")
        if self.mean_span < 1:
            raise ValueError(f"mean_span must be 1 or more, got {self.mean_span}")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without sentinels or without an end token."""
        if not sentinel_ids(tokenizer):
            raise ValueError(
                "objective 'span' needs sentinels <extra_id_0> … and the tokenizer has none: build it with some"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("objective 'span' needs an end token, and the tokenizer has none: set tokenizer.eos_token")

    def noise(self, length: int) -> tuple[int, int]:
        """(noise tokens, spans) of a row of `length` raw tokens.

        Raises:
            ValueError: Fewer than two tokens: there must be one to keep and one to write.
        """
        if length < 2:
            raise ValueError(f"a row for span corruption needs 2 tokens or more, got {length}")
        noise = min(max(round(length * self.rate), 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, length - noise)

    def raw_length(self, length: int) -> int:
        """The largest number of raw tokens whose inputs, sentinels and eos included, have `length` tokens at most."""
        if length < 3:
            raise ValueError(f"length must be 3 or more for span corruption, got {length}")
        raw = 2
        while self._input_length(raw + 1) <= length:
            raw += 1
        return raw

    def _input_length(self, raw: int) -> int:
        noise, spans = self.noise(raw)
        return raw - noise + spans + 1

    def target_length(self, length: int) -> int:
        """Tokens of the targets, sentinels and eos included, that go with inputs of `length` tokens."""
        noise, spans = self.noise(self.raw_length(length))
        return noise + spans + 1

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of raw text that fill inputs of `length` tokens.

        Raises:
            ValueError: The tokenizer has fewer sentinels than a row has spans.
        """
        raw = self.raw_length(length)
        self._need_sentinels(self.noise(raw)[1], len(sentinel_ids(tokenizer)), length)
        return {"length": raw}

    @staticmethod
    def _need_sentinels(spans: int, sentinels: int, length: int) -> None:
        if spans > sentinels:
            raise ValueError(f"a row of {length} tokens has {spans} spans but the tokenizer has {sentinels} sentinels")


def noise_mask(length: int, noise: int, spans: int, random: np.random.Generator) -> np.ndarray:
    """Which tokens are noise, bool `(length,)`: `spans` kept parts and `spans` noise parts by turns, kept text first."""
    sizes = np.empty(2 * spans, np.int64)
    sizes[0::2], sizes[1::2] = _parts(length - noise, spans, random), _parts(noise, spans, random)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes)


def _parts(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """`total` cut into `parts` non-empty parts, each way equally likely, `(parts,)`."""
    cuts = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def fold(ids: np.ndarray, hidden: np.ndarray, sentinels: np.ndarray, eos: int) -> np.ndarray:
    """Replace each run of hidden tokens by the next sentinel and close with eos.

    Args:
        ids: Raw tokens, `(length,)`.
        hidden: Tokens replaced, bool `(length,)`: the noise for the inputs, everything else for the targets.
        sentinels: Ids of `<extra_id_0>`, `<extra_id_1>` …

    Returns:
        `(kept tokens + runs + 1,)`.
    """
    begins = hidden & ~np.concatenate([[False], hidden[:-1]])
    order = np.cumsum(begins) - 1
    written = np.where(begins, sentinels[order.clip(0)], ids)[~hidden | begins]
    return np.append(written, eos)


def interleave(inputs: Sequence[int], targets: Sequence[int], tokenizer: Any) -> list[int]:
    """Put the spans of the targets back in the place of their sentinels: the raw text that a pair came from.

    Args:
        inputs: Token ids of the inputs, without padding.
        targets: Token ids of the targets, without padding or −100.
        tokenizer: Gives sentinels and eos.

    Raises:
        ValueError: A sentinel of the inputs that the targets don't have.
    """
    sentinels = set(sentinel_ids(tokenizer))
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in _without_end(targets, tokenizer.eos_token_id):
        if token in sentinels:
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    original: list[int] = []
    for token in _without_end(inputs, tokenizer.eos_token_id):
        if token in sentinels and token not in spans:
            raise ValueError(f"the targets have no span for {tokenizer.convert_ids_to_tokens(token)}")
        original += spans[token] if token in sentinels else [token]
    return original


def _without_end(ids: Sequence[int], eos: int) -> list[int]:
    tokens = [int(token) for token in ids]
    return tokens[:-1] if tokens and tokens[-1] == eos else tokens
