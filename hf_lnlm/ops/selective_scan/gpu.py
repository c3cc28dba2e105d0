"""Selective scan on a graphics processor: Triton kernels, forward and backward, fused with softplus, skip connection
and gate; mamba-ssm's kernel instead where it is installed and does the same.

Grid: one program a row and a tile of channels; it runs the whole sequence with its `(N, tile)` state in registers.
Tensors keep the `(batch, length, channel)` layout of the projections around the scan, and slices of a projection are
read in place. The forward pass stores the state at the entry of every block of `BLOCK` tokens; the backward pass runs a
block again from there into a scratch of one block, so that nothing of size `L · N · E` ever exists. Sums over channels
(the gradients of B and C) are written a tile and then added up: the result is the same on every run.

mamba-ssm's scan knows no carried states, masks or documents and gives no gradient of the final state: it serves the
forward pass without gradients.

Complexity: O(B · L · E · N) time, O(B · L · E · N / BLOCK) memory when gradients are wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.triton_math import exp2, kernel, power_of_two, sigmoid, softplus, tl
from .inputs import INPUTS

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

BLOCK = 16


class Operands(NamedTuple):
    """The operation's tensors; absent ones are stood in for by `u` and never read."""

    u: Any
    dt: Any
    z: Any
    A: Any
    B: Any
    C: Any
    D: Any
    dt_bias: Any
    mask: Any
    reset: Any


class Strides(NamedTuple):
    """Elements from row to row and from token to token."""

    u: tuple[int, int]
    dt: tuple[int, int]
    z: tuple[int, int]
    B: tuple[int, int]
    C: tuple[int, int]


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    channels: int
    states: int
    block: int  # tokens between stored states
    block_states: int
    tile: int  # channels of a program
    softplus: bool
    gated: bool
    skipped: bool
    biased: bool
    masked: bool
    resets: bool
    save: bool


class Gradients(NamedTuple):
    """What the backward kernel reads and fills, float32."""

    y: Any  # `(B, L, E)`, given
    state: Any  # `(B, N, E)`: that of the final state, then that of the initial one
    entries: Any  # `(blocks, B, N, E)`, given
    states: Any  # `(B, BLOCK, N, E)`, scratch
    u: Any  # `(B, L, E)`
    dt: Any  # `(B, L, E)`
    z: Any  # `(B, L, E)` or empty
    A: Any  # `(B, N, E)`
    B: Any  # `(tiles, B, L, N)`
    C: Any  # `(tiles, B, L, N)`
    D: Any  # `(B, E)`


@kernel
def _token(
    tensor: tl.tensor, strides: tl.tensor, b: tl.tensor, t: tl.tensor, at: tl.tensor, size: tl.tensor
) -> tl.tensor:
    """Entries `at` of one token's row, float32."""
    return tl.load(tensor + b * strides[0] + t * strides[1] + at, mask=at < size, other=0.0).to(tl.float32)


@kernel
def _vector(vector: tl.tensor, at: tl.tensor, size: tl.tensor, present: tl.constexpr) -> tl.tensor:
    """Entries of a vector of channels, or zeros."""
    values = tl.zeros([at.shape[0]], tl.float32)
    if present:
        values = tl.load(vector + at, mask=at < size, other=0.0).to(tl.float32)
    return values


@kernel
def _discretise(
    o: tl.tensor, k: tl.tensor, b: tl.tensor, t: tl.tensor, length: tl.tensor, e: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """Δ, its derivative with respect to dt, Δ u, and the factor of the state before (0 where a document begins)."""
    raw = _token(o.dt, k.dt, b, t, e, s.channels) + _vector(o.dt_bias, e, s.channels, s.biased)
    delta, slope = raw, tl.full([e.shape[0]], 1.0, tl.float32)
    if s.softplus:
        delta, slope = softplus(raw), sigmoid(raw)
    weight = 1.0
    if s.masked:
        weight = tl.load(o.mask + b * length + t).to(tl.float32)
    keep = 1.0
    if s.resets:
        fresh = (tl.load(o.reset + b * length + t) != 0) & (weight != 0.0)
        keep = tl.where(fresh, 0.0, 1.0)
    u = _token(o.u, k.u, b, t, e, s.channels)
    return u, delta * weight, slope * weight, keep


@kernel
def _tile(tensor: tl.tensor, n: tl.tensor, e: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """A state `(N, E)`'s part, 0 in the padding."""
    inside = (n[:, None] < s.states) & (e[None, :] < s.channels)
    return tl.load(tensor + n[:, None] * s.channels + e[None, :], mask=inside, other=0.0)


@kernel
def _store_tile(tensor: tl.tensor, n: tl.tensor, e: tl.tensor, values: tl.tensor, s: tl.constexpr) -> None:
    """Writes a part of a state `(N, E)`."""
    inside = (n[:, None] < s.states) & (e[None, :] < s.channels)
    tl.store(tensor + n[:, None] * s.channels + e[None, :], values, mask=inside)


@kernel
def _decays(o: tl.tensor, n: tl.tensor, e: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """A's part, transposed and as powers of two."""
    inside = (n[:, None] < s.states) & (e[None, :] < s.channels)
    return tl.load(o.A + e[None, :] * s.states + n[:, None], mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634


@kernel
def _forward(
    o: tl.tensor,
    k: tl.tensor,
    final: tl.tensor,
    y: tl.tensor,
    entries: tl.tensor,
    batch: tl.tensor,
    length: tl.tensor,
    s: tl.constexpr,
) -> None:
    """One row and tile; `final` `(B, N, E)` holds the initial and then the final state."""
    b = tl.program_id(0).to(tl.int64)
    n, e = tl.arange(0, s.block_states), tl.program_id(1) * s.tile + tl.arange(0, s.tile)
    size: tl.constexpr = s.states * s.channels
    a, skip = _decays(o, n, e, s), _vector(o.D, e, s.channels, s.skipped)
    state = _tile(final + b * size, n, e, s)
    for t in range(length):
        if s.save and t % s.block == 0:
            _store_tile(entries + (t // s.block * batch + b) * size, n, e, state, s)
        u, delta, _slope, keep = _discretise(o, k, b, t, length, e, s)
        source = (delta * u)[None, :] * _token(o.B, k.B, b, t, n, s.states)[:, None]
        state = exp2(delta[None, :] * a) * keep * state + source
        row = tl.sum(state * _token(o.C, k.C, b, t, n, s.states)[:, None], 0) + skip * u
        if s.gated:
            z = _token(o.z, k.z, b, t, e, s.channels)
            row *= z * sigmoid(z)
        tl.store(y + (b * length + t) * s.channels + e, row, mask=e < s.channels)
    _store_tile(final + b * size, n, e, state, s)


@kernel
def _run_block_again(
    o: tl.tensor,
    k: tl.tensor,
    d: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    batch: tl.tensor,
    length: tl.tensor,
    s: tl.constexpr,
) -> None:
    """The states before the tokens first ≤ t < last into the scratch."""
    n, e = tl.arange(0, s.block_states), tl.program_id(1) * s.tile + tl.arange(0, s.tile)
    size: tl.constexpr = s.states * s.channels
    state = _tile(d.entries + (first // s.block * batch + b) * size, n, e, s)
    for t in range(first, last):
        _store_tile(d.states + (b * s.block + t - first) * size, n, e, state, s)
        u, delta, _slope, keep = _discretise(o, k, b, t, length, e, s)
        source = (delta * u)[None, :] * _token(o.B, k.B, b, t, n, s.states)[:, None]
        state = exp2(delta[None, :] * a) * keep * state + source


@kernel
def _through_gate(
    o: tl.tensor,
    k: tl.tensor,
    d: tl.tensor,
    row: tl.tensor,
    b: tl.tensor,
    t: tl.tensor,
    length: tl.tensor,
    e: tl.tensor,
    s: tl.constexpr,
) -> tl.tensor:
    """The gradient before the gate; writes the gate's own."""
    at = (b * length + t) * s.channels + e
    grad = tl.load(d.y + at, mask=e < s.channels, other=0.0).to(tl.float32)
    if s.gated:
        z = _token(o.z, k.z, b, t, e, s.channels)
        gate = sigmoid(z)
        tl.store(d.z + at, grad * row * gate * (1.0 + z * (1.0 - gate)), mask=e < s.channels)
        grad *= z * gate
    return grad


@kernel
def _retreat(
    o: tl.tensor,
    k: tl.tensor,
    d: tl.tensor,
    a: tl.tensor,
    carry: tl.tensor,
    before: tl.tensor,
    b: tl.tensor,
    t: tl.tensor,
    batch: tl.tensor,
    length: tl.tensor,
    s: tl.constexpr,
) -> tl.tensor:
    """One token of the adjoint recurrence; writes the token's gradients, returns the state's, A's and D's parts."""
    n, e = tl.arange(0, s.block_states), tl.program_id(1) * s.tile + tl.arange(0, s.tile)
    u, delta, slope, keep = _discretise(o, k, b, t, length, e, s)
    skip = _vector(o.D, e, s.channels, s.skipped)
    bn, cn = _token(o.B, k.B, b, t, n, s.states), _token(o.C, k.C, b, t, n, s.states)
    decay, source = exp2(delta[None, :] * a) * keep, delta * u
    after = decay * before + source[None, :] * bn[:, None]
    grad = _through_gate(o, k, d, tl.sum(after * cn[:, None], 0) + skip * u, b, t, length, e, s)
    g = carry + cn[:, None] * grad[None, :]
    row = ((tl.program_id(1) * batch + b) * length + t) * s.states + n
    tl.store(d.C + row, tl.sum(after * grad[None, :], 1), mask=n < s.states)
    tl.store(d.B + row, tl.sum(g * source[None, :], 1), mask=n < s.states)
    gain, carry = tl.sum(g * bn[:, None], 0), g * decay
    through = carry * before
    pull = tl.sum(through * a, 0) * 0.6931471805599453  # `a` is in powers of two
    at = (b * length + t) * s.channels + e
    tl.store(d.dt + at, (gain * u + pull) * slope, mask=e < s.channels)
    tl.store(d.u + at, gain * delta + skip * grad, mask=e < s.channels)
    return carry, through * delta[None, :], grad * u


@kernel
def _backward(
    o: tl.tensor, k: tl.tensor, d: tl.tensor, batch: tl.tensor, length: tl.tensor, blocks: tl.tensor, s: tl.constexpr
) -> None:
    """One row and tile, blocks from last to first."""
    b = tl.program_id(0).to(tl.int64)
    n, e = tl.arange(0, s.block_states), tl.program_id(1) * s.tile + tl.arange(0, s.tile)
    size: tl.constexpr = s.states * s.channels
    a, carry = _decays(o, n, e, s), _tile(d.state + b * size, n, e, s)
    d_a, d_skip = tl.zeros([s.block_states, s.tile], tl.float32), tl.zeros([s.tile], tl.float32)
    for back in range(blocks):
        first = (blocks - 1 - back) * s.block
        last = tl.minimum(first + s.block, length)
        tl.debug_barrier()
        _run_block_again(o, k, d, a, b, first, last, batch, length, s)
        tl.debug_barrier()
        block_a, block_skip = tl.zeros([s.block_states, s.tile], tl.float32), tl.zeros([s.tile], tl.float32)
        for behind in range(last - first):
            t = last - 1 - behind
            before = _tile(d.states + (b * s.block + t - first) * size, n, e, s)
            carry, part_a, part_skip = _retreat(o, k, d, a, carry, before, b, t, batch, length, s)
            block_a += part_a
            block_skip += part_skip
        d_a += block_a
        d_skip += block_skip
    _store_tile(d.A + b * size, n, e, d_a, s)
    _store_tile(d.state + b * size, n, e, carry, s)
    tl.store(d.D + b * s.channels + e, d_skip, mask=e < s.channels)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view or copy whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _operands(call: dict[str, Any], softplus: bool, save: bool) -> tuple[Operands, Strides, Sizes]:
    """Turn the operator's tensors into the kernels' operands and sizes."""
    u = _rows(call["u"])
    dt, B, C = (_rows(call[name]) for name in ("dt", "B", "C"))
    z = u if call["z"] is None else _rows(call["z"])
    vectors = [u if call[name] is None else call[name].contiguous() for name in ("D", "dt_bias")]
    mask = u if call["mask"] is None else call["mask"].to(torch.float32).contiguous()
    reset = u if call["reset"] is None else call["reset"].to(torch.uint8).contiguous()
    operands = Operands(*[u, dt, z, call["A"].contiguous(), B, C, *vectors, mask, reset])
    states = call["A"].shape[1]
    padded = power_of_two(states, 1)
    tile = min(power_of_two(u.shape[2]), max(16, 1024 // padded))
    present = [call[name] is not None for name in ("z", "D", "dt_bias", "mask", "reset")]
    sizes = Sizes(*[u.shape[2], states, BLOCK, padded, tile, softplus, *present, save])
    return operands, Strides(*[(t.stride(0), t.stride(1)) for t in (u, dt, z, B, C)]), sizes


def _launch(sizes: Sizes, batch: int) -> tuple[tuple[int, int], int]:
    """Grid and warps."""
    return (batch, -(-sizes.channels // sizes.tile)), max(1, min(8, sizes.tile * sizes.block_states // 512))


def _by_mamba_ssm(call: dict[str, Any], softplus: bool) -> tuple[torch.Tensor, ...]:
    """The same by mamba-ssm, whose layout is `(batch, channel, length)`."""
    turned = {name: None if call[name] is None else call[name].transpose(1, 2) for name in ("u", "dt", "B", "C", "z")}
    vectors = {name: None if call[name] is None else call[name].float() for name in ("D", "dt_bias")}
    y, state = selective_scan_fn(
        turned["u"], turned["dt"], call["A"].float(), turned["B"], turned["C"], vectors["D"], turned["z"],
        vectors["dt_bias"], softplus, True,
    )  # fmt: skip
    state = state.transpose(1, 2).float().contiguous()
    return y.transpose(1, 2).contiguous(), state, state.new_empty(0, *state.shape)


def selective_scan_gpu(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass; arguments as in `selective_scan_eager`.

    Returns:
        `y` `(B, L, E)` in the input's dtype, final state `(B, N, E)` float32, entry states `(blocks, B, N, E)` or empty.
    """
    call, (softplus, save) = INPUTS.split(values)
    plain = all(call[name] is None for name in ("initial_state", "mask", "reset"))
    if selective_scan_fn is not None and plain and not save:
        return _by_mamba_ssm(call, softplus)
    operands, strides, sizes = _operands(call, softplus, save)
    batch, length, channels = call["u"].shape
    shape = (batch, sizes.states, channels)
    options = {"dtype": torch.float32, "device": call["u"].device}
    final = torch.zeros(shape, **options)
    if call["initial_state"] is not None:
        final.copy_(call["initial_state"])
    y = torch.empty(call["u"].shape, dtype=call["u"].dtype, device=call["u"].device)
    entries = torch.empty(-(-length // BLOCK) if save else 0, *shape, **options)
    grid, warps = _launch(sizes, batch)
    _forward[grid](operands, strides, final, y, entries, batch, length, sizes, num_warps=warps)
    return y, final, entries


def selective_scan_gpu_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, entries: torch.Tensor, *values: Any
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `selective_scan_eager_backward`, always float32."""
    call, (softplus,) = INPUTS.split(values)
    operands, strides, sizes = _operands(call, softplus, True)
    batch, length, channels = call["u"].shape
    grid, warps = _launch(sizes, batch)
    like = entries.new_empty
    rows, sums = (batch, length, channels), (grid[1], batch, length, sizes.states)
    d = Gradients(
        grad_y.contiguous(), grad_state.float().clone(memory_format=torch.contiguous_format), entries,
        like(batch, BLOCK, sizes.states, channels), like(rows), like(rows), like(rows if sizes.gated else 1),
        like(batch, sizes.states, channels), like(sums), like(sums), like(batch, channels),
    )  # fmt: skip
    _backward[grid](operands, strides, d, batch, length, entries.shape[0], sizes, num_warps=warps)
    grads = {"u": d.u, "dt": d.dt, "z": d.z, "A": d.A.sum(0).t().contiguous(), "B": d.B.sum(0), "C": d.C.sum(0)}
    return grads | {"D": d.D.sum(0), "dt_bias": d.dt.sum((0, 1)), "initial_state": d.state}
