"""Whole-sequence Triton kernel of the neural computer, forward: controller, allocation, links, reads and writes.

Grid: one program a sample; it runs the whole sequence with its memory in registers all the way. Links live in place in
global memory (for the usual sizes that is the cache) and are visited in tiles of rows. Every short row that a step hands
to the next goes through global memory too, where the backward kernel finds it again.

Slots are not sorted: what is allocated to a slot is the product of the usages of all slots before it in the order of
usage, found by comparing all pairs by u[n] + n·1.6e-6, which costs no more than a visit of the links. Products are sums of
logarithms.

Glossary: `hidden` [h_t ; r_t] · `raw` clipped interface · `usage` u · `retention` ψ · `free` a_t · `content` c ·
`forwards`, `backwards` f and b · `slot`, `word` padded index ranges · `s` sizes, `at` places in the interface.

Complexity: time O(T·(H² + heads·N·W + K·N²)) a sample; stored O(T·(H + (R·K + K)·N)) and N² every `every` steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...kernels.triton_math import kernel, log_of_share, sigmoid, softplus, tl
from ...kernels.triton_rows import (
    controller_forward,
    copy_row,
    cosines,
    entry,
    inverse_norms,
    kept,
    load_row,
    load_tile,
    read,
    softmax,
    store_row,
    store_tile,
)


class Sizes(NamedTuple):
    """The numbers that a kernel is compiled for."""

    hidden: int
    reads: int
    writes: int
    slots: int
    width: int
    linked: int  # write heads with links: all or none
    modes: int  # of a read head
    reading: int  # R·W
    interface: int
    gates: int
    lstm: bool
    masked: bool
    deallocate: bool
    clip: float
    mask_min: float
    block: int  # tile of the matrix-vector products
    block_slots: int
    block_width: int
    block_modes: int
    rows: int  # of a tile of links


class History(NamedTuple):
    """What the forward kernel keeps for the backward kernel, float32."""

    gates: Any  # `(B, T, 4H)`, or `(B, T, H)` for a feed-forward controller; holds the projected inputs at first
    cells: Any  # `(B, T+1, H)`
    hidden: Any  # `(B, T+1, H + R·W)`
    interface: Any  # `(B, T, I)`
    usage: Any  # `(B, T+1, N)`
    precedence: Any  # `(B, T+1, K, N)`
    write: Any  # `(B, T+1, K, N)`
    read: Any  # `(B, T+1, R, N)`
    forwards: Any  # `(B, T, K, R, N)`
    backwards: Any  # `(B, T, K, R, N)`
    usages: Any  # `(B, K, N)`, scratch: the usages that the write heads see
    stored_memory: Any  # `(B, ceil(T / every), N, W)`
    stored_link: Any  # `(B, ceil(T / every), K, N, N)`


class Rows(NamedTuple):
    """Pointers at one sample's step t; rows of t+1 follow."""

    gates: Any
    cells: Any
    hidden: Any
    raw: Any
    usage: Any
    precedence: Any
    write: Any
    read: Any
    forwards: Any
    backwards: Any
    usages: Any


@kernel
def step_rows(h: tl.tensor, b: tl.tensor, t: tl.tensor, steps: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Pointers at sample `b`, step `t`."""
    state, step = b * (steps + 1) + t, b * steps + t
    cells = h.cells
    if s.lstm:
        cells += state * s.hidden
    return Rows(
        h.gates + step * s.gates, cells, h.hidden + state * (s.hidden + s.reading), h.interface + step * s.interface,
        h.usage + state * s.slots, h.precedence + state * s.linked * s.slots, h.write + state * s.writes * s.slots,
        h.read + state * s.reads * s.slots, h.forwards + step * s.linked * s.reads * s.slots, h.backwards + step *
        s.linked * s.reads * s.slots, h.usages + b * s.writes * s.slots,
    )  # fmt: skip


@kernel
def retained(readings: tl.tensor, gates: tl.tensor, skip: tl.tensor, slot: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Π_r (1 − f_r w^r) over the read heads but `skip`; `gates` points at the raw free gates."""
    keep = tl.full([s.block_slots], 1.0, tl.float32)
    for r in range(s.reads):
        w = load_row(readings + r * s.slots, slot, s.slots)
        keep *= 1.0 - tl.where(r == skip, 0.0, sigmoid(tl.load(gates + r)) * w)
    return keep


@kernel
def unwritten(weightings: tl.tensor, skip: tl.tensor, slot: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Π_i (1 − w_i) over the write heads but `skip`."""
    keep = tl.full([s.block_slots], 1.0, tl.float32)
    for i in range(s.writes):
        keep *= 1.0 - tl.where(i == skip, 0.0, load_row(weightings + i * s.slots, slot, s.slots))
    return keep


@kernel
def ordered_sum(
    usages: tl.tensor, values: tl.tensor, own: tl.tensor, slot: tl.tensor, after: tl.constexpr, s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """For every slot, the sum over the slots before it in the order of usage of their usages' logarithms; with `after`,
    over the slots behind it of `values`. `usages` and `values` are rows, `own` is the former in registers."""
    total, rank = tl.zeros([s.block_slots], tl.float32), own + slot * 1.6e-6
    for first in range(0, s.slots, s.rows):
        j = first + tl.arange(0, s.rows)
        other = load_row(usages, j, s.slots)
        before = other + j * 1.6e-6
        equal = before[:, None] == rank[None, :]
        if after:
            term = load_row(values, j, s.slots)
            counts = (before[:, None] > rank[None, :]) | (equal & (j[:, None] > slot[None, :]))
        else:
            term = log_of_share(1e-6 + (1 - 1e-6) * other)
            counts = (before[:, None] < rank[None, :]) | (equal & (j[:, None] < slot[None, :]))
        total += tl.sum(tl.where(counts & (j[:, None] < s.slots), term[:, None], 0.0), 0)
    return total


@kernel
def allocate(usages: tl.tensor, slot: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Usage, its floored form, the product before each slot and what is allocated to it; `usages` is a row."""
    usage = load_row(usages, slot, s.slots)
    floored = 1e-6 + (1 - 1e-6) * usage
    before = tl.exp(ordered_sum(usages, usages, usage, slot, False, s))
    return usage, floored, before, tl.where(slot < s.slots, (1.0 - floored) * before, 0.0)


@kernel
def word_mask(raw: tl.tensor, word: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """The mask over a word's entries; 1 without masking."""
    mask = tl.full([s.block_width], 1.0, tl.float32)
    if s.masked:
        mask = s.mask_min + (1.0 - s.mask_min) * sigmoid(load_row(raw, word, s.width))
    return mask


@kernel
def look_up(
    memory: tl.tensor, key: tl.tensor, strength: tl.tensor, mask: tl.tensor, slot: tl.tensor, word: tl.tensor,
    s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One head's content weighting, from pointers at its raw key, strength and mask, and what its backward needs."""
    seen = word_mask(mask, word, s)
    masked = memory * seen[None, :]
    masked_key = load_row(key, word, s.width) * seen
    inverse = inverse_norms(masked)
    scores, norm = cosines(masked, inverse, masked_key)
    power = 1.0 + softplus(tl.load(strength))
    return softmax(power * scores, slot < s.slots), masked, masked_key, inverse, scores, norm, power


@kernel
def _next_usage(p: tl.tensor, slot: tl.tensor, s: tl.constexpr, at: tl.constexpr) -> tl.tensor:
    """u_t = (u + (1 − u)(1 − Π(1 − w^w))) ∘ ψ_t into its row and the first write head's; returns ψ_t."""
    before = load_row(p.usage, slot, s.slots)
    retention = retained(p.read, p.raw + at.free_gates, -1, slot, s)
    usage = (before + (1.0 - before) * (1.0 - unwritten(p.write, -1, slot, s))) * retention
    store_row(p.usage + s.slots, slot, usage, s.slots)
    store_row(p.usages, slot, usage, s.slots)
    return retention


@kernel
def choose_slots(
    memory: tl.tensor, p: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr, at: tl.constexpr
) -> None:
    """w^w_t of every write head; each sees the usage that the ones before it leave."""
    after = p.write + s.writes * s.slots
    for i in range(s.writes):
        tl.debug_barrier()
        gate = sigmoid(tl.load(p.raw + at.allocation_gates + i))
        write = sigmoid(tl.load(p.raw + at.write_gates + i))
        usage, _floored, _before, free = allocate(p.usages + i * s.slots, slot, s)
        content, _m, _k, _i, _s, _n, _p = look_up(
            memory, p.raw + at.write_keys + i * s.width, p.raw + at.write_strengths + i, p.raw + at.write_masks + i *
            s.width, slot, word, s,
        )  # fmt: skip
        store_row(after + i * s.slots, slot, write * (gate * free + (1.0 - gate) * content), s.slots)
        if i + 1 < s.writes:
            taken = usage + (1.0 - usage) * gate * write * free
            store_row(p.usages + (i + 1) * s.slots, slot, taken, s.slots)
    tl.debug_barrier()


@kernel
def write_step(
    memory: tl.tensor, retention: tl.tensor, p: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr,
    at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """M_t from M_{t−1}."""
    after = p.write + s.writes * s.slots
    memory *= kept(after, p.raw + at.erases, slot, word, -1, s.width, s.writes, s.slots, s.width)
    if s.deallocate:
        memory *= retention[:, None]
    for i in range(s.writes):
        w = load_row(after + i * s.slots, slot, s.slots)
        memory += w[:, None] * load_row(p.raw + at.adds + i * s.width, word, s.width)[None, :]
    return memory


@kernel
def link_rows(link: tl.tensor, row: tl.tensor, slot: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Some rows of a link matrix, 0 in the padding."""
    return load_tile(link, row, slot, s.slots, s.slots)


@kernel
def advanced(
    tile: tl.tensor, row: tl.tensor, p: tl.tensor, i: tl.tensor, slot: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """Rows of L_t from rows of L_{t−1}: (1 − w[i] − w[j]) L + w[i] p[j], diagonal zero."""
    weighting = p.write + (s.writes + i) * s.slots
    own, other = load_row(weighting, row, s.slots), load_row(weighting, slot, s.slots)
    precedence = load_row(p.precedence + i * s.slots, slot, s.slots)
    tile = (1.0 - own[:, None] - other[None, :]) * tile + own[:, None] * precedence[None, :]
    return tl.where(row[:, None] == slot[None, :], 0.0, tile)


@kernel
def advance_links(source: tl.tensor, target: tl.tensor, p: tl.tensor, slot: tl.tensor, s: tl.constexpr) -> None:
    """L_t of every write head into `target` `(K, N, N)` from L_{t−1} in `source`; they may be the same."""
    for i in range(s.linked):
        for first in range(0, s.slots, s.rows):
            row = first + tl.arange(0, s.rows)
            tile = advanced(link_rows(source + i * s.slots * s.slots, row, slot, s), row, p, i, slot, s)
            store_tile(target + i * s.slots * s.slots, row, slot, tile, s.slots, s.slots)
    tl.debug_barrier()


@kernel
def _follow_links(link: tl.tensor, p: tl.tensor, slot: tl.tensor, s: tl.constexpr) -> None:
    """f = L w^r_{t−1} and b = L^T w^r_{t−1} of every pair of heads, and the precedence of t."""
    for i in range(s.linked):
        for r in range(s.reads):
            reading = p.read + r * s.slots
            along, whole = tl.zeros([s.block_slots], tl.float32), load_row(reading, slot, s.slots)
            place = (i * s.reads + r) * s.slots
            for first in range(0, s.slots, s.rows):
                row = first + tl.arange(0, s.rows)
                tile = link_rows(link + i * s.slots * s.slots, row, slot, s)
                store_row(p.forwards + place, row, tl.sum(tile * whole[None, :], 1), s.slots)
                along += tl.sum(tile * load_row(reading, row, s.slots)[:, None], 0)
            store_row(p.backwards + place, slot, along, s.slots)
        w = load_row(p.write + (s.writes + i) * s.slots, slot, s.slots)
        precedence = (1.0 - tl.sum(w, 0)) * load_row(p.precedence + i * s.slots, slot, s.slots) + w
        store_row(p.precedence + (s.linked + i) * s.slots, slot, precedence, s.slots)
    tl.debug_barrier()


@kernel
def read_modes(raw: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Softmax of one read head's modes: backward links, content, forward links."""
    mode = tl.arange(0, s.block_modes)
    return softmax(load_row(raw, mode, s.modes), mode < s.modes)


@kernel
def _choose_readings(
    memory: tl.tensor, p: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr, at: tl.constexpr
) -> None:
    """w^r_t of every read head from its modes, and what it reads."""
    for r in range(s.reads):
        weighting, _m, _k, _i, _s, _n, _p = look_up(
            memory, p.raw + at.read_keys + r * s.width, p.raw + at.read_strengths + r, p.raw + at.read_masks + r *
            s.width, slot, word, s,
        )  # fmt: skip
        if s.linked > 0:
            modes = read_modes(p.raw + at.modes + r * s.modes, s)
            weighting *= entry(modes, s.writes)
            for i in range(s.writes):
                place = (i * s.reads + r) * s.slots
                weighting += entry(modes, i) * load_row(p.backwards + place, slot, s.slots)
                weighting += entry(modes, s.writes + 1 + i) * load_row(p.forwards + place, slot, s.slots)
        store_row(p.read + (s.reads + r) * s.slots, slot, weighting, s.slots)
        out = p.hidden + 2 * s.hidden + s.reading + r * s.width
        store_row(out, word, read(memory, weighting), s.width)


@kernel
def _keep_state(p: tl.tensor, s: tl.constexpr) -> None:
    """A masked step: the rows of t+1 are those of t."""
    copy_row(p.hidden, p.hidden + s.hidden + s.reading, s.hidden + s.reading, s.block)
    copy_row(p.usage, p.usage + s.slots, s.slots, s.block)
    copy_row(p.write, p.write + s.writes * s.slots, s.writes * s.slots, s.block)
    copy_row(p.read, p.read + s.reads * s.slots, s.reads * s.slots, s.block)
    if s.lstm:
        copy_row(p.cells, p.cells + s.hidden, s.hidden, s.block)
    if s.linked > 0:
        copy_row(p.precedence, p.precedence + s.linked * s.slots, s.linked * s.slots, s.block)


@kernel
def forward_kernel(
    h: tl.tensor, memory_row: tl.tensor, link: tl.tensor, mask: tl.tensor, w: tl.tensor, steps: tl.tensor,
    every: tl.tensor, chunks: tl.tensor, s: tl.constexpr, at: tl.constexpr,
) -> None:  # fmt: skip
    """One sample through all steps; its rows of `memory_row` `(B, N, W)` and `link` `(B, K, N, N)` go from the first
    step to the last."""
    b = tl.program_id(0).to(tl.int64)
    slot, word = tl.arange(0, s.block_slots), tl.arange(0, s.block_width)
    words: tl.constexpr = s.slots * s.width
    links: tl.constexpr = s.linked * s.slots * s.slots
    memory = load_tile(memory_row + b * words, slot, word, s.slots, s.width)
    link += b * links
    for t in range(steps):
        if t % every == 0:
            chunk = b * chunks + t // every
            store_tile(h.stored_memory + chunk * words, slot, word, memory, s.slots, s.width)
            if s.linked > 0:
                copy_row(link, h.stored_link + chunk * links, links, 1024)
        p = step_rows(h, b, t, steps, s)
        if tl.load(mask + b * steps + t) != 0:
            controller_forward(p.gates, p.cells, p.hidden, p.raw, w.recurrent, w.interface, w.bias, s)
            retention = _next_usage(p, slot, s, at)
            choose_slots(memory, p, slot, word, s, at)
            memory = write_step(memory, retention, p, slot, word, s, at)
            advance_links(link, link, p, slot, s)
            _follow_links(link, p, slot, s)
            _choose_readings(memory, p, slot, word, s, at)
        else:
            _keep_state(p, s)
        tl.debug_barrier()
    store_tile(memory_row + b * words, slot, word, memory, s.slots, s.width)
