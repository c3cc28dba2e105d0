"""State space duality on the CPU: the machine's matrix products, and numba kernels for everything between them.

The algorithm is that of `eager.py`, chunk by chunk. Its products stay torch's; decays, masks, scalings and sums, which
there are two dozen passes over memory, are one kernel each here. Rows keep the layout `(batch, token, heads · width)` of
the projections; products over a group read them in place.

Glossary: `S` ↔ `sums` (cumulative log decay within the chunk, float64), `W` ↔ `weights`, `exp(S_l)` ↔ `onward`,
`exp(S_Q - S_s)` ↔ `remaining`, `exp(S_Q)` ↔ `whole`.

Complexity: as `eager.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.compiled import STRICT, compiled, part
from ..kernels.flat import DOUBLES, FLOATS, flat_bytes, flat_rows, flat_vector
from ..kernels.simd import (
    WIDTH,
    add,
    exp,
    fma,
    load_row,
    mul,
    read_byte,
    read_double,
    read_float,
    scalar_exp,
    splat,
    store_row,
    total,
    vanish_below,
    write_double,
    write_float,
)
from .inputs import INPUTS

try:
    import numpy as np
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

# Sums whose order is the compiler's.
_SUMS = STRICT | {"reassoc"}
# exp(-69) is 1e-30; smaller decays are zero: denormal operands make matrix products thirty times slower.
_NEGLIGIBLE = np.float32(-69.0)
_FORGET = -1.0e4
_ZERO = np.float32(0.0)


class Rows(NamedTuple):
    """Addresses of a call's tensors, 0 for absent ones; `stride` is that of `x` from token to token."""

    x: int
    stride: int
    scale: int
    log_decay: int
    skip: int
    diagonal: int
    reset: int


class Sizes(NamedTuple):
    """Sizes of a call and of the chunk of `count` tokens that begins at token `first`."""

    batch: int
    length: int
    heads: int
    width: int
    groups: int
    first: int
    count: int  # type: ignore[assignment]  # hides the method of tuples, which kernels have no use for


class Parts(NamedTuple):
    """Addresses of a chunk's buffers, see `_Chunk`."""

    sums: int
    onward: int
    remaining: int
    whole: int
    weights: int
    attention: int
    values: int
    kept: int
    ahead: int


class Out(NamedTuple):
    """Addresses of gradients."""

    dx: int
    dscale: int
    dlog_decay: int
    dskip: int


@part(STRICT, forceinline=True)
def _decay_of(x: Any) -> Any:
    """`exp(x)` of one number, 0 where negligible."""
    return _ZERO if x < _NEGLIGIBLE else scalar_exp(np.float32(x))


@part(STRICT)
def _accumulate(rows: Rows, r: int, h: int, sizes: Sizes, parts: Parts) -> None:
    """`S` of one head, and the decays that depend on one token."""
    _batch, length, heads, _width, _groups, first, count = sizes
    sums = 0.0
    for j in range(count):
        i = r * length + first + j
        fresh = rows.reset != 0 and read_byte(rows.reset, i) != 0
        sums += _FORGET if fresh else np.float64(read_float(rows.log_decay, i * heads + h))
        write_double(parts.sums, j, sums)
    for j in range(count):
        at = (r * count + j) * heads + h
        mine = read_double(parts.sums, j)
        write_float(parts.onward, at, _decay_of(mine))
        write_float(parts.remaining, at, _decay_of(sums - mine))
    write_float(parts.whole, r * heads + h, _decay_of(sums))


@part(STRICT)
def _weigh(rows: Rows, r: int, h: int, sizes: Sizes, parts: Parts, scores: int, line: int) -> None:
    """`W` and `W ∘ C Bᵀ` of one head; `line` is scratch of one row."""
    _batch, length, heads, _width, groups, first, count = sizes
    matrix = (r * heads + h) * count * count
    shared = (r * groups + h // (heads // groups)) * count * count
    for j in range(count):
        mine = read_double(parts.sums, j)
        for s in range(count):
            later = np.float32(mine - read_double(parts.sums, s))
            write_float(line, s, later if s <= j else np.float32(-1000.0))
        for s in range(0, count, WIDTH):
            left, x = count - s, load_row(line, s, count - s)
            weight = vanish_below(x, splat(_NEGLIGIBLE), exp(x))
            store_row(parts.weights, matrix + j * count + s, weight, left)
            product = mul(weight, load_row(scores, shared + j * count + s, left))
            store_row(parts.attention, matrix + j * count + s, product, left)
        if rows.diagonal != 0:
            own = read_float(rows.diagonal, (r * length + first + j) * heads + h)
            write_float(parts.weights, matrix + j * count + j, own)
            write_float(parts.attention, matrix + j * count + j, own * read_float(scores, shared + j * count + j))


@part(STRICT)
def _scale(rows: Rows, r: int, sizes: Sizes, parts: Parts, dy: int) -> None:
    """`values = scale · x`, `kept = remaining · values` and, if there is `dy`, `ahead = onward · dy`, of one row."""
    _batch, length, heads, width, _groups, first, count = sizes
    for j in range(count):
        i, at = r * length + first + j, (r * count + j) * heads
        for h in range(heads):
            scale, rest = splat(read_float(rows.scale, i * heads + h)), splat(read_float(parts.remaining, at + h))
            onward = splat(read_float(parts.onward, at + h))
            for p in range(0, width, WIDTH):
                left, place = width - p, (at + h) * width + p
                value = mul(scale, load_row(rows.x, i * rows.stride + h * width + p, left))
                store_row(parts.values, place, value, left)
                store_row(parts.kept, place, mul(value, rest), left)
                if dy != 0:
                    store_row(parts.ahead, place, mul(onward, load_row(dy, (i * heads + h) * width + p, left)), left)


@compiled(STRICT)
def _prepare(rows: Rows, sizes: Sizes, parts: Parts, scores: int, line: int, dy: int) -> None:
    """Everything of a chunk that its products need."""
    for r in range(sizes.batch):
        for h in range(sizes.heads):
            _accumulate(rows, r, h, sizes, parts)
            _weigh(rows, r, h, sizes, parts, scores, line)
        _scale(rows, r, sizes, parts, dy)


@part(STRICT, forceinline=True)
def _by_group(r: int, j: int, h: int, sizes: Sizes) -> int:
    """Where head `h` of token `j` begins in `(batch, groups, count, heads / groups · width)`."""
    heads, width, groups, count = sizes.heads, sizes.width, sizes.groups, sizes.count
    ratio = heads // groups
    return (((r * groups + h // ratio) * count + j) * ratio + h % ratio) * width


@compiled(STRICT)
def _assemble(rows: Rows, sizes: Sizes, parts: Parts, before: int, within: int, y: int) -> None:
    """`y = onward · before + within + D x`: what the entry state and what the chunk's own tokens give."""
    batch, length, heads, width, _groups, first, count = sizes
    for r in range(batch):
        for j in range(count):
            i = r * length + first + j
            for h in range(heads):
                onward = splat(read_float(parts.onward, (r * count + j) * heads + h))
                skip = splat(read_float(rows.skip, h) if rows.skip != 0 else _ZERO)
                group, own = _by_group(r, j, h, sizes), ((r * heads + h) * count + j) * width
                for p in range(0, width, WIDTH):
                    left = width - p
                    value = fma(onward, load_row(before, group + p, left), load_row(within, own + p, left))
                    value = fma(skip, load_row(rows.x, i * rows.stride + h * width + p, left), value)
                    store_row(y, (i * heads + h) * width + p, value, left)


@compiled(_SUMS)
def _pair(
    rows: Rows, sizes: Sizes, parts: Parts, scores: int, dattention: int, dscores: int, slopes: int, own: int, line: int
) -> None:
    """Gradients of the scores and the diagonal; `slopes` `(batch, count, heads)` gets what each pair adds to log decays."""
    batch, length, heads, _width, groups, first, count = sizes
    for r in range(batch):
        for h in range(heads):
            matrix = (r * heads + h) * count * count
            shared = (r * groups + h // (heads // groups)) * count * count
            for j in range(count):
                for s in range(0, j + 1, WIDTH):
                    left, at = count - s, j * count + s
                    grad = load_row(dattention, matrix + at, left)
                    weighted = mul(grad, load_row(parts.weights, matrix + at, left))
                    store_row(dscores, shared + at, add(load_row(dscores, shared + at, left), weighted), left)
                    store_row(line, s, mul(grad, load_row(parts.attention, matrix + at, left)), left)
                sums = 0.0
                for s in range(j + 1):
                    pair = np.float64(read_float(line, s))
                    sums += pair
                    at = (r * count + s) * heads + h
                    write_double(slopes, at, read_double(slopes, at) - pair)
                at = (r * count + j) * heads + h
                write_double(slopes, at, read_double(slopes, at) + sums)
                diagonal = read_float(dattention, matrix + j * count + j) * read_float(scores, shared + j * count + j)
                write_float(own, (r * length + first + j) * heads + h, diagonal)


@part(STRICT)
def _finish_head(
    rows: Rows, r: int, j: int, h: int, sizes: Sizes, parts: Parts, more: Any, out: Out, kept_sum: int
) -> None:
    """Gradients of one token's input and scale, and its part of the log decays' and `D`'s."""
    _batch, length, heads, width, _groups, first, count = sizes
    dy, through, to_state, from_state, slopes = more
    i, at = r * length + first + j, (r * count + j) * heads + h
    scale, rest = read_float(rows.scale, i * heads + h), read_float(parts.remaining, at)
    skip = read_float(rows.skip, h) if rows.skip != 0 else _ZERO
    group, own = _by_group(r, j, h, sizes), ((r * heads + h) * count + j) * width
    to_scale, arrived, left_behind, to_skip = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for p in range(0, width, WIDTH):
        left, place = width - p, (i * heads + h) * width + p
        grad = load_row(dy, place, left)
        x = load_row(rows.x, i * rows.stride + h * width + p, left)
        state = load_row(to_state, group + p, left)
        value = fma(state, splat(rest), load_row(through, own + p, left))
        store_row(out.dx, place, fma(value, splat(scale), mul(grad, splat(skip))), left)
        to_scale = fma(value, x, to_scale)
        left_behind = fma(load_row(parts.kept, at * width + p, left), state, left_behind)
        arrived = fma(load_row(parts.ahead, at * width + p, left), load_row(from_state, group + p, left), arrived)
        to_skip = fma(grad, x, to_skip)
    write_float(out.dscale, i * heads + h, total(to_scale))
    behind = np.float64(total(left_behind))
    write_double(slopes, at, read_double(slopes, at) + np.float64(total(arrived)) - behind)
    write_double(kept_sum, r * heads + h, read_double(kept_sum, r * heads + h) + behind)
    write_double(out.dskip, h, read_double(out.dskip, h) + np.float64(total(to_skip)))


@compiled(STRICT)
def _finish(rows: Rows, sizes: Sizes, parts: Parts, more: Any, kept_sum: int, out: Out) -> None:
    """A chunk's gradients of `x`, `scale` and `log_decay`; `kept_sum` enters as `∂ whole · whole`, one number a head.

    A log decay multiplies every pair that it lies between, so its gradient is a sum over the tokens from it on.
    """
    batch, length, heads, _width, _groups, first, count = sizes
    for r in range(batch):
        for h in range(heads):
            for j in range(count):
                _finish_head(rows, r, j, h, sizes, parts, more, out, kept_sum)
            sums = read_double(kept_sum, r * heads + h)
            for j in range(count - 1, -1, -1):
                sums += read_double(more[4], (r * count + j) * heads + h)
                write_float(out.dlog_decay, (r * length + first + j) * heads + h, np.float32(sums))


class _Call:
    """One call's tensors as the kernels and the products read them.

    Attributes:
        rows: see `Rows`.
        b, c: `(batch, groups, length, states)`.
        sizes: batch, length, heads, width, groups.
    """

    def __init__(self, call: dict[str, Any]) -> None:
        x = call["x"]
        self.sizes = (*x.shape, call["B"].shape[2])
        first, reset = flat_rows(x.flatten(2)), flat_bytes(call["reset"])
        vectors = map(flat_vector, (call["scale"], call["log_decay"], call["D"], call["diagonal"]))
        self.kept = (first, *vectors, reset)
        self.rows = Rows(first.address, first.stride, *(flat.address for flat in self.kept[1:]))
        self.b, self.c = (call[name].detach().float().transpose(1, 2) for name in ("B", "C"))
        self.line = torch.empty(WIDTH + max(1, x.shape[1]), **FLOATS)


class _Chunk:
    """One chunk's buffers, filled by `_prepare`.

    Attributes:
        b, c: `(batch, groups, count, states)`; `scores` is `c bᵀ`.
        weights, attention: `(batch · heads, count, count)`.
        values, kept, ahead: `(batch, count, heads, width)`.
    """

    def __init__(self, call: _Call, first: int, last: int, dy: int = 0) -> None:
        batch, _, heads, width, groups = call.sizes
        count = last - first
        self.sizes = Sizes._make((*call.sizes, first, count))
        self.call, self.groups = call, groups
        self.b, self.c = call.b[:, :, first:last], call.c[:, :, first:last]
        self.scores = self.c @ self.b.mT
        self.sums = torch.empty(count, **DOUBLES)
        self.onward, self.remaining = torch.empty(2, batch, count, heads, **FLOATS)
        self.whole = torch.empty(batch, groups, heads // groups, 1, **FLOATS)
        self.weights, self.attention = torch.empty(2, batch * heads, count, count, **FLOATS)
        values = torch.empty(3 if dy else 2, batch, count, heads, width, **FLOATS).unbind()
        self.values, self.kept, self.ahead = values if dy else (*values, self.whole)
        tensors = (self.sums, self.onward, self.remaining, self.whole, self.weights, self.attention, self.values)
        self.parts = Parts(*(tensor.data_ptr() for tensor in (*tensors, self.kept, self.ahead)))
        _prepare(call.rows, self.sizes, self.parts, self.scores.data_ptr(), call.line.data_ptr(), dy)

    def by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(batch, count, heads, width)` as `(batch, groups, count, heads / groups · width)`, a view."""
        return tensor.unflatten(2, (self.groups, -1)).flatten(3).transpose(1, 2)

    def by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(batch, count, heads, width)` as `(batch · heads, count, width)`, a view for one row."""
        return tensor.transpose(1, 2).flatten(0, 1)

    def decayed(self, state: torch.Tensor) -> torch.Tensor:
        """`(batch, groups, heads / groups · width, states)` times each head's decay over the chunk."""
        return (state.unflatten(2, (self.whole.shape[2], -1)) * self.whole.unsqueeze(-1)).flatten(2, 3)


def ssd_cpu(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass; arguments and results as in `ssd_eager`, always float32."""
    call, (chunk_size, save) = INPUTS.split(values)
    known = _Call(call)
    batch, length, heads, width, groups = known.sizes
    shape = (batch, heads, width, call["B"].shape[3])
    initial = call["initial_state"]
    state = torch.zeros(shape, **FLOATS) if initial is None else initial.detach().float()
    state = state.reshape(batch, groups, -1, shape[3])
    y, starts = torch.empty(batch, length, heads, width, **FLOATS), range(0, length, chunk_size)
    entries = torch.empty((len(starts) if save else 0, *shape), **FLOATS)
    for k, first in enumerate(starts):
        chunk = _Chunk(known, first, min(length, first + chunk_size))
        if save:
            entries[k] = state.view(shape)
        before = (chunk.c @ state.mT).contiguous()
        within = torch.bmm(chunk.attention, chunk.by_head(chunk.values))
        _assemble(known.rows, chunk.sizes, chunk.parts, before.data_ptr(), within.data_ptr(), y.data_ptr())
        state = chunk.decayed(state) + chunk.by_group(chunk.kept).mT @ chunk.b
    return y, state.reshape(shape).clone(), entries


def ssd_cpu_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, entries: torch.Tensor, *values: Any
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `ssd_eager_backward`, always float32."""
    call, (chunk_size,) = INPUTS.split(values)
    known, dy = _Call(call), grad_y.float().contiguous()
    batch, length, heads, _, groups = known.sizes
    grads = {"x": torch.empty_like(dy), "scale": torch.empty(batch, length, heads, **FLOATS)}
    grads |= {name: torch.empty(batch, length, heads, **FLOATS) for name in ("log_decay", "diagonal")}
    grads |= {name: torch.empty(call[name].shape, **FLOATS) for name in ("B", "C")}
    skip = torch.zeros(heads, **DOUBLES)
    carry = grad_state.float().reshape(batch, groups, -1, entries.shape[-1])
    for k in reversed(range(entries.shape[0])):
        first, last = k * chunk_size, min(length, (k + 1) * chunk_size)
        chunk = _Chunk(known, first, last, dy.data_ptr())
        carry = _retreat(chunk, grads, dy, skip, entries[k].reshape(carry.shape), carry)
    return grads | {"D": skip.float(), "initial_state": carry.reshape(grad_state.shape).clone()}


def _retreat(
    chunk: _Chunk,
    grads: dict[str, torch.Tensor],
    dy: torch.Tensor,
    skip: torch.Tensor,
    state: torch.Tensor,
    carry: torch.Tensor,
) -> torch.Tensor:
    """Write one chunk's gradients and return the entry state's; `state` and `carry` are by group."""
    batch, _, heads, _, _, first, count = chunk.sizes
    rows, window = chunk.call.rows, slice(first, first + count)
    dy_heads = chunk.by_head(dy[:, window])
    dattention = torch.bmm(dy_heads, chunk.by_head(chunk.values).mT)
    dscores, slopes = torch.zeros_like(chunk.scores), torch.zeros(batch, count, heads, **DOUBLES)
    line, own = chunk.call.line.data_ptr(), grads["diagonal"].data_ptr()
    addresses = [tensor.data_ptr() for tensor in (chunk.scores, dattention, dscores, slopes)]
    _pair(rows, chunk.sizes, chunk.parts, *addresses, own, line)
    ahead, kept = chunk.by_group(chunk.ahead), chunk.by_group(chunk.kept)
    grads["C"][:, window] = (dscores @ chunk.b + ahead @ state).transpose(1, 2)
    grads["B"][:, window] = (dscores.mT @ chunk.c + kept @ carry).transpose(1, 2)
    through = torch.bmm(chunk.attention.mT, dy_heads)
    to_state, from_state = (chunk.b @ carry.mT).contiguous(), (chunk.c @ state.mT).contiguous()
    held = (carry * state).unflatten(2, (chunk.whole.shape[2], -1)).sum((3, 4)).unsqueeze(-1)
    kept_sum = (held * chunk.whole).double().contiguous()
    more = tuple(tensor.data_ptr() for tensor in (dy, through, to_state, from_state, slopes))
    out = Out(*(tensor.data_ptr() for tensor in (grads["x"], grads["scale"], grads["log_decay"], skip)))
    _finish(rows, chunk.sizes, chunk.parts, more, kept_sum.data_ptr(), out)
    return chunk.decayed(carry) + ahead.mT @ chunk.c
