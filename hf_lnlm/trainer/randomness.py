"""Random state of a run: kept while something looks at the model that must not disturb training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the random generators of Python, NumPy and torch (all devices in use) as they were found."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    devices = torch.cuda.random.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.random.set_rng_state_all(devices)
