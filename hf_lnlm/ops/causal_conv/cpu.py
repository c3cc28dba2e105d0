"""Causal depthwise convolution on the CPU: numba kernels, fused with SiLU, one pass over the rows.

Complexity: O(B · L · E · K) time and no memory beyond the result; the backward pass recomputes the pre-activation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .fast_math import STRICT, compiled, sigmoidf
from .flat import flat_rows

# Tokens whose contributions to a weight's gradient are summed in float32 before they are added in float64.
BLOCK = 64

Array = Any  # numba's own array types: kernels are compiled for float32

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_NO_TAPS = np.empty((0, 0, 0), np.int64)


@compiled(STRICT)
def _source(taps: Array, r: int, t: int, k: int, kernel: int) -> int:
    """Row that tap `k` reads at position `t`, counted from the zero row (see `tap_table`)."""
    return taps[r, t, k] if taps.size > 0 else t + k + 1


@compiled(STRICT)
def _row(source: int, r: int, kernel: int, length: int, xs: int, channels: int) -> int:
    """Offset of a source row: into the input from `kernel` on, else into the state."""
    if source >= kernel:
        return (r * length + source - kernel) * xs
    return (r * (kernel - 1) + source - 1) * channels


@compiled(STRICT)
def _add_row(out: Array, weight: Array, row: Array, at: int, width: int) -> None:
    """`out += weight · row`, for one row that begins at `at`."""
    for e in range(width):
        out[e] += weight[e] * row[at + e]


@compiled(STRICT)
def _total(
    x: Array, xs: int, weight: Array, bias: Array, state: Array, taps: Array, r: int, t: int, sizes: Any, out: Array
) -> None:
    """The sum before the activation, for one position."""
    _batch, length, channels, kernel = sizes
    at = (r * length + t) * xs
    current = weight[kernel - 1]
    for e in range(channels):
        out[e] = bias[e] + current[e] * x[at + e]
    for k in range(kernel - 1):
        source = _source(taps, r, t, k, kernel)
        at = _row(source, r, kernel, length, xs, channels)
        if source >= kernel:
            _add_row(out, weight[k], x, at, channels)
        elif source > 0 and state.size > 0:
            _add_row(out, weight[k], state, at, channels)


@compiled(STRICT)
def _forward(
    x: Array,
    xs: int,
    weight: Array,
    bias: Array,
    state: Array,
    taps: Array,
    y: Array,
    last: Array,
    sizes: Any,
    activation: bool,
) -> None:
    batch, length, channels, kernel = sizes
    row = np.empty(channels, np.float32)
    for r in range(batch):
        for t in range(length):
            _total(x, xs, weight, bias, state, taps, r, t, sizes, row)
            at = (r * length + t) * channels
            if activation:
                for e in range(channels):
                    y[at + e] = row[e] * sigmoidf(row[e])
            else:
                for e in range(channels):
                    y[at + e] = row[e]
        for k in range(kernel - 1):
            source = _source(taps, r, length, k, kernel)
            at = _row(source, r, kernel, length, xs, channels)
            for e in range(channels):
                last[r, k, e] = x[at + e] if source >= kernel else _ZERO
            if 0 < source < kernel and state.size > 0:
                for e in range(channels):
                    last[r, k, e] = state[at + e]


@compiled(STRICT)
def _spread(grad: Array, factor: Array, dx: Array, dstate: Array, source: int, r: int, sizes: Any) -> None:
    """Add `factor · grad` to the gradient of the row that a tap had read."""
    _batch, length, channels, kernel = sizes
    at = _row(source, r, kernel, length, channels, channels)
    if source >= kernel:
        for e in range(channels):
            dx[at + e] += factor[e] * grad[e]
    elif source > 0:
        for e in range(channels):
            dstate[at + e] += factor[e] * grad[e]


@compiled(STRICT)
def _flush(part: Array, total: Array) -> None:
    """Move block sums into the float64 totals."""
    for k in range(part.shape[0]):
        for e in range(part.shape[1]):
            total[k, e] += part[k, e]
            part[k, e] = _ZERO


@compiled(STRICT)
def _slope(row: Array, dy: Array, at: int, grad: Array, activation: bool) -> None:
    """Gradient before the activation, for one position; `row` is the pre-activation."""
    if activation:
        for e in range(grad.size):
            s = sigmoidf(row[e])
            grad[e] = dy[at + e] * s * (_ONE + row[e] * (_ONE - s))
    else:
        for e in range(grad.size):
            grad[e] = dy[at + e]


@compiled(STRICT)
def _gather(grad: Array, x: Array, xs: int, state: Array, taps: Array, r: int, t: int, sizes: Any, part: Array) -> None:
    """One position's part of the weights' and bias's gradients; `part` has the bias as its last row."""
    _batch, length, channels, kernel = sizes
    at = (r * length + t) * xs
    for e in range(channels):
        part[kernel - 1, e] += grad[e] * x[at + e]
        part[kernel, e] += grad[e]
    for k in range(kernel - 1):
        source = _source(taps, r, t, k, kernel)
        at = _row(source, r, kernel, length, xs, channels)
        if source >= kernel:
            _add_row(part[k], grad, x, at, channels)
        elif source > 0 and state.size > 0:
            _add_row(part[k], grad, state, at, channels)


@compiled(STRICT)
def _backward(
    x: Array, xs: int, weight: Array, bias: Array, state: Array, taps: Array, dy: Array, dlast: Array, dx: Array,
    dstate: Array, dweight: Array, sizes: Any, activation: bool,
) -> None:  # fmt: skip
    """`dweight` has the bias's gradient as its last row."""
    batch, length, channels, kernel = sizes
    row = np.empty(channels, np.float32)
    grad = np.empty(channels, np.float32)
    ones = np.ones(channels, np.float32)
    part = np.zeros((kernel + 1, channels), np.float32)
    for r in range(batch):
        for k in range(kernel - 1):
            _spread(dlast[r, k], ones, dx, dstate, _source(taps, r, length, k, kernel), r, sizes)
        for t in range(length):
            if activation:
                _total(x, xs, weight, bias, state, taps, r, t, sizes, row)
            _slope(row, dy, (r * length + t) * channels, grad, activation)
            _gather(grad, x, xs, state, taps, r, t, sizes, part)
            _spread(grad, weight[kernel - 1], dx, dstate, t + kernel, r, sizes)
            for k in range(kernel - 1):
                _spread(grad, weight[k], dx, dstate, _source(taps, r, t, k, kernel), r, sizes)
            if t % BLOCK == BLOCK - 1:
                _flush(part, dweight)
        _flush(part, dweight)


def _arguments(call: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[int, int, int, int]]:
    """Turn the operator's tensors into the kernels' leading arguments and the sizes."""
    x, weight, bias = call["x"], call["weight"], call["bias"]
    rows, stride = flat_rows(x)
    kernel = weight.shape[1]
    shift = np.zeros(x.shape[2], np.float32) if bias is None else bias.detach().float().contiguous().numpy()
    state = call["state"]
    state = flat_rows(None if state is None else state.contiguous())[0]
    taps = _NO_TAPS if call["taps"] is None else call["taps"].contiguous().numpy()
    return (rows, stride, weight.detach().float().t().contiguous().numpy(), shift, state, taps), (*x.shape, kernel)


def causal_conv_cpu(call: dict[str, Any], activation: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass; arguments and results as in `causal_conv_eager`, always float32."""
    arguments, sizes = _arguments(call)
    batch, length, channels, kernel = sizes
    y = torch.empty(batch, length, channels)
    last = torch.empty(batch, kernel - 1, channels)
    _forward(*arguments, y.numpy().reshape(-1), last.numpy(), sizes, activation)
    return y, last


def causal_conv_cpu_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, call: dict[str, Any], activation: bool
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `causal_conv_eager_backward`."""
    arguments, sizes = _arguments(call)
    batch, length, channels, kernel = sizes
    dx = torch.zeros(batch, length, channels)
    dstate = torch.zeros(batch, kernel - 1, channels)
    dweight = torch.zeros(kernel + 1, channels, dtype=torch.float64)
    dy, _ = flat_rows(grad_y.contiguous())
    out = [t.numpy() for t in (dx.view(-1), dstate.view(-1), dweight)]
    _backward(*arguments, dy, grad_state.detach().float().contiguous().numpy(), *out, sizes, activation)
    dweight = dweight.float()
    return {"x": dx, "weight": dweight[:-1].t().clone(), "bias": dweight[-1].clone(), "state": dstate}
