"""Selective scan on the CPU: numba kernels, forward and backward, fused with softplus, skip connection and gate.

Tensors keep the `(batch, length, channel)` layout that the projections around the scan read and write, and slices of a
fused projection are read in place. Time runs in blocks of `BLOCK` tokens. Within a block, step sizes are made for all
channels, then sixteen channels at a time run through all of its tokens, their `N · 16` state in the first-level cache.
The forward pass stores the state at the entry of every block; the backward pass recomputes a block from there, so that
nothing of size `L · N · E` ever exists.

Packed arrays hold `(channels / 16, N, 16)` numbers, channels padded with zeros: what sixteen channels need lies together.

Complexity: O(B · L · E · N) time, O(B · L · E · N / BLOCK) memory when gradients are wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.compiled import STRICT, compiled, part
from ..kernels.flat import DOUBLES, FLOATS, flat_bytes, flat_rows, flat_vector
from ..kernels.simd import (
    WIDTH,
    add,
    decay,
    exp,
    flush,
    fma,
    load,
    load_column,
    load_row,
    mul,
    padded_size,
    read_byte,
    read_float,
    sigmoid,
    softplus,
    splat,
    store,
    store_row,
    sub,
    total,
    write_float,
)
from .inputs import INPUTS

try:
    import numpy as np
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

BLOCK = 16
# States that the backward pass takes through a block at once: their decays, history and sums fill two thirds of a
# first-level cache of 48 KiB.
TILE = 8
# Blocks whose sums stay in float32 before they are added in float64.
BLOCKS = 4

Vector = Any  # sixteen channels
Scratch = Any  # addresses of buffers
Tile = Any  # (first state, number of states)


class Operands(NamedTuple):
    """Addresses of the tensors of `selective_scan`, 0 for absent ones, and strides from token to token."""

    u: int
    u_stride: int
    dt: int
    dt_stride: int
    z: int
    z_stride: int
    A: int
    B: int
    B_stride: int
    C: int
    C_stride: int
    D: int
    dt_bias: int
    mask: int
    reset: int


class Sizes(NamedTuple):
    """Sizes of a call; `padded` are the channels rounded up to whole vectors."""

    batch: int
    length: int
    channels: int
    states: int
    padded: int


class Tokens(NamedTuple):
    """Addresses of buffers with a row of padded channels a token of a block."""

    delta: int
    source: int
    grad: int
    gain: int
    pull: int


class Packed(NamedTuple):
    """Addresses of packed arrays: two of all channels, then those of sixteen in a block, and sums."""

    a: int
    carry: int
    decays: int
    history: int
    dA: int
    dB: int
    dC: int


class Gate(NamedTuple):
    """Addresses of more buffers like `Tokens`; `sums` holds a part of the gradients of `D` and `dt_bias`."""

    slope: int
    y: int
    sums: int
    bend: int


class Out(NamedTuple):
    """Addresses of gradients that have a row a token."""

    du: int
    ddt: int
    dz: int
    dB: int
    dC: int
    dz_stride: int


_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LN2 = np.float32(0.6931471805599453)
_LOG2E = np.float32(1.4426950408889634)


@part(STRICT)
def _pack(source: int, at: int, factor: Any, packed: int, sizes: Sizes) -> None:
    """`(N, E)` numbers from element `at` on, times a factor, into a packed array."""
    channels, states = sizes.channels, sizes.states
    for e in range(0, channels, WIDTH):
        for n in range(states):
            row = load_row(source, at + n * channels + e, channels - e)
            store(packed, e * states + n * WIDTH, mul(row, splat(factor)))


@part(STRICT)
def _unpack(packed: int, target: int, at: int, sizes: Sizes) -> None:
    """A packed array into `(N, E)` numbers from element `at` on."""
    channels, states = sizes.channels, sizes.states
    for e in range(0, channels, WIDTH):
        for n in range(states):
            store_row(target, at + n * channels + e, load(packed, e * states + n * WIDTH), channels - e)


@part(STRICT, forceinline=True)
def _real(operands: Operands, i: int) -> bool:
    """Whether token `i` counts."""
    return operands.mask == 0 or read_byte(operands.mask, i) != 0


@part(STRICT, forceinline=True)
def _fresh(operands: Operands, i: int) -> bool:
    """Whether token `i` forgets the state before it."""
    return operands.reset != 0 and read_byte(operands.reset, i) != 0 and _real(operands, i)


@part(STRICT, forceinline=True)
def _raw_step(operands: Operands, i: int, e: int, left: int) -> Vector:
    """`dt + dt_bias`."""
    raw = load_row(operands.dt, i * operands.dt_stride + e, left)
    return add(raw, load_row(operands.dt_bias, e, left)) if operands.dt_bias != 0 else raw


@part(STRICT, forceinline=True)
def _skip(operands: Operands, e: int, left: int) -> Vector:
    """`D`."""
    return load_row(operands.D, e, left) if operands.D != 0 else splat(_ZERO)


@part(STRICT)
def _discretise(operands: Operands, i: int, j: int, sizes: Sizes, delta: int, source: int) -> None:
    """`Δ = softplus(dt + bias)` and `Δ u` of token `i`, row `j` of the block; zeros if it is masked."""
    channels, padded = sizes.channels, sizes.padded
    real = _real(operands, i)
    for e in range(0, channels, WIDTH):
        step, value = splat(_ZERO), splat(_ZERO)
        if real:
            step = softplus(_raw_step(operands, i, e, channels - e))
            value = mul(step, load_row(operands.u, i * operands.u_stride + e, channels - e))
        store(delta, j * padded + e, step)
        store(source, j * padded + e, value)


@part(STRICT)
def _advance(operands: Operands, i: int, count: int, e: int, sizes: Sizes, scratch: Scratch) -> None:
    """Sixteen channels through the block that begins at token `i`: `h ← exp(Δ A) h + Δ u B`, `y = Σ_n h C`."""
    states, padded = sizes.states, sizes.padded
    delta, source, rows, state, a = scratch
    for j in range(count):
        b, c = (i + j) * operands.B_stride, (i + j) * operands.C_stride
        d, s, y = load(delta, j * padded + e), load(source, j * padded + e), splat(_ZERO)
        fresh = _fresh(operands, i + j)
        for n in range(states):
            at = e * states + n * WIDTH
            h = splat(_ZERO) if fresh else load(state, at)
            h = fma(decay(mul(d, load(a, at))), h, mul(s, splat(read_float(operands.B, b + n))))
            store(state, at, h)
            y = fma(h, splat(read_float(operands.C, c + n)), y)
        store(rows, j * padded + e, y)


@part(STRICT)
def _emit(operands: Operands, i: int, j: int, sizes: Sizes, rows: int, y: int) -> None:
    """Write `(y + D u) · silu(z)` of token `i`, row `j` of the block."""
    channels, padded = sizes.channels, sizes.padded
    for e in range(0, channels, WIDTH):
        left = channels - e
        u = load_row(operands.u, i * operands.u_stride + e, left)
        value = fma(_skip(operands, e, left), u, load(rows, j * padded + e))
        if operands.z != 0:
            gate = load_row(operands.z, i * operands.z_stride + e, left)
            value = mul(mul(value, gate), sigmoid(gate))
        store_row(y, i * channels + e, value, left)


@compiled(STRICT)
def _forward(operands: Operands, h: int, y: int, entries: int, scratch: Scratch, sizes: Sizes) -> None:
    """All rows and tokens; `h` `(B, N, E)` enters as the initial and leaves as the final state."""
    batch, length, channels, states = sizes.batch, sizes.length, sizes.channels, sizes.states
    delta, source, rows, state, a = scratch
    one_state = states * channels
    _pack(operands.A, 0, _LOG2E, a, sizes)
    for r in range(batch):
        _pack(h, r * one_state, _ONE, state, sizes)
        for first in range(0, length, BLOCK):
            i = r * length + first
            count = min(BLOCK, length - first)
            if entries != 0:
                _unpack(state, entries, (first // BLOCK * batch + r) * one_state, sizes)
            for j in range(count):
                _discretise(operands, i + j, j, sizes, delta, source)
            for e in range(0, channels, WIDTH):
                _advance(operands, i, count, e, sizes, scratch)
            for j in range(count):
                _emit(operands, i + j, j, sizes, rows, y)
        _unpack(state, h, r * one_state, sizes)


@part(STRICT)
def _prepare(operands: Operands, i: int, j: int, sizes: Sizes, dy: int, slope: int, bend: int, grad: int) -> None:
    """Derivatives of `Δ` and of the gate and the gradient before the gate, of token `i`, row `j` of the block."""
    channels, padded = sizes.channels, sizes.padded
    real = _real(operands, i)
    for e in range(0, channels, WIDTH):
        left = channels - e
        store(slope, j * padded + e, sigmoid(_raw_step(operands, i, e, left)) if real else splat(_ZERO))
        g = load_row(dy, i * channels + e, left)
        if operands.z != 0:
            gate = load_row(operands.z, i * operands.z_stride + e, left)
            s = sigmoid(gate)
            store(bend, j * padded + e, mul(s, fma(gate, sub(splat(_ONE), s), splat(_ONE))))
            g = mul(mul(g, gate), s)
        store(grad, j * padded + e, g)


@part(STRICT, forceinline=True)
def _gather(rows: int, at: int, value: Vector, low: int) -> None:
    """Write a sum over the first tile of states, or add one over a later tile."""
    store(rows, at, value if low == 0 else add(load(rows, at), value))


@part(STRICT)
def _replay(
    operands: Operands, i: int, count: int, e: int, tile: Tile, sizes: Sizes, rows: Tokens, packed: Packed, y: int
) -> None:
    """The block again for sixteen channels, keeping its decays and states this time; outputs added to rows of `y`."""
    states, padded, (low, wide) = sizes.states, sizes.padded, tile
    delta, source = rows.delta, rows.source
    a, decays, history = packed.a, packed.decays, packed.history
    for j in range(count):
        b, c = (i + j) * operands.B_stride, (i + j) * operands.C_stride
        d, s, value = load(delta, j * padded + e), load(source, j * padded + e), splat(_ZERO)
        fresh = _fresh(operands, i + j)
        for k in range(wide):
            at, n = (j * wide + k) * WIDTH, low + k
            h, p = splat(_ZERO), splat(_ZERO)
            if not fresh:
                h, p = load(history, at), decay(mul(d, load(a, e * states + n * WIDTH)))
            h = fma(p, h, mul(s, splat(read_float(operands.B, b + n))))
            store(decays, at, p)
            store(history, at + wide * WIDTH, h)
            value = fma(h, splat(read_float(operands.C, c + n)), value)
        _gather(y, j * padded + e, value, low)


@part(STRICT)
def _retreat(
    operands: Operands, i: int, count: int, e: int, tile: Tile, sizes: Sizes, rows: Tokens, packed: Packed
) -> None:
    """The adjoint recurrence `g ← exp(Δ_{t+1} A) g + C_t ∂y_t` for sixteen channels, and its part of every gradient."""
    states, padded, (low, wide) = sizes.states, sizes.padded, tile
    delta, source, grad, gain, pull = rows
    a, carry, decays, history, da, db, dc = packed
    for j in range(count - 1, -1, -1):
        b, c = (i + j) * operands.B_stride, (i + j) * operands.C_stride
        row = j * padded + e
        d, s, dy = load(delta, row), load(source, row), load(grad, row)
        to_u, to_step = splat(_ZERO), splat(_ZERO)
        for k in range(wide):
            n = low + k
            at, place = (j * wide + k) * WIDTH, e * states + n * WIDTH
            g = fma(splat(read_float(operands.C, c + n)), dy, load(carry, place))
            store(dc, at, fma(load(history, at + wide * WIDTH), dy, load(dc, at)))
            store(db, at, fma(g, s, load(db, at)))
            to_u = fma(g, splat(read_float(operands.B, b + n)), to_u)
            g = mul(g, load(decays, at))
            store(carry, place, g)
            g = mul(g, load(history, at))
            to_step = fma(g, load(a, place), to_step)
            store(da, place, fma(g, d, load(da, place)))
        _gather(gain, row, to_u, low)
        _gather(pull, row, to_step, low)


@part(STRICT)
def _write(operands: Operands, i: int, j: int, sizes: Sizes, dy: int, rows: Tokens, more: Gate, out: Out) -> None:
    """Gradients of `u`, `dt` and `z` of token `i`, row `j` of the block, and its part of those of `D` and `dt_bias`."""
    channels, padded = sizes.channels, sizes.padded
    delta, _source, grad, gain, pull = rows
    slope, y, sums, bend = more
    for e in range(0, channels, WIDTH):
        left, row, at = channels - e, j * padded + e, i * channels + e
        u, skip, g = load_row(operands.u, i * operands.u_stride + e, left), _skip(operands, e, left), load(grad, row)
        slant = mul(
            fma(load(gain, row), u, mul(load(pull, row), splat(_LN2))), load(slope, row)
        )  # `A` is in powers of 2
        store_row(out.ddt, at, slant, left)
        store_row(out.du, at, fma(load(gain, row), load(delta, row), mul(skip, g)), left)
        store(sums, e, fma(g, u, load(sums, e)))
        store(sums, padded + e, add(slant, load(sums, padded + e)))
        if operands.z != 0:
            value = mul(fma(skip, u, load(y, row)), load_row(dy, at, left))
            store_row(out.dz, i * out.dz_stride + e, mul(value, load(bend, row)), left)


@part(STRICT)
def _collect(part: int, i: int, count: int, tile: Tile, states: int, target: int) -> None:
    """Sum each token's gradient of `B` or `C` over the lanes, and clear the buffer."""
    low, wide = tile
    for j in range(count):
        for k in range(wide):
            at = (j * wide + k) * WIDTH
            write_float(target, (i + j) * states + low + k, total(load(part, at)))
            store(part, at, splat(_ZERO))


@part(STRICT)
def _backward_block(
    operands: Operands, r: int, k: int, sizes: Sizes, dy: int, entries: int, rows: Tokens, packed: Packed, more: Gate,
    out: Out,
) -> None:  # fmt: skip
    """Replay a block of tokens, then retreat through it."""
    batch, length, channels, states = sizes.batch, sizes.length, sizes.channels, sizes.states
    i = r * length + k * BLOCK
    count = min(BLOCK, length - k * BLOCK)
    for j in range(count):
        _discretise(operands, i + j, j, sizes, rows.delta, rows.source)
        _prepare(operands, i + j, j, sizes, dy, more.slope, more.bend, rows.grad)
    for low in range(0, states, TILE):
        tile = (low, min(TILE, states - low))
        for e in range(0, channels, WIDTH):
            for n in range(tile[1]):
                entry = load_row(entries, ((k * batch + r) * states + low + n) * channels + e, channels - e)
                store(packed.history, n * WIDTH, entry)
            _replay(operands, i, count, e, tile, sizes, rows, packed, more.y)
            _retreat(operands, i, count, e, tile, sizes, rows, packed)
        _collect(packed.dB, i, count, tile, states, out.dB)
        _collect(packed.dC, i, count, tile, states, out.dC)
    for j in range(count):
        _write(operands, i + j, j, sizes, dy, rows, more, out)


@compiled(STRICT)
def _backward(
    operands: Operands, entries: int, dy: int, dh: int, of_a: int, of_skip: int, rows: Tokens, packed: Packed, more: Gate,
    out: Out, sizes: Sizes,
) -> None:  # fmt: skip
    """Blocks from last to first. `dh` enters as ∂final, leaves as ∂initial state; `of_a` is ∂A, `of_skip` ∂D, ∂dt_bias."""
    batch, length, channels, states, padded = sizes
    one_state = states * channels
    _pack(operands.A, 0, _LOG2E, packed.a, sizes)
    for r in range(batch):
        _pack(dh, r * one_state, _ONE, packed.carry, sizes)
        for k in range((length + BLOCK - 1) // BLOCK - 1, -1, -1):
            _backward_block(operands, r, k, sizes, dy, entries, rows, packed, more, out)
            if k % BLOCKS == 0:
                flush(packed.dA, of_a, padded * states)
                flush(more.sums, of_skip, 2 * padded)
        _unpack(packed.carry, dh, r * one_state, sizes)


def _operands(call: dict[str, Any]) -> tuple[Any, Operands, Sizes]:
    """Turn the operator's tensors into memory to keep alive, the kernels' operands and sizes."""
    batch, length, channels = call["u"].shape
    mask = call["mask"]
    rows = u, dt, z, B, C = tuple(map(flat_rows, (call["u"], call["dt"], call["z"], call["B"], call["C"])))
    vectors = A, D, bias = tuple(map(flat_vector, (call["A"].t(), call["D"], call["dt_bias"])))
    marks = real, reset = flat_bytes(None if mask is None else mask != 0), flat_bytes(call["reset"])
    operands = Operands(
        u.address, u.stride, dt.address, dt.stride, z.address, z.stride, A.address, B.address, B.stride, C.address,
        C.stride, D.address, bias.address, real.address, reset.address,
    )  # fmt: skip
    return (rows, vectors, marks), operands, Sizes(batch, length, channels, call["A"].shape[1], padded_size(channels))


def _writable(state: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 copy."""
    return state.detach().float().clone(memory_format=torch.contiguous_format)


def _buffers(*sizes: int) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """Zeroed buffers and their addresses."""
    tensors = [torch.zeros(size, **FLOATS) for size in sizes]
    return tensors, tuple(tensor.data_ptr() for tensor in tensors)


def selective_scan_cpu(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass, with `Δ = softplus(dt + dt_bias)` and `A ≤ 0`; arguments and results as in `selective_scan_eager`,
    always float32.
    """
    call, (_softplus, save, *into) = INPUTS.split(values)
    _kept, operands, sizes = _operands(call)
    batch, length, channels, states, padded = sizes
    shape = (batch, states, channels)
    final = torch.zeros(shape, **FLOATS) if call["initial_state"] is None else _writable(call["initial_state"])
    blocks = -(-length // BLOCK) if save else 0
    y, entries = into or (torch.empty(batch, length, channels, **FLOATS), torch.empty((blocks, *shape), **FLOATS))
    _tensors, scratch = _buffers(*[BLOCK * padded] * 3, states * padded, states * padded)
    _forward(operands, final.data_ptr(), y.data_ptr(), entries.data_ptr() if save else 0, scratch, sizes)
    return y, final, entries


def selective_scan_cpu_backward(
    grad_y: torch.Tensor,
    grad_state: torch.Tensor,
    entries: torch.Tensor,
    *values: Any,
    into: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `selective_scan_eager_backward`, always float32."""
    call, _options = INPUTS.split(values)
    _kept, operands, sizes = _operands(call)
    batch, length, channels, states, padded = sizes
    shape = (batch, length, channels)
    shapes = shape, shape, *[(batch, length, states)] * 2
    du, ddt, db, dc = (torch.empty(size, **FLOATS) for size in shapes)
    dz = into if into is not None else torch.empty(shape if call["z"] is not None else 0, **FLOATS)
    # Sums over the whole batch are kept in float64: their terms are block sums in float32.
    da = torch.zeros(padded // WIDTH, states, WIDTH, **DOUBLES)
    sums = torch.zeros(2, padded, **DOUBLES)
    dh, dy = _writable(grad_state), flat_vector(grad_y)
    many, few = BLOCK * padded, BLOCK * TILE * WIDTH
    _rows, tokens = _buffers(*[many] * 5)
    _packed, packed = _buffers(states * padded, states * padded, few, few + TILE * WIDTH, states * padded, few, few)
    _more, gate = _buffers(many, many, 2 * padded, many)
    written = (tensor.data_ptr() for tensor in (du, ddt, dz, db, dc))
    out = Out._make((*written, dz.stride(-2) if dz.dim() > 1 else 0))
    totals = da.data_ptr(), sums.data_ptr()
    buffers = Tokens(*tokens), Packed(*packed), Gate(*gate)
    _backward(operands, entries.data_ptr(), dy.address, dh.data_ptr(), *totals, *buffers, out, sizes)
    by_channel = da.transpose(1, 2).flatten(0, 1)[:channels]
    skip, bias = (row[:channels].float() for row in sums)
    grads = {"u": du, "dt": ddt, "z": dz, "A": by_channel.float(), "D": skip, "dt_bias": bias}
    return grads | {"B": db, "C": dc, "initial_state": dh}


@compiled(STRICT)
def _step(
    u: int, us: int, dt: int, ds: int, z: int, zs: int, a: int, b: int, bs: int, c: int, cs: int, skip: int, bias: int,
    state: int, batch: int, channels: int, states: int, y: int, last: int,
) -> None:  # fmt: skip
    """One token of every row; `a` is `(E, N)`, `state` and `last` are `(B, N, E)`."""
    for r in range(batch):
        for e in range(0, channels, WIDTH):
            left = channels - e
            raw = load_row(dt, r * ds + e, left)
            step = softplus(add(raw, load_row(bias, e, left)) if bias != 0 else raw)
            x = load_row(u, r * us + e, left)
            source = mul(step, x)
            value = mul(load_row(skip, e, left), x) if skip != 0 else splat(_ZERO)
            for n in range(states):
                at = (r * states + n) * channels + e
                h = mul(source, splat(read_float(b, r * bs + n)))
                if state != 0:
                    rate = load_column(a, e * states + n, states, left)
                    h = fma(exp(mul(step, rate)), load_row(state, at, left), h)
                store_row(last, at, h, left)
                value = fma(h, splat(read_float(c, r * cs + n)), value)
            if z != 0:
                gate = load_row(z, r * zs + e, left)
                value = mul(mul(value, gate), sigmoid(gate))
            store_row(y, r * channels + e, value, left)


def selective_scan_cpu_step(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    *_rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token; arguments and results as in `selective_scan_step` with softplus."""
    rows = [flat_rows(tensor) for tensor in (u, dt, z, B, C)]
    x, steps, gates, to_state, from_state = ((flat.address, flat.stride) for flat in rows)
    vectors = [flat_vector(tensor) for tensor in (A, D, dt_bias, state)]
    rates, skip, bias, carried = (flat.address for flat in vectors)
    batch, _, channels = u.shape
    y = torch.empty(u.shape, **FLOATS)
    last = torch.empty(batch, A.shape[1], channels, **FLOATS)
    mixing = (*to_state, *from_state, skip, bias, carried)
    _step(*x, *steps, *gates, rates, *mixing, batch, channels, A.shape[1], y.data_ptr(), last.data_ptr())
    return y, last
