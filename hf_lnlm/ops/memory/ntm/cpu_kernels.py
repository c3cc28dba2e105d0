"""Compiled whole-sequence loops of the Turing machine: controller, addressing, reads and writes, forward and backward.

Layout: memories are (B, M, N), slots last, so that every addressing loop runs over contiguous slots. Samples go through
the whole sequence in groups, so that a group's memories and the weights stay in the cache. Memories are stored every few
steps only; backward recomputes the ones between from the stored weightings and interface (writes only, no addressing).

Glossary: `hidden` [h_t ; r_t] · `interface` raw head parameters · `weightings` w_t of all heads, reads first · `inverse`
1/|M(n)| · `scores` K[k_t, M(n)] (eq. 6) · `content` wc_t (eq. 5) · `gated` wg_t (eq. 7), padded by the shift range on
both sides · `shifted` w~_t (eq. 8).

Complexity: time O(T·(H² + heads·N·M)) a sample; stored O(T·(H + heads·N)) and a memory every `every` steps.
"""

from typing import Any, NamedTuple

from ...kernels.compiled import inner, loop
from ...kernels.controllers import controller_backward, controller_forward
from ...kernels.rows import (
    GROUP,
    ONE,
    ZERO,
    add_scaled,
    apply_sigmoid,
    apply_tanh,
    borrowed,
    clip_row,
    content_backward,
    content_scores,
    content_weighting,
    content_weighting_in_place,
    copy_row,
    copy_rows,
    dot,
    enable_ftz,
    fast_log,
    fill_row,
    inverse_norms,
    np,
    read_backward,
    read_memory,
    restore_fp_mode,
    sigmoid,
    softplus,
    write_backward,
    write_memory,
    written_row,
)

FLOOR = np.float32(1e-12)  # ε² inside the roots of the cosine, as in the reference
TINY = np.float32(1e-12)  # added to the shifted weighting before its logarithm


class History(NamedTuple):
    """What the forward loop keeps for the backward loop (arrays, float32)."""

    gates: Any  # `(B, T, 4H)`, or `(B, T, H)` for a feed-forward controller
    cells: Any  # `(B, T+1, H)`
    hidden: Any  # `(B, T+1, H + R·M)`
    interface: Any  # `(B, T, I)`
    weightings: Any  # `(B, T+1, R+W, N)`
    stored: Any  # `(B, ceil(T / every), M, N)`


class Sizes(NamedTuple):
    """The numbers that shape the loops."""

    hidden: int
    reads: int
    writes: int
    width: int
    kernel: int
    every: int
    lstm: bool
    read_first: bool
    tiled: bool


class Scratch(NamedTuple):
    """Rows that one sample-step needs and nobody keeps."""

    inverse: Any
    scores: Any
    content: Any
    gated: Any
    shifted: Any
    terms: Any
    curvature: Any
    padded: Any
    keep: Any
    active: Any
    erases: Any
    adds: Any
    d_erases: Any
    d_adds: Any


def make_scratch(sizes: Sizes, slots: int) -> Scratch:
    """Fresh rows.

    Args:
        sizes: of the layer.
        slots: N.
    """
    wide = slots + sizes.kernel - 1
    rows = [slots, slots, slots, wide, slots, slots, slots, wide, slots, sizes.width + 3 + sizes.kernel]
    vectors = [(sizes.writes, sizes.width)] * 4
    return Scratch(*[np.empty(shape, np.float32) for shape in (*rows, *vectors)])


@inner
def _activate_head(raw: Any, active: Any, width: Any, kernel: Any) -> None:
    """One head's key, strength, gate, sharpening and shift distribution from its clipped parameters."""
    apply_tanh(raw[:width], active[:width])
    active[width] = softplus(raw[width])
    active[width + 1] = sigmoid(raw[width + 1])
    active[width + 2] = ONE + softplus(raw[width + 2])
    shift = active[width + 3 : width + 3 + kernel]
    content_weighting(raw[width + 3 : width + 3 + kernel], ONE, shift)


@inner
def _activate_writes(raw: Any, scratch: Any, first: Any) -> None:
    """Erase and add vectors of the write heads; they start at entry `first` of the interface."""
    writes, width = scratch.erases.shape
    for i in range(writes):
        start = first + 2 * width * i
        apply_sigmoid(raw[start : start + width], scratch.erases[i])
        apply_tanh(raw[start + width : start + 2 * width], scratch.adds[i])


@inner
def _interpolate(content: Any, before: Any, gate: Any, gated: Any, half: Any) -> None:
    """Eq. 7, into the middle of `gated`; the ends repeat the other side."""
    slots = content.shape[0]
    middle = gated[half : half + slots]
    for n in range(slots):
        middle[n] = gate * content[n] + (ONE - gate) * before[n]
    _wrap(gated, half, slots)


@inner
def _wrap(padded: Any, half: Any, slots: Any) -> None:
    """Copies both ends of a circular row into its padding."""
    for j in range(half):
        padded[j] = padded[slots + j]
        padded[half + slots + j] = padded[half + j]


@inner
def _shift(gated: Any, shift: Any, shifted: Any) -> None:
    """Eq. 8: w~(n) = Σ_j s_j · wg(n − (j − half)), and the floor for the logarithm."""
    kernel, slots = shift.shape[0], shifted.shape[0]
    fill_row(shifted, TINY)
    for j in range(kernel):
        start = kernel - 1 - j
        add_scaled(shifted, gated[start : start + slots], shift[j])


@inner
def _logarithms(row: Any, out: Any) -> None:
    """out = log(row)."""
    for n in range(row.shape[0]):
        out[n] = fast_log(row[n])


@inner
def _sharpen(shifted: Any, sharpening: Any, out: Any) -> None:
    """Eq. 9 in log space: relative to the largest entry, so that no power underflows to an empty weighting."""
    _logarithms(shifted, out)
    content_weighting_in_place(out, sharpening)


@inner
def _address(memory: Any, active: Any, before: Any, scratch: Any, width: Any, kernel: Any, out: Any) -> None:
    """One head's weighting w_t from its parameters, the memory and w_{t-1}."""
    content_scores(memory, active[:width], scratch.inverse, FLOOR, scratch.scores)
    content_weighting(scratch.scores, active[width], scratch.content)
    _interpolate(scratch.content, before, active[width + 1], scratch.gated, kernel // 2)
    _shift(scratch.gated, active[width + 3 : width + 3 + kernel], scratch.shifted)
    _sharpen(scratch.shifted, active[width + 2], out)


@inner
def _read_heads(memory: Any, weightings: Any, reads: Any, out: Any) -> None:
    """r_t of every read head, side by side."""
    width = memory.shape[0]
    for r in range(reads):
        read_memory(memory, weightings[r], out[r * width : (r + 1) * width])


@inner
def _memory_step(sizes: Any, raw: Any, memory: Any, before: Any, after: Any, reads: Any, scratch: Any) -> None:
    """Addressing by M_{t-1}, then read and write in the configured order; `memory` becomes M_t."""
    width, kernel, heads = sizes.width, sizes.kernel, sizes.reads + sizes.writes
    size = width + 3 + kernel
    inverse_norms(memory, FLOOR, scratch.inverse)
    for h in range(heads):
        active = scratch.active[:size]
        _activate_head(raw[h * size : (h + 1) * size], active, width, kernel)
        _address(memory, active, before[h], scratch, width, kernel, after[h])
    _activate_writes(raw, scratch, heads * size)
    if sizes.read_first:
        _read_heads(memory, after, sizes.reads, reads)
    write_memory(memory, after[sizes.reads :], scratch.erases, scratch.adds, scratch.keep)
    if not sizes.read_first:
        _read_heads(memory, after, sizes.reads, reads)


@inner
def _keep_state(history: Any, b: Any, t: Any) -> None:
    """A masked step: the state of step t+1 is that of step t."""
    copy_row(history.hidden[b, t], history.hidden[b, t + 1])
    copy_rows(history.weightings[b, t], history.weightings[b, t + 1])
    if history.cells.shape[1] > 1:
        copy_row(history.cells[b, t], history.cells[b, t + 1])


@inner
def _forward_sample(sizes: Any, history: Any, memory: Any, mask: Any, b: Any, t: Any, clip: Any, scratch: Any) -> None:
    """The memory's part of step `t` for one sample."""
    if t % sizes.every == 0:
        copy_rows(memory, history.stored[b, t // sizes.every])
    if mask[b, t] == 0:
        _keep_state(history, b, t)
        return
    raw = history.interface[b, t]
    clip_row(raw, clip)
    before, after = history.weightings[b, t], history.weightings[b, t + 1]
    _memory_step(sizes, raw, memory, before, after, history.hidden[b, t + 1, sizes.hidden :], scratch)


@loop
def forward_loop(
    sizes: Any, history: Any, memory: Any, mask: Any, recurrent: Any, interface: Any, bias: Any, clip: Any, scratch: Any
) -> None:
    """Runs all samples through all steps.

    `history.gates` holds the projected inputs and entry 0 of `cells`, `hidden`, `weightings` the initial state; `memory`
    (B, M, N) holds M_0 and becomes M_T; `recurrent` and `interface` are the packed, transposed weights.
    """
    batch, steps, _ = history.interface.shape
    history, memory, mask, bias = borrowed(history), borrowed(memory), borrowed(mask), borrowed(bias)
    recurrent, interface = borrowed(recurrent), borrowed(interface)
    scratch = borrowed(scratch)
    before = enable_ftz()
    for first in range(0, batch, GROUP):
        last = min(first + GROUP, batch)
        for t in range(steps):
            controller_forward(sizes, history, t, recurrent, interface, bias, first, last)
            for b in range(first, last):
                _forward_sample(sizes, history, memory[b], mask, b, t, clip, scratch)
    restore_fp_mode(before)


@inner
def _sharpen_backward(weighting: Any, d_weighting: Any, shifted: Any, sharpening: Any, out: Any) -> Any:
    """Eq. 9 backward: sets d(shifted), returns d(sharpening)."""
    mean = dot(weighting, d_weighting)
    total = ZERO
    for n in range(weighting.shape[0]):
        gradient = weighting[n] * (d_weighting[n] - mean)
        total += gradient * fast_log(shifted[n])
        out[n] = sharpening * gradient / shifted[n]
    return total


@inner
def _shift_backward(padded: Any, gated: Any, shift: Any, d_shift: Any, d_gated: Any) -> None:
    """Eq. 8 backward from `padded` d(shifted): sets the raw shift gradient and d(gated)."""
    kernel, slots = shift.shape[0], d_gated.shape[0]
    half = kernel // 2
    fill_row(d_gated, ZERO)
    mean = ZERO
    for j in range(kernel):
        start = kernel - 1 - j
        d_shift[j] = dot(padded[half : half + slots], gated[start : start + slots])
        mean += d_shift[j] * shift[j]
        add_scaled(d_gated, padded[j : j + slots], shift[j])
    for j in range(kernel):
        d_shift[j] = shift[j] * (d_shift[j] - mean)


@inner
def _interpolate_backward(content: Any, before: Any, gate: Any, d_gated: Any, d_before: Any) -> Any:
    """Eq. 7 backward: `d_gated` becomes d(content), `d_before` is set; returns d(gate)."""
    total = ZERO
    for n in range(content.shape[0]):
        gradient = d_gated[n]
        total += gradient * (content[n] - before[n])
        d_before[n] = (ONE - gate) * gradient
        d_gated[n] = gate * gradient
    return total


@inner
def _address_backward(
    sizes: Any,
    memory: Any,
    d_memory: Any,
    raw: Any,
    before: Any,
    after: Any,
    d_weighting: Any,
    d_raw: Any,
    scratch: Any,
) -> None:
    """One head backward: adds to `d_memory`, sets `d_raw`; `d_weighting` goes from w_t to w_{t-1}."""
    width, kernel, half = sizes.width, sizes.kernel, sizes.kernel // 2
    active, slots = scratch.active[: width + 3 + kernel], before.shape[0]
    _activate_head(raw, active, width, kernel)
    strength, gate, sharpening = active[width], active[width + 1], active[width + 2]
    shift, key = active[width + 3 :], active[:width]
    key_inverse = content_scores(memory, key, scratch.inverse, FLOOR, scratch.scores)
    content_weighting(scratch.scores, strength, scratch.content)
    _interpolate(scratch.content, before, gate, scratch.gated, half)
    _shift(scratch.gated, shift, scratch.shifted)
    padded = scratch.padded
    d_sharpening = _sharpen_backward(after, d_weighting, scratch.shifted, sharpening, padded[half : half + slots])
    _wrap(padded, half, slots)
    d_gated = scratch.shifted
    _shift_backward(padded, scratch.gated, shift, d_raw[width + 3 :], d_gated)
    d_gate = _interpolate_backward(scratch.content, before, gate, d_gated, d_weighting)
    d_strength = content_backward(
        memory, d_memory, key, key_inverse, strength, scratch.inverse, scratch.scores, scratch.content, d_gated,
        d_raw[:width], scratch.terms, scratch.curvature,
    )  # fmt: skip
    for q in range(width):
        d_raw[q] *= ONE - key[q] * key[q]
    d_raw[width] = d_strength * sigmoid(raw[width])
    d_raw[width + 1] = d_gate * gate * (ONE - gate)
    d_raw[width + 2] = d_sharpening * sigmoid(raw[width + 2])


@inner
def _reads_backward(memory: Any, d_memory: Any, weightings: Any, d_weightings: Any, d_reads: Any, reads: Any) -> None:
    """All read heads backward."""
    width = memory.shape[0]
    for r in range(reads):
        d_read = d_reads[r * width : (r + 1) * width]
        read_backward(memory, d_memory, weightings[r], d_weightings[r], d_read)


@inner
def _store_write_gradients(scratch: Any, d_raw: Any, first: Any) -> None:
    """From d(erase), d(add) to the raw interface."""
    writes, width = scratch.erases.shape
    for i in range(writes):
        start = first + 2 * width * i
        for q in range(width):
            e, a = scratch.erases[i, q], scratch.adds[i, q]
            d_raw[start + q] = scratch.d_erases[i, q] * e * (ONE - e)
            d_raw[start + width + q] = scratch.d_adds[i, q] * (ONE - a * a)


@inner
def _memory_backward(
    sizes: Any, raw: Any, before: Any, after: Any, w_before: Any, w_after: Any, d_reads: Any, d_memory: Any,
    d_weightings: Any, d_raw: Any, clip: Any, scratch: Any,
) -> None:  # fmt: skip
    """One sample-step backward: `before` M_{t-1}, `after` M_t; gradients go from step t to step t−1 in place."""
    reads, heads = sizes.reads, sizes.reads + sizes.writes
    size = sizes.width + 3 + sizes.kernel
    _activate_writes(raw, scratch, heads * size)
    if not sizes.read_first:
        _reads_backward(after, d_memory, w_after, d_weightings, d_reads, reads)
    write_backward(
        before, d_memory, w_after[reads:], d_weightings[reads:], scratch.erases, scratch.adds, scratch.d_erases,
        scratch.d_adds, scratch.keep,
    )  # fmt: skip
    _store_write_gradients(scratch, d_raw, heads * size)
    if sizes.read_first:
        _reads_backward(before, d_memory, w_after, d_weightings, d_reads, reads)
    inverse_norms(before, FLOOR, scratch.inverse)
    for h in range(heads):
        part, d_part = raw[h * size : (h + 1) * size], d_raw[h * size : (h + 1) * size]
        _address_backward(sizes, before, d_memory, part, w_before[h], w_after[h], d_weightings[h], d_part, scratch)
    for j in range(raw.shape[0]):
        if raw[j] >= clip or raw[j] <= -clip:
            d_raw[j] = ZERO


@inner
def _recompute_memories(
    sizes: Any, history: Any, mask: Any, b: Any, start: Any, stop: Any, memories: Any, scratch: Any
) -> None:
    """memories[k] = M_{start+k} for start ≤ start+k ≤ stop, from the stored one and the stored writes."""
    offset = (sizes.reads + sizes.writes) * (sizes.width + 3 + sizes.kernel)
    copy_rows(history.stored[b, start // sizes.every], memories[0])
    for t in range(start, stop):
        before, after = memories[t - start], memories[t - start + 1]
        if mask[b, t] == 0:
            copy_rows(before, after)
            continue
        _activate_writes(history.interface[b, t], scratch, offset)
        weightings = history.weightings[b, t + 1, sizes.reads :]
        if sizes.writes == 1:
            for q in range(sizes.width):
                written_row(before[q], weightings[0], scratch.erases[0, q], scratch.adds[0, q], after[q])
            continue
        copy_rows(before, after)
        write_memory(after, weightings, scratch.erases, scratch.adds, scratch.keep)


class Gradients(NamedTuple):
    """Arrays the backward loop fills; those of the state go from the last step to the first in place."""

    out: Any  # `(B, T, H + R·M)`, given: the gradient of the outputs
    hidden: Any  # `(B, 1, H + R·M)`
    cells: Any  # `(B, H)`
    weightings: Any  # `(B, R+W, N)`
    memory: Any  # `(B, M, N)`
    gates: Any  # `(B, T, 4H)` or `(B, T, H)`, of the pre-activations
    interface: Any  # `(B, T, I)`, of the raw interface


@inner
def _backward_sample(
    sizes: Any, history: Any, gradients: Any, mask: Any, b: Any, t: Any, memories: Any, k: Any, clip: Any, scratch: Any
) -> None:
    """The memory's part of step `t` backward for one sample."""
    add_scaled(gradients.hidden[b, 0], gradients.out[b, t], ONE)
    if mask[b, t] == 0:
        fill_row(gradients.interface[b, t], ZERO)
        fill_row(gradients.gates[b, t], ZERO)
        return
    _memory_backward(
        sizes, history.interface[b, t], memories[k], memories[k + 1], history.weightings[b, t],
        history.weightings[b, t + 1], gradients.hidden[b, 0, sizes.hidden :], gradients.memory[b],
        gradients.weightings[b], gradients.interface[b, t], clip, scratch,
    )  # fmt: skip


@loop
def backward_loop(
    sizes: Any, history: Any, gradients: Any, mask: Any, recurrent: Any, interface: Any, clip: Any, memories: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Runs all samples backward, chunk by chunk; `recurrent` (4H, ·) and `interface` (I, H) are the weights.

    `memories` (GROUP, every + 1, M, N) takes the recomputed memories of a chunk.
    """
    batch, steps, _ = history.interface.shape
    history, gradients, scratch = borrowed(history), borrowed(gradients), borrowed(scratch)
    mask, recurrent, interface, memories = borrowed(mask), borrowed(recurrent), borrowed(interface), borrowed(memories)
    before = enable_ftz()
    for first in range(0, batch, GROUP):
        last = min(first + GROUP, batch)
        for start in range((steps - 1) // sizes.every * sizes.every, -1, -sizes.every):
            stop = min(start + sizes.every, steps)
            for b in range(first, last):
                _recompute_memories(sizes, history, mask, b, start, stop, memories[b - first], scratch)
            for t in range(stop - 1, start - 1, -1):
                for b in range(first, last):
                    _backward_sample(
                        sizes, history, gradients, mask, b, t, memories[b - first], t - start, clip, scratch
                    )
                controller_backward(sizes, history, gradients, mask, t, recurrent, interface, first, last)
    restore_fp_mode(before)
