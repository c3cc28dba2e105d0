"""Random numbers that are a function of (seed, epoch, example_id) and of nothing else.

A counter-based generator (Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is keyed by the
seed and a purpose and starts at a counter made of epoch and example. No generator lives from one row to the next, so a
resumed run, another number of workers or another accumulation draws the same masks.
"""

from __future__ import annotations

import zlib

import numpy as np

_WORD = 2**64


def generator(seed: int, epoch: int, example_id: int, purpose: str) -> np.random.Generator:
    """The generator of one row.

    Args:
        seed: The run's seed.
        epoch: Epoch, 0 or more.
        example_id: The row's stable number.
        purpose: What the numbers are for; different purposes draw independently.

    Returns:
        A fresh generator; 2**128 numbers apart from any other row's.
    """
    key = np.array([seed % _WORD, zlib.crc32(purpose.encode())], np.uint64)
    counter = np.array([0, 0, epoch % _WORD, example_id % _WORD], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
