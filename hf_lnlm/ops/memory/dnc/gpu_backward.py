"""Whole-sequence Triton kernel of the neural computer, backward, by hand, in the names of `gpu_kernels`.

One program a sample keeps the memory's gradient in registers; gradients of all other parts of the state go from the last
step to the first in place. Memories and links of a chunk of steps are run again from the stored ones before the chunk's
steps are visited. The order of usage is not differentiated.

Complexity: as forward, with R + 1 visits of each link matrix, and one more to run the chunk's writes again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...kernels.triton_math import kernel, sigmoid, tl
from ...kernels.triton_rows import (
    add_row,
    clear_row,
    clip_backward,
    content_backward,
    controller_backward,
    copy_row,
    entry,
    kept,
    load_row,
    load_tile,
    store_row,
    store_tile,
)
from .gpu_kernels import (
    advance_links,
    advanced,
    allocate,
    link_rows,
    look_up,
    ordered_sum,
    read_modes,
    retained,
    step_rows,
    unwritten,
    word_mask,
    write_step,
)


class Gradients(NamedTuple):
    """What the backward kernel fills; gradients of the state go from the last step to the first in place."""

    out: Any  # `(B, T, H + R·W)`, given: the gradient of the outputs
    hidden: Any  # `(B, H + R·W)`
    cells: Any  # `(B, H)`
    usage: Any  # `(B, N)`
    precedence: Any  # `(B, K, N)`
    write: Any  # `(B, K, N)`
    read: Any  # `(B, R, N)`
    memory: Any  # `(B, N, W)`
    link: Any  # `(B, K, N, N)`
    gates: Any  # `(B, T, 4H)` or `(B, T, H)`, of the pre-activations
    interface: Any  # `(B, T, I)`, of the raw interface
    memories: Any  # `(B, every, N, W)`, scratch: before the steps of a chunk
    links: Any  # `(B, every, K, N, N)`, scratch: before the steps of a chunk
    readings: Any  # `(B, R, N)`, scratch: what the links give to w^r_{t−1}
    row: Any  # `(B, N)`, scratch


class Slopes(NamedTuple):
    """Pointers at one sample's gradients at step t."""

    hidden: Any
    cells: Any
    usage: Any
    precedence: Any
    write: Any
    read: Any
    link: Any
    gates: Any
    raw: Any
    readings: Any
    row: Any


@kernel
def _slopes(d: tl.tensor, b: tl.tensor, t: tl.tensor, steps: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Pointers at sample `b`, step `t`."""
    return Slopes(
        d.hidden + b * (s.hidden + s.reading), d.cells + b * s.hidden, d.usage + b * s.slots, d.precedence + b *
        s.linked * s.slots, d.write + b * s.writes * s.slots, d.read + b * s.reads * s.slots, d.link + b * s.linked *
        s.slots * s.slots, d.gates + (b * steps + t) * s.gates, d.interface + (b * steps + t) * s.interface, d.readings
        + b * s.reads * s.slots, d.row + b * s.slots,
    )  # fmt: skip


@kernel
def _look_up_backward(
    memory: tl.tensor, d_weighting: tl.tensor, raw: tl.tensor, d_raw: tl.tensor, key: tl.tensor, strength: tl.tensor,
    mask: tl.tensor, weighting: tl.tensor, masked: tl.tensor, masked_key: tl.tensor, inverse: tl.tensor,
    scores: tl.tensor, norm: tl.tensor, power: tl.tensor, word: tl.tensor, s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Through `look_up`: returns the memory's gradient, sets those of the raw numbers at places key, strength, mask."""
    d_memory, d_key, d_power = content_backward(
        masked, inverse, scores, masked_key, norm, power, weighting, d_weighting
    )
    tl.store(d_raw + strength, d_power * sigmoid(tl.load(raw + strength)))
    if s.masked:
        seen = word_mask(raw + mask, word, s)
        d_mask = tl.sum(d_memory * memory, 0) + d_key * load_row(raw + key, word, s.width)
        gate = sigmoid(load_row(raw + mask, word, s.width))
        store_row(d_raw + mask, word, d_mask * (1.0 - s.mask_min) * gate * (1.0 - gate), s.width)
        d_memory, d_key = d_memory * seen[None, :], d_key * seen
    store_row(d_raw + key, word, d_key, s.width)
    return d_memory


@kernel
def _modes_backward(
    p: tl.tensor, q: tl.tensor, r: tl.tensor, content: tl.tensor, d_reading: tl.tensor, slot: tl.tensor,
    s: tl.constexpr, at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sets the raw gradients of read head `r`'s modes; returns the weight of its content weighting."""
    mode = tl.arange(0, s.block_modes)
    modes = read_modes(p.raw + at.modes + r * s.modes, s)
    d_modes = tl.where(mode == s.writes, tl.sum(d_reading * content, 0), 0.0)
    for i in range(s.writes):
        place = (i * s.reads + r) * s.slots
        along = tl.sum(d_reading * load_row(p.backwards + place, slot, s.slots), 0)
        onward = tl.sum(d_reading * load_row(p.forwards + place, slot, s.slots), 0)
        d_modes += tl.where(mode == i, along, 0.0) + tl.where(mode == s.writes + 1 + i, onward, 0.0)
    store_row(q.raw + at.modes + r * s.modes, mode, modes * (d_modes - tl.sum(modes * d_modes, 0)), s.modes)
    return entry(modes, s.writes)


@kernel
def _readings_backward(
    memory: tl.tensor, d_memory: tl.tensor, p: tl.tensor, q: tl.tensor, slot: tl.tensor, word: tl.tensor,
    s: tl.constexpr, at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Through the reads from M_t and the content part of the read weightings; leaves d(w^r_t) in `q.read`."""
    for r in range(s.reads):
        d_read = load_row(q.hidden + s.hidden + r * s.width, word, s.width)
        d_memory += load_row(p.read + (s.reads + r) * s.slots, slot, s.slots)[:, None] * d_read[None, :]
        d_reading = load_row(q.read + r * s.slots, slot, s.slots) + tl.sum(memory * d_read[None, :], 1)
        tl.debug_barrier()  # several threads may hold one entry: all have read it before any writes over it
        store_row(q.read + r * s.slots, slot, d_reading, s.slots)
        key, strength = at.read_keys + r * s.width, at.read_strengths + r
        mask = at.read_masks + r * s.width
        content, masked, masked_key, inverse, scores, norm, power = look_up(
            memory, p.raw + key, p.raw + strength, p.raw + mask, slot, word, s
        )
        if s.linked > 0:
            d_reading *= _modes_backward(p, q, r, content, d_reading, slot, s, at)
        d_memory += _look_up_backward(
            memory, d_reading, p.raw, q.raw, key, strength, mask, content, masked, masked_key, inverse, scores, norm,
            power, word, s,
        )  # fmt: skip
    tl.debug_barrier()
    return d_memory


@kernel
def _follow_backward(
    link: tl.tensor, p: tl.tensor, q: tl.tensor, i: tl.tensor, slot: tl.tensor, s: tl.constexpr, at: tl.constexpr
) -> None:
    """What write head i's links L_t give to w^r_{t−1}, added to `q.readings`."""
    for r in range(s.reads):
        modes = read_modes(p.raw + at.modes + r * s.modes, s)
        back, forth = entry(modes, i), entry(modes, s.writes + 1 + i)
        d_reading = q.read + r * s.slots
        d_back, along = back * load_row(d_reading, slot, s.slots), tl.zeros([s.block_slots], tl.float32)
        for first in range(0, s.slots, s.rows):
            row = first + tl.arange(0, s.rows)
            tile = advanced(link_rows(link + i * s.slots * s.slots, row, slot, s), row, p, i, slot, s)
            along += tl.sum(tile * (forth * load_row(d_reading, row, s.slots))[:, None], 0)
            store_row(q.row, row, tl.sum(tile * d_back[None, :], 1), s.slots)
        tl.debug_barrier()
        total = load_row(q.readings + r * s.slots, slot, s.slots) + along + load_row(q.row, slot, s.slots)
        store_row(q.readings + r * s.slots, slot, total, s.slots)
        tl.debug_barrier()


@kernel
def _followed(
    gradient: tl.tensor, row: tl.tensor, p: tl.tensor, q: tl.tensor, i: tl.tensor, slot: tl.tensor, s: tl.constexpr,
    at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows of d(L_t) with what f = L w^r and b = L^T w^r add, diagonal zero."""
    for r in range(s.reads):
        modes = read_modes(p.raw + at.modes + r * s.modes, s)
        back, forth = entry(modes, i), entry(modes, s.writes + 1 + i)
        reading, d_reading = p.read + r * s.slots, q.read + r * s.slots
        d_forth, here = forth * load_row(d_reading, row, s.slots), load_row(reading, row, s.slots)
        d_back, there = back * load_row(d_reading, slot, s.slots), load_row(reading, slot, s.slots)
        gradient += d_forth[:, None] * there[None, :] + here[:, None] * d_back[None, :]
    return tl.where(row[:, None] == slot[None, :], 0.0, gradient)


@kernel
def _links_backward(
    link: tl.tensor, p: tl.tensor, q: tl.tensor, slot: tl.tensor, s: tl.constexpr, at: tl.constexpr
) -> None:
    """Through links and precedence, from L_{t−1} in `link`; adds to d(w^w_t), sets `q.readings`."""
    clear_row(q.readings, s.reads * s.slots, s.block)
    tl.debug_barrier()
    for i in range(s.linked):
        _follow_backward(link, p, q, i, slot, s, at)
        weighting, before = p.write + (s.writes + i) * s.slots, load_row(p.precedence + i * s.slots, slot, s.slots)
        w, d_before = load_row(weighting, slot, s.slots), load_row(q.precedence + i * s.slots, slot, s.slots)
        d_w = load_row(q.write + i * s.slots, slot, s.slots) + d_before - tl.sum(d_before * before, 0)
        d_before *= 1.0 - tl.sum(w, 0)
        for first in range(0, s.slots, s.rows):
            row = first + tl.arange(0, s.rows)
            place, own = i * s.slots * s.slots, load_row(weighting, row, s.slots)
            gradient = _followed(link_rows(q.link + place, row, slot, s), row, p, q, i, slot, s, at)
            products = gradient * link_rows(link + place, row, slot, s)
            store_row(q.row, row, tl.sum(gradient * before[None, :] - products, 1), s.slots)
            d_before += tl.sum(gradient * own[:, None], 0)
            d_w -= tl.sum(products, 0)
            gradient *= 1.0 - own[:, None] - w[None, :]
            store_tile(q.link + place, row, slot, gradient, s.slots, s.slots)
        tl.debug_barrier()
        store_row(q.write + i * s.slots, slot, d_w + load_row(q.row, slot, s.slots), s.slots)
        store_row(q.precedence + i * s.slots, slot, d_before, s.slots)
        tl.debug_barrier()


@kernel
def _writes_backward(
    memory: tl.tensor, d_memory: tl.tensor, retention: tl.tensor, p: tl.tensor, q: tl.tensor, slot: tl.tensor,
    word: tl.tensor, s: tl.constexpr, at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Through M_t = M_{t−1}∘Π(1 − w e)∘ψ + Σ w v; returns d(M_{t−1}) and d(ψ)."""
    after, raw = p.write + s.writes * s.slots, p.raw + at.erases
    source = memory
    if s.deallocate:
        source = memory * retention[:, None]
    for i in range(s.writes):
        erase, add = sigmoid(load_row(raw + i * s.width, word, s.width)), p.raw + at.adds + i * s.width
        w = load_row(after + i * s.slots, slot, s.slots)
        others = kept(after, raw, slot, word, i, s.width, s.writes, s.slots, s.width)
        erased = d_memory * source * others
        along = d_memory * load_row(add, word, s.width)[None, :] - erased * erase[None, :]
        d_w = load_row(q.write + i * s.slots, slot, s.slots) + tl.sum(along, 1)
        store_row(q.write + i * s.slots, slot, d_w, s.slots)
        d_erase = -tl.sum(erased * w[:, None], 0) * erase * (1.0 - erase)
        store_row(q.raw + at.erases + i * s.width, word, d_erase, s.width)
        store_row(q.raw + at.adds + i * s.width, word, tl.sum(d_memory * w[:, None], 0), s.width)
    d_memory *= kept(after, raw, slot, word, -1, s.width, s.writes, s.slots, s.width)
    d_retention = tl.zeros([s.block_slots], tl.float32)
    if s.deallocate:
        d_retention += tl.sum(d_memory * memory, 1)
        d_memory *= retention[:, None]
    tl.debug_barrier()
    return d_memory, d_retention


@kernel
def _usages(p: tl.tensor, slot: tl.tensor, s: tl.constexpr, at: tl.constexpr) -> None:
    """The usages that the write heads saw, again."""
    copy_row(p.usage + s.slots, p.usages, s.slots, s.block)
    tl.debug_barrier()
    for i in range(s.writes - 1):
        scale = sigmoid(tl.load(p.raw + at.allocation_gates + i)) * sigmoid(tl.load(p.raw + at.write_gates + i))
        usage, _floored, _before, free = allocate(p.usages + i * s.slots, slot, s)
        store_row(p.usages + (i + 1) * s.slots, slot, usage + (1.0 - usage) * scale * free, s.slots)
        tl.debug_barrier()


@kernel
def _allocation_backward(
    p: tl.tensor, q: tl.tensor, i: tl.tensor, d_w: tl.tensor, d_usage: tl.tensor, content: tl.tensor, slot: tl.tensor,
    s: tl.constexpr, at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Through w = g^w (g^a a + (1 − g^a) c), the usage left to the next head, and a; returns d(usage) and d(c)."""
    gate, write = sigmoid(tl.load(p.raw + at.allocation_gates + i)), sigmoid(tl.load(p.raw + at.write_gates + i))
    usage, floored, before, free = allocate(p.usages + i * s.slots, slot, s)
    along_free, along_content = tl.sum(d_w * free, 0), tl.sum(d_w * content, 0)
    room, scale = (1.0 - usage) * d_usage, gate * write
    along_free += tl.sum(room * free, 0)
    d_free = d_w * scale + room * scale
    d_usage *= 1.0 - scale * free
    d_gate, d_write = write * (along_free - along_content), gate * along_free + (1.0 - gate) * along_content
    tl.store(q.raw + at.allocation_gates + i, d_gate * gate * (1.0 - gate))
    tl.store(q.raw + at.write_gates + i, d_write * write * (1.0 - write))
    store_row(q.row, slot, d_free * free, s.slots)
    tl.debug_barrier()
    behind = ordered_sum(p.usages + i * s.slots, q.row, usage, slot, True, s)
    tl.debug_barrier()
    return d_usage + (1 - 1e-6) * (behind / floored - d_free * before), d_w * write * (1.0 - gate)


@kernel
def _choices_backward(
    memory: tl.tensor, d_memory: tl.tensor, p: tl.tensor, q: tl.tensor, slot: tl.tensor, word: tl.tensor,
    s: tl.constexpr, at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Through the write weightings, last head first; returns d(M_{t−1}) and d(u_t)."""
    _usages(p, slot, s, at)
    d_usage = tl.zeros([s.block_slots], tl.float32)
    for back in range(s.writes):
        i = s.writes - 1 - back
        key, strength = at.write_keys + i * s.width, at.write_strengths + i
        mask = at.write_masks + i * s.width
        content, masked, masked_key, inverse, scores, norm, power = look_up(
            memory, p.raw + key, p.raw + strength, p.raw + mask, slot, word, s
        )
        d_w = load_row(q.write + i * s.slots, slot, s.slots)
        d_usage, d_content = _allocation_backward(p, q, i, d_w, d_usage, content, slot, s, at)
        d_memory += _look_up_backward(
            memory, d_content, p.raw, q.raw, key, strength, mask, content, masked, masked_key, inverse, scores, norm,
            power, word, s,
        )  # fmt: skip
    tl.debug_barrier()
    return d_memory, d_usage


@kernel
def _usage_backward(
    d_usage: tl.tensor, d_retention: tl.tensor, retention: tl.tensor, p: tl.tensor, q: tl.tensor, slot: tl.tensor,
    s: tl.constexpr, at: tl.constexpr,
) -> None:  # fmt: skip
    """Through the usage: d(u), d(w^w) and d(w^r) go to step t−1."""
    before, keep = load_row(p.usage, slot, s.slots), unwritten(p.write, -1, slot, s)
    d_usage += load_row(q.usage, slot, s.slots)
    d_retention += d_usage * (before + (1.0 - before) * (1.0 - keep))
    base = d_usage * retention
    tl.debug_barrier()  # as above, for `q.usage`
    store_row(q.usage, slot, base * keep, s.slots)
    for i in range(s.writes):
        store_row(q.write + i * s.slots, slot, base * (1.0 - before) * unwritten(p.write, i, slot, s), s.slots)
    for r in range(s.reads):
        gate = sigmoid(tl.load(p.raw + at.free_gates + r))
        along = d_retention * retained(p.read, p.raw + at.free_gates, r, slot, s)
        d_gate = -tl.sum(along * load_row(p.read + r * s.slots, slot, s.slots), 0)
        tl.store(q.raw + at.free_gates + r, d_gate * gate * (1.0 - gate))
        d_reading = -along * gate
        if s.linked > 0:
            d_reading += load_row(q.readings + r * s.slots, slot, s.slots)
        store_row(q.read + r * s.slots, slot, d_reading, s.slots)
    tl.debug_barrier()


@kernel
def _memory_backward(
    before: tl.tensor, d_memory: tl.tensor, link: tl.tensor, p: tl.tensor, q: tl.tensor, slot: tl.tensor,
    word: tl.tensor, s: tl.constexpr, at: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One step of one sample; `before` is M_{t−1}, `link` points at L_{t−1}."""
    retention = retained(p.read, p.raw + at.free_gates, -1, slot, s)
    after = write_step(before, retention, p, slot, word, s, at)
    d_memory = _readings_backward(after, d_memory, p, q, slot, word, s, at)
    if s.linked > 0:
        _links_backward(link, p, q, slot, s, at)
    d_memory, d_retention = _writes_backward(before, d_memory, retention, p, q, slot, word, s, at)
    d_memory, d_usage = _choices_backward(before, d_memory, p, q, slot, word, s, at)
    _usage_backward(d_usage, d_retention, retention, p, q, slot, s, at)
    clip_backward(p.raw, q.raw, s.interface, s.clip, s.block)
    tl.debug_barrier()
    return d_memory


@kernel
def _run_writes_again(
    h: tl.tensor, memories: tl.tensor, link: tl.tensor, mask: tl.tensor, b: tl.tensor, first: tl.tensor,
    last: tl.tensor, steps: tl.tensor, chunk: tl.tensor, s: tl.constexpr, at: tl.constexpr,
) -> None:  # fmt: skip
    """Memories and links before the steps first ≤ t < last, from the stored ones and the stored weightings."""
    slot, word = tl.arange(0, s.block_slots), tl.arange(0, s.block_width)
    words: tl.constexpr = s.slots * s.width
    links: tl.constexpr = s.linked * s.slots * s.slots
    memory = load_tile(h.stored_memory + chunk * words, slot, word, s.slots, s.width)
    if s.linked > 0:
        copy_row(h.stored_link + chunk * links, link, links, 1024)
    tl.debug_barrier()
    for t in range(first, last):
        store_tile(memories + (t - first) * words, slot, word, memory, s.slots, s.width)
        p = step_rows(h, b, t, steps, s)
        here = link + (t - first) * links
        if tl.load(mask + b * steps + t) != 0:
            retention = retained(p.read, p.raw + at.free_gates, -1, slot, s)
            memory = write_step(memory, retention, p, slot, word, s, at)
            if t + 1 < last:
                advance_links(here, here + links, p, slot, s)
        elif t + 1 < last:
            copy_row(here, here + links, links, 1024)
        tl.debug_barrier()


@kernel
def backward_kernel(
    h: tl.tensor, d: tl.tensor, mask: tl.tensor, w: tl.tensor, steps: tl.tensor, every: tl.tensor, chunks: tl.tensor,
    s: tl.constexpr, at: tl.constexpr,
) -> None:  # fmt: skip
    """One sample from the last step to the first, chunk by chunk."""
    b = tl.program_id(0).to(tl.int64)
    slot, word = tl.arange(0, s.block_slots), tl.arange(0, s.block_width)
    words: tl.constexpr = s.slots * s.width
    links: tl.constexpr = s.linked * s.slots * s.slots
    row: tl.constexpr = s.hidden + s.reading
    d_memory = load_tile(d.memory + b * words, slot, word, s.slots, s.width)
    memories, link = d.memories + b * every * words, d.links + b * every * links
    for back in range(chunks):
        first = (chunks - 1 - back) * every
        last = tl.minimum(first + every, steps)
        tl.debug_barrier()
        _run_writes_again(h, memories, link, mask, b, first, last, steps, b * chunks + chunks - 1 - back, s, at)
        for behind in range(last - first):
            t = last - 1 - behind
            q, p = _slopes(d, b, t, steps, s), step_rows(h, b, t, steps, s)
            tl.debug_barrier()
            add_row(d.out + (b * steps + t) * row, q.hidden, row, s.block)
            tl.debug_barrier()
            if tl.load(mask + b * steps + t) != 0:
                before = load_tile(memories + (t - first) * words, slot, word, s.slots, s.width)
                here = link + (t - first) * links
                d_memory = _memory_backward(before, d_memory, here, p, q, slot, word, s, at)
                controller_backward(
                    p.gates, p.cells, p.hidden, q.raw, q.hidden, q.cells, q.gates, w.recurrent, w.interface, s
                )
            else:
                clear_row(q.raw, s.interface, s.block)
                clear_row(q.gates, s.gates, s.block)
    store_tile(d.memory + b * words, slot, word, d_memory, s.slots, s.width)
