"""Compiled whole-sequence loops of the neural computer: controller, allocation, links, reads and writes, forward and
backward.

Layout: memories are (B, W, N), slots last. Memories and links live in place during the forward loop and are stored every
few steps only; backward runs the writes of a chunk again, from the stored weightings, and so has L_{t−1} and L_t of every
step of the chunk.

Glossary: `hidden` [h_t ; r_t] · `raw` interface · `active` interface after its activations · `usage` u · `retention` ψ ·
`order` φ · `free` a_t · `by_content` c · `forwards`, `backwards` f and b.

Complexity: time O(T·(H² + heads·N·W + K·N²)) a sample; stored O(T·(H + (R·K + K)·N)) and N² every `every` steps.
"""

from typing import Any, NamedTuple

from ...kernels.compiled import inner, loop
from ...kernels.controllers import controller_forward
from ...kernels.rows import (
    ONE,
    add_scaled,
    borrowed,
    clip_row,
    content_scores,
    content_weighting,
    copy_row,
    copy_rows,
    enable_ftz,
    fill_row,
    inverse_norms,
    np,
    read_memory,
    restore_fp_mode,
    sigmoid,
    softplus,
    write_memory,
)
from .link_kernels import advance_and_follow_links, advance_precedence, allocate, combine, sort_slots

FLOOR = np.float32(1e-12)

GROUP = 2  # samples that go through time together: a link matrix each has to stay in the cache


class Sizes(NamedTuple):
    """The numbers that shape the loops; offsets into the interface are in `Places`."""

    hidden: int
    reads: int
    writes: int
    width: int
    every: int
    lstm: bool
    linked: bool
    masked: bool
    deallocate: bool
    tiled: bool


class Limits(NamedTuple):
    """Bounds that the options set, float32."""

    clip: Any  # of the raw interface
    mask_min: Any


class History(NamedTuple):
    """What the forward loop keeps for the backward loop (float32 but for `order`)."""

    gates: Any  # `(B, T, 4H)`, or `(B, T, H)` for a feed-forward controller
    cells: Any  # `(B, T+1, H)`
    hidden: Any  # `(B, T+1, H + R·W)`
    interface: Any  # `(B, T, I)`
    usage: Any  # `(B, T+1, N)`
    precedence: Any  # `(B, T+1, K, N)`
    write: Any  # `(B, T+1, K, N)`
    read: Any  # `(B, T+1, R, N)`
    order: Any  # `(B, T, K, N)` int32
    forwards: Any  # `(B, T, K, R, N)`
    backwards: Any  # `(B, T, K, R, N)`
    stored_memory: Any  # `(B, ceil(T / every), W, N)`
    stored_link: Any  # `(B, ceil(T / every), K, N, N)`


class Scratch(NamedTuple):
    """Rows that one sample-step needs and nobody keeps."""

    active: Any
    inverse: Any
    scores: Any
    by_content: Any
    free: Any
    usage: Any
    retention: Any
    keep: Any
    masked: Any
    masked_key: Any
    order: Any  # of each sample of a group: the step before's is nearly the next one's
    erases: Any
    adds: Any


def make_scratch(sizes: Sizes, slots: int, interface: int) -> Scratch:
    """Fresh rows.

    Args:
        sizes: of the layer.
        slots: N.
        interface: length of the interface vector.
    """
    row, vectors = (slots,), (sizes.writes, sizes.width)
    shapes = [(interface,), row, row, row, row, (sizes.writes, slots), row, row, (sizes.width, slots), (sizes.width,)]
    rows = [np.empty(shape, np.float32) for shape in shapes]
    order = np.empty((GROUP, sizes.writes, slots), np.int32)
    order[:] = np.arange(slots)
    return Scratch(*[*rows, order, np.empty(vectors, np.float32), np.empty(vectors, np.float32)])


@inner
def activate(sizes: Any, at: Any, raw: Any, active: Any, mask_min: Any) -> None:
    """The interface after its activations; keys and write vectors are linear."""
    for j in range(raw.shape[0]):
        active[j] = raw[j]
    for j in range(at.read_strengths, at.write_keys):
        active[j] = ONE + softplus(raw[j])
    for j in range(at.write_strengths, at.erases):
        active[j] = ONE + softplus(raw[j])
    for j in range(at.erases, at.adds):
        active[j] = sigmoid(raw[j])
    for j in range(at.free_gates, at.modes):
        active[j] = sigmoid(raw[j])
    for j in range(at.read_masks, at.sharpness):
        active[j] = mask_min + (ONE - mask_min) * sigmoid(raw[j])
    modes = (at.read_masks - at.modes) // sizes.reads
    if modes > 0:
        for r in range(sizes.reads):
            start = at.modes + r * modes
            content_weighting(raw[start : start + modes], ONE, active[start : start + modes])


@inner
def take_vectors(at: Any, active: Any, scratch: Any) -> None:
    """Erase and write vectors of the write heads as matrices."""
    writes, width = scratch.erases.shape
    for i in range(writes):
        for q in range(width):
            scratch.erases[i, q] = active[at.erases + i * width + q]
            scratch.adds[i, q] = active[at.adds + i * width + q]


@inner
def mask_memory(memory: Any, mask: Any, out: Any) -> None:
    """out[q] = mask[q] · memory[q]."""
    for q in range(memory.shape[0]):
        source, target, scale = memory[q], out[q], mask[q]
        for n in range(source.shape[0]):
            target[n] = scale * source[n]


@inner
def mask_key(key: Any, mask: Any, out: Any) -> None:
    """out = key ∘ mask."""
    for q in range(key.shape[0]):
        out[q] = key[q] * mask[q]


@inner
def look_up(
    sizes: Any, memory: Any, active: Any, key_at: Any, strength_at: Any, mask_at: Any, scratch: Any, out: Any
) -> Any:
    """Content weighting of one head into `out`; returns the key's inverse norm. Without masks `scratch.inverse` is
    ready."""
    key, strength = active[key_at : key_at + sizes.width], active[strength_at]
    if sizes.masked:
        mask = active[mask_at : mask_at + sizes.width]
        mask_memory(memory, mask, scratch.masked)
        mask_key(key, mask, scratch.masked_key)
        inverse_norms(scratch.masked, FLOOR, scratch.inverse)
        norm = content_scores(scratch.masked, scratch.masked_key, scratch.inverse, FLOOR, scratch.scores)
    else:
        norm = content_scores(memory, key, scratch.inverse, FLOOR, scratch.scores)
    content_weighting(scratch.scores, strength, out)
    return norm


@inner
def retain(at: Any, active: Any, readings: Any, skip: Any, out: Any) -> None:
    """Π_r (1 − f_r w^r) over the read heads but `skip` (−1: all of them)."""
    fill_row(out, ONE)
    for r in range(readings.shape[0]):
        if r != skip:
            gate, row = active[at.free_gates + r], readings[r]
            for n in range(out.shape[0]):
                out[n] *= ONE - gate * row[n]


@inner
def unwritten(weightings: Any, skip: Any, out: Any) -> None:
    """Π_i (1 − w_i) over the write heads but `skip` (−1: all of them)."""
    fill_row(out, ONE)
    for i in range(weightings.shape[0]):
        if i != skip:
            row = weightings[i]
            for n in range(out.shape[0]):
                out[n] *= ONE - row[n]


@inner
def _next_usage(before: Any, keep: Any, retention: Any, out: Any) -> None:
    """u_t = (u + (1 − u)(1 − keep)) ∘ ψ."""
    for n in range(out.shape[0]):
        out[n] = (before[n] + (ONE - before[n]) * (ONE - keep[n])) * retention[n]


@inner
def taken(usage: Any, free: Any, scale: Any, out: Any) -> None:
    """The usage that the next write head sees: u + (1 − u) · scale · a."""
    for n in range(out.shape[0]):
        out[n] = usage[n] + (ONE - usage[n]) * scale * free[n]


@inner
def _write_weighting(free: Any, by_content: Any, gate: Any, write: Any, out: Any) -> None:
    """w^w = g^w (g^a a + (1 − g^a) c)."""
    for n in range(out.shape[0]):
        out[n] = write * (gate * free[n] + (ONE - gate) * by_content[n])


@inner
def _choose_slots(
    sizes: Any, at: Any, memory: Any, usage: Any, after: Any, order: Any, place: Any, scratch: Any
) -> None:
    """w^w_t of every write head; keeps each head's order of usage."""
    active = scratch.active
    if not sizes.masked:
        inverse_norms(memory, FLOOR, scratch.inverse)
    copy_row(usage, scratch.usage[0])
    for i in range(sizes.writes):
        gate, write = active[at.allocation_gates + i], active[at.write_gates + i]
        sorted_slots = scratch.order[place, i]
        sort_slots(scratch.usage[i], sorted_slots)
        copy_row(sorted_slots, order[i])
        allocate(scratch.usage[i], sorted_slots, scratch.free)
        key_at, mask_at = at.write_keys + i * sizes.width, at.write_masks + i * sizes.width
        look_up(sizes, memory, active, key_at, at.write_strengths + i, mask_at, scratch, scratch.by_content)
        _write_weighting(scratch.free, scratch.by_content, gate, write, after[i])
        if i + 1 < sizes.writes:
            taken(scratch.usage[i], scratch.free, gate * write, scratch.usage[i + 1])


@inner
def write_step(sizes: Any, at: Any, memory: Any, weightings: Any, scratch: Any) -> None:
    """M_t from M_{t−1} in place; `scratch` holds the active interface and ψ_t."""
    take_vectors(at, scratch.active, scratch)
    if sizes.deallocate:
        for q in range(memory.shape[0]):
            row = memory[q]
            for n in range(row.shape[0]):
                row[n] *= scratch.retention[n]
    write_memory(memory, weightings, scratch.erases, scratch.adds, scratch.keep)


@inner
def _choose_readings(sizes: Any, at: Any, memory: Any, forwards: Any, backwards: Any, after: Any, scratch: Any) -> None:
    """w^r_t of every read head from its modes."""
    active, writes = scratch.active, sizes.writes
    if not sizes.masked:
        inverse_norms(memory, FLOOR, scratch.inverse)
    for r in range(sizes.reads):
        key_at, mask_at = at.read_keys + r * sizes.width, at.read_masks + r * sizes.width
        if not sizes.linked:
            look_up(sizes, memory, active, key_at, at.read_strengths + r, mask_at, scratch, after[r])
            continue
        look_up(sizes, memory, active, key_at, at.read_strengths + r, mask_at, scratch, scratch.by_content)
        mode = at.modes + r * (1 + 2 * writes)
        combine(after[r], scratch.by_content, active[mode + writes], True)
        for i in range(writes):
            add_scaled(after[r], backwards[i, r], active[mode + i])
            add_scaled(after[r], forwards[i, r], active[mode + writes + 1 + i])


@inner
def _memory_step(
    sizes: Any, at: Any, history: Any, memory: Any, link: Any, b: Any, t: Any, place: Any, mask_min: Any, scratch: Any
) -> None:
    """One step of one sample, the `place`-th of its group; `memory` and `link` go from t−1 to t."""
    read_before, write_before = history.read[b, t], history.write[b, t]
    usage, write = history.usage[b, t + 1], history.write[b, t + 1]
    activate(sizes, at, history.interface[b, t], scratch.active, mask_min)
    retain(at, scratch.active, read_before, -1, scratch.retention)
    unwritten(write_before, -1, scratch.keep)
    _next_usage(history.usage[b, t], scratch.keep, scratch.retention, usage)
    _choose_slots(sizes, at, memory, usage, write, history.order[b, t], place, scratch)
    write_step(sizes, at, memory, write, scratch)
    if sizes.linked:
        for i in range(sizes.writes):
            before = history.precedence[b, t, i]
            advance_and_follow_links(
                link[i], before, write[i], read_before, history.forwards[b, t, i], history.backwards[b, t, i]
            )
            advance_precedence(before, write[i], history.precedence[b, t + 1, i])
    reading = history.read[b, t + 1]
    _choose_readings(sizes, at, memory, history.forwards[b, t], history.backwards[b, t], reading, scratch)
    out, width = history.hidden[b, t + 1], sizes.width
    for r in range(sizes.reads):
        start = sizes.hidden + r * width
        read_memory(memory, reading[r], out[start : start + width])


@inner
def _keep_state(sizes: Any, history: Any, b: Any, t: Any) -> None:
    """A masked step: the state of step t+1 is that of step t."""
    copy_row(history.hidden[b, t], history.hidden[b, t + 1])
    copy_row(history.usage[b, t], history.usage[b, t + 1])
    copy_rows(history.write[b, t], history.write[b, t + 1])
    copy_rows(history.read[b, t], history.read[b, t + 1])
    if sizes.lstm:
        copy_row(history.cells[b, t], history.cells[b, t + 1])
    if sizes.linked:
        copy_rows(history.precedence[b, t], history.precedence[b, t + 1])


@inner
def _store(sizes: Any, history: Any, memory: Any, link: Any, b: Any, t: Any) -> None:
    """Memory and links at the beginning of a chunk."""
    if t % sizes.every == 0:
        copy_rows(memory, history.stored_memory[b, t // sizes.every])
        for i in range(link.shape[0]):
            copy_rows(link[i], history.stored_link[b, t // sizes.every, i])


@loop
def forward_loop(
    sizes: Any, at: Any, history: Any, memory: Any, link: Any, mask: Any, recurrent: Any, interface: Any, bias: Any,
    limits: Any, scratch: Any,
) -> None:  # fmt: skip
    """Runs all samples through all steps.

    `history.gates` holds the projected inputs and entry 0 of its state arrays the initial state; `memory` (B, W, N) and
    `link` (B, K, N, N) go from the first step to the last in place; `recurrent` and `interface` are the packed,
    transposed weights.
    """
    batch, steps, _ = history.interface.shape
    history, scratch, memory, link = borrowed(history), borrowed(scratch), borrowed(memory), borrowed(link)
    mask, recurrent, interface, bias = borrowed(mask), borrowed(recurrent), borrowed(interface), borrowed(bias)
    before = enable_ftz()
    for first in range(0, batch, GROUP):
        last = min(first + GROUP, batch)
        for t in range(steps):
            controller_forward(sizes, history, t, recurrent, interface, bias, first, last)
            for b in range(first, last):
                _store(sizes, history, memory[b], link[b], b, t)
                clip_row(history.interface[b, t], limits.clip)
                if mask[b, t] == 0:
                    _keep_state(sizes, history, b, t)
                else:
                    _memory_step(sizes, at, history, memory[b], link[b], b, t, b - first, limits.mask_min, scratch)
    restore_fp_mode(before)
