"""Packed blocks: documents one after the other, cut into rows of equal length, map-style or streaming.

Columns of a row (numpy arrays and integers): `input_ids` `(length,)`; `example_id`, the block's number, stable for given
documents, tokenizer and length; `epoch` (see data/epochs.py); `num_bytes`, the UTF-8 bytes covered by the tokens that
this block is first to hold, for bits per byte; with `boundaries=True` `position_ids` `(length,)`, which restart at 0
where a document starts; with `words=True` `word_ids` `(length,)`, −1 outside every word.

An objective knows the options it needs: `pack(documents, tokenizer, **objective.packing(tokenizer, length))`.
With `overlap=1` (causal) every token but the stream's first is predicted exactly once: a block's first token is the
last of the block before it and serves as context only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .epochs import EpochDataset, EpochStream
from .tokens import Encoder, Tokens, TokenStream


@dataclass(frozen=True)
class Layout:
    """How a stream is cut.

    Args:
        length: Tokens of a row, head and tail included.
        overlap: Tokens a row repeats from the row before.
        head: Ids put before each row (`<cls>`).
        tail: Ids put behind each row (`<sep>`).
    """

    length: int
    overlap: int = 0
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.body <= max(self.overlap, 0) or self.overlap < 0:
            frame = len(self.head) + len(self.tail)
            raise ValueError(
                f"length must exceed the overlap ({self.overlap}) and the {frame} special tokens of a row, "
                f"got {self.length}"
            )

    @property
    def body(self) -> int:
        """Tokens of text in a row."""
        return self.length - len(self.head) - len(self.tail)

    @property
    def stride(self) -> int:
        """Tokens by which a row starts later than the row before."""
        return self.body - self.overlap

    def count(self, tokens: int, drop_last: bool) -> int:
        """Number of rows that `tokens` give; a shorter last row counts unless dropped, if it has two tokens or more.

        Args:
            tokens: Of the stream.
            drop_last: Leaves out a shorter last row.
        """
        fresh = max(0, tokens - self.overlap)
        whole, rest = divmod(fresh, self.stride)
        return whole + (not drop_last and rest > 0 and rest + self.overlap >= 2)

    def row(self, ids: np.ndarray, num_bytes: np.ndarray, extra: dict[str, np.ndarray]) -> dict[str, Any]:
        """Build a row from a body's arrays, each `(body,)`; `extra` may hold `position_ids` and `word_ids`.

        Args:
            ids: `(body,)`.
            num_bytes: UTF-8 bytes of each token, `(body,)`.
            extra: May hold `position_ids` and `word_ids`, each `(body,)`.
        """
        seen = num_bytes.astype(np.int64)
        seen[: self.overlap] = 0
        row: dict[str, Any] = {"input_ids": _framed(ids, self.head, self.tail)}
        if "position_ids" in extra:
            # Nothing predicts a document's first token, so its bytes (none where documents begin with bos) don't count.
            seen[extra["position_ids"] == 0] = 0
            row["position_ids"] = extra["position_ids"]
        if "word_ids" in extra:
            row["word_ids"] = _framed(extra["word_ids"], (-1,) * len(self.head), (-1,) * len(self.tail))
        return {**row, "num_bytes": int(seen.sum())}


def _framed(values: np.ndarray, head: tuple[int, ...], tail: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.array(head, np.int64), values.astype(np.int64), np.array(tail, np.int64)])


def _restarting(positions: np.ndarray) -> np.ndarray:
    """Positions within a document `(body,)` → the same, but a row's first part counts from the row's first token."""
    starts = np.flatnonzero(positions == 0)
    first = int(starts[0]) if len(starts) else len(positions)
    return np.concatenate([np.arange(first), positions[first:]])


class PackedBlocks(EpochDataset):
    """Blocks of documents, map-style: row k is the same at any time, in any process.

    Args:
        documents: `datasets.Dataset` with a `text` column.
        tokenizer: Fast tokenizer.
        length: Tokens of a row.
        overlap: Tokens a row repeats from the row before; 1 for causal models, so that each token is predicted once.
        head: Ids put before each row.
        tail: Ids put behind each row.
        boundaries: Adds `position_ids` that restart at every document; only without head and tail.
        words: Adds `word_ids`.
        frame: Which of the tokenizer's bos and eos are put around each document: `both`, `start`, `end` or `none`.
        drop_last: Leaves out the last row if it is shorter than the others (always, if it has a single token).

    Raises:
        ValueError: No documents, or too little text for one block (names the counts).
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: Any,
        length: int,
        *,
        drop_last: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layout, self.encoder = _cut(tokenizer, length, **options)
        self.stream = TokenStream(documents, self.encoder)
        self._count = self.layout.count(len(self.stream), drop_last)
        if self._count == 0:
            raise ValueError(too_short(len(self.stream), len(documents), self.layout))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self._count <= index < self._count:
            raise IndexError(f"block must lie in 0 … {self._count - 1}, got {index}")
        index %= self._count
        start = index * self.layout.stride
        stop = min(start + self.layout.body, len(self.stream))
        extra = {}
        if self.encoder.close:
            extra["position_ids"] = _restarting(self.stream.positions(start, stop))
        if self.stream.words is not None:
            extra["word_ids"] = self.stream.words.slice(start, stop)
        ids, num_bytes = self.stream.ids.slice(start, stop), self.stream.num_bytes.slice(start, stop)
        return {"example_id": index, **self.layout.row(ids, num_bytes, extra), "epoch": self.epoch.get()}


class PackedStream(EpochStream):
    """Blocks of documents that are read as they come: nothing is kept, so the text may be larger than the disk.

    Rows are those of `PackedBlocks` in the same order, with a shorter last one dropped. One worker reads.

    Args:
        documents: Re-iterable of rows with a `text`, for instance a `datasets.IterableDataset`.
        tokenizer: Fast tokenizer.
        length: Tokens of a row.
        options: `overlap`, `head`, `tail`, `boundaries`, `words` and `frame`, as in `PackedBlocks`.

    Raises:
        ValueError: On iteration, where the text is too short for one block.
    """

    def __init__(self, documents: Any, tokenizer: Any, length: int, **options: Any) -> None:
        super().__init__(documents)
        self.layout, self.encoder = _cut(tokenizer, length, **options)

    def numbered_rows(self) -> Iterator[dict[str, Any]]:
        """Cut the documents into rows as they come.

        Raises:
            ValueError: The text is too short for one row.
        """
        buffer, empty = _Buffer(), True
        for document in self.rows:
            begun = 0
            for tokens in self.encoder.pieces([document["text"]]):
                buffer.append(tokens, begun)
                begun += len(tokens.ids)
                for row in self._complete(buffer):
                    empty = False
                    yield row
        if empty:
            raise ValueError(
                f"the stream is too short: {len(buffer)} tokens, but one block needs {self.layout.body} (length "
                f"{self.layout.length}): use more text or a smaller length"
            )

    def _complete(self, buffer: _Buffer) -> Iterator[dict[str, Any]]:
        """Take as many rows as the buffer holds."""
        while len(buffer) >= self.layout.body:
            ids, num_bytes, words, positions = buffer.take(self.layout.body, self.layout.stride)
            extra = {"position_ids": _restarting(positions)} if self.encoder.close else {}
            if self.encoder.words:
                extra["word_ids"] = words
            yield self.layout.row(ids, num_bytes, extra)


def pack(documents: Any, tokenizer: Any, length: int, *, drop_last: bool = True, **options: Any) -> Any:
    """Pack documents: `PackedBlocks` of a `datasets.Dataset`, `PackedStream` of anything without a length.

    Args:
        documents: Rows with a `text`.
        tokenizer: Fast tokenizer.
        length: Tokens of a row.
        drop_last: Leaves out a shorter last row; a stream always does.
        options: See `PackedBlocks`; `objective.packing(tokenizer, length)` gives `length` and these.
    """
    if hasattr(documents, "__len__"):
        return PackedBlocks(documents, tokenizer, length, drop_last=drop_last, **options)
    return PackedStream(documents, tokenizer, length, **options)


class _Buffer:
    """Tokens read but not yet given out, as arrays ids, num_bytes, words, positions."""

    def __init__(self) -> None:
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._arrays: tuple[np.ndarray, ...] = ()
        self._start = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, tokens: Tokens, begun: int) -> None:
        """Add tokens of a document of which `begun` came before them."""
        self._waiting.append((*tokens, begun + np.arange(len(tokens.ids))))
        self._length += len(tokens.ids)

    def take(self, size: int, stride: int) -> tuple[np.ndarray, ...]:
        """Return the first `size` tokens and move on by `stride`."""
        if self._waiting:
            rest = [array[self._start :] for array in self._arrays] or [np.zeros(0, np.int64)] * 4
            self._arrays = tuple(np.concatenate([old, *new]) for old, *new in zip(rest, *self._waiting, strict=True))
            self._waiting, self._start = [], 0
        taken = tuple(array[self._start : self._start + size] for array in self._arrays)
        self._start += stride
        self._length -= stride
        return taken


def _cut(
    tokenizer: Any,
    length: int,
    *,
    overlap: int = 0,
    head: tuple[int, ...] = (),
    tail: tuple[int, ...] = (),
    boundaries: bool = False,
    words: bool = False,
    frame: str = "both",
) -> tuple[Layout, Encoder]:
    """How rows are cut and documents encoded; see `PackedBlocks`."""
    if boundaries and (head or tail):
        raise ValueError("boundaries=True goes with rows without head and tail: position_ids mark the documents there")
    layout = Layout(length, overlap, tuple(head), tuple(tail))
    return layout, Encoder(tokenizer, frame=frame, close=boundaries, words=words)


def too_short(tokens: int, documents: int, layout: Layout) -> str:
    """The message for text that doesn't fill one row.

    Args:
        tokens: That there are.
        documents: That there are.
        layout: Of a row.
    """
    return (
        f"the text is too short: {documents} document{'s' * (documents != 1)} with {tokens} tokens, "
        f"but one block needs {layout.body} (length {layout.length}): use more text or a smaller length"
    )
