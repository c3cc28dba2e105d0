"""LSTM and GRU: worked by hand, against torch's own modules, and eager against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_lnlm.ops.recurrence import NUM_GATES, STATES, recurrence, recurrence_blocks
from hf_lnlm.ops.recurrence.eager import recurrence_eager
from hf_lnlm.ops.recurrence.reference import gru_cell, lstm_cell, recurrence_reference

CELLS = ("lstm", "gru")


def double(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_lstm_step_by_hand():
    # One input, one unit: x = 1, h = 0.5, c = 2; W_ih = (0, 1, 0.5, -1), W_hh = (2, 0, 1, 0), b = 0 for i, f, g, o.
    #   i: 0·1 + 2·0.5 = 1      sigmoid 0.731058578630
    #   f: 1·1 + 0·0.5 = 1      sigmoid 0.731058578630
    #   g: 0.5·1 + 1·0.5 = 1    tanh    0.761594155956
    #   o: -1·1 + 0·0.5 = -1    sigmoid 0.268941421370
    #   c' = 0.731058578630·2 + 0.731058578630·0.761594155956 = 1.462117157260 + 0.556769941146 = 2.018887098406
    #   h' = 0.268941421370·tanh(2.018887098406) = 0.268941421370·0.965321...
    weights = (double([[0.0], [1.0], [0.5], [-1.0]]), double([[2.0], [0.0], [1.0], [0.0]]), None, None)
    states = (double([[0.5]]), double([[2.0]]))
    outputs, (h, c) = recurrence_reference("lstm", double([[[1.0]]]), states, weights)
    assert c.item() == pytest.approx(2.018887098406, abs=1e-11)
    assert h.item() == pytest.approx(0.268941421370 * math.tanh(2.018887098406), abs=1e-11)
    assert h.item() == pytest.approx(0.25961, abs=1e-5)
    assert outputs.item() == h.item()


def test_gru_step_by_hand():
    # x = 1, h = 2; W_ih = (0, -2, 1), W_hh = (0, 0.5, 1), b_ih = 0, b_hh = (0, 0, 0.5) for r, z, n.
    #   r: 0 + 0 = 0             sigmoid 0.5
    #   z: -2 + 1 = -1           sigmoid 0.268941421370
    #   n: 1 + r·(1·2 + 0.5) = 1 + 0.5·2.5 = 2.25   tanh 0.978026114714   (reset after the product, bias inside)
    #   h' = (1 - z)·n + z·h = 0.731058578630·0.978026114714 + 0.268941421370·2 = 0.714994381 + 0.537882843 = 1.252877224
    # Resetting the state before the product would give n = tanh(1 + (0.5·2) + 0.5) = tanh(2.5) and 1.2591...
    weights = (double([[0.0], [-2.0], [1.0]]), double([[0.0], [0.5], [1.0]]), double([0, 0, 0]), double([0, 0, 0.5]))
    _, (h,) = recurrence_reference("gru", double([[[1.0]]]), (double([[2.0]]),), weights)
    assert h.item() == pytest.approx(0.731058578630 * math.tanh(2.25) + 0.268941421370 * 2, abs=1e-11)
    assert h.item() == pytest.approx(1.252877, abs=1e-6)


def test_two_lstm_steps_by_hand():
    # All weights zero, b_f = 0, b_g = atanh(0.5), the others so that i = o = 1/2: the cell is a leaky sum.
    #   c_1 = 0.5·0 + 0.5·0.5 = 0.25, c_2 = 0.5·0.25 + 0.5·0.5 = 0.375, h_2 = 0.5·tanh(0.375) = 0.179178599...
    bias = double([0, 0, math.atanh(0.5), 0])
    weights = (torch.zeros(4, 1).double(), torch.zeros(4, 1).double(), bias, torch.zeros(4).double())
    outputs, (h, c) = recurrence_reference(
        "lstm", torch.ones(1, 2, 1).double(), (torch.zeros(1, 1).double(),) * 2, weights
    )
    assert c.item() == pytest.approx(0.375, abs=1e-15)
    assert outputs[0, :, 0].tolist() == pytest.approx([0.5 * math.tanh(0.25), 0.5 * math.tanh(0.375)], abs=1e-15)
    assert h.item() == outputs[0, 1, 0].item()


def problem(
    cell: str, batch: int = 3, length: int = 6, inputs: int = 5, hidden: int = 4, dtype=torch.float64, bias=True
):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    gates = NUM_GATES[cell] * hidden
    weights = (draw(gates, inputs), draw(gates, hidden), draw(gates) if bias else None, draw(gates) if bias else None)
    states = tuple(draw(batch, hidden) for _ in STATES[cell])
    return draw(batch, length, inputs), states, weights


def gradients(loss: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def weighted(outputs: torch.Tensor, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A loss that every output and final state takes part in, each with another weight."""
    parts = [outputs.flatten(), *(state.flatten() for state in states)]
    return sum((part * torch.linspace(0.5, 1.5, part.numel(), dtype=part.dtype)).sum() for part in parts)


def compare(one, other, leaves, tolerance):
    for found, wanted in ((one, other),):
        torch.testing.assert_close(found[0], wanted[0], **tolerance)
        for a, b in zip(found[1], wanted[1], strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        pairs = zip(gradients(weighted(*found), leaves), gradients(weighted(*wanted), leaves), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, **tolerance)


TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SINGLE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.core
def test_eager_is_the_reference(cell, bias):
    inputs, states, weights = problem(cell, bias=bias)
    leaves = [inputs, *states, *(w for w in weights if w is not None)]
    one = recurrence_eager(cell, inputs, states, weights)
    compare(one, recurrence_reference(cell, inputs, states, weights), leaves, TIGHT)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("lengths", [[6, 4, 1], [6, 6, 6], [5, 3, 3]], ids=str)
@pytest.mark.parametrize("stepwise", [False, True], ids=["blocks", "stepwise"])
@pytest.mark.core
def test_blocks_are_the_reference(cell, backend, lengths, stepwise):
    """Rows of unequal lengths, longest first, in rectangles or step by step, against the masked loop."""
    inputs, states, weights = problem(cell)
    leaves = [inputs, *states, *weights]
    bounds = list(range(1, lengths[0] + 1)) if stepwise else sorted(set(lengths))
    sizes, tokens, start = [], [], 0
    for bound in bounds:
        rows = sum(length > start for length in lengths)
        sizes.append((rows, bound - start))
        tokens.append(inputs[:rows, start:bound].flatten(0, 1))
        start = bound
    batch_sizes = torch.tensor([rows for rows, _ in sizes]) if stepwise else None
    flat, final = recurrence_blocks(cell, torch.cat(tokens), tuple(sizes), batch_sizes, states, weights, backend)
    assert not flat[-1].any(), "the row that masked positions read"
    outputs, start, offset = torch.zeros(3, 6, 4).double(), 0, 0
    for rows, steps in sizes:
        block = flat[offset : offset + rows * steps].view(rows, steps, -1)
        outputs = outputs.clone()
        outputs[:rows, start : start + steps] = block
        start, offset = start + steps, offset + rows * steps
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    wanted, states_after = recurrence_reference(cell, inputs, states, weights, mask=mask)
    compare((outputs, final), (wanted * mask[..., None], states_after), leaves, TIGHT)


@pytest.mark.parametrize("cell", CELLS)
def test_single_precision_is_close_to_double(cell):
    inputs, states, weights = problem(cell)
    wanted = recurrence_reference(cell, inputs, states, weights)
    narrow = [t.detach().float() for t in (inputs, *states, *weights)]
    found = recurrence(cell, narrow[0], tuple(narrow[1 : 1 + len(states)]), tuple(narrow[1 + len(states) :]))
    torch.testing.assert_close(found[0].double(), wanted[0].detach(), **SINGLE)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a.double(), b.detach(), **SINGLE)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_equals_the_module_of_torch(cell, backend):
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](5, 4, batch_first=True).double()
    inputs, states, _ = problem(cell)
    weights = tuple(getattr(module, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = tuple(state.unsqueeze(0) for state in states)
    outputs, final = module(inputs, hidden if cell == "lstm" else hidden[0])
    final = tuple(f[0] for f in final) if cell == "lstm" else (final[0],)
    compare(recurrence(cell, inputs, states, weights, backend=backend), (outputs, final), [inputs, *weights], TIGHT)


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_without_gradients_is_the_same(cell):
    inputs, states, weights = problem(cell, length=1)
    wanted = recurrence_reference(cell, inputs, states, weights)
    with torch.no_grad():
        outputs, final = recurrence_eager(cell, inputs, states, weights)
    torch.testing.assert_close(outputs, wanted[0].detach(), **TIGHT)
    for a, b in zip(final, wanted[1], strict=True):
        torch.testing.assert_close(a, b.detach(), **TIGHT)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    inputs, states, weights = problem(cell, batch=2, length=3, inputs=2, hidden=2)
    leaves = (inputs, *states, *weights)

    def run(*tensors: torch.Tensor):
        count = len(states)
        outputs, final = recurrence_reference(cell, tensors[0], tensors[1 : 1 + count], tensors[1 + count :])
        return outputs, *final

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_pieces_equal_the_whole(cell, backend):
    inputs, states, weights = problem(cell, length=9)
    leaves = [inputs, *states, *weights]
    pieces, carried = [], states
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        outputs, carried = recurrence(cell, inputs[:, start:stop], carried, weights, backend=backend)
        pieces.append(outputs)
    compare((torch.cat(pieces, 1), carried), recurrence(cell, inputs, states, weights, backend=backend), leaves, TIGHT)


@pytest.mark.parametrize("cell", CELLS)
@settings(max_examples=40)
@given(data=st.data())
def test_masked_and_started_steps(cell, data):
    """The reference with a mask and document starts equals each document by itself."""
    length = data.draw(st.integers(1, 7))
    mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    starts = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    inputs, states, weights = problem(cell, batch=1, length=length)
    given_mask, given_starts = torch.tensor([mask]), torch.tensor([starts]) & torch.tensor([mask])
    outputs, final = recurrence_reference(cell, inputs, states, weights, mask=given_mask, starts=given_starts)
    current = states
    for t in range(length):
        if not mask[t]:
            continue
        if starts[t]:
            current = tuple(torch.zeros_like(state) for state in states)
        step, current = recurrence_reference(cell, inputs[:, t : t + 1], current, weights)
        torch.testing.assert_close(outputs[:, t], step[:, 0], **TIGHT)
    for a, b in zip(final, current, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("cell", CELLS)
def test_no_rows(cell):
    _, _, weights = problem(cell)
    states = tuple(torch.zeros(0, 4).double() for _ in STATES[cell])
    flat, final = recurrence_blocks(cell, torch.zeros(0, 5).double(), (), None, states, weights)
    assert flat.tolist() == [[0.0] * 4]
    assert all(state.shape == (0, 4) for state in final)


def test_backends_that_do_not_exist_are_refused():
    inputs, states, weights = problem("gru")
    for wanted in ("cpu", "gpu", "cuda"):
        with pytest.raises(ValueError, match=f"reference, eager, got '{wanted}'"):
            recurrence("gru", inputs, states, weights, backend=wanted)


def test_cells_are_the_equations_of_the_loop():
    inputs, (h, c), (w_ih, w_hh, b_ih, b_hh) = problem("lstm", length=1)
    gates = nn.functional.linear(inputs[:, 0], w_ih, b_ih)
    torch.testing.assert_close(
        lstm_cell(gates, h, c, w_hh, b_hh), torch.lstm_cell(inputs[:, 0], (h, c), w_ih, w_hh, b_ih, b_hh)
    )
    inputs, (h,), (w_ih, w_hh, b_ih, b_hh) = problem("gru", length=1)
    gates = nn.functional.linear(inputs[:, 0], w_ih, b_ih)
    torch.testing.assert_close(gru_cell(gates, h, w_hh, b_hh), torch.gru_cell(inputs[:, 0], h, w_ih, w_hh, b_ih, b_hh))
