"""Pairs of segments from documents, for objectives that learn how two pieces of text belong together.

A *segment* is a line of a document with something on it; a line longer than half a row is cut into equal parts. A
*chunk* is as many consecutive segments of one document as fill a row (Devlin et al. 2019, appendix A.2): nine in ten are
filled up, the others only to a random length, so that models see short rows too.

Columns of a row: `input_ids` `[tokens]` of a chunk; `segments` `[segments]`, where each of its segments begins; with
`others=True` `other_ids` `[tokens]`, a chunk of another document, drawn anew every epoch; with `words=True` `word_ids` and
`other_word_ids`; `example_id` and `epoch`. Which tokens become A and which B, and in what order, is for the collator.

Deviation from the authors' code: chunks are the same every epoch, so what a random B leaves unused of its chunk is not put
back; the next epoch cuts it elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .epochs import EpochDataset
from .progress import progress_on_terminals
from .tokens import Encoder, _FlatColumn

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
        self._table = _segmented(documents, tokenizer, length, words)
        self._open()
        self.chunks = np.array(list(self._cut()), np.int64).reshape(-1, 3)
        filled = len(set(self.chunks[:, 2].tolist()))
        if filled < 1 + others:
            needed = "two documents or more" if others else "one document"
            raise ValueError(f"pairs of segments need text of {needed}, got {filled} with two tokens or more")

    def _open(self) -> None:
        column = self._table.data.column
        self.ids, self.sizes = _FlatColumn(column("input_ids")), _FlatColumn(column("sizes"))
        self.word_ids = _FlatColumn(column("words")) if self.words else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name not in ("ids", "sizes", "word_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        """(first segment, segment behind the last, document) of each chunk, segments counted over all documents."""
        for document, (first, last) in enumerate(zip(self.sizes.starts[:-1], self.sizes.starts[1:], strict=True)):
            sizes, random = self.sizes.slice(first, last), np.random.default_rng([0, document])
            begin, held, target = 0, 0, self._target(random)
            for index, size in enumerate(sizes):
                if index > begin and held + size > self.length:
                    yield first + begin, first + index, document
                    begin, held, target = index, 0, self._target(random)
                held += size
                if held >= target:
                    yield first + begin, first + index + 1, document
                    begin, held, target = index + 1, 0, self._target(random)
            if held >= 2:
                yield first + begin, first + len(sizes), document

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
        first, last, document = self.chunks[index]
        begin = int(self.ids.starts[document]) + int(self.sizes.slice(self.sizes.starts[document], first).sum())
        return begin, begin + int(self.sizes.slice(first, last).sum())

    def _segments(self, index: int) -> np.ndarray:
        sizes = self.sizes.slice(int(self.chunks[index, 0]), int(self.chunks[index, 1]))
        return np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _segmented(documents: Any, tokenizer: Any, length: int, words: bool) -> Any:
    """One row a document: its tokens, the sizes of its segments and, if asked for, word numbers."""
    from datasets import Features, List, Value

    encoder = Encoder(tokenizer, frame="none", words=words)
    columns = {"input_ids": List(Value("int32")), "sizes": List(Value("int32"))}
    state = f"segments 1|{documents._fingerprint}|{encoder.fingerprint}|{length}"
    with progress_on_terminals():
        return documents.map(
            _encode_batch,
            batched=True,
            batch_size=16,
            writer_batch_size=64,
            remove_columns=documents.column_names,
            features=Features({**columns, "words": List(Value("int32"))} if words else columns),
            fn_kwargs={"encoder": encoder, "length": length},
            new_fingerprint=hashlib.sha256(state.encode()).hexdigest()[:16],
            desc="Tokenising",
        )


def _encode_batch(batch: dict[str, list[str]], encoder: Encoder, length: int) -> dict[str, list[np.ndarray]]:
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "sizes": [], **({"words": []} if encoder.words else {})}
    for text in batch["text"]:
        tokens = [encoder.encode(line) for line in text.splitlines() if line.strip()]
        pieces = [piece for line in tokens for piece in _pieces(len(line.ids), length)]
        columns["input_ids"].append(np.concatenate([np.zeros(0, np.int32), *(line.ids for line in tokens)]))
        columns["sizes"].append(np.array(pieces, np.int32))
        if encoder.words:
            columns["words"].append(_numbered([line.words for line in tokens]))
    return columns


def _pieces(tokens: int, length: int) -> list[int]:
    """Sizes of the parts of a line of so many tokens: itself, or equal parts of half a row at most."""
    parts = 1 if tokens <= length // 2 else -(-tokens // max(1, length // 2))
    return [len(part) for part in np.array_split(np.arange(tokens), parts)] if tokens else []


def _numbered(lines: list[np.ndarray]) -> np.ndarray:
    """Word numbers that go on from line to line, `[tokens]`."""
    found, first = [np.zeros(0, np.int32)], 0
    for words in lines:
        found.append(np.where(words < 0, -1, words + first).astype(np.int32))
        first += int(words.max(initial=-1)) + 1
    return np.concatenate(found)
