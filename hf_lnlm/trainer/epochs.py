"""Epochs that a resumed run repeats exactly.

accelerate sets the epoch of some of: the dataset, the sampler, the sampler under a shard, the sampler under a skip;
which one depends on the number of processes and on whether the run was resumed. Here every one of them gets it. A
stream without a length would, in the stock loop, end in the middle of an accumulation and forget its epoch on resume;
repeated without an end it is one long epoch to the loop, and skipping batches replays the epochs one after another.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset


def set_epoch_everywhere(loader: Any, epoch: int, seed: int) -> None:
    """Set the epoch of a loader's dataset and of every sampler in it.

    Args:
        loader: The prepared training loader.
        epoch: From 0.
        seed: Seed of samplers that draw from a generator instead of knowing epochs; they get `seed + epoch`.
    """
    seen: list[Any] = []
    waiting = [loader]
    while waiting:
        found = waiting.pop()
        if found is None or any(found is other for other in seen):
            continue
        seen.append(found)
        if found is not loader and hasattr(found, "set_epoch"):
            found.set_epoch(epoch)
        elif hasattr(found, "generator") and isinstance(found, torch.utils.data.Sampler):
            setattr(found, "generator", torch.Generator().manual_seed(seed + epoch))  # noqa: B010
        waiting += [getattr(found, name, None) for name in ("dataset", "batch_sampler", "sampler", "base_dataloader")]


class EndlessEpochs(IterableDataset[Any]):
    """A stream over and over, with its epoch set before each pass; ends if a pass gives nothing.

    Args:
        rows: An iterable dataset, with `set_epoch` or without.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        epoch = 0
        while True:
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            empty = True
            for row in self.rows:
                empty = False
                yield row
            if empty:
                return
            epoch += 1
