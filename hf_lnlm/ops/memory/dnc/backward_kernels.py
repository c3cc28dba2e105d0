"""Compiled backward loop of the neural computer, by hand, in the names of `cpu_kernels`.

All gradients of the state go from the last step to the first in place. The order of usage is not differentiated.

Complexity: as forward, with two visits of each link row instead of one, and one more to run the chunk's writes again.
"""

from typing import Any, NamedTuple

from ...kernels.compiled import inner, loop
from ...kernels.controllers import controller_backward
from ...kernels.rows import (
    ONE,
    ZERO,
    add_scaled,
    borrowed,
    content_backward,
    copy_rows,
    dot,
    enable_ftz,
    fill_row,
    inverse_norms,
    np,
    read_backward,
    restore_fp_mode,
    sigmoid,
    write_backward,
)
from .cpu_kernels import (
    FLOOR,
    GROUP,
    Sizes,
    activate,
    look_up,
    retain,
    take_vectors,
    taken,
    unwritten,
    write_step,
)
from .link_kernels import (
    advance_links,
    advance_links_backward,
    allocate,
    allocate_backward,
    follow_links_backward,
    precedence_backward,
)


class Gradients(NamedTuple):
    """Arrays the backward loop fills; those of the state go from the last step to the first in place."""

    out: Any  # `(B, T, H + R·W)`, given: the gradient of the outputs
    hidden: Any  # `(B, 1, H + R·W)`
    cells: Any  # `(B, H)`
    usage: Any  # `(B, N)`
    precedence: Any  # `(B, K, N)`
    write: Any  # `(B, K, N)`
    read: Any  # `(B, R, N)`
    memory: Any  # `(B, W, N)`
    link: Any  # `(B, K, N, N)`
    gates: Any  # `(B, T, 4H)` or `(B, T, H)`, of the pre-activations
    interface: Any  # `(B, T, I)`, of the raw interface


class Rows(NamedTuple):
    """More rows that one backward sample-step needs."""

    terms: Any
    curvature: Any
    d_content: Any
    d_free: Any
    d_usage: Any
    d_retention: Any
    other: Any
    base: Any
    d_forwards: Any
    d_backwards: Any
    d_readings: Any
    d_masked: Any
    d_key: Any
    erased: Any
    d_erases: Any
    d_adds: Any


class Chunk(NamedTuple):
    """Memories and links of the steps of one chunk, run again."""

    memories: Any  # `(GROUP, every + 1, W, N)`
    links: Any  # `(GROUP, every + 1, K, N, N)`


def make_rows(sizes: Sizes, slots: int) -> Rows:
    """Fresh rows.

    Args:
        sizes: of the layer.
        slots: N.
    """
    heads, words, vectors = (sizes.reads, slots), (sizes.width, slots), (sizes.writes, sizes.width)
    shapes = [(slots,)] * 8 + [heads] * 3 + [words, (sizes.width,), words, vectors, vectors]
    return Rows(*[np.empty(shape, np.float32) for shape in shapes])


@inner
def _unmask(memory: Any, d_memory: Any, key: Any, mask: Any, rows: Any, d_key: Any, d_mask: Any) -> None:
    """From the gradients of M∘m and k∘m to those of M, k and m."""
    for q in range(key.shape[0]):
        add_scaled(d_memory[q], rows.d_masked[q], mask[q])
        d_mask[q] = dot(rows.d_masked[q], memory[q]) + rows.d_key[q] * key[q]
        d_key[q] = rows.d_key[q] * mask[q]


@inner
def _look_up_backward(
    sizes: Any, memory: Any, d_memory: Any, raw: Any, d_raw: Any, key_at: Any, strength_at: Any, mask_at: Any,
    norm: Any, weighting: Any, low: Any, scratch: Any, rows: Any,
) -> None:  # fmt: skip
    """Through `look_up`, whose scores and norms are still in `scratch`; the weighting's gradient is in
    `rows.d_content`."""
    active, width = scratch.active, sizes.width
    key, d_key, strength = active[key_at : key_at + width], d_raw[key_at : key_at + width], active[strength_at]
    if sizes.masked:
        for q in range(width):
            fill_row(rows.d_masked[q], ZERO)
        d_strength = content_backward(
            scratch.masked, rows.d_masked, scratch.masked_key, norm, strength, scratch.inverse, scratch.scores,
            weighting, rows.d_content, rows.d_key, rows.terms, rows.curvature,
        )  # fmt: skip
        mask, d_mask = active[mask_at : mask_at + width], d_raw[mask_at : mask_at + width]
        _unmask(memory, d_memory, key, mask, rows, d_key, d_mask)
        for q in range(width):
            s = sigmoid(raw[mask_at + q])
            d_mask[q] *= (ONE - low) * s * (ONE - s)
    else:
        d_strength = content_backward(
            memory, d_memory, key, norm, strength, scratch.inverse, scratch.scores, weighting, rows.d_content, d_key,
            rows.terms, rows.curvature,
        )  # fmt: skip
    d_raw[strength_at] = d_strength * sigmoid(raw[strength_at])


@inner
def _modes_backward(modes: Any, d_modes: Any) -> None:
    """Softmax backward in place."""
    mean = dot(modes, d_modes)
    for j in range(modes.shape[0]):
        d_modes[j] = modes[j] * (d_modes[j] - mean)


@inner
def _scaled_copy(source: Any, scale: Any, target: Any) -> None:
    """target = scale · source."""
    for n in range(source.shape[0]):
        target[n] = scale * source[n]


@inner
def _readings_backward(
    sizes: Any, at: Any, memory: Any, history: Any, gradients: Any, b: Any, t: Any, low: Any, scratch: Any, rows: Any
) -> None:
    """Through the reads and the content part of the read weightings; mode gradients are set, those of links left to
    do."""
    active, raw, d_raw = scratch.active, history.interface[b, t], gradients.interface[b, t]
    writes, width = sizes.writes, sizes.width
    d_memory, d_reading = gradients.memory[b], gradients.read[b]
    if not sizes.masked:
        inverse_norms(memory, FLOOR, scratch.inverse)
    for r in range(sizes.reads):
        start = sizes.hidden + r * width
        d_read = gradients.hidden[b, 0, start : start + width]
        read_backward(memory, d_memory, history.read[b, t + 1, r], d_reading[r], d_read)
        key_at, mask_at = at.read_keys + r * width, at.read_masks + r * width
        norm = look_up(sizes, memory, active, key_at, at.read_strengths + r, mask_at, scratch, scratch.by_content)
        scale = ONE
        if sizes.linked:
            mode = at.modes + r * (1 + 2 * writes)
            scale = active[mode + writes]
            d_raw[mode + writes] = dot(d_reading[r], scratch.by_content)
            for i in range(writes):
                d_raw[mode + i] = dot(d_reading[r], history.backwards[b, t, i, r])
                d_raw[mode + writes + 1 + i] = dot(d_reading[r], history.forwards[b, t, i, r])
            _modes_backward(active[mode : mode + 2 * writes + 1], d_raw[mode : mode + 2 * writes + 1])
        _scaled_copy(d_reading[r], scale, rows.d_content)
        _look_up_backward(
            sizes, memory, d_memory, raw, d_raw, key_at, at.read_strengths + r, mask_at, norm, scratch.by_content, low,
            scratch, rows,
        )  # fmt: skip


@inner
def _links_backward(
    sizes: Any, at: Any, history: Any, gradients: Any, before: Any, after: Any, b: Any, t: Any, scratch: Any, rows: Any
) -> None:
    """Through links and precedence; `gradients.read` then holds what the links give to w^r_{t−1}."""
    writes = sizes.writes
    for r in range(sizes.reads):
        fill_row(rows.d_readings[r], ZERO)
    for i in range(writes):
        for r in range(sizes.reads):
            mode = at.modes + r * (1 + 2 * writes)
            _scaled_copy(gradients.read[b, r], scratch.active[mode + i], rows.d_backwards[r])
            _scaled_copy(gradients.read[b, r], scratch.active[mode + writes + 1 + i], rows.d_forwards[r])
        precedence, weighting = history.precedence[b, t, i], history.write[b, t + 1, i]
        d_precedence, d_weighting = gradients.precedence[b, i], gradients.write[b, i]
        gradient = gradients.link[b, i]
        precedence_backward(precedence, weighting, d_precedence, d_weighting)
        follow_links_backward(
            gradient, after[i], history.read[b, t], rows.d_forwards, rows.d_backwards, rows.d_readings
        )
        advance_links_backward(gradient, before[i], precedence, weighting, d_precedence, d_weighting)
    copy_rows(rows.d_readings, gradients.read[b])


@inner
def _store_vector_gradients(at: Any, scratch: Any, rows: Any, d_raw: Any) -> None:
    """Gradients of erase and write vectors."""
    writes, width = scratch.erases.shape
    for i in range(writes):
        for q in range(width):
            e = scratch.erases[i, q]
            d_raw[at.erases + i * width + q] = rows.d_erases[i, q] * e * (ONE - e)
            d_raw[at.adds + i * width + q] = rows.d_adds[i, q]


@inner
def _writes_backward(
    sizes: Any, at: Any, history: Any, gradients: Any, memory: Any, b: Any, t: Any, scratch: Any, rows: Any
) -> None:
    """Through M_t = M_{t−1}∘Π(1 − w e)∘ψ + Σ w v; sets `rows.d_retention`."""
    take_vectors(at, scratch.active, scratch)
    d_memory, weightings, d_weightings = gradients.memory[b], history.write[b, t + 1], gradients.write[b]
    fill_row(rows.d_retention, ZERO)
    source = memory
    if sizes.deallocate:
        source = rows.erased
        for q in range(memory.shape[0]):
            row, target = memory[q], source[q]
            for n in range(row.shape[0]):
                target[n] = row[n] * scratch.retention[n]
    write_backward(
        source, d_memory, weightings, d_weightings, scratch.erases, scratch.adds, rows.d_erases, rows.d_adds,
        scratch.keep,
    )  # fmt: skip
    _store_vector_gradients(at, scratch, rows, gradients.interface[b, t])
    if sizes.deallocate:
        for q in range(memory.shape[0]):
            row, gradient = memory[q], d_memory[q]
            for n in range(row.shape[0]):
                rows.d_retention[n] += gradient[n] * row[n]
                gradient[n] *= scratch.retention[n]


@inner
def _usages(sizes: Any, at: Any, usage: Any, order: Any, scratch: Any) -> None:
    """The usages that the write heads saw, into `scratch.usage`."""
    for n in range(usage.shape[0]):
        scratch.usage[0, n] = usage[n]
    for i in range(sizes.writes - 1):
        scale = scratch.active[at.allocation_gates + i] * scratch.active[at.write_gates + i]
        allocate(scratch.usage[i], order[i], scratch.free)
        taken(scratch.usage[i], scratch.free, scale, scratch.usage[i + 1])


@inner
def _taken_backward(usage: Any, free: Any, scale: Any, d_usage: Any, d_free: Any) -> Any:
    """Through `taken`: adds to d(free), turns `d_usage` into that of the usage before; returns d(scale)."""
    total = ZERO
    for n in range(usage.shape[0]):
        gradient = d_usage[n]
        room = (ONE - usage[n]) * gradient
        total += room * free[n]
        d_free[n] += room * scale
        d_usage[n] = gradient * (ONE - scale * free[n])
    return total


@inner
def _weighting_backward(
    free: Any, by_content: Any, gate: Any, write: Any, d_weighting: Any, d_free: Any, d_content: Any
) -> Any:
    """Through w = g^w (g^a a + (1 − g^a) c); returns Σ dw·a and Σ dw·c."""
    along_free, along_content = ZERO, ZERO
    for n in range(free.shape[0]):
        gradient = d_weighting[n]
        along_free += gradient * free[n]
        along_content += gradient * by_content[n]
        d_free[n] = gradient * write * gate
        d_content[n] = gradient * write * (ONE - gate)
    return along_free, along_content


@inner
def _choices_backward(
    sizes: Any, at: Any, history: Any, gradients: Any, memory: Any, b: Any, t: Any, low: Any, scratch: Any, rows: Any
) -> None:
    """Through the write weightings, last head first; sets `rows.d_usage`."""
    active, raw, d_raw = scratch.active, history.interface[b, t], gradients.interface[b, t]
    _usages(sizes, at, history.usage[b, t + 1], history.order[b, t], scratch)
    fill_row(rows.d_usage, ZERO)
    if not sizes.masked:
        inverse_norms(memory, FLOOR, scratch.inverse)
    for i in range(sizes.writes - 1, -1, -1):
        gate, write, order = active[at.allocation_gates + i], active[at.write_gates + i], history.order[b, t, i]
        key_at, mask_at = at.write_keys + i * sizes.width, at.write_masks + i * sizes.width
        allocate(scratch.usage[i], order, scratch.free)
        norm = look_up(sizes, memory, active, key_at, at.write_strengths + i, mask_at, scratch, scratch.by_content)
        along_free, along_content = _weighting_backward(
            scratch.free, scratch.by_content, gate, write, gradients.write[b, i], rows.d_free, rows.d_content
        )
        d_scale = ZERO
        if i + 1 < sizes.writes:
            d_scale = _taken_backward(scratch.usage[i], scratch.free, gate * write, rows.d_usage, rows.d_free)
        d_gate = write * (along_free - along_content + d_scale)
        d_write = gate * (along_free + d_scale) + (ONE - gate) * along_content
        d_raw[at.allocation_gates + i] = d_gate * gate * (ONE - gate)
        d_raw[at.write_gates + i] = d_write * write * (ONE - write)
        allocate_backward(scratch.usage[i], order, rows.d_free, rows.terms, rows.d_usage)
        _look_up_backward(
            sizes, memory, gradients.memory[b], raw, d_raw, key_at, at.write_strengths + i, mask_at, norm,
            scratch.by_content, low, scratch, rows,
        )  # fmt: skip


@inner
def _usage_rows(before: Any, keep: Any, retention: Any, d_usage: Any, d_retention: Any, base: Any) -> None:
    """d(ψ) += du·base and base = du∘ψ, with base = u + (1 − u)(1 − keep)."""
    for n in range(before.shape[0]):
        value = before[n] + (ONE - before[n]) * (ONE - keep[n])
        d_retention[n] += d_usage[n] * value
        base[n] = d_usage[n] * retention[n]


@inner
def _previous_write(before: Any, base: Any, other: Any, out: Any) -> None:
    """d(w^w_{t−1}) = d(base)·(1 − u)·Π_{others}(1 − w)."""
    for n in range(before.shape[0]):
        out[n] = base[n] * (ONE - before[n]) * other[n]


@inner
def _previous_read(d_retention: Any, reading: Any, other: Any, gate: Any, out: Any) -> Any:
    """Adds ψ's part to d(w^r_{t−1}); returns d(f)."""
    total = ZERO
    for n in range(reading.shape[0]):
        gradient = d_retention[n] * other[n]
        total -= gradient * reading[n]
        out[n] -= gradient * gate
    return total


@inner
def _usage_backward(sizes: Any, at: Any, history: Any, gradients: Any, b: Any, t: Any, scratch: Any, rows: Any) -> None:
    """Through the usage: `gradients.usage`, `.write` and `.read` go to step t−1."""
    before, d_usage = history.usage[b, t], gradients.usage[b]
    writes, reads = history.write[b, t], history.read[b, t]
    add_scaled(d_usage, rows.d_usage, ONE)
    unwritten(writes, -1, scratch.keep)
    _usage_rows(before, scratch.keep, scratch.retention, d_usage, rows.d_retention, rows.base)
    for n in range(before.shape[0]):
        d_usage[n] = rows.base[n] * scratch.keep[n]
    for i in range(sizes.writes):
        unwritten(writes, i, rows.other)
        _previous_write(before, rows.base, rows.other, gradients.write[b, i])
    for r in range(sizes.reads):
        gate = scratch.active[at.free_gates + r]
        retain(at, scratch.active, reads, r, rows.other)
        d_gate = _previous_read(rows.d_retention, reads[r], rows.other, gate, gradients.read[b, r])
        gradients.interface[b, t, at.free_gates + r] = d_gate * gate * (ONE - gate)


@inner
def _memory_backward(
    sizes: Any, at: Any, history: Any, gradients: Any, chunk: Any, place: Any, k: Any, b: Any, t: Any, limits: Any,
    scratch: Any, rows: Any,
) -> None:  # fmt: skip
    """One sample-step backward."""
    raw, d_raw = history.interface[b, t], gradients.interface[b, t]
    activate(sizes, at, raw, scratch.active, limits.mask_min)
    retain(at, scratch.active, history.read[b, t], -1, scratch.retention)
    before, after = chunk.memories[place, k], chunk.memories[place, k + 1]
    _readings_backward(sizes, at, after, history, gradients, b, t, limits.mask_min, scratch, rows)
    if sizes.linked:
        links = chunk.links[place]
        _links_backward(sizes, at, history, gradients, links[k], links[k + 1], b, t, scratch, rows)
    else:
        for r in range(sizes.reads):
            fill_row(gradients.read[b, r], ZERO)
    _writes_backward(sizes, at, history, gradients, before, b, t, scratch, rows)
    _choices_backward(sizes, at, history, gradients, before, b, t, limits.mask_min, scratch, rows)
    _usage_backward(sizes, at, history, gradients, b, t, scratch, rows)
    for j in range(raw.shape[0]):
        if raw[j] >= limits.clip or raw[j] <= -limits.clip:
            d_raw[j] = ZERO


@inner
def _run_chunk_again(
    sizes: Any, at: Any, history: Any, chunk: Any, place: Any, mask: Any, b: Any, start: Any, stop: Any, low: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Memories and links of the steps start to stop of one sample, from the stored ones and the stored weightings."""
    memories, links = chunk.memories[place], chunk.links[place]
    copy_rows(history.stored_memory[b, start // sizes.every], memories[0])
    for i in range(links.shape[1]):
        copy_rows(history.stored_link[b, start // sizes.every, i], links[0, i])
    for t in range(start, stop):
        k = t - start
        copy_rows(memories[k], memories[k + 1])
        if mask[b, t] == 0:
            for i in range(links.shape[1]):
                copy_rows(links[k, i], links[k + 1, i])
            continue
        activate(sizes, at, history.interface[b, t], scratch.active, low)
        retain(at, scratch.active, history.read[b, t], -1, scratch.retention)
        write_step(sizes, at, memories[k + 1], history.write[b, t + 1], scratch)
        for i in range(links.shape[1]):
            advance_links(links[k, i], history.precedence[b, t, i], history.write[b, t + 1, i], links[k + 1, i])


@loop
def backward_loop(
    sizes: Any, at: Any, history: Any, gradients: Any, chunk: Any, mask: Any, recurrent: Any, interface: Any,
    limits: Any, scratch: Any, rows: Any,
) -> None:  # fmt: skip
    """Runs all samples backward, chunk by chunk; `recurrent` (4H, ·) and `interface` (I, H) are the weights."""
    batch, steps, _ = history.interface.shape
    history, gradients, chunk, scratch = borrowed(history), borrowed(gradients), borrowed(chunk), borrowed(scratch)
    rows, mask, recurrent, interface = borrowed(rows), borrowed(mask), borrowed(recurrent), borrowed(interface)
    before = enable_ftz()
    for first in range(0, batch, GROUP):
        last = min(first + GROUP, batch)
        for start in range((steps - 1) // sizes.every * sizes.every, -1, -sizes.every):
            stop = min(start + sizes.every, steps)
            for b in range(first, last):
                _run_chunk_again(sizes, at, history, chunk, b - first, mask, b, start, stop, limits.mask_min, scratch)
            for t in range(stop - 1, start - 1, -1):
                for b in range(first, last):
                    add_scaled(gradients.hidden[b, 0], gradients.out[b, t], ONE)
                    if mask[b, t] == 0:
                        fill_row(gradients.interface[b, t], ZERO)
                        fill_row(gradients.gates[b, t], ZERO)
                    else:
                        _memory_backward(
                            sizes, at, history, gradients, chunk, b - first, t - start, b, t, limits, scratch, rows
                        )
                controller_backward(sizes, history, gradients, mask, t, recurrent, interface, first, last)
    restore_fp_mode(before)
