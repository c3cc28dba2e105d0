"""RMS norm on the CPU: numba kernels, one pass over the rows, forward and backward; nothing is kept but the inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.compiled import STRICT, compiled, part
from ..kernels.flat import DOUBLES, FLOATS, flat_rows, flat_vector
from ..kernels.simd import (
    WIDTH,
    flush,
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


class Inputs(NamedTuple):
    """Addresses of the tensors of `rms_norm`, `z` 0 without a gate, and strides from row to row."""

    x: int
    stride: int
    z: int
    gate_stride: int
    weight: int


class Sizes(NamedTuple):
    """Sizes of a call."""

    rows: int
    channels: int
    groups: int


_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@part(STRICT, forceinline=True)
def _gated(inputs: Inputs, r: int, e: int, left: int) -> Vector:
    """`x · silu(z)` of sixteen channels of row `r`."""
    x, stride, z, gate_stride, _weight = inputs
    value = load_row(x, r * stride + e, left)
    if z == 0:
        return value
    gate = load_row(z, r * gate_stride + e, left)
    return mul(mul(value, gate), sigmoid(gate))


@part(STRICT, forceinline=True)
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
                store_row(y, at, mul(mul(load_row(y, at, left), factor), load_row(inputs.weight, e, left)), left)


@part(STRICT)
def _backward_group(
    inputs: Inputs, dy: int, r: int, begin: int, sizes: Sizes, eps: Any, dx: int, dz: int, part: int
) -> None:
    """Gradients of one group of one row; `dx` holds the gated values first, `part` sums the weight's gradient."""
    channels, size = sizes.channels, sizes.channels // sizes.groups
    end, squares, inner = begin + size, splat(_ZERO), splat(_ZERO)
    for e in range(begin, end, WIDTH):
        left, at = end - e, r * channels + e
        value = _gated(inputs, r, e, left)
        squares = fma(value, value, squares)
        inner = fma(mul(load_row(dy, at, left), load_row(inputs.weight, e, left)), value, inner)
        store_row(dx, at, value, left)
    factor = _factor(squares, size, eps)
    scale, pull = splat(factor), splat(-total(inner) * factor * factor / np.float32(size))
    for e in range(begin, end, WIDTH):
        left, at = end - e, r * channels + e
        value, g = load_row(dx, at, left), load_row(dy, at, left)
        store_row(part, e, fma(mul(g, value), scale, load_row(part, e, left)), left)
        g = mul(fma(g, load_row(inputs.weight, e, left), mul(value, pull)), scale)
        if inputs.z != 0:
            gate = load_row(inputs.z, r * inputs.gate_stride + e, left)
            s = sigmoid(gate)
            bend = mul(s, fma(gate, sub(splat(_ONE), s), splat(_ONE)))
            store_row(dz, at, mul(mul(g, load_row(inputs.x, r * inputs.stride + e, left)), bend), left)
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
    inputs = Inputs(values.address, values.stride, gates.address, gates.stride, scale.address)
    y = torch.empty(x.shape, **FLOATS)
    size = x.shape[-1]
    _forward(inputs, y.data_ptr(), Sizes(x.numel() // size, size, groups), np.float32(eps))
    return y


def rms_norm_cpu_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, eps: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Backward pass: gradients of `x`, `weight` and `z` (None without a gate)."""
    values, gates, scale, dy = flat_rows(x), flat_rows(z), flat_vector(weight), flat_vector(grad)
    inputs = Inputs(values.address, values.stride, gates.address, gates.stride, scale.address)
    size = x.shape[-1]
    dx, dz = torch.empty(x.shape, **FLOATS), None if z is None else torch.empty(x.shape, **FLOATS)
    part, totals = torch.zeros(padded_size(size), **FLOATS), torch.zeros(size, **DOUBLES)
    into = dx.data_ptr(), 0 if dz is None else dz.data_ptr(), part.data_ptr(), totals.data_ptr()
    _backward(inputs, dy.address, Sizes(x.numel() // size, size, groups), np.float32(eps), *into)
    return dx, totals.float(), dz
