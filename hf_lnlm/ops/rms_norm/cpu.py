"""RMS norm on the CPU: numba kernels, one pass over the rows, forward and backward; nothing is kept but the inputs."""

from __future__ import annotations

from typing import Any

import torch

from ..causal_conv.compiled import STRICT, compiled
from ..causal_conv.cpu import flush
from ..causal_conv.flat import DOUBLES, FLOATS, flat_rows, flat_vector
from ..causal_conv.lanes import (
    WIDTH,
    fma,
    load_row,
    mul,
    padded_size,
    sigmoid,
    splat,
    store_row,
    sub,
    total,
)

try:
    import numpy as np
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

# Rows whose contributions to the weight's gradient are summed in float32 before they are added in float64.
BLOCK = 64

Vector = Any  # sixteen channels
Inputs = Any  # addresses and strides: (x, stride, z or 0, stride, weight)
Sizes = Any  # (rows, channels, groups)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@compiled(STRICT, forceinline=True)
def _gated(inputs: Inputs, r: int, e: int, left: int) -> Vector:
    """`x · silu(z)` of sixteen channels of row `r`."""
    x, stride, z, gate_stride, _weight = inputs
    value = load_row(x, r * stride + e, left)
    if z == 0:
        return value
    gate = load_row(z, r * gate_stride + e, left)
    return mul(mul(value, gate), sigmoid(gate))


@compiled(STRICT, forceinline=True)
def _factor(squares: Vector, size: int, eps: Any) -> Any:
    """`1 / rms`, from sums of squares."""
    return _ONE / np.sqrt(total(squares) / np.float32(size) + eps)


@compiled(STRICT)
def _forward(inputs: Inputs, y: int, sizes: Sizes, eps: Any) -> None:
    rows, channels, groups = sizes
    size = channels // groups
    for r in range(rows):
        for begin in range(0, channels, size):
            end, squares = begin + size, splat(_ZERO)
            for e in range(begin, end, WIDTH):
                value = _gated(inputs, r, e, end - e)
                squares = fma(value, value, squares)
                store_row(y, r * channels + e, value, end - e)
            factor = splat(_factor(squares, size, eps))
            for e in range(begin, end, WIDTH):
                left, at = end - e, r * channels + e
                store_row(y, at, mul(mul(load_row(y, at, left), factor), load_row(inputs[4], e, left)), left)


@compiled(STRICT)
def _backward_group(
    inputs: Inputs, dy: int, r: int, begin: int, sizes: Sizes, eps: Any, dx: int, dz: int, part: int
) -> None:
    """Gradients of one group of one row; `dx` holds the gated values first, `part` sums the weight's gradient."""
    channels, size = sizes[1], sizes[1] // sizes[2]
    end, squares, inner = begin + size, splat(_ZERO), splat(_ZERO)
    for e in range(begin, end, WIDTH):
        left, at = end - e, r * channels + e
        value = _gated(inputs, r, e, left)
        squares = fma(value, value, squares)
        inner = fma(mul(load_row(dy, at, left), load_row(inputs[4], e, left)), value, inner)
        store_row(dx, at, value, left)
    factor = _factor(squares, size, eps)
    scale, pull = splat(factor), splat(-total(inner) * factor * factor / np.float32(size))
    for e in range(begin, end, WIDTH):
        left, at = end - e, r * channels + e
        value, g = load_row(dx, at, left), load_row(dy, at, left)
        store_row(part, e, fma(mul(g, value), scale, load_row(part, e, left)), left)
        g = mul(fma(g, load_row(inputs[4], e, left), mul(value, pull)), scale)
        if inputs[2] != 0:
            gate = load_row(inputs[2], r * inputs[3] + e, left)
            s = sigmoid(gate)
            bend = mul(s, fma(gate, sub(splat(_ONE), s), splat(_ONE)))
            store_row(dz, at, mul(mul(g, load_row(inputs[0], r * inputs[1] + e, left)), bend), left)
            g = mul(mul(g, gate), s)
        store_row(dx, at, g, left)


@compiled(STRICT)
def _backward(
    inputs: Inputs, dy: int, sizes: Sizes, eps: Any, dx: int, dz: int, part: int, totals: int
) -> None:  # fmt: skip
    rows, channels, groups = sizes
    for r in range(rows):
        for begin in range(0, channels, channels // groups):
            _backward_group(inputs, dy, r, begin, sizes, eps, dx, dz, part)
        if r % BLOCK == BLOCK - 1:
            flush(part, totals, channels)
    flush(part, totals, channels)


def rms_norm_cpu(
    x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, eps: float, groups: int
) -> torch.Tensor:
    """Forward pass; arguments as in `rms_norm`, all float32."""
    values, gates, scale = flat_rows(x), flat_rows(z), flat_vector(weight)
    inputs = (values.address, values.stride, gates.address, gates.stride, scale.address)
    y = torch.empty(x.shape, **FLOATS)
    size = x.shape[-1]
    _forward(inputs, y.data_ptr(), (x.numel() // size, size, groups), np.float32(eps))
    return y


def rms_norm_cpu_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, eps: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Backward pass: gradients of `x`, `weight` and `z` (None without a gate)."""
    values, gates, scale, dy = flat_rows(x), flat_rows(z), flat_vector(weight), flat_vector(grad)
    inputs = (values.address, values.stride, gates.address, gates.stride, scale.address)
    size = x.shape[-1]
    dx, dz = torch.empty(x.shape, **FLOATS), None if z is None else torch.empty(x.shape, **FLOATS)
    part, totals = torch.zeros(padded_size(size), **FLOATS), torch.zeros(size, **DOUBLES)
    into = dx.data_ptr(), 0 if dz is None else dz.data_ptr(), part.data_ptr(), totals.data_ptr()
    _backward(inputs, dy.address, (x.numel() // size, size, groups), np.float32(eps), *into)
    return dx, totals.float(), dz
