"""Causal depthwise convolution on the CPU: numba kernels of explicit vectors, fused with SiLU, one pass over the rows.

Complexity: O(B · L · E · K) time and no memory beyond the result; the backward pass recomputes the pre-activation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.compiled import STRICT, compiled, part
from ..kernels.flat import FLOATS, Flat, flat_integers, flat_rows, flat_vector
from ..kernels.simd import (
    WIDTH,
    add,
    flush,
    fma,
    load,
    load_row,
    mul,
    padded_size,
    read_float,
    read_integer,
    sigmoid,
    splat,
    store,
    store_row,
    sub,
    whole_lanes,
    write_float,
)
from .inputs import INPUTS

try:
    import numpy as np
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

# Tokens whose contributions to a weight's gradient are summed in float32 before they are added in float64.
BLOCK = 64

Vector = Any  # sixteen channels


class Inputs(NamedTuple):
    """Addresses of the tensors of `causal_conv`, 0 for absent ones; `stride` is that of `x` from token to token."""

    x: int
    stride: int
    weight: int
    bias: int
    state: int
    gather_index: int


class Sizes(NamedTuple):
    """Sizes of a call."""

    batch: int
    length: int
    channels: int
    kernel: int


class Out(NamedTuple):
    """Addresses of the gradients of input and state; `stride` is the former's from token to token."""

    dx: int
    stride: int
    dstate: int


_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@part(STRICT, forceinline=True)
def _source(inputs: Inputs, r: int, t: int, k: int, sizes: Sizes) -> int:
    """Row that tap `k` reads at position `t`, counted from the zero row (see `conv_gather_index`)."""
    gather_index, length, kernel = inputs.gather_index, sizes.length, sizes.kernel
    if gather_index == 0 or k == kernel - 1:
        return t + k + 1
    return read_integer(gather_index, (r * (length + 1) + t) * (kernel - 1) + k)


@part(STRICT, forceinline=True)
def _read(inputs: Inputs, source: int, r: int, e: int, sizes: Sizes) -> Vector:
    """Sixteen channels of a source row: of the input from `kernel` on, of the state from 1 on, else zero."""
    x, stride, _weight, _bias, state, _taps = inputs
    _batch, length, channels, kernel = sizes
    if source >= kernel:
        return load_row(x, (r * length + source - kernel) * stride + e, channels - e)
    if source > 0 and state != 0:
        return load_row(state, (r * (kernel - 1) + source - 1) * channels + e, channels - e)
    return splat(_ZERO)


@part(STRICT, forceinline=True)
def _total(inputs: Inputs, r: int, t: int, e: int, sizes: Sizes) -> Vector:
    """The sum before the activation, for sixteen channels of one position."""
    channels, kernel = sizes.channels, sizes.kernel
    value = load_row(inputs.bias, e, channels - e) if inputs.bias != 0 else splat(_ZERO)
    for k in range(kernel):
        row = _read(inputs, _source(inputs, r, t, k, sizes), r, e, sizes)
        value = fma(load_row(inputs.weight, k * channels + e, channels - e), row, value)
    return value


@compiled(STRICT)
def _forward(inputs: Inputs, y: int, last: int, sizes: Sizes, activation: bool) -> None:
    batch, length, channels, kernel = sizes
    for r in range(batch):
        for t in range(length):
            for e in range(0, channels, WIDTH):
                value = _total(inputs, r, t, e, sizes)
                if activation:
                    value = mul(value, sigmoid(value))
                store_row(y, (r * length + t) * channels + e, value, channels - e)
        for k in range(kernel - 1):
            for e in range(0, channels, WIDTH):
                kept = _read(inputs, _source(inputs, r, length, k, sizes), r, e, sizes)
                store_row(last, (r * (kernel - 1) + k) * channels + e, kept, channels - e)


@part(STRICT, forceinline=True)
def _give(grad: Vector, source: int, r: int, e: int, sizes: Sizes, out: Out) -> None:
    """Add to the gradient of the row that a tap had read."""
    _batch, length, channels, kernel = sizes
    left = channels - e
    if source >= kernel:
        at = (r * length + source - kernel) * out.stride + e
        store_row(out.dx, at, add(load_row(out.dx, at, left), grad), left)
    elif source > 0:
        at = (r * (kernel - 1) + source - 1) * channels + e
        store_row(out.dstate, at, add(load_row(out.dstate, at, left), grad), left)


@part(STRICT, forceinline=True)
def _retreat(inputs: Inputs, dy: int, r: int, t: int, sizes: Sizes, activation: bool, part: int, out: Out) -> None:
    """One position's gradients; `part` takes those of the weights and, as its last row, of the bias.

    A position's own tap writes its row, which no earlier position has read; the other taps add to rows written before.
    """
    _batch, length, channels, kernel = sizes
    padded = whole_lanes(channels)
    one = splat(_ONE)
    for e in range(0, channels, WIDTH):
        grad = load_row(dy, (r * length + t) * channels + e, channels - e)
        if activation:
            value = _total(inputs, r, t, e, sizes)
            s = sigmoid(value)
            grad = mul(mul(grad, s), fma(value, sub(one, s), one))
        store(part, kernel * padded + e, add(load(part, kernel * padded + e), grad))
        for k in range(kernel):
            source = _source(inputs, r, t, k, sizes)
            at = k * padded + e
            store(part, at, fma(grad, _read(inputs, source, r, e, sizes), load(part, at)))
            given = mul(grad, load_row(inputs.weight, k * channels + e, channels - e))
            if k == kernel - 1:
                store_row(out.dx, (r * length + t) * out.stride + e, given, channels - e)
            else:
                _give(given, source, r, e, sizes, out)


@compiled(STRICT)
def _backward(
    inputs: Inputs, dy: int, dlast: int, out: Out, part: int, totals: int, sizes: Sizes, activation: bool
) -> None:
    """`part` and `totals` have a row for each tap and one for the bias, padded to whole vectors."""
    batch, length, channels, kernel = sizes
    count = (kernel + 1) * whole_lanes(channels)
    for r in range(batch):
        for t in range(length):
            _retreat(inputs, dy, r, t, sizes, activation, part, out)
            if t % BLOCK == BLOCK - 1:
                flush(part, totals, count)
        for k in range(kernel - 1):
            for e in range(0, channels, WIDTH):
                grad = load_row(dlast, (r * (kernel - 1) + k) * channels + e, channels - e)
                _give(grad, _source(inputs, r, length, k, sizes), r, e, sizes, out)
        flush(part, totals, count)


def _inputs(call: dict[str, Any]) -> tuple[list[Flat], Inputs, Sizes]:
    """Turn the operator's tensors into memory to keep alive, the kernels' inputs and the sizes."""
    x, weight, gather_index = flat_rows(call["x"]), flat_vector(call["weight"].t()), call["gather_index"]
    bias, state = flat_vector(call["bias"]), flat_vector(call["state"])
    table = flat_integers(gather_index)
    inputs = Inputs(x.address, x.stride, weight.address, bias.address, state.address, table.address)
    return [x, weight, bias, state, table], inputs, Sizes._make((*call["x"].shape, call["weight"].shape[1]))


def causal_conv_cpu(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass; arguments and results as in `causal_conv_eager`, always float32."""
    call, (activation, _save) = INPUTS.split(values)
    _kept, inputs, sizes = _inputs(call)
    batch, length, channels, kernel = sizes
    y = torch.empty(batch, length, channels, **FLOATS)
    last = torch.empty(batch, kernel - 1, channels, **FLOATS)
    _forward(inputs, y.data_ptr(), last.data_ptr(), sizes, activation)
    return y, last, torch.empty(0, **FLOATS)


def causal_conv_cpu_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, _kept: Any, *values: Any, into: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `causal_conv_eager_backward`."""
    call, (activation,) = INPUTS.split(values)
    _tensors, inputs, sizes = _inputs(call)
    batch, length, channels, kernel = sizes
    dx = torch.empty(batch, length, channels, **FLOATS) if into is None else into
    dstate = torch.zeros(batch, kernel - 1, channels, **FLOATS)
    part = torch.zeros(kernel + 1, padded_size(channels), **FLOATS)
    totals = part.double()
    dy, dlast = flat_vector(grad_y), flat_vector(grad_state)
    out = Out(dx.data_ptr(), dx.stride(-2), dstate.data_ptr())
    _backward(inputs, dy.address, dlast.address, out, part.data_ptr(), totals.data_ptr(), sizes, activation)
    sums = totals[:, :channels].float()
    return {"x": dx, "weight": sums[:-1].t().contiguous(), "bias": sums[-1].clone(), "state": dstate}


@part(STRICT)
def convolve_token(
    x: int, at: int, weight: int, bias: int, state: int, r: int, channels: int, kernel: int, activation: bool, y: int,
    y_at: int, last: int,
) -> None:  # fmt: skip
    """One position of row `r`: `x` from element `at` on, `y` from `y_at`; `weight` is `(E, K)`, states `(B, K - 1, E)`."""
    rows = r * (kernel - 1) * channels
    for e in range(channels):
        current = read_float(x, at + e)
        value = current * read_float(weight, (e + 1) * kernel - 1)
        if bias != 0:
            value += read_float(bias, e)
        for k in range(kernel - 1):
            before = read_float(state, rows + k * channels + e) if state != 0 else _ZERO
            value += before * read_float(weight, e * kernel + k)
            if k > 0:
                write_float(last, rows + (k - 1) * channels + e, before)
        if kernel > 1:
            write_float(last, rows + (kernel - 2) * channels + e, current)
        write_float(y, y_at + e, value)
    if activation:
        for e in range(0, channels, WIDTH):
            sums = load_row(y, y_at + e, channels - e)
            store_row(y, y_at + e, mul(sums, sigmoid(sums)), channels - e)


@compiled(STRICT)
def _step(
    x: int, stride: int, weight: int, bias: int, state: int, batch: int, channels: int, kernel: int, activation: bool,
    y: int, last: int,
) -> None:  # fmt: skip
    """One position of every row."""
    for r in range(batch):
        convolve_token(
            x, r * stride, weight, bias, state, r, channels, kernel, activation, y, r * channels, last
        )  # fmt: skip


def causal_conv_cpu_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    _gather_index: None,
    activation: bool,
    _save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One position; arguments and results as in `causal_conv_step`."""
    batch, _, channels = x.shape
    kernel = weight.shape[1]
    rows, filters, shift, carried = flat_rows(x), flat_vector(weight), flat_vector(bias), flat_vector(state)
    y, last = torch.empty(x.shape, **FLOATS), torch.empty(batch, kernel - 1, channels, **FLOATS)
    addresses = rows.address, rows.stride, filters.address, shift.address, carried.address
    _step(*addresses, batch, channels, kernel, activation, y.data_ptr(), last.data_ptr())
    return y, last
