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
def _twice_artanh(s: tl.tensor) -> tl.tensor:
    """2·artanh(s) = log((1 + s) / (1 − s)) for |s| ≤ 1/3, as a series."""
    q = s * s
    return (
        2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15)))))))
    )


@kernel
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x), relatively exact for very negative numbers: log(1 + w) = 2·artanh(w / (2 + w))."""
    w = tl.exp(-tl.abs(x))
    return tl.where(x > 0, x, 0.0) + _twice_artanh(w / (2.0 + w))


@kernel
def log_of_share(x: tl.tensor) -> tl.tensor:
    """log(x) of a number in (0, 1], relatively exact near 1, where the device's own is exact absolutely only."""
    return tl.where(x > 0.5, _twice_artanh((x - 1.0) / (x + 1.0)), tl.log(x))


@kernel
def _exp_near_zero(x: tl.tensor) -> tl.tensor:
    """e^x for |x| ≤ 0.18."""
    return 1.0 + x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))


@kernel
def exp(x: tl.tensor) -> tl.tensor:
    """e^x without bias near 0: the device's own is off by two units in the last place, which adds up in a recurrence."""
    return tl.where(tl.abs(x) < 0.17, _exp_near_zero(x), tl.exp(x))


@kernel
def exp2(x: tl.tensor) -> tl.tensor:
    """2^x without bias near 0."""
    return tl.where(tl.abs(x) < 0.25, _exp_near_zero(x * 0.6931471805599453), tl.exp2(x))
