"""A process in which Triton's kernels run by Triton's own interpreter, on any machine's processor.

Triton decides when it is imported whether kernels are compiled or interpreted, and other tests of a process may have
imported it long ago. So kernels are checked in a process of their own, which computes errors that the tests compare.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest


def start() -> None:
    """Prepare the process, before anything imports Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # the interpreter's own: numpy's remarks where it looks for the largest of only NaN, or computes what a mask drops
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton|numpy")


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call a function of a test module, with its arguments, where Triton interprets."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=500)
