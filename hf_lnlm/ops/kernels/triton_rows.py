"""Small Triton functions that the Turing machine's and the neural computer's whole-sequence kernels share.

One program runs one sample, so every function here works for one sample: on tiles that live in registers, and on rows
in global memory that only this program reads and writes. Threads of a program see each other's rows after a barrier.

Glossary: `slot`, `word` index ranges over N and W, padded to powers of two · `norm` 1/|k| · `inverse` 1/|M(n)| ·
`scores` cosines.

Complexity: each function is one pass over its tiles; the matrix-vector products read every weight once a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .triton_math import kernel, sigmoid, tanh, tl

PRODUCT_BLOCK = 64  # rows and columns of a weight tile


class Parameters(NamedTuple):
    """Weights, plain and contiguous."""

    recurrent: Any  # `(4H, H + R·M)` or `(H, R·M)`
    interface: Any  # `(I, H)`
    bias: Any  # `(I,)`


def warps_for(entries: int) -> int:
    """Warps of a program that keeps tiles of so many entries in registers: about 32 entries a thread.

    Args:
        entries: of the largest tile, a power of two.
    """
    return min(16, max(4, entries // 1024))


@kernel
def clamp(x: tl.tensor, bound: tl.constexpr) -> tl.tensor:
    """`x` within ±`bound`; NaN stays NaN."""
    x = tl.where(x < -bound, -bound, x)
    return tl.where(x > bound, bound, x)


@kernel
def softmax(x: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Softmax over the entries that are `inside`; the others become 0."""
    x = tl.where(inside, x, float("-inf"))
    powers = tl.exp(x - tl.max(x, 0))
    return powers / tl.sum(powers, 0)


@kernel
def load_row(row: tl.tensor, at: tl.tensor, size: tl.constexpr) -> tl.tensor:
    """Entries `at` of a row of `size`; 0 beyond its end."""
    return tl.load(row + at, mask=at < size, other=0.0)


@kernel
def entry(row: tl.tensor, j: tl.tensor) -> tl.tensor:
    """Entry `j` of a row in registers."""
    return tl.sum(tl.where(tl.arange(0, row.shape[0]) == j, row, 0.0), 0)


@kernel
def store_row(row: tl.tensor, at: tl.tensor, values: tl.tensor, size: tl.constexpr) -> None:
    """Writes entries `at` of a row of `size`."""
    tl.store(row + at, values, mask=at < size)


@kernel
def load_tile(tile: tl.tensor, slot: tl.tensor, word: tl.tensor, slots: tl.constexpr, width: tl.constexpr) -> tl.tensor:
    """A matrix `(slots, width)`; 0 in the padding."""
    inside = (slot[:, None] < slots) & (word[None, :] < width)
    return tl.load(tile + slot[:, None] * width + word[None, :], mask=inside, other=0.0)


@kernel
def store_tile(
    tile: tl.tensor, slot: tl.tensor, word: tl.tensor, values: tl.tensor, slots: tl.constexpr, width: tl.constexpr
) -> None:
    """Writes a matrix `(slots, width)`."""
    inside = (slot[:, None] < slots) & (word[None, :] < width)
    tl.store(tile + slot[:, None] * width + word[None, :], values, mask=inside)


@kernel
def copy_row(source: tl.tensor, target: tl.tensor, size: tl.constexpr, block: tl.constexpr) -> None:
    """target = source."""
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        store_row(target, at, load_row(source, at, size), size)


@kernel
def add_row(source: tl.tensor, target: tl.tensor, size: tl.constexpr, block: tl.constexpr) -> None:
    """target += source."""
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        store_row(target, at, load_row(target, at, size) + load_row(source, at, size), size)


@kernel
def clear_row(row: tl.tensor, size: tl.constexpr, block: tl.constexpr) -> None:
    """row = 0."""
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        store_row(row, at, tl.zeros([block], tl.float32), size)


@kernel
def product(
    out: tl.tensor, start: tl.tensor, matrix: tl.tensor, x: tl.tensor, rows: tl.constexpr, columns: tl.constexpr,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """out = start + matrix `(rows, columns)` @ x."""
    for first in range(0, rows, block):
        i = first + tl.arange(0, block)
        total = load_row(start, i, rows)
        for left in range(0, columns, block):
            j = left + tl.arange(0, block)
            inside = (i[:, None] < rows) & (j[None, :] < columns)
            tile = tl.load(matrix + i[:, None] * columns + j[None, :], mask=inside, other=0.0)
            total += tl.sum(tile * load_row(x, j, columns)[None, :], 1)
        store_row(out, i, total, rows)


@kernel
def transposed_product(
    out: tl.tensor, matrix: tl.tensor, x: tl.tensor, rows: tl.constexpr, columns: tl.constexpr, add: tl.constexpr,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """out = (out, with `add`) + x @ matrix `(rows, columns)`."""
    for left in range(0, columns, block):
        j = left + tl.arange(0, block)
        total = tl.zeros([block], tl.float32)
        if add:
            total += load_row(out, j, columns)
        for first in range(0, rows, block):
            i = first + tl.arange(0, block)
            inside = (i[:, None] < rows) & (j[None, :] < columns)
            tile = tl.load(matrix + i[:, None] * columns + j[None, :], mask=inside, other=0.0)
            total += tl.sum(tile * load_row(x, i, rows)[:, None], 0)
        store_row(out, j, total, columns)


@kernel
def lstm_forward(
    gates: tl.tensor, before: tl.tensor, after: tl.tensor, hidden: tl.tensor, size: tl.constexpr, block: tl.constexpr
) -> None:
    """c_t and h_t; `gates` (4·size: input, forget, candidate, output) go from pre-activations to activations."""
    for first in range(0, size, block):
        j = first + tl.arange(0, block)
        gate_in = sigmoid(load_row(gates, j, size))
        forget = sigmoid(load_row(gates + size, j, size))
        candidate = tanh(load_row(gates + 2 * size, j, size))
        gate_out = sigmoid(load_row(gates + 3 * size, j, size))
        cell = forget * load_row(before, j, size) + gate_in * candidate
        tl.debug_barrier()  # several threads may hold one entry: all have read it before any writes over it
        store_row(gates, j, gate_in, size)
        store_row(gates + size, j, forget, size)
        store_row(gates + 2 * size, j, candidate, size)
        store_row(gates + 3 * size, j, gate_out, size)
        store_row(after, j, cell, size)
        store_row(hidden, j, gate_out * tanh(cell), size)


@kernel
def lstm_backward(
    gates: tl.tensor, before: tl.tensor, after: tl.tensor, d_hidden: tl.tensor, d_cells: tl.tensor, d_gates: tl.tensor,
    size: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """`d_cells` goes from c_t to c_{t-1}; the pre-activations' gradients are set."""
    for first in range(0, size, block):
        j = first + tl.arange(0, block)
        gate_in, forget = load_row(gates, j, size), load_row(gates + size, j, size)
        candidate, gate_out = load_row(gates + 2 * size, j, size), load_row(gates + 3 * size, j, size)
        out, d_out = tanh(load_row(after, j, size)), load_row(d_hidden, j, size)
        d_cell = load_row(d_cells, j, size) + d_out * gate_out * (1.0 - out * out)
        tl.debug_barrier()  # as above, for `d_cells`
        store_row(d_gates, j, d_cell * candidate * gate_in * (1.0 - gate_in), size)
        store_row(d_gates + size, j, d_cell * load_row(before, j, size) * forget * (1.0 - forget), size)
        store_row(d_gates + 2 * size, j, d_cell * gate_in * (1.0 - candidate * candidate), size)
        store_row(d_gates + 3 * size, j, d_out * out * gate_out * (1.0 - gate_out), size)
        store_row(d_cells, j, d_cell * forget, size)


@kernel
def tanh_forward(gates: tl.tensor, hidden: tl.tensor, size: tl.constexpr, block: tl.constexpr) -> None:
    """h_t of a feed-forward controller."""
    for first in range(0, size, block):
        j = first + tl.arange(0, block)
        store_row(hidden, j, tanh(load_row(gates, j, size)), size)


@kernel
def tanh_backward(
    hidden: tl.tensor, d_hidden: tl.tensor, d_gates: tl.tensor, size: tl.constexpr, block: tl.constexpr
) -> None:
    """The pre-activations' gradients of a feed-forward controller."""
    for first in range(0, size, block):
        j = first + tl.arange(0, block)
        out = load_row(hidden, j, size)
        store_row(d_gates, j, load_row(d_hidden, j, size) * (1.0 - out * out), size)


@kernel
def clip_row(row: tl.tensor, size: tl.constexpr, bound: tl.constexpr, block: tl.constexpr) -> None:
    """Clips the interface in place."""
    for first in range(0, size, block):
        j = first + tl.arange(0, block)
        store_row(row, j, clamp(load_row(row, j, size), bound), size)


@kernel
def clip_backward(
    row: tl.tensor, d_row: tl.tensor, size: tl.constexpr, bound: tl.constexpr, block: tl.constexpr
) -> None:
    """No gradient where the interface was clipped."""
    for first in range(0, size, block):
        j = first + tl.arange(0, block)
        raw = load_row(row, j, size)
        clipped = (raw >= bound) | (raw <= -bound)
        store_row(d_row, j, tl.where(clipped, 0.0, load_row(d_row, j, size)), size)


@kernel
def controller_forward(
    gates: tl.tensor, cells: tl.tensor, hidden: tl.tensor, interface: tl.tensor, recurrent: tl.tensor,
    weight: tl.tensor, bias: tl.tensor, s: tl.constexpr,
) -> None:  # fmt: skip
    """h_t, c_t and the clipped interface of one step; `cells` and `hidden` point at t, the rows of t+1 follow.

    `s` has `hidden`, `reading` (R·W), `interface`, `lstm`, `clip` and `block`.
    """
    after = hidden + s.hidden + s.reading
    if s.lstm:
        product(gates, gates, recurrent, hidden, 4 * s.hidden, s.hidden + s.reading, s.block)
        tl.debug_barrier()
        lstm_forward(gates, cells, cells + s.hidden, after, s.hidden, s.block)
    else:
        product(gates, gates, recurrent, hidden + s.hidden, s.hidden, s.reading, s.block)
        tl.debug_barrier()
        tanh_forward(gates, after, s.hidden, s.block)
    tl.debug_barrier()
    product(interface, bias, weight, after, s.interface, s.hidden, s.block)
    tl.debug_barrier()
    clip_row(interface, s.interface, s.clip, s.block)
    tl.debug_barrier()


@kernel
def controller_backward(
    gates: tl.tensor, cells: tl.tensor, hidden: tl.tensor, d_interface: tl.tensor, d_hidden: tl.tensor,
    d_cells: tl.tensor, d_gates: tl.tensor, recurrent: tl.tensor, weight: tl.tensor, s: tl.constexpr,
) -> None:  # fmt: skip
    """From the interface's gradient to that of [h_{t-1} ; r_{t-1}] in `d_hidden`; arguments as in the forward step."""
    after = hidden + s.hidden + s.reading
    transposed_product(d_hidden, weight, d_interface, s.interface, s.hidden, True, s.block)
    tl.debug_barrier()
    if s.lstm:
        lstm_backward(gates, cells, cells + s.hidden, d_hidden, d_cells, d_gates, s.hidden, s.block)
        tl.debug_barrier()
        transposed_product(d_hidden, recurrent, d_gates, 4 * s.hidden, s.hidden + s.reading, False, s.block)
    else:
        tanh_backward(after, d_hidden, d_gates, s.hidden, s.block)
        tl.debug_barrier()
        clear_row(d_hidden, s.hidden, s.block)
        transposed_product(d_hidden + s.hidden, recurrent, d_gates, s.hidden, s.reading, False, s.block)
    tl.debug_barrier()


@kernel
def inverse_norms(memory: tl.tensor) -> tl.tensor:
    """1 / sqrt(Σ_q M[n, q]² + 1e-12): the floor lies inside the root, so that the gradient at zero is finite."""
    return 1.0 / tl.sqrt(tl.sum(memory * memory, 1) + 1e-12)


@kernel
def cosines(memory: tl.tensor, inverse: tl.tensor, key: tl.tensor) -> tl.tensor:
    """Cosines of `key` with every slot, and the key's inverse norm."""
    norm = 1.0 / tl.sqrt(tl.sum(key * key, 0) + 1e-12)
    return tl.sum(memory * (key * norm)[None, :], 1) * inverse, norm


@kernel
def content_backward(
    memory: tl.tensor, inverse: tl.tensor, scores: tl.tensor, key: tl.tensor, norm: tl.tensor, strength: tl.tensor,
    weighting: tl.tensor, gradient: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Gradients of memory, key and strength through softmax(strength · cosines)."""
    slopes = weighting * (gradient - tl.sum(gradient * weighting, 0))
    d_strength = tl.sum(slopes * scores, 0)
    terms = strength * slopes * inverse
    curvature = terms * scores * inverse
    unit = key * norm
    d_memory = terms[:, None] * unit[None, :] - curvature[:, None] * memory
    along_key = strength * d_strength
    d_key = (tl.sum(terms[:, None] * memory, 0) - along_key * unit) * norm
    return d_memory, d_key, d_strength


@kernel
def read(memory: tl.tensor, weighting: tl.tensor) -> tl.tensor:
    """r = M^T w."""
    return tl.sum(memory * weighting[:, None], 0)


@kernel
def kept(
    weightings: tl.tensor, erases: tl.tensor, slot: tl.tensor, word: tl.tensor, skip: tl.tensor, stride: tl.constexpr,
    heads: tl.constexpr, slots: tl.constexpr, width: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Π_i (1 − w_i e_i) over the write heads but `skip`, a tile; `stride` is from one raw erase vector to the next."""
    keep = tl.full([slot.shape[0], word.shape[0]], 1.0, tl.float32)
    for i in range(heads):
        w = load_row(weightings + i * slots, slot, slots)
        w = tl.where(i == skip, 0.0, w)
        keep *= 1.0 - w[:, None] * sigmoid(load_row(erases + i * stride, word, width))[None, :]
    return keep
