"""Pairs of segments from documents, for objectives that learn how two pieces of text belong together.

A *segment* is a line of a document with something on it; a line longer than half a row is cut into equal parts. A
*chunk* is as many consecutive segments of one document as fill a row (Devlin et al. 2019, appendix A.2): nine in ten are
filled up, the others only to a random length, so that models see short rows too.

Columns of a row: `input_ids` `(tokens,)` of a chunk; `segments` `(segments,)`, where each of its segments begins; with
`others=True` `other_ids` `(tokens,)`, a chunk of another document, drawn anew every epoch; with `words=True` `word_ids` and
`other_word_ids`; `example_id` and `epoch`. Which tokens become A and which B, and in what order, is for the collator.

Deviation from the authors' code: chunks are the same every epoch, so what a random B leaves unused of its chunk is not put
back; the next epoch cuts it elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from .epochs import EpochDataset
from .pieces import document_blocks, lines_of
from .tokens import SLAB, Encoder, Tokens, flat_columns, tokenised

SHORT_SHARE = 0.1
"""Share of the chunks that are filled only to a random length."""


class SegmentPairs(EpochDataset):
    """Chunks of consecutive segments, map-style.

    Args:
        documents: `datasets.Dataset` with a `text` column.
        tokenizer: Fast tokenizer.
        length: Most tokens of a chunk.
        words: Adds word numbers.
        others: Adds text of another document.

    Raises:
        ValueError: A stream, no chunk of two tokens, or text of a single document where another one is needed.
    """

    def __init__(
        self, documents: Any, tokenizer: Any, length: int, *, words: bool = False, others: bool = True
    ) -> None:
        super().__init__()
        if not hasattr(documents, "__len__"):
            raise ValueError("pairs of segments need documents of known number, got a stream: use data.streaming=false")
        if length < 4:
            raise ValueError(f"length must leave 4 tokens or more for a pair, got {length}")
        self.length, self.words, self.others = length, words, others
        self._table = tokenised(documents, Encoder(tokenizer, frame="none", words=words), _slabs, length=length)
        self._open()
        self.chunks = np.fromiter(itertools.chain.from_iterable(self._cut()), np.int64).reshape(-1, 4)
        filled = len(set(self.chunks[:, 2].tolist()))
        if filled < 1 + others:
            needed = "two documents or more" if others else "one document"
            raise ValueError(f"pairs of segments need text of {needed}, got {filled} with two tokens or more")

    def _open(self) -> None:
        columns = flat_columns(self._table)
        self.ids, self.sizes, self.word_ids = columns["input_ids"], columns["sizes"], columns.get("words")
        self.first_segments = np.append(columns["first_segments"].all(), len(self.sizes))

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name not in ("ids", "sizes", "word_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _cut(self) -> Iterator[tuple[int, int, int, int]]:
        """(first segment, segment behind the last, document, first token) of each chunk, counted over all documents."""
        token = 0
        for document, (first, last) in enumerate(itertools.pairwise(self.first_segments.tolist())):
            sizes, random = self.sizes.slice(first, last), np.random.default_rng([0, document])
            begin, held, target = 0, 0, self._target(random)
            for index, size in enumerate(sizes.tolist()):
                if index > begin and held + size > self.length:
                    yield first + begin, first + index, document, token
                    begin, held, token, target = index, 0, token + held, self._target(random)
                held += size
                if held >= target:
                    yield first + begin, first + index + 1, document, token
                    begin, held, token, target = index + 1, 0, token + held, self._target(random)
            if held >= 2:
                yield first + begin, first + len(sizes), document, token
            token += held

    def _target(self, random: np.random.Generator) -> int:
        return int(random.integers(2, self.length + 1)) if random.random() < SHORT_SHARE else self.length

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair must lie in 0 … {len(self) - 1}, got {index}")
        index %= len(self)
        epoch = self.epoch.get()
        row: dict[str, Any] = {"example_id": index, "epoch": epoch, "segments": self._segments(index)}
        row |= self._tokens(index, "")
        if self.others:
            drawn = self._other(index, np.random.default_rng([1, epoch, index]))
            row |= self._tokens(drawn, "other_") | {"other_segments": self._segments(drawn)}
        return row

    def _tokens(self, index: int, prefix: str) -> dict[str, np.ndarray]:
        """Ids and word numbers of a chunk."""
        span = self._span(index)
        found = {f"{prefix}ids" if prefix else "input_ids": self.ids.slice(*span).astype(np.int64)}
        if self.word_ids is not None:
            found[f"{prefix}word_ids"] = self.word_ids.slice(*span).astype(np.int64)
        return found

    def _other(self, index: int, random: np.random.Generator) -> int:
        """A chunk of another document, each equally likely."""
        own = np.flatnonzero(self.chunks[:, 2] == self.chunks[index, 2])  # consecutive
        drawn = int(random.integers(len(self) - len(own)))
        return drawn if drawn < own[0] else drawn + len(own)

    def _span(self, index: int) -> tuple[int, int]:
        """First token and token behind the last of a chunk."""
        first, last, _, begin = map(int, self.chunks[index])
        return begin, begin + int(self.sizes.slice(first, last).sum())

    def _segments(self, index: int) -> np.ndarray:
        sizes = self.sizes.slice(int(self.chunks[index, 0]), int(self.chunks[index, 1]))
        return np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _slabs(documents: Any, encoder: Encoder, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Slabs of tokens, the sizes of their segments, and `first_segments`, with which documents begin in it."""
    parts: list[Tokens] = [encoder.nothing]
    sizes: list[int] = []
    firsts: list[int] = []
    segments = held = 0
    for blocks in document_blocks(documents):
        firsts.append(segments)
        word = 0
        for line in lines_of(blocks):
            tokens = encoder.encode(line) if line.strip() else encoder.nothing
            cut = _pieces(len(tokens.ids), length)
            parts.append(tokens._replace(words=np.where(tokens.words < 0, -1, tokens.words + word).astype(np.int32)))
            word += int(tokens.words.max(initial=-1)) + 1
            segments += len(cut)
            held += len(tokens.ids)
            sizes.extend(cut)
            if held >= SLAB:
                yield _columns(encoder, parts, sizes, firsts)
                parts, sizes, firsts, held = [encoder.nothing], [], [], 0
    yield _columns(encoder, parts, sizes, firsts)


def _columns(encoder: Encoder, parts: list[Tokens], sizes: list[int], firsts: list[int]) -> dict[str, np.ndarray]:
    """The columns of a slab."""
    return {
        **encoder.columns(parts),
        "sizes": np.array(sizes, np.int32),
        "first_segments": np.array(firsts, np.int64),
    }


def _pieces(tokens: int, length: int) -> list[int]:
    """Sizes of the parts of a line of so many tokens: itself, or equal parts of half a row at most."""
    parts = 1 if tokens <= length // 2 else -(-tokens // max(1, length // 2))
    return [len(part) for part in np.array_split(np.arange(tokens), parts)] if tokens else []
