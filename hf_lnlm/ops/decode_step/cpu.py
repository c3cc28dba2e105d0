"""One decoded token between a mixer's projections on the CPU: convolution, step sizes, recurrence, gate in one kernel.

References:
    [1] Gu, Dao 2023, "Mamba", arXiv:2312.00752, algorithm 2.
    [2] Dao, Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 7.

Complexity: O(B · E · (K + R + N)) time for Mamba-1, O(B · (H P N + G N K)) for Mamba-2.
"""

from __future__ import annotations

from typing import Any

import torch

from ..causal_conv.cpu import convolve_token
from ..kernels.compiled import STRICT, compiled, part
from ..kernels.flat import FLOATS, flat_rows, flat_vector
from ..kernels.simd import (
    WIDTH,
    add,
    exp,
    fma,
    load_column,
    load_row,
    mul,
    read_float,
    scalar_exp,
    scalar_softplus,
    sigmoid,
    softplus,
    splat,
    store_row,
    total,
    write_float,
)

try:
    import numpy as np
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@part(STRICT)
def _dot(x: int, at: int, y: int, start: int, count: int) -> Any:
    """Product of two runs of `count` numbers."""
    value = splat(_ZERO)
    for e in range(0, count, WIDTH):
        value = fma(load_row(x, at + e, count - e), load_row(y, start + e, count - e), value)
    return total(value)


@part(STRICT)
def _product(x: int, weight: int, bias: int, sizes: Any, residual: int, y: int) -> None:
    """`residual + W x + bias` of all rows; each row of `W` is read once."""
    batch, inputs, outputs = sizes
    for o in range(outputs):
        shift = read_float(bias, o) if bias != 0 else _ZERO
        for r in range(batch):
            value = _dot(weight, o * inputs, x, r * inputs, inputs) + shift
            if residual != 0:
                value += read_float(residual, r * outputs + o)
            write_float(y, r * outputs + o, value)


@compiled(STRICT)
def _leave(x: int, weight: int, bias: int, sizes: Any, residual: int, y: int) -> None:
    """Product and residual sum of all rows."""
    _product(x, weight, bias, sizes, residual, y)


@part(STRICT)
def _normalise(x: int, norm: int, eps: Any, batch: int, size: int, y: int) -> None:
    """RMS norm of all rows."""
    for r in range(batch):
        at = r * size
        factor = splat(_ONE / np.sqrt(_dot(x, at, x, at, size) / np.float32(size) + eps))
        for e in range(0, size, WIDTH):
            value = mul(mul(load_row(x, at + e, size - e), factor), load_row(norm, e, size - e))
            store_row(y, at + e, value, size - e)


@compiled(STRICT)
def _enter(x: int, norm: int, eps: Any, weight: int, bias: int, sizes: Any, normal: int, y: int) -> None:
    """RMS norm and product of all rows."""
    _normalise(x, norm, eps, sizes[0], sizes[1], normal)
    _product(normal, weight, bias, sizes, 0, y)


def enter_cpu(
    hidden: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """One token's way into a mixer: RMS norm and input projection.

    Args:
        hidden: `(batch, 1, size)`.
        norm: `(size,)`, the norm's weight.
        eps: of the norm.
        weight, bias: `(outputs, size)` and `(outputs,)` or None.

    Returns:
        `(batch, 1, outputs)`.
    """
    batch, _, size = hidden.shape
    x, scale, matrix, shift = (flat_vector(tensor) for tensor in (hidden, norm, weight, bias))
    normal, y = torch.empty(batch, size, **FLOATS), torch.empty(batch, 1, weight.shape[0], **FLOATS)
    sizes, work = (batch, size, weight.shape[0]), normal.data_ptr()
    _enter(x.address, scale.address, np.float32(eps), matrix.address, shift.address, sizes, work, y.data_ptr())
    return y


def leave_cpu(
    mixed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """One token's way out of a mixer: output projection and residual sum.

    Args:
        mixed: `(batch, 1, inner)`.
        weight, bias: `(size, inner)` and `(size,)` or None.
        residual: `(batch, 1, size)`.

    Returns:
        `(batch, 1, size)`.
    """
    x, matrix, shift, before = (flat_vector(tensor) for tensor in (mixed, weight, bias, residual))
    y = torch.empty(residual.shape, **FLOATS)
    sizes = (mixed.shape[0], mixed.shape[2], weight.shape[0])
    _leave(x.address, matrix.address, shift.address, sizes, before.address, y.data_ptr())
    return y


@part(STRICT)
def _s6(
    z: int, zs: int, x: int, mixed: int, rank: int, states: int, channels: int, step_weight: int, step_bias: int,
    a_log: int, skip: int, state: int, last: int, y: int,
) -> None:  # fmt: skip
    """The recurrence of [1] for one row: `x` is convolved, `mixed` its projection `(R + 2 N)`; `y` is scratch first."""
    b, c = rank, rank + states
    for e in range(channels):
        write_float(y, e, _dot(step_weight, e * rank, mixed, 0, rank))
    for e in range(0, channels, WIDTH):
        left = channels - e
        raw = load_row(y, e, left)
        step = softplus(add(raw, load_row(step_bias, e, left)) if step_bias != 0 else raw)
        u = load_row(x, e, left)
        source = mul(step, u)
        value = mul(load_row(skip, e, left), u)
        step = mul(step, splat(-_ONE))
        for n in range(states):
            h = mul(source, splat(read_float(mixed, b + n)))
            if state != 0:
                rate = exp(load_column(a_log, e * states + n, states, left))
                h = fma(exp(mul(step, rate)), load_row(state, n * channels + e, left), h)
            store_row(last, n * channels + e, h, left)
            value = fma(h, splat(read_float(mixed, c + n)), value)
        gate = load_row(z, zs + e, left)
        store_row(y, e, mul(mul(value, gate), sigmoid(gate)), left)


@compiled(STRICT)
def _s6_rows(
    projected: int, stride: int, conv: Any, x_weight: int, step_weight: int, step_bias: int, a_log: int, skip: int,
    state: int, sizes: Any, work: int, y: int, conv_last: int, last: int,
) -> None:  # fmt: skip
    """All rows; `work` holds `E + R + 2 N` numbers."""
    batch, channels, kernel, rank, states = sizes
    weight, bias, carried = conv
    mixed = work + 4 * channels
    for r in range(batch):
        convolve_token(projected, r * stride, weight, bias, carried, r, channels, kernel, True, work, 0, conv_last)
        for o in range(rank + 2 * states):
            write_float(mixed, o, _dot(x_weight, o * channels, work, 0, channels))
        before = state + 4 * r * states * channels if state != 0 else 0
        _s6(projected, r * stride + channels, work, mixed, rank, states, channels, step_weight, step_bias, a_log, skip,
            before, last + 4 * r * states * channels, y + 4 * r * channels)  # fmt: skip


def s6_token_cpu(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    x_weight: torch.Tensor,
    step_weight: torch.Tensor,
    step_bias: torch.Tensor | None,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    conv_state: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of Mamba-1, from the input projection's result to the output projection's input.

    Args:
        projected: `(batch, 1, 2 · channels)`, input and gate.
        conv_weight, conv_bias: `(channels, 1, kernel)` and `(channels,)` or None.
        x_weight: `(rank + 2 · states, channels)`.
        step_weight, step_bias: `(channels, rank)` and `(channels,)` or None.
        a_log: `(channels, states)`; A is `-exp(a_log)`.
        skip: `(channels,)`, the weight D.
        conv_state: `(batch, kernel - 1, channels)` or None for zeros.
        state: `(batch, states, channels)` or None for zeros.

    Returns:
        `(batch, 1, channels)` and the two states.
    """
    rows = flat_rows(projected)
    tensors = (conv_weight, conv_bias, conv_state, x_weight, step_weight, step_bias, a_log, skip, state)
    weight, bias, carried, x_flat, step_flat, step_shift, rates, skips, before = (flat_vector(t) for t in tensors)
    batch, channels, kernel = projected.shape[0], conv_weight.shape[0], conv_weight.shape[2]
    rank, states = step_weight.shape[1], a_log.shape[1]
    y, work = torch.empty(batch, 1, channels, **FLOATS), torch.empty(channels + rank + 2 * states, **FLOATS)
    conv_last = torch.empty(batch, kernel - 1, channels, **FLOATS)
    last = torch.empty(batch, states, channels, **FLOATS)
    _s6_rows(
        rows.address, rows.stride, (weight.address, bias.address, carried.address), x_flat.address, step_flat.address,
        step_shift.address, rates.address, skips.address, before.address, (batch, channels, kernel, rank, states),
        work.data_ptr(), y.data_ptr(), conv_last.data_ptr(), last.data_ptr(),
    )  # fmt: skip
    return y, conv_last, last


@part(STRICT)
def _ssd_head(
    x: int, at: int, width: int, states: int, b: int, c: int, step: Any, kept: Any, skip: Any, state: int, last: int,
    y: int,
) -> None:  # fmt: skip
    """One head of [2]: its state is `(P, N)`; `b` and `c` are elements of `x`, as is `at`."""
    for p in range(width):
        u = read_float(x, at + p)
        source, value = splat(u * step), splat(_ZERO)
        for n in range(0, states, WIDTH):
            left = states - n
            h = mul(source, load_row(x, b + n, left))
            if state != 0:
                h = fma(splat(kept), load_row(state, p * states + n, left), h)
            store_row(last, p * states + n, h, left)
            value = fma(h, load_row(x, c + n, left), value)
        write_float(y, p, total(value) + skip * u)


@part(STRICT)
def _gate(y: int, z: int, at: int, channels: int, groups: int, weight: int, eps: Any) -> None:
    """`y · silu(z)`, normalised in groups, in place."""
    size = channels // groups
    for g in range(groups):
        squares = splat(_ZERO)
        for e in range(g * size, (g + 1) * size, WIDTH):
            left = (g + 1) * size - e
            gate = load_row(z, at + e, left)
            value = mul(mul(load_row(y, e, left), gate), sigmoid(gate))
            store_row(y, e, value, left)
            squares = fma(value, value, squares)
        factor = splat(_ONE / np.sqrt(total(squares) / np.float32(size) + eps))
        for e in range(g * size, (g + 1) * size, WIDTH):
            left = (g + 1) * size - e
            store_row(y, e, mul(mul(load_row(y, e, left), factor), load_row(weight, e, left)), left)


@compiled(STRICT)
def _ssd_rows(
    projected: int, stride: int, conv: Any, step_bias: int, a_log: int, skip: int, norm: int, eps: Any, limit: Any,
    state: int, sizes: Any, work: int, y: int, conv_last: int, last: int,
) -> None:  # fmt: skip
    """All rows; `work` holds the convolved channels."""
    batch, heads, width, groups, states, kernel = sizes
    weight, bias, carried = conv
    inner = heads * width
    channels = inner + 2 * groups * states
    for r in range(batch):
        at = r * stride
        convolve_token(projected, at + inner, weight, bias, carried, r, channels, kernel, True, work, 0, conv_last)
        for h in range(heads):
            step = scalar_softplus(read_float(projected, at + inner + channels + h) + read_float(step_bias, h))
            step = min(max(step, limit[0]), limit[1])
            kept = scalar_exp(-step * scalar_exp(read_float(a_log, h)))
            b = inner + h // (heads // groups) * states
            place = 4 * (r * heads + h) * width * states
            _ssd_head(work, h * width, width, states, b, b + groups * states, step, kept, read_float(skip, h),
                      state + place if state != 0 else 0, last + place, y + 4 * (r * inner + h * width))  # fmt: skip
        _gate(y + 4 * r * inner, projected, at, inner, groups, norm, eps)


def ssd_token_cpu(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    step_bias: torch.Tensor,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    groups: int,
    limit: tuple[float, float],
    conv_state: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of Mamba-2, from the input projection's result to the output projection's input.

    Args:
        projected: `(batch, 1, inner + (inner + 2 · groups · states) + heads)`: gate, convolved channels, step sizes.
        conv_weight, conv_bias: `(inner + 2 · groups · states, 1, kernel)` and bias or None.
        step_bias, a_log, skip: `(heads,)`; A is `-exp(a_log)`, D is `skip`.
        norm_weight: `(inner,)`, of the gated norm.
        eps: of the gated norm.
        groups: groups of heads that share B and C, and groups of channels that are normalised apart.
        limit: bounds of the step size.
        conv_state: `(batch, kernel - 1, channels)` or None for zeros.
        state: `(batch, heads, width, states)` or None for zeros.

    Returns:
        `(batch, 1, inner)` and the two states.
    """
    rows = flat_rows(projected)
    tensors = (conv_weight, conv_bias, conv_state, step_bias, a_log, skip, norm_weight, state)
    weight, bias, carried, shift, rates, skips, norm, before = (flat_vector(tensor) for tensor in tensors)
    batch, heads, inner = projected.shape[0], a_log.shape[0], norm_weight.shape[0]
    channels, kernel = conv_weight.shape[0], conv_weight.shape[2]
    states = (channels - inner) // (2 * groups)
    y, work = torch.empty(batch, 1, inner, **FLOATS), torch.empty(channels, **FLOATS)
    conv_last = torch.empty(batch, kernel - 1, channels, **FLOATS)
    last = torch.empty(batch, heads, inner // heads, states, **FLOATS)
    bounds = np.float32(limit[0]), np.float32(limit[1])
    _ssd_rows(
        rows.address, rows.stride, (weight.address, bias.address, carried.address), shift.address, rates.address,
        skips.address, norm.address, np.float32(eps), bounds, before.address,
        (batch, heads, inner // heads, groups, states, kernel), work.data_ptr(), y.data_ptr(), conv_last.data_ptr(),
        last.data_ptr(),
    )  # fmt: skip
    return y, conv_last, last
