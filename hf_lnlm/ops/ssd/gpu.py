"""State space duality on a graphics processor: Triton kernels, forward and backward, matrix products within tiles of
tokens and a state that stays on chip between them.

Grid: one program a row, a head and a tile of the head's width; it runs the whole sequence. Within a tile of `Q` tokens
the recurrence is a masked, decayed attention; the tile's last state is the next one's first. Log decays are summed in
float64, so that differences of large sums stay exact. The forward pass stores the state at every chunk's entry; the
backward pass runs a chunk's tiles again from there. Gradients that several programs share are written by each and then
added up: the result is the same on every run.

All products are in full float32 (`ieee`), not in the tensor cores' shorter format. mamba-ssm's kernels are not used: they
take log decays that are proportional to the inputs' weights only, and these need not be (Mamba-3, masks).

References:
    [1] Dao, Gu: "Transformers are SSMs", arXiv:2405.21060, section 6 and listing 1.

Glossary: `S` ↔ `sums` (cumulative log decay within the tile), `W_ls = exp(S_l - S_s)` for `l ≥ s` ↔ `weights`,
`exp(S_l)` ↔ `onward`, `exp(S_Q - S_s)` ↔ `remaining`, `h` ↔ `state` `(P, N)`.

Complexity: O(L · (Q (N + P) + P N)) multiply-adds a row and head, O(B · H · P · N · L / chunk) memory for gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.triton_math import exp, kernel, power_of_two, tl
from .inputs import INPUTS

_MOST_TOKENS = 64  # of a tile
_STATE_ENTRIES = 4096  # of a program's part of the state


class Operands(NamedTuple):
    """The operation's tensors; absent ones are stood in for by `x` and never read."""

    x: Any
    scale: Any
    log_decay: Any
    B: Any
    C: Any
    D: Any
    diagonal: Any
    reset: Any


class Strides(NamedTuple):
    """Elements from row to row, token to token and head (or group) to head."""

    x: tuple[int, int, int]
    B: tuple[int, int, int]
    C: tuple[int, int, int]


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    heads: int
    width: int  # P
    groups: int
    states: int  # N
    chunk: int  # tokens between stored states
    tokens: int  # Q, of a tile
    tile: int  # of a head's width
    block_states: int
    skipped: bool
    bent: bool  # a diagonal is given
    resets: bool
    save: bool


class Gradients(NamedTuple):
    """What the backward kernel reads and fills, float32; `parts` are tiles of the heads' widths."""

    y: Any  # `(B, L, H, P)`, given
    state: Any  # `(B, H, P, N)`: that of the final state, then that of the initial one
    entries: Any  # `(chunks, B, H, P, N)`, given
    states: Any  # `(B, H, tiles of a chunk, P, N)`, scratch
    x: Any  # `(B, L, H, P)`
    scale: Any  # `(parts, B, L, H)`
    log_decay: Any  # `(parts, B, L, H)`
    diagonal: Any  # `(parts, B, L, H)`
    B: Any  # `(B, L, H · parts, N)`
    C: Any  # `(B, L, H · parts, N)`
    D: Any  # `(parts, B, H)`


@kernel
def _product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Matrix product in full float32."""
    return tl.dot(a, b, input_precision="ieee")


@kernel
def _state_tile(s: tl.constexpr) -> tl.tensor:
    """Offsets and mask of this program's part of a state `(P, N)`."""
    at = tl.program_id(2) * s.tile + tl.arange(0, s.tile)
    n = tl.arange(0, s.block_states)
    return at[:, None] * s.states + n[None, :], (at[:, None] < s.width) & (n[None, :] < s.states)


@kernel
def _values(
    tensor: tl.tensor, stride: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """The tokens `t < last` of this program's part of a head, `(Q, tile)`, float32."""
    at = tl.program_id(2) * s.tile + tl.arange(0, s.tile)
    row = tensor + b * stride[0] + t[:, None] * stride[1] + tl.program_id(1) * stride[2] + at[None, :]
    return tl.load(row, mask=(t[:, None] < last) & (at[None, :] < s.width), other=0.0).to(tl.float32)


@kernel
def _keys(
    tensor: tl.tensor, stride: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """The tokens `t < last` of B or C of this program's group, `(Q, N)`, float32."""
    n, group = tl.arange(0, s.block_states), tl.program_id(1) // (s.heads // s.groups)
    row = tensor + b * stride[0] + t[:, None] * stride[1] + group * stride[2] + n[None, :]
    return tl.load(row, mask=(t[:, None] < last) & (n[None, :] < s.states), other=0.0).to(tl.float32)


@kernel
def _per_head(
    tensor: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """One number a token, `(Q,)`, float32."""
    return tl.load(tensor + (b * length + t) * s.heads + tl.program_id(1), mask=t < last, other=0.0).to(tl.float32)


@kernel
def _fresh(o: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Which tokens begin a document."""
    return tl.load(o.reset + b * length + t, mask=t < last, other=0) != 0


@kernel
def _decays(o: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """`weights` without the diagonal's change, `onward`, `remaining` and the decay over the whole tile."""
    log_decay = _per_head(o.log_decay, b, t, last, length, s).to(tl.float64)
    if s.resets:
        log_decay = tl.where(_fresh(o, b, t, last, length), -1.0e4, log_decay)
    sums, total = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
    place = tl.arange(0, s.tokens)
    past = place[:, None] >= place[None, :]
    weights = exp(tl.where(past, (sums[:, None] - sums[None, :]).to(tl.float32), float("-inf")))
    return weights, exp(sums.to(tl.float32)), exp((total - sums).to(tl.float32)), exp(total.to(tl.float32))


@kernel
def _bend(
    o: tl.tensor, weights: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """`weights` with each token's factor of its own part on the diagonal."""
    if s.bent:
        place, own = tl.arange(0, s.tokens), _per_head(o.diagonal, b, t, last, length, s)
        weights = tl.where(place[:, None] == place[None, :], own[:, None], weights)
    return weights


@kernel
def _advance(
    o: tl.tensor, k: tl.tensor, state: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor,
    s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The state after a tile from that before it."""
    _weights, _onward, remaining, whole = _decays(o, b, t, last, length, s)
    gain = _per_head(o.scale, b, t, last, length, s) * remaining
    values = _values(o.x, k.x, b, t, last, s) * gain[:, None]
    return state * whole + _product(tl.trans(values), _keys(o.B, k.B, b, t, last, s))


@kernel
def _emit(
    o: tl.tensor, k: tl.tensor, state: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor,
    s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The outputs of a tile, `(Q, tile)`."""
    weights, onward, _remaining, _whole = _decays(o, b, t, last, length, s)
    x, keys = _values(o.x, k.x, b, t, last, s), _keys(o.B, k.B, b, t, last, s)
    queries = _keys(o.C, k.C, b, t, last, s)
    attention = _product(queries, tl.trans(keys)) * _bend(o, weights, b, t, last, length, s)
    y = _product(attention, x * _per_head(o.scale, b, t, last, length, s)[:, None])
    y += _product(queries, tl.trans(state)) * onward[:, None]
    if s.skipped:
        y += x * tl.load(o.D + tl.program_id(1)).to(tl.float32)
    return y


@kernel
def _store_values(
    tensor: tl.tensor, values: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor,
    s: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the tokens `t < last` of this program's part of a head, `(B, L, H, P)`."""
    at = tl.program_id(2) * s.tile + tl.arange(0, s.tile)
    row = ((b * length + t)[:, None] * s.heads + tl.program_id(1)) * s.width + at[None, :]
    tl.store(tensor + row, values, mask=(t[:, None] < last) & (at[None, :] < s.width))


@kernel
def _forward(
    o: tl.tensor, k: tl.tensor, final: tl.tensor, y: tl.tensor, entries: tl.tensor, batch: tl.tensor,
    length: tl.tensor, s: tl.constexpr,
) -> None:  # fmt: skip
    """One row, head and part; `final` `(B, H, P, N)` holds the initial and then the final state."""
    b = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = s.width * s.states
    at, inside = _state_tile(s)
    place = (b * s.heads + tl.program_id(1)) * size
    state = tl.load(final + place + at, mask=inside, other=0.0)
    for first in range(0, length, s.chunk):
        if s.save:
            entry = (first // s.chunk * batch + b) * s.heads + tl.program_id(1)
            tl.store(entries + entry * size + at, state, mask=inside)
        last = tl.minimum(first + s.chunk, length)
        for start in range(first, last, s.tokens):
            t = start + tl.arange(0, s.tokens)
            _store_values(y, _emit(o, k, state, b, t, last, length, s), b, t, last, length, s)
            state = _advance(o, k, state, b, t, last, length, s)
    tl.store(final + place + at, state, mask=inside)


@kernel
def _store_per_head(
    tensor: tl.tensor, values: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, batch: tl.tensor,
    length: tl.tensor, s: tl.constexpr,
) -> None:  # fmt: skip
    """Writes one number a token of this program's part."""
    row = ((tl.program_id(2) * batch + b) * length + t) * s.heads + tl.program_id(1)
    tl.store(tensor + row, values, mask=t < last)


@kernel
def _store_keys(
    tensor: tl.tensor, values: tl.tensor, b: tl.tensor, t: tl.tensor, last: tl.tensor, length: tl.tensor,
    s: tl.constexpr,
) -> None:  # fmt: skip
    """Writes this program's share of the gradient of B or C."""
    n, parts = tl.arange(0, s.block_states), tl.num_programs(2)
    share = tl.program_id(1) * parts + tl.program_id(2)
    row = ((b * length + t)[:, None] * s.heads * parts + share) * s.states + n[None, :]
    tl.store(tensor + row, values, mask=(t[:, None] < last) & (n[None, :] < s.states))


@kernel
def _decay_slope(pairs: tl.tensor, arrived: tl.tensor, left: tl.tensor, whole: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Gradient of the log decays: the sum of all products that each one multiplies, in float64, since row and column
    sums of `pairs` nearly cancel."""
    pairs, left = pairs.to(tl.float64), left.to(tl.float64)
    terms = tl.sum(pairs, 1) - tl.sum(pairs, 0) + arrived.to(tl.float64) - left
    return (tl.cumsum(terms, 0, reverse=True) + (tl.sum(left, 0) + whole.to(tl.float64))).to(tl.float32)


@kernel
def _retreat(
    o: tl.tensor, k: tl.tensor, d: tl.tensor, state: tl.tensor, carry: tl.tensor, b: tl.tensor, t: tl.tensor,
    last: tl.tensor, batch: tl.tensor, length: tl.tensor, s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Writes one tile's gradients; returns those of the state before it and of D."""
    past, onward, remaining, whole = _decays(o, b, t, last, length, s)
    weights = _bend(o, past, b, t, last, length, s)
    x, scale = _values(o.x, k.x, b, t, last, s), _per_head(o.scale, b, t, last, length, s)
    keys, queries = _keys(o.B, k.B, b, t, last, s), _keys(o.C, k.C, b, t, last, s)
    dy = _values(d.y, (length * s.heads * s.width, s.heads * s.width, s.width), b, t, last, s)
    values, scores = x * scale[:, None], _product(queries, tl.trans(keys))
    d_attention = _product(dy, tl.trans(values))
    ahead, kept = dy * onward[:, None], values * remaining[:, None]
    to_state = _product(keys, tl.trans(carry))
    d_values = _product(tl.trans(scores * weights), dy) + to_state * remaining[:, None]
    d_scores = d_attention * weights
    _store_keys(d.C, _product(d_scores, keys) + _product(ahead, state), b, t, last, length, s)
    _store_keys(d.B, _product(tl.trans(d_scores), queries) + _product(kept, carry), b, t, last, length, s)
    _store_per_head(d.scale, tl.sum(d_values * x, 1), b, t, last, batch, length, s)
    arrived = tl.sum(ahead * _product(queries, tl.trans(state)), 1)
    over = tl.sum(tl.sum(carry * state, 1), 0) * whole
    slope = _decay_slope(scores * d_scores, arrived, tl.sum(kept * to_state, 1), over, s)
    if s.resets:
        slope = tl.where(_fresh(o, b, t, last, length), 0.0, slope)
    _store_per_head(d.log_decay, slope, b, t, last, batch, length, s)
    if s.bent:
        place = tl.arange(0, s.tokens)
        own = tl.sum(tl.where(place[:, None] == place[None, :], d_attention * scores, 0.0), 1)
        _store_per_head(d.diagonal, own, b, t, last, batch, length, s)
    d_x = d_values * scale[:, None]
    if s.skipped:
        d_x += dy * tl.load(o.D + tl.program_id(1)).to(tl.float32)
    _store_values(d.x, d_x, b, t, last, length, s)
    return carry * whole + _product(tl.trans(ahead), queries), tl.sum(tl.sum(dy * x, 1), 0)


@kernel
def _backward(
    o: tl.tensor, k: tl.tensor, d: tl.tensor, batch: tl.tensor, length: tl.tensor, chunks: tl.tensor, s: tl.constexpr
) -> None:
    """One row, head and part, chunks from last to first."""
    b = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = s.width * s.states
    most: tl.constexpr = (s.chunk + s.tokens - 1) // s.tokens
    at, inside = _state_tile(s)
    head = b * s.heads + tl.program_id(1)
    carry = tl.load(d.state + head * size + at, mask=inside, other=0.0)
    d_skip = 0.0
    for back in range(chunks):
        first = (chunks - 1 - back) * s.chunk
        last = tl.minimum(first + s.chunk, length)
        entry = ((chunks - 1 - back) * batch + b) * s.heads + tl.program_id(1)
        state = tl.load(d.entries + entry * size + at, mask=inside, other=0.0)
        tiles = (last - first + s.tokens - 1) // s.tokens
        for i in range(tiles):
            tl.store(d.states + (head * most + i) * size + at, state, mask=inside)
            if i + 1 < tiles:
                state = _advance(o, k, state, b, first + i * s.tokens + tl.arange(0, s.tokens), last, length, s)
        tl.debug_barrier()
        for behind in range(tiles):
            i = tiles - 1 - behind
            before = tl.load(d.states + (head * most + i) * size + at, mask=inside, other=0.0)
            t = first + i * s.tokens + tl.arange(0, s.tokens)
            carry, part = _retreat(o, k, d, before, carry, b, t, last, batch, length, s)
            d_skip += part
        tl.debug_barrier()
    tl.store(d.state + head * size + at, carry, mask=inside)
    tl.store(d.D + (tl.program_id(2) * batch + b) * s.heads + tl.program_id(1), d_skip)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view or copy whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _operands(call: dict[str, Any], chunk_size: int, save: bool) -> tuple[Operands, Strides, Sizes]:
    """Turn the operator's tensors into the kernels' operands and sizes."""
    x, B, C = (_rows(call[name]) for name in ("x", "B", "C"))
    scale, log_decay = call["scale"].contiguous(), call["log_decay"].contiguous()
    skip, diagonal = (x if call[name] is None else call[name].contiguous() for name in ("D", "diagonal"))
    reset = x if call["reset"] is None else call["reset"].to(torch.uint8).contiguous()
    states = power_of_two(B.shape[3])
    tile = min(power_of_two(x.shape[3]), max(16, _STATE_ENTRIES // states))
    present = [call[name] is not None for name in ("D", "diagonal", "reset")]
    tokens = min(_MOST_TOKENS, power_of_two(chunk_size))
    shape = [*x.shape[2:], *B.shape[2:], chunk_size, tokens, tile, states]
    sizes = Sizes(*[*shape, *present, save])
    strides = Strides(*[(t.stride(0), t.stride(1), t.stride(2)) for t in (x, B, C)])
    return Operands(x, scale, log_decay, B, C, skip, diagonal, reset), strides, sizes


def _grid(batch: int, sizes: Sizes) -> tuple[int, int, int]:
    """Rows, heads and parts of a head's width."""
    return batch, sizes.heads, -(-sizes.width // sizes.tile)


def ssd_gpu(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass; arguments as in `ssd_eager`.

    Returns:
        `y` `(B, L, H, P)` in the input's dtype, final state `(B, H, P, N)` float32, states at the chunks' entries
        `(chunks, B, H, P, N)` or empty.
    """
    call, (chunk_size, save) = INPUTS.split(values)
    operands, strides, sizes = _operands(call, chunk_size, save)
    x, (batch, length) = call["x"], call["x"].shape[:2]
    shape = (batch, sizes.heads, sizes.width, sizes.states)
    options = {"dtype": torch.float32, "device": x.device}
    final = torch.zeros(shape, **options)
    if call["initial_state"] is not None:
        final.copy_(call["initial_state"])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    entries = torch.empty((-(-length // chunk_size) if save else 0, *shape), **options)
    _forward[_grid(batch, sizes)](operands, strides, final, y, entries, batch, length, sizes, num_warps=8)
    return y, final, entries


def ssd_gpu_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, entries: torch.Tensor, *values: Any
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `ssd_eager_backward`, always float32."""
    call, (chunk_size,) = INPUTS.split(values)
    operands, strides, sizes = _operands(call, chunk_size, True)
    batch, length, heads, width = call["x"].shape
    grid, like = _grid(batch, sizes), entries.new_empty
    shares, numbers = (batch, length, heads * grid[2], sizes.states), (grid[2], batch, length, heads)
    tiles = -(-chunk_size // sizes.tokens)
    d = Gradients(
        grad_y.contiguous(), grad_state.float().clone(memory_format=torch.contiguous_format), entries,
        like(batch, heads, tiles, width, sizes.states), like(batch, length, heads, width), like(numbers),
        like(numbers), like(numbers if sizes.bent else 1), like(shares), like(shares), like(grid[2], batch, heads),
    )  # fmt: skip
    _backward[grid](operands, strides, d, batch, length, entries.shape[0], sizes, num_warps=8)
    shared = {name: getattr(d, name).unflatten(2, (sizes.groups, -1)).sum(3) for name in ("B", "C")}
    sums = {name: getattr(d, name).sum(0) for name in ("scale", "log_decay", "diagonal")}
    return shared | sums | {"x": d.x, "D": d.D.sum((0, 1)), "initial_state": d.state}
