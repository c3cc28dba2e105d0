"""LSTM with projection and clipping: a step by hand, nn.LSTM where nothing is clipped, eager against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_lnlm.ops.projected_lstm import projected_lstm
from hf_lnlm.ops.projected_lstm.reference import projected_lstm_cell, projected_lstm_traced

INPUT, CELLS, WIDTH = 5, 6, 3
SIZES = [4, 4, 3, 1]
CLIPS = [(None, None), (0.5, 0.7), (3.0, 3.0)]


def double(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def drawn(seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    shapes = [(sum(SIZES), INPUT), (4, WIDTH), (4, CELLS)]
    shapes += [(4 * CELLS, INPUT), (4 * CELLS,), (4 * CELLS, WIDTH), (WIDTH, CELLS)]
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("clips", [(None, None), (1.5, 0.2)])
def test_a_step_by_hand(clips):
    # One cell, h = 0.5, c = 2; the input's share of i, f, g, o is 0, 1, 0.5, -1; recurrent weights 2, 0, 1, 0; W_p = 3.
    #   i: sigmoid(0 + 2·0.5), f: sigmoid(1), g: tanh(0.5 + 0.5), o: sigmoid(-1)
    #   c' = i·g + f·2 = 2.018887098406, over 1.5; h' = 3·o·tanh(c') = 0.778..., over 0.2
    gates, recurrent = double([[0.0, 1.0, 0.5, -1.0]]), double([[2.0], [0.0], [1.0], [0.0]])
    h, c = projected_lstm_cell(gates, double([[0.5]]), double([[2.0]]), recurrent, double([[3.0]]), clips)
    cell = sigmoid(1) * math.tanh(1) + sigmoid(1) * 2
    cell = min(cell, clips[0] or math.inf)
    assert c.item() == pytest.approx(cell, abs=1e-12)
    assert h.item() == pytest.approx(min(3 * sigmoid(-1) * math.tanh(cell), clips[1] or math.inf), abs=1e-12)


def test_without_clipping_it_is_nn_lstm_with_a_projection():
    torch.manual_seed(1)
    stock = nn.LSTM(INPUT, CELLS, proj_size=WIDTH, batch_first=True).double()
    words = torch.randn(2, 7, INPUT, dtype=torch.float64)
    weights = (stock.weight_ih_l0, stock.bias_ih_l0 + stock.bias_hh_l0, stock.weight_hh_l0, stock.weight_hr_l0)
    zeros = (words.new_zeros(2, WIDTH), words.new_zeros(2, CELLS))
    wanted, (h, c) = stock(words)
    found, final = projected_lstm(words.mT.permute(2, 0, 1).reshape(14, INPUT), [2] * 7, zeros, weights, (None, None))
    torch.testing.assert_close(found.view(7, 2, WIDTH).transpose(0, 1), wanted)
    torch.testing.assert_close(final, (h[0], c[0]))


@pytest.mark.parametrize("clips", CLIPS)
def test_eager_is_the_reference_in_outputs_states_and_gradients(clips):
    found = []
    for backend in ("reference", "eager"):
        tokens, h, c, *weights = (tensor.requires_grad_() for tensor in drawn())
        outputs, final = projected_lstm(tokens, SIZES, (h, c), tuple(weights), clips, backend)
        (outputs.sin().sum() + final[0].square().sum() + final[1].cos().sum()).backward()
        with torch.no_grad():
            again, _ = projected_lstm(tokens, SIZES, (h, c), tuple(weights), clips, backend)
        torch.testing.assert_close(again, outputs)
        found.append([outputs, *final, *(tensor.grad for tensor in (tokens, h, c, *weights))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_clipping_counts_here():
    tokens, h, c, *weights = drawn()
    free, _ = projected_lstm(tokens, SIZES, (h, c), tuple(weights), (None, None))
    clipped, final = projected_lstm(tokens, SIZES, (h, c), tuple(weights), (0.5, 0.7))
    assert (free - clipped).abs().max() > 0.1
    assert clipped.abs().max() == 0.7 and final[1].abs().max() <= c.abs().max()


def test_padded_rows_as_a_tracer_sees_them_are_the_same():
    tokens, h, c, *weights = drawn()
    wanted, final = projected_lstm(tokens, SIZES, (h, c), tuple(weights), (0.5, 0.7))
    mask = torch.tensor([[row < size for size in SIZES] for row in range(4)])
    padded, places = torch.randn(4, 4, INPUT, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.long)
    offset = 0
    for step, size in enumerate(SIZES):
        padded[:size, step] = tokens[offset : offset + size]
        places[:size, step] = torch.arange(offset, offset + size)
        offset += size
    found, ended = projected_lstm_traced(padded, mask, (h, c), tuple(weights), (0.5, 0.7))
    torch.testing.assert_close(found[mask], wanted[places[mask]])
    torch.testing.assert_close(ended, final)


def test_no_words_leave_the_state():
    tokens, h, c, *weights = drawn()
    outputs, final = projected_lstm(tokens[:0], [], (h, c), tuple(weights), (3.0, 3.0))
    assert outputs.shape == (0, WIDTH) and final == (h, c)
