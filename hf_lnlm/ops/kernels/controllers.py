"""Compiled controllers for whole-sequence loops: a long short-term memory cell and a feed-forward layer.

Buffers keep one row a sample and step: `gates` (B, T, 4H or H), `cells` (B, T+1, H), `hidden` (B, T+1, H+R·W) = [h_t ;
r_t]. Gate order is torch's: input, forget, candidate, output.

Complexity: O(H) a sample and step beside the matrix products.
"""

from typing import Any

from .compiled import inner
from .products import add_product
from .rows import ONE, ZERO, apply_tanh, copy_row, fill_row, sigmoid_in_place, tanh, tanh_in_place


@inner
def _cell(gate_in: Any, forget: Any, candidate: Any, before: Any, after: Any) -> None:
    """c_t = f ∘ c_{t-1} + i ∘ g."""
    for j in range(before.shape[0]):
        after[j] = forget[j] * before[j] + gate_in[j] * candidate[j]


@inner
def _emit(gate_out: Any, cell: Any, hidden: Any) -> None:
    """h_t = o ∘ tanh(c_t)."""
    for j in range(cell.shape[0]):
        hidden[j] = gate_out[j] * tanh(cell[j])


@inner
def lstm_forward(gates: Any, before: Any, after: Any, hidden: Any) -> None:
    """One cell; `gates` (4H,) holds the pre-activations and is overwritten with the activations."""
    size = before.shape[0]
    sigmoid_in_place(gates[: 2 * size])
    tanh_in_place(gates[2 * size : 3 * size])
    sigmoid_in_place(gates[3 * size :])
    _cell(gates[:size], gates[size : 2 * size], gates[2 * size : 3 * size], before, after)
    _emit(gates[3 * size :], after, hidden[:size])


@inner
def _emit_backward(gate_out: Any, cell: Any, d_hidden: Any, d_cell: Any, d_out: Any) -> None:
    """Through h = o ∘ tanh(c): adds to `d_cell`, sets the output gate's pre-activation gradient."""
    for j in range(cell.shape[0]):
        t = tanh(cell[j])
        o = gate_out[j]
        d_out[j] = d_hidden[j] * t * o * (ONE - o)
        d_cell[j] += d_hidden[j] * o * (ONE - t * t)


@inner
def _product_backward(gate: Any, other: Any, d_cell: Any, out: Any) -> None:
    """Gradient of a logistic gate that multiplies `other` in the cell."""
    for j in range(gate.shape[0]):
        out[j] = d_cell[j] * other[j] * gate[j] * (ONE - gate[j])


@inner
def _candidate_backward(gate_in: Any, candidate: Any, d_cell: Any, out: Any) -> None:
    """Gradient of the candidate's pre-activation."""
    for j in range(candidate.shape[0]):
        out[j] = d_cell[j] * gate_in[j] * (ONE - candidate[j] * candidate[j])


@inner
def _cell_backward(forget: Any, d_cell: Any) -> None:
    """d(c_{t-1}) = f ∘ d(c_t)."""
    for j in range(forget.shape[0]):
        d_cell[j] *= forget[j]


@inner
def lstm_backward(gates: Any, before: Any, after: Any, d_hidden: Any, d_cell: Any, d_gates: Any) -> None:
    """One cell backward: `d_cell` goes from c_t to c_{t-1}; `d_gates` (4H,) is set."""
    n = before.shape[0]
    gate_in, forget, candidate = gates[:n], gates[n : 2 * n], gates[2 * n : 3 * n]
    _emit_backward(gates[3 * n :], after, d_hidden, d_cell, d_gates[3 * n :])
    _product_backward(gate_in, candidate, d_cell, d_gates[:n])
    _product_backward(forget, before, d_cell, d_gates[n : 2 * n])
    _candidate_backward(gate_in, candidate, d_cell, d_gates[2 * n : 3 * n])
    _cell_backward(forget, d_cell)


@inner
def _feedforward_backward(hidden: Any, d_hidden: Any, d_gates: Any) -> None:
    """Through h = tanh(z)."""
    for j in range(d_gates.shape[0]):
        d_gates[j] = d_hidden[j] * (ONE - hidden[j] * hidden[j])


@inner
def controller_forward(
    sizes: Any, history: Any, t: Any, recurrent: Any, interface: Any, bias: Any, first: Any, last: Any
) -> None:
    """Step `t` of the controller for the samples first ≤ b < last, and the raw interface that it puts out.

    `history.gates` holds the projected inputs; `recurrent` and `interface` are the transposed weights as `add_product`
    reads them.
    """
    gates, cells, hidden, raw = history.gates, history.cells, history.hidden, history.interface
    skip = 0 if sizes.lstm else sizes.hidden
    add_product(sizes.tiled, gates, t, 0, gates.shape[2], hidden, t, skip, recurrent, first, last)
    for b in range(first, last):
        if sizes.lstm:
            lstm_forward(gates[b, t], cells[b, t], cells[b, t + 1], hidden[b, t + 1])
        else:
            apply_tanh(gates[b, t], hidden[b, t + 1, : sizes.hidden])
        copy_row(bias, raw[b, t])
    add_product(sizes.tiled, raw, t, 0, raw.shape[2], hidden, t + 1, 0, interface, first, last)


@inner
def controller_backward(
    sizes: Any, history: Any, gradients: Any, mask: Any, t: Any, recurrent: Any, interface: Any, first: Any, last: Any
) -> None:
    """From the interface's gradient through the controller to the gradient of [h ; r] of the step before.

    `recurrent` (G, ·) and `interface` (I, H) are the weights as `add_product` reads them.
    """
    out, d_gates, size = gradients.hidden, gradients.gates, sizes.hidden
    add_product(sizes.tiled, out, 0, 0, size, gradients.interface, t, 0, interface, first, last)
    for b in range(first, last):
        if mask[b, t] != 0:
            gates, cells, d_hidden = history.gates[b, t], history.cells[b], out[b, 0]
            if sizes.lstm:
                lstm_backward(gates, cells[t], cells[t + 1], d_hidden, gradients.cells[b], d_gates[b, t])
            else:
                _feedforward_backward(history.hidden[b, t + 1], d_hidden, d_gates[b, t])
            fill_row(d_hidden, ZERO)
    skip = 0 if sizes.lstm else size
    add_product(sizes.tiled, out, 0, skip, out.shape[2] - skip, d_gates, t, 0, recurrent, first, last)
