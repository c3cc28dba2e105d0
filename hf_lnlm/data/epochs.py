"""How the epoch reaches the collators: datasets that stamp every row with it.

Masks and noise are a function of (seed, epoch, example_id) alone. `example_id` is a column of every dataset of this
package; the epoch is set by `dataset.set_epoch(epoch)` in the main process *before* the loader's iterator is made, and
lives in shared memory, so that worker processes see it whether they are forked, spawned, fresh or persistent. Collators
find it in the rows (`row["epoch"]`) and stay stateless.

Rows must reach the collator whole: under transformers' Trainer set `remove_unused_columns=False`.

Who calls `set_epoch`: `accelerate`'s loaders do when they have a `dataset` with that method, **except** for sharded
batch samplers over a seedable sampler (two processes, map-style), where accelerate 1.15 calls the sampler's method
instead. So a training loop calls `train_dataset.set_epoch(epoch)` itself at the start of every epoch; calling twice is
harmless. Evaluation never calls it: the masks of an evaluation are those of epoch 0 every time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset


class Epoch:
    """The current epoch, shared with worker processes."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        """Set the epoch, 0 or more, for this process and all workers that hold this object.

        Raises:
            ValueError: A negative number.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self._value.fill_(int(epoch))

    def get(self) -> int:
        """The epoch last set, 0 at first."""
        return int(self._value)


class EpochDataset(Dataset[dict[str, Any]]):
    """Base of the map-style datasets: keeps the epoch that rows carry."""

    def __init__(self) -> None:
        self.epoch = Epoch()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that later rows carry."""
        self.epoch.set(epoch)


class EpochRows(EpochDataset):
    """Any map-style dataset of dict rows, with `example_id` (the index, unless the row has one) and `epoch` added.

    Args:
        rows: Map-style dataset of mappings, for instance a `datasets.Dataset`.
    """

    def __init__(self, rows: Any) -> None:
        super().__init__()
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: Mapping[str, Any] = self.rows[index]
        return {"example_id": index, **row, "epoch": self.epoch.get()}


class EpochStream(IterableDataset[dict[str, Any]]):
    """Any iterable dataset of dict rows, with `example_id` (the running number) and `epoch` added.

    Rows come from one worker only, so that their order doesn't depend on the number of workers.

    Args:
        rows: Re-iterable of mappings, for instance a `datasets.IterableDataset`.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.epoch = Epoch()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that later rows carry, and the order of rows that shuffle by epoch."""
        self.epoch.set(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if is_reading_worker():
            with _as_only_reader():
                for index, row in enumerate(self.numbered_rows()):
                    yield {"example_id": index, **row, "epoch": self.epoch.get()}

    def numbered_rows(self) -> Iterator[Mapping[str, Any]]:
        """The rows in the order of their numbers."""
        yield from self.rows


@contextlib.contextmanager
def _as_only_reader() -> Iterator[None]:
    """Hide from `datasets` that a loader has workers: it would give this one its own share of the shards only."""
    from torch.utils.data._utils import worker

    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info


def is_reading_worker() -> bool:
    """True in the main process and in the first worker of a loader: the one process that reads a stream."""
    worker = torch.utils.data.get_worker_info()
    return worker is None or worker.id == 0
