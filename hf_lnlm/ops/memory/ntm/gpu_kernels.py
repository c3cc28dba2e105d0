"""Whole-sequence Triton kernels of the Turing machine: controller, addressing, reads and writes, forward and backward.

Grid: one program a sample; it runs the whole sequence, with its memory (forward) or the memory's gradient (backward) in
registers all the way. Everything a step hands to the next but the memory is a short row that goes through global memory
(in practice the caches), where the backward pass finds it again. Memories are stored every few steps only; backward runs
the writes of a chunk again into a scratch of one chunk.

Glossary: `hidden` [h_t ; r_t] · `interface` clipped raw head parameters · `weightings` w_t of all heads, reads first ·
`content` wc_t (eq. 5) · `gated` wg_t (eq. 7) · `shifted` w~_t (eq. 8) · `power` γ (eq. 9).

Complexity: time O(T·(H² + heads·N·M)) a sample; stored O(T·(H + heads·N)) and a memory every `every` steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...kernels.triton_math import kernel, log_of_share, sigmoid, softplus, tanh, tl
from ...kernels.triton_rows import (
    add_row,
    clear_row,
    clip_backward,
    content_backward,
    controller_backward,
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
    kernel: int
    reading: int  # R·M
    interface: int
    gates: int
    lstm: bool
    read_first: bool
    clip: float
    block: int  # tile of the matrix-vector products
    block_slots: int
    block_width: int
    block_kernel: int


class History(NamedTuple):
    """What the forward kernel keeps for the backward kernel, float32."""

    gates: Any  # `(B, T, 4H)`, or `(B, T, H)` for a feed-forward controller; holds the projected inputs at first
    cells: Any  # `(B, T+1, H)`
    hidden: Any  # `(B, T+1, H + R·M)`
    interface: Any  # `(B, T, I)`
    weightings: Any  # `(B, T+1, R+W, N)`
    stored: Any  # `(B, ceil(T / every), N, M)`


class Gradients(NamedTuple):
    """What the backward kernel fills; gradients of the state go from the last step to the first in place."""

    out: Any  # `(B, T, H + R·M)`, given: the gradient of the outputs
    hidden: Any  # `(B, H + R·M)`
    cells: Any  # `(B, H)`
    weightings: Any  # `(B, R+W, N)`
    memory: Any  # `(B, N, M)`
    gates: Any  # `(B, T, 4H)` or `(B, T, H)`, of the pre-activations
    interface: Any  # `(B, T, I)`, of the raw interface
    memories: Any  # `(B, every, N, M)`, scratch: memories before the steps of a chunk


@kernel
def _rows(h: tl.tensor, b: tl.tensor, t: tl.tensor, steps: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Pointers at sample `b`, step `t`: gates, cells, hidden, interface, weightings."""
    heads: tl.constexpr = s.reads + s.writes
    gates = h.gates + (b * steps + t) * s.gates
    cells = h.cells
    if s.lstm:
        cells += (b * (steps + 1) + t) * s.hidden
    hidden = h.hidden + (b * (steps + 1) + t) * (s.hidden + s.reading)
    interface = h.interface + (b * steps + t) * s.interface
    return gates, cells, hidden, interface, h.weightings + (b * (steps + 1) + t) * heads * s.slots


@kernel
def _shift_distribution(raw: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Softmax of one head's shift parameters, padded."""
    at = tl.arange(0, s.block_kernel)
    return softmax(load_row(raw + s.width + 3, at, s.kernel), at < s.kernel)


@kernel
def _turned(row: tl.tensor, slot: tl.tensor, by: tl.constexpr, slots: tl.constexpr) -> tl.tensor:
    """out[n] = row[n − by], circular over the real slots; 0 in the padding."""
    return tl.where(slot < slots, tl.gather(row, (slot + slots - by) % slots, 0), 0.0)


@kernel
def _shift(gated: tl.tensor, shift: tl.tensor, slot: tl.tensor, s: tl.constexpr) -> tl.tensor:
    """Eq. 8, with the floor for the logarithm."""
    shifted = tl.full([slot.shape[0]], 1e-12, tl.float32)
    for j in tl.static_range(s.kernel):
        shifted += entry(shift, j) * _turned(gated, slot, j - s.kernel // 2, s.slots)
    return shifted


@kernel
def _head(
    raw: tl.tensor, before: tl.tensor, memory: tl.tensor, inverse: tl.tensor, slot: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """One head from its clipped parameters up to eq. 8: everything that its backward step needs again."""
    key = tanh(load_row(raw, tl.arange(0, s.block_width), s.width))
    strength = softplus(tl.load(raw + s.width))
    gate = sigmoid(tl.load(raw + s.width + 1))
    power = 1.0 + softplus(tl.load(raw + s.width + 2))
    scores, norm = cosines(memory, inverse, key)
    content = softmax(strength * scores, slot < s.slots)
    gated = gate * content + (1.0 - gate) * before
    shift = _shift_distribution(raw, s)
    return key, norm, strength, gate, power, scores, content, gated, shift, _shift(gated, shift, slot, s)


@kernel
def _write(
    memory: tl.tensor, raw: tl.tensor, weightings: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """M_t from M_{t-1} (eqs. 3, 4): all erases, then all adds; `raw` points at the erase and add vectors."""
    memory *= kept(weightings, raw, slot, word, -1, 2 * s.width, s.writes, s.slots, s.width)
    for i in range(s.writes):
        w = load_row(weightings + i * s.slots, slot, s.slots)
        memory += w[:, None] * tanh(load_row(raw + (2 * i + 1) * s.width, word, s.width))[None, :]
    return memory


@kernel
def _read_heads(
    memory: tl.tensor, weightings: tl.tensor, out: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr
) -> None:
    """r_t of every read head, side by side."""
    for r in range(s.reads):
        w = load_row(weightings + r * s.slots, slot, s.slots)
        store_row(out + r * s.width, word, read(memory, w), s.width)


@kernel
def _memory_step(
    memory: tl.tensor, raw: tl.tensor, before: tl.tensor, out: tl.tensor, slot: tl.tensor, word: tl.tensor,
    s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Addressing by M_{t-1}, then read and write in the configured order; w_t goes behind w_{t-1}."""
    heads: tl.constexpr = s.reads + s.writes
    size: tl.constexpr = s.width + 3 + s.kernel
    after = before + heads * s.slots
    inverse = inverse_norms(memory)
    for i in range(heads):
        last = load_row(before + i * s.slots, slot, s.slots)
        _k, _n, _b, _g, power, _s, _c, _w, _d, shifted = _head(raw + i * size, last, memory, inverse, slot, s)
        store_row(after + i * s.slots, slot, softmax(power * log_of_share(shifted), slot < s.slots), s.slots)
    tl.debug_barrier()
    vectors = raw + heads * size
    if s.read_first:
        _read_heads(memory, after, out, slot, word, s)
        memory = _write(memory, vectors, after + s.reads * s.slots, slot, word, s)
    else:
        memory = _write(memory, vectors, after + s.reads * s.slots, slot, word, s)
        _read_heads(memory, after, out, slot, word, s)
    return memory


@kernel
def _keep_state(cells: tl.tensor, hidden: tl.tensor, weightings: tl.tensor, s: tl.constexpr) -> None:
    """A masked step: the rows of t+1 are those of t."""
    heads: tl.constexpr = s.reads + s.writes
    copy_row(hidden, hidden + s.hidden + s.reading, s.hidden + s.reading, s.block)
    copy_row(weightings, weightings + heads * s.slots, heads * s.slots, s.block)
    if s.lstm:
        copy_row(cells, cells + s.hidden, s.hidden, s.block)


@kernel
def forward_kernel(
    h: tl.tensor, memory_row: tl.tensor, mask: tl.tensor, p: tl.tensor, steps: tl.tensor, every: tl.tensor,
    chunks: tl.tensor, s: tl.constexpr,
) -> None:  # fmt: skip
    """One sample through all steps; its row of `memory_row` `(B, N, M)` holds M_0 and then M_T."""
    b = tl.program_id(0).to(tl.int64)
    slot, word = tl.arange(0, s.block_slots), tl.arange(0, s.block_width)
    place = memory_row + b * s.slots * s.width
    memory = load_tile(place, slot, word, s.slots, s.width)
    for t in range(steps):
        if t % every == 0:
            chunk = h.stored + (b * chunks + t // every) * s.slots * s.width
            store_tile(chunk, slot, word, memory, s.slots, s.width)
        gates, cells, hidden, raw, weightings = _rows(h, b, t, steps, s)
        if tl.load(mask + b * steps + t) != 0:
            controller_forward(gates, cells, hidden, raw, p.recurrent, p.interface, p.bias, s)
            out = hidden + 2 * s.hidden + s.reading
            memory = _memory_step(memory, raw, weightings, out, slot, word, s)
        else:
            _keep_state(cells, hidden, weightings, s)
        tl.debug_barrier()
    store_tile(place, slot, word, memory, s.slots, s.width)


@kernel
def _reads_backward(
    memory: tl.tensor, d_memory: tl.tensor, weightings: tl.tensor, d_weightings: tl.tensor, d_reads: tl.tensor,
    slot: tl.tensor, word: tl.tensor, s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """All read heads: adds to `d_weightings` in place, returns the memory's gradient."""
    for r in range(s.reads):
        d_read = load_row(d_reads + r * s.width, word, s.width)
        d_w = load_row(d_weightings + r * s.slots, slot, s.slots) + tl.sum(memory * d_read[None, :], 1)
        store_row(d_weightings + r * s.slots, slot, d_w, s.slots)
        d_memory += load_row(weightings + r * s.slots, slot, s.slots)[:, None] * d_read[None, :]
    return d_memory


@kernel
def _write_backward(
    before: tl.tensor, d_memory: tl.tensor, raw: tl.tensor, d_raw: tl.tensor, weightings: tl.tensor,
    d_weightings: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """From d(M_t) to d(M_{t-1}); adds to `d_weightings` of the write heads, sets the vectors' raw gradients."""
    for i in range(s.writes):
        at = 2 * i * s.width
        erase, add = sigmoid(load_row(raw + at, word, s.width)), tanh(load_row(raw + at + s.width, word, s.width))
        w = load_row(weightings + i * s.slots, slot, s.slots)
        others = kept(weightings, raw, slot, word, i, 2 * s.width, s.writes, s.slots, s.width)
        erased = d_memory * before * others
        d_w = load_row(d_weightings + i * s.slots, slot, s.slots)
        d_w += tl.sum(d_memory * add[None, :] - erased * erase[None, :], 1)
        store_row(d_weightings + i * s.slots, slot, d_w, s.slots)
        d_erase, d_add = -tl.sum(erased * w[:, None], 0), tl.sum(d_memory * w[:, None], 0)
        store_row(d_raw + at, word, d_erase * erase * (1.0 - erase), s.width)
        store_row(d_raw + at + s.width, word, d_add * (1.0 - add * add), s.width)
    return d_memory * kept(weightings, raw, slot, word, -1, 2 * s.width, s.writes, s.slots, s.width)


@kernel
def _shift_backward(
    shift: tl.tensor, gated: tl.tensor, d_shifted: tl.tensor, d_raw: tl.tensor, slot: tl.tensor, s: tl.constexpr
) -> tl.tensor:
    """Through eq. 8: sets the raw shift gradient, returns d(gated)."""
    at = tl.arange(0, s.block_kernel)
    d_shift = tl.zeros([s.block_kernel], tl.float32)
    d_gated = tl.zeros([slot.shape[0]], tl.float32)
    for j in tl.static_range(s.kernel):
        along = tl.sum(d_shifted * _turned(gated, slot, j - s.kernel // 2, s.slots), 0)
        d_shift += tl.where(at == j, along, 0.0)
        d_gated += entry(shift, j) * _turned(d_shifted, slot, s.kernel // 2 - j, s.slots)
    d_shift = shift * (d_shift - tl.sum(shift * d_shift, 0))
    store_row(d_raw + s.width + 3, at, d_shift, s.kernel)
    return d_gated


@kernel
def _address_backward(
    memory: tl.tensor, d_memory: tl.tensor, inverse: tl.tensor, raw: tl.tensor, d_raw: tl.tensor, before: tl.tensor,
    weighting: tl.tensor, d_weighting: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One head: returns the memory's gradient and that of w_{t-1}, sets `d_raw`."""
    key, norm, strength, gate, power, scores, content, gated, shift, shifted = _head(
        raw, before, memory, inverse, slot, s
    )
    slopes = weighting * (d_weighting - tl.sum(weighting * d_weighting, 0))
    d_power = tl.sum(slopes * log_of_share(shifted), 0)
    d_gated = _shift_backward(shift, gated, power * slopes / shifted, d_raw, slot, s)
    d_gate = tl.sum(d_gated * (content - before), 0)
    added, d_key, d_strength = content_backward(memory, inverse, scores, key, norm, strength, content, gate * d_gated)
    store_row(d_raw, word, d_key * (1.0 - key * key), s.width)
    tl.store(d_raw + s.width, d_strength * sigmoid(tl.load(raw + s.width)))
    tl.store(d_raw + s.width + 1, d_gate * gate * (1.0 - gate))
    tl.store(d_raw + s.width + 2, d_power * sigmoid(tl.load(raw + s.width + 2)))
    return d_memory + added, (1.0 - gate) * d_gated


@kernel
def _memory_backward(
    before: tl.tensor, d_memory: tl.tensor, raw: tl.tensor, d_raw: tl.tensor, weightings: tl.tensor,
    d_weightings: tl.tensor, d_reads: tl.tensor, slot: tl.tensor, word: tl.tensor, s: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One step of one sample; gradients of weightings and memory go from t to t−1."""
    heads: tl.constexpr = s.reads + s.writes
    size: tl.constexpr = s.width + 3 + s.kernel
    after, at, d_at = weightings + heads * s.slots, raw + heads * size, d_raw + heads * size
    writing = after + s.reads * s.slots
    if not s.read_first:
        written = _write(before, at, writing, slot, word, s)
        d_memory = _reads_backward(written, d_memory, after, d_weightings, d_reads, slot, word, s)
    d_memory = _write_backward(before, d_memory, at, d_at, writing, d_weightings + s.reads * s.slots, slot, word, s)
    if s.read_first:
        d_memory = _reads_backward(before, d_memory, after, d_weightings, d_reads, slot, word, s)
    tl.debug_barrier()
    inverse = inverse_norms(before)
    for i in range(heads):
        last, w = load_row(weightings + i * s.slots, slot, s.slots), load_row(after + i * s.slots, slot, s.slots)
        d_w = load_row(d_weightings + i * s.slots, slot, s.slots)
        d_memory, d_w = _address_backward(
            before, d_memory, inverse, raw + i * size, d_raw + i * size, last, w, d_w, slot, word, s
        )
        tl.debug_barrier()  # several threads may hold one entry: all have read it before any writes over it
        store_row(d_weightings + i * s.slots, slot, d_w, s.slots)
    tl.debug_barrier()
    clip_backward(raw, d_raw, s.interface, s.clip, s.block)
    return d_memory


@kernel
def _run_writes_again(
    h: tl.tensor, memories: tl.tensor, mask: tl.tensor, b: tl.tensor, first: tl.tensor, last: tl.tensor,
    steps: tl.tensor, every: tl.tensor, chunks: tl.tensor, s: tl.constexpr,
) -> None:  # fmt: skip
    """The memories before the steps first ≤ t < last, from the stored one and the stored writes."""
    slot, word = tl.arange(0, s.block_slots), tl.arange(0, s.block_width)
    heads: tl.constexpr = s.reads + s.writes
    memory = load_tile(h.stored + (b * chunks + first // every) * s.slots * s.width, slot, word, s.slots, s.width)
    for t in range(first, last):
        store_tile(memories + (t - first) * s.slots * s.width, slot, word, memory, s.slots, s.width)
        if tl.load(mask + b * steps + t) != 0:
            _g, _c, _h, raw, weightings = _rows(h, b, t, steps, s)
            vectors = raw + heads * (s.width + 3 + s.kernel)
            memory = _write(memory, vectors, weightings + (heads + s.reads) * s.slots, slot, word, s)


@kernel
def backward_kernel(
    h: tl.tensor, d: tl.tensor, mask: tl.tensor, p: tl.tensor, steps: tl.tensor, every: tl.tensor, chunks: tl.tensor,
    s: tl.constexpr,
) -> None:  # fmt: skip
    """One sample from the last step to the first, chunk by chunk."""
    b = tl.program_id(0).to(tl.int64)
    slot, word = tl.arange(0, s.block_slots), tl.arange(0, s.block_width)
    tile: tl.constexpr = s.slots * s.width
    row: tl.constexpr = s.hidden + s.reading
    d_memory = load_tile(d.memory + b * tile, slot, word, s.slots, s.width)
    memories, d_weightings = d.memories + b * every * tile, d.weightings + b * (s.reads + s.writes) * s.slots
    d_hidden, d_cells = d.hidden + b * row, d.cells + b * s.hidden
    for back in range(chunks):
        first = (chunks - 1 - back) * every
        last = tl.minimum(first + every, steps)
        _run_writes_again(h, memories, mask, b, first, last, steps, every, chunks, s)
        for behind in range(last - first):
            t = last - 1 - behind
            tl.debug_barrier()
            add_row(d.out + (b * steps + t) * row, d_hidden, row, s.block)
            tl.debug_barrier()
            gates, cells, hidden, raw, weightings = _rows(h, b, t, steps, s)
            d_gates, d_raw = d.gates + (b * steps + t) * s.gates, d.interface + (b * steps + t) * s.interface
            if tl.load(mask + b * steps + t) != 0:
                before = load_tile(memories + (t - first) * tile, slot, word, s.slots, s.width)
                d_memory = _memory_backward(
                    before, d_memory, raw, d_raw, weightings, d_weightings, d_hidden + s.hidden, slot, word, s
                )
                tl.debug_barrier()
                controller_backward(
                    gates, cells, hidden, d_raw, d_hidden, d_cells, d_gates, p.recurrent, p.interface, s
                )
            else:
                clear_row(d_raw, s.interface, s.block)
                clear_row(d_gates, s.gates, s.block)
        tl.debug_barrier()
    store_tile(d.memory + b * tile, slot, word, d_memory, s.slots, s.width)
