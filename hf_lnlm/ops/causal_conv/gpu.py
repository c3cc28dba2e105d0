"""Causal depthwise convolution on a graphics processor: Triton kernels, forward and backward, fused with SiLU;
causal-conv1d's forward kernel instead where it is installed and does the same.

Grid: one program a row, a tile of positions and a tile of channels. What a tap reads is computed from the position, or
looked up in the table of sources when positions are masked or rows hold several documents. The backward pass first makes
the gradient before the activation, with the weights' gradients as sums of tiles, then that of the inputs: each input
gathers from its readers, or, with a table, readers add to their sources atomically (as torch's scatter does there).

Sources are numbered as in `gather_index`: a zero row, the K − 1 rows of the state, the rows of the input.

Complexity: O(B · L · E · K) time, O(B · L · E) memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.triton_math import kernel, power_of_two, sigmoid, tl
from .inputs import INPUTS

try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None


class Operands(NamedTuple):
    """The operation's tensors; absent ones are stood in for by `x` and never read."""

    x: Any
    weight: Any
    bias: Any
    state: Any
    gather_index: Any


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    width: int  # K
    positions: int  # of a tile
    tile: int  # channels of a tile
    activation: bool
    biased: bool
    carried: bool
    tabled: bool


@kernel
def _place(s: tl.constexpr) -> tl.tensor:
    """Row, positions and channels of this program."""
    t = tl.program_id(1) * s.positions + tl.arange(0, s.positions)
    return tl.program_id(0).to(tl.int64), t, tl.program_id(2) * s.tile + tl.arange(0, s.tile)


@kernel
def _source(o: tl.tensor, b: tl.tensor, t: tl.tensor, length: tl.tensor, j: tl.constexpr, s: tl.constexpr) -> tl.tensor:
    """Number of the row that tap `j` reads at positions `t`, `length` standing for the next state."""
    if s.tabled and j < s.width - 1:
        at = (b * (length + 1) + t) * (s.width - 1) + j
        source = tl.load(o.gather_index + at, mask=t <= length, other=0)
    else:
        source = t + j + 1
    return source


@kernel
def _row(
    o: tl.tensor,
    b: tl.tensor,
    source: tl.tensor,
    valid: tl.tensor,
    e: tl.tensor,
    stride: tl.tensor,
    s: tl.constexpr,
) -> tl.tensor:
    """Rows by their numbers, `(positions, tile)`, float32."""
    inside = valid[:, None] & (e[None, :] < s.channels)
    at = b * stride[0] + (source - s.width)[:, None] * stride[1] + e[None, :]
    values = tl.load(o.x + at, mask=inside & (source >= s.width)[:, None], other=0.0).to(tl.float32)
    if s.carried:
        before = (b * (s.width - 1) + source - 1)[:, None] * s.channels + e[None, :]
        known = inside & ((source >= 1) & (source < s.width))[:, None]
        values += tl.load(o.state + before, mask=known, other=0.0).to(tl.float32)
    return values


@kernel
def _weights(o: tl.tensor, e: tl.tensor, j: tl.constexpr, s: tl.constexpr) -> tl.tensor:
    """Tap `j` of every channel."""
    return tl.load(o.weight + e * s.width + j, mask=e < s.channels, other=0.0).to(tl.float32)


@kernel
def _total(
    o: tl.tensor, b: tl.tensor, t: tl.tensor, e: tl.tensor, length: tl.tensor, stride: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """The convolution before its activation, `(positions, tile)`."""
    total = tl.zeros([s.positions, s.tile], tl.float32)
    for j in tl.static_range(s.width):
        total += _row(o, b, _source(o, b, t, length, j, s), t < length, e, stride, s) * _weights(o, e, j, s)[None, :]
    if s.biased:
        total += tl.load(o.bias + e, mask=e < s.channels, other=0.0).to(tl.float32)[None, :]
    return total


@kernel
def _forward(
    o: tl.tensor, y: tl.tensor, last: tl.tensor, length: tl.tensor, stride: tl.tensor, s: tl.constexpr
) -> None:
    """One tile of outputs; the first program of a row also gathers the next state, `(B, K - 1, E)`."""
    b, t, e = _place(s)
    total = _total(o, b, t, e, length, stride, s)
    if s.activation:
        total *= sigmoid(total)
    inside = (t < length)[:, None] & (e[None, :] < s.channels)
    tl.store(y + (b * length + t)[:, None] * s.channels + e[None, :], total, mask=inside)
    if tl.program_id(1) == 0:
        only = tl.arange(0, s.positions) == 0
        end = length + tl.zeros([s.positions], tl.int32)
        for j in tl.static_range(s.width - 1):
            row = _row(o, b, _source(o, b, end, length, j, s), only, e, stride, s)
            at = (b * (s.width - 1) + j) * s.channels + e[None, :] + tl.zeros([s.positions, 1], tl.int32)
            tl.store(last + at, row, mask=only[:, None] & (e[None, :] < s.channels))


@kernel
def _weight_gradients(
    o: tl.tensor,
    d_y: tl.tensor,
    d_total: tl.tensor,
    sums: tl.tensor,
    length: tl.tensor,
    stride: tl.tensor,
    s: tl.constexpr,
) -> None:
    """The gradient before the activation, and its tile's part of those of the weights and (as row K) of the bias."""
    b, t, e = _place(s)
    inside = (t < length)[:, None] & (e[None, :] < s.channels)
    at = (b * length + t)[:, None] * s.channels + e[None, :]
    grad = tl.load(d_y + at, mask=inside, other=0.0).to(tl.float32)
    if s.activation:
        total = _total(o, b, t, e, length, stride, s)
        gate = sigmoid(total)
        grad *= gate * (1.0 + total * (1.0 - gate))
    tl.store(d_total + at, grad, mask=inside)
    part = sums + (b * tl.num_programs(1) + tl.program_id(1)) * (s.width + 1) * s.channels + e
    for j in tl.static_range(s.width):
        row = _row(o, b, _source(o, b, t, length, j, s), t < length, e, stride, s)
        tl.store(part + j * s.channels, tl.sum(grad * row, 0), mask=e < s.channels)
    tl.store(part + s.width * s.channels, tl.sum(grad, 0), mask=e < s.channels)


@kernel
def _gather_gradients(
    o: tl.tensor,
    d_total: tl.tensor,
    d_last: tl.tensor,
    d_x: tl.tensor,
    d_state: tl.tensor,
    length: tl.tensor,
    s: tl.constexpr,
) -> None:
    """Every row's gradient from the positions that read it, without a table; programs go over K − 1 + L rows."""
    b, place, e = _place(s)
    row, columns = place + 1, e[None, :] < s.channels
    grad = tl.zeros([s.positions, s.tile], tl.float32)
    for j in tl.static_range(s.width):
        t = row - j - 1
        known = ((t >= 0) & (t < length))[:, None] & columns
        read = tl.load(d_total + (b * length + t)[:, None] * s.channels + e[None, :], mask=known, other=0.0)
        grad += read * _weights(o, e, j, s)[None, :]
    kept = row - length - 1
    known = ((kept >= 0) & (kept < s.width - 1))[:, None] & columns
    at = (b * (s.width - 1) + kept)[:, None] * s.channels + e[None, :]
    grad += tl.load(d_last + at, mask=known, other=0.0).to(tl.float32)
    x_row = row - s.width
    at = (b * length + x_row)[:, None] * s.channels + e[None, :]
    tl.store(d_x + at, grad, mask=((x_row >= 0) & (x_row < length))[:, None] & columns)
    at = (b * (s.width - 1) + row - 1)[:, None] * s.channels + e[None, :]
    tl.store(d_state + at, grad, mask=(row < s.width)[:, None] & columns)


@kernel
def _scatter_gradients(
    o: tl.tensor, d_total: tl.tensor, d_last: tl.tensor, rows: tl.tensor, length: tl.tensor, s: tl.constexpr
) -> None:
    """Adds every position's gradient to the rows `(B, K + L, E)` that it read, by the table."""
    b, t, e = _place(s)
    columns = e[None, :] < s.channels
    inside = (t < length)[:, None] & columns
    grad = tl.load(d_total + (b * length + t)[:, None] * s.channels + e[None, :], mask=inside, other=0.0)
    for j in tl.static_range(s.width):
        source = _source(o, b, t, length, j, s)
        at = (b * (s.width + length) + source)[:, None] * s.channels + e[None, :]
        tl.atomic_add(rows + at, grad * _weights(o, e, j, s)[None, :], mask=inside)
    if tl.program_id(1) == 0:
        only = (tl.arange(0, s.positions) == 0)[:, None] & columns
        end = length + tl.zeros([s.positions], tl.int32)
        for j in tl.static_range(s.width - 1):
            at = (b * (s.width - 1) + j) * s.channels + e[None, :] + tl.zeros([s.positions, 1], tl.int32)
            kept = tl.load(d_last + at, mask=only, other=0.0).to(tl.float32)
            read = b * (s.width + length) + _source(o, b, end, length, j, s)
            tl.atomic_add(rows + read[:, None] * s.channels + e[None, :], kept, mask=only)


def _operands(call: dict[str, Any], activation: bool) -> tuple[Operands, Sizes, tuple[int, int]]:
    """Turn the operator's tensors into the kernels' operands, sizes and the input's strides."""
    x = call["x"] if call["x"].stride(-1) == 1 else call["x"].contiguous()
    rest = [x if call[name] is None else call[name].contiguous() for name in ("bias", "state", "gather_index")]
    present = [call[name] is not None for name in ("bias", "state", "gather_index")]
    tiles = min(32, power_of_two(x.shape[1])), min(64, power_of_two(x.shape[2]))
    sizes = Sizes(x.shape[2], call["weight"].shape[1], *tiles, activation, *present)
    return Operands(x, call["weight"].contiguous(), *rest), sizes, (x.stride(0), x.stride(1))


def _grid(batch: int, positions: int, sizes: Sizes) -> tuple[int, int, int]:
    """Programs for so many positions a row."""
    return batch, -(-positions // sizes.positions), -(-sizes.channels // sizes.tile)


def _suits_causal_conv1d(call: dict[str, Any]) -> bool:
    """Whether causal-conv1d is there and takes such a call: channels last, in steps of eight."""
    x, width = call["x"], call["weight"].shape[1]
    fits = 2 <= width <= 4 and x.shape[1] >= width - 1 and call["gather_index"] is None
    eights = not any(step % 8 for step in (x.shape[2], x.stride(0), x.stride(1)))
    return causal_conv1d_fn is not None and fits and eights and x.stride(2) == 1


def _by_causal_conv1d(call: dict[str, Any], activation: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by causal-conv1d, whose layout is `(batch, channel, length)`."""
    x, carried = call["x"], call["state"]
    carried = None if carried is None else carried.to(x.dtype).contiguous().transpose(1, 2)
    y, state = causal_conv1d_fn(
        x.transpose(1, 2), call["weight"], call["bias"], initial_states=carried, return_final_states=True,
        activation="silu" if activation else None,
    )  # fmt: skip
    return y.transpose(1, 2).contiguous(), state.transpose(1, 2).float().contiguous()


def causal_conv_gpu(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass; arguments as in `causal_conv_eager`.

    Returns:
        `y` `(B, L, E)` in the input's dtype, the next state `(B, K - 1, E)`, float32, and nothing to keep.
    """
    call, (activation, _save) = INPUTS.split(values)
    nothing = call["x"].new_empty(0)
    if _suits_causal_conv1d(call):
        return *_by_causal_conv1d(call, activation), nothing
    o, sizes, stride = _operands(call, activation)
    batch, length, channels = call["x"].shape
    y = torch.empty((batch, length, channels), dtype=o.x.dtype, device=o.x.device)
    last = torch.empty((batch, sizes.width - 1, channels), dtype=torch.float32, device=o.x.device)
    _forward[_grid(batch, length, sizes)](o, y, last, length, stride, sizes)
    return y, last, nothing


def causal_conv_gpu_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, _kept: Any, *values: Any
) -> dict[str, torch.Tensor]:
    """Backward pass.

    Args:
        grad_y: `(B, L, E)`.
        grad_state: `(B, K - 1, E)`, gradient of the next state.
        values: as in the forward pass, but the last.

    Returns:
        Gradients by argument name, float32.
    """
    call, (activation,) = INPUTS.split(values)
    o, sizes, stride = _operands(call, activation)
    (batch, length, channels), width = call["x"].shape, sizes.width
    options = {"dtype": torch.float32, "device": o.x.device}
    grid = _grid(batch, length, sizes)
    d_total = torch.empty((batch, length, channels), **options)
    sums = torch.empty((batch * grid[1], width + 1, channels), **options)
    _weight_gradients[grid](o, grad_y.contiguous(), d_total, sums, length, stride, sizes)
    total, d_last = sums.sum(0), grad_state.contiguous()
    grads = {"weight": total[:width].t().clone(memory_format=torch.contiguous_format), "bias": total[width]}
    if sizes.tabled:
        rows = torch.zeros((batch, width + length, channels), **options)
        _scatter_gradients[grid](o, d_total, d_last, rows, length, sizes)
        return grads | {"x": rows[:, width:].clone(), "state": rows[:, 1:width].clone()}
    d_x, d_state = torch.empty_like(d_total), torch.empty((batch, width - 1, channels), **options)
    _gather_gradients[_grid(batch, length + width - 1, sizes)](o, d_total, d_last, d_x, d_state, length, sizes)
    return grads | {"x": d_x, "state": d_state}
