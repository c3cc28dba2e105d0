"""Triton's decorator and the scalar formulas that kernels of several operations share.

Without Triton the decorator returns the plain function, so that modules with kernels can be imported (and their code
carried) anywhere; the graphics processor's backends then report themselves as unavailable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # the optional extra [gpu] is not installed
    triton = None
    tl = None


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function with Triton on its first launch; returns `function` itself without Triton.

    Args:
        function: in Triton's subset of Python.
    """
    return function if triton is None else triton.jit(function)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size` entries.

    Args:
        size: entries wanted.
        least: lower bound.
    """
    return max(least, 1 << (size - 1).bit_length())


@kernel
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@kernel
def tanh(x: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent by way of the logistic function."""
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@kernel
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x), relatively exact for very negative numbers: log(1 + w) = 2·artanh(w / (2 + w)) as a series."""
    w = tl.exp(-tl.abs(x))
    s = w / (2.0 + w)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.where(x > 0, x, 0.0) + 2.0 * s * series
