"""Contiguous streams, for models that carry their state from batch to batch (truncated back-propagation through time).

The tokens of all documents are cut into B streams of W windows of T tokens. Item k of the dataset is window k // B of
stream k % B, so that a sequential loader of batch size B gives batch after batch the next window of every stream, in
the same row. Inputs are tokens t … t + T − 1; what they predict are tokens t + 1 … t + T: the last one comes as
`next_id`, so no token is read twice, which a carried state would not forgive.

With several processes make B the *global* number of rows a step (rows per process × processes). accelerate gives
process r the batches r, r + processes, …, hence streams r·rows … (r + 1)·rows − 1, always the same ones;
`streams.shard(rank, world_size)` does the same for a loader of one's own. With gradient accumulation the small batches
are consecutive windows.

Columns of a row: `input_ids` `(T,)`, `next_id`, `num_bytes` (bytes of the T predicted tokens), `example_id` k, `epoch`,
`reset` (window 0: forget the carried state before this row), and with `boundaries=True` `position_ids` `(T,)`, 0 where a
document starts (forget the state there) and counting on across windows otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..nn.loss_heads import IGNORED
from .epochs import EpochDataset
from .tokens import Encoder, TokenStream


class BPTTStreams(EpochDataset):
    """Windows of contiguous streams, in the order a sequential loader needs.

    Args:
        documents: `datasets.Dataset` with a `text` column.
        tokenizer: Fast tokenizer.
        length: T, tokens of a window.
        num_streams: B, rows of a step over all processes.
        boundaries: Adds `position_ids` that restart at every document, whose first token is then not predicted.
        frame: Which of the tokenizer's bos and eos are put around each document: `both`, `start`, `end` or `none`.

    Raises:
        ValueError: Too little text for one window in every stream (names the counts).
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: Any,
        length: int,
        num_streams: int,
        *,
        boundaries: bool = False,
        frame: str = "both",
    ) -> None:
        super().__init__()
        if length < 1 or num_streams < 1:
            raise ValueError(f"length and num_streams must be 1 or more, got {length} and {num_streams}")
        self.length, self.num_streams, self.boundaries = length, num_streams, boundaries
        self.tokens = TokenStream(documents, Encoder(tokenizer, frame=frame, close=boundaries))
        self.num_windows = max(0, len(self.tokens) - 1) // (length * num_streams)
        if self.num_windows == 0:
            need = f"{num_streams} streams of one window of {length} tokens need {num_streams * length + 1}"
            raise ValueError(
                f"the text is too short: {len(documents)} documents with {len(self.tokens)} tokens, but {need}: "
                "use more text, fewer rows or a smaller length"
            )

    def __len__(self) -> int:
        return self.num_streams * self.num_windows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item must lie in 0 … {len(self) - 1}, got {index}")
        window, stream = divmod(index % len(self), self.num_streams)
        begin = stream * self.num_windows * self.length
        start = begin + window * self.length
        ids = self.tokens.ids.slice(start, start + self.length + 1).astype(np.int64)
        num_bytes = self.tokens.num_bytes.slice(start + 1, start + self.length + 1).astype(np.int64)
        row: dict[str, Any] = {"example_id": index % len(self), "input_ids": ids[:-1], "next_id": int(ids[-1])}
        if self.boundaries:
            since_begin = np.arange(start - begin, start - begin + self.length + 1)
            positions = np.minimum(self.tokens.positions(start, start + self.length + 1), since_begin)
            row["position_ids"] = positions[:-1]
            num_bytes[positions[1:] == 0] = 0
            row["next_id"] = IGNORED if positions[-1] == 0 else row["next_id"]
        return {**row, "num_bytes": int(num_bytes.sum()), "reset": window == 0, "epoch": self.epoch.get()}

    def shard(self, rank: int, world_size: int) -> BPTTStreamShard:
        """The streams of one process, as a dataset of their own with `num_streams / world_size` streams.

        Args:
            rank: Number of the process.
            world_size: Number of processes.

        Raises:
            ValueError: The streams can't be divided evenly, or the rank is out of range.
        """
        return BPTTStreamShard(self, rank, world_size)


class BPTTStreamShard(EpochDataset):
    """The streams of one process; rows keep the `example_id` they have in the whole."""

    def __init__(self, whole: BPTTStreams, rank: int, world_size: int) -> None:
        super().__init__()
        if not 0 <= rank < world_size or whole.num_streams % world_size:
            raise ValueError(
                f"{whole.num_streams} streams must be a multiple of world_size ({world_size}) and rank lie in "
                f"0 … {world_size - 1}, got rank {rank}"
            )
        self.whole, self.epoch = whole, whole.epoch
        self.num_streams = whole.num_streams // world_size
        self.first_stream = rank * self.num_streams

    def __len__(self) -> int:
        return self.num_streams * self.whole.num_windows

    def __getitem__(self, index: int) -> dict[str, Any]:
        window, stream = divmod(index % len(self), self.num_streams)
        return self.whole[window * self.whole.num_streams + self.first_stream + stream]
