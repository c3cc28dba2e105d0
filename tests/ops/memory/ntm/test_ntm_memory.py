"""The Turing machine's operation: equations by hand, every backend against the reference, and the numerical pitfalls."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.memory.ntm import ntm_memory
from hf_lnlm.ops.memory.ntm.layout import NTMOptions, NTMState
from hf_lnlm.ops.memory.ntm.reference import (
    circular_shift,
    cosine,
    memory_step,
    ntm_memory_reference,
    sharpen,
    write,
)

from .cases import NAMES, gradients, layer, relative

FAST = ("eager", "cpu")
HEADS = [(1, 1), (2, 1), (1, 2), (4, 4)]
SHAPES = [{"batch": 1, "steps": 1, "slots": 7, "width": 3}, {"batch": 5, "steps": 9, "slots": 13, "width": 5}]


def assert_equal(result, expected, got, wanted):
    found, known = ((*r.state, r.outputs, r.weightings) for r in (result, expected))
    assert max(relative(one, other) for one, other in zip(found, known, strict=True)) <= 1e-5
    errors = {name: relative(one, other) for name, one, other in zip(NAMES, got, wanted, strict=True)}
    assert not {name: error for name, error in errors.items() if error > 5e-5}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=("one", "odd"))
@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_backends_equal_the_reference(heads, controller, shape, backend):
    for read_first, shift, masked in ((True, 1, False), (False, 2, True), (True, 0, True)):
        options = NTMOptions(*heads, shift, controller, read_first)
        mask = torch.rand(shape["batch"], shape["steps"], generator=torch.Generator().manual_seed(3)) < 0.6
        mask = mask if masked else None
        expected, wanted = gradients(ntm_memory_reference, layer(options, **shape), options, mask)
        arguments = layer(options, **shape, dtype=torch.float32)
        result, got = gradients(ntm_memory, arguments, options, mask, backend=backend)
        assert_equal(result, expected, got, wanted)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_a_sequence_in_pieces_gives_the_same(backend):
    options = NTMOptions(1, 2)
    inputs, weights, state = layer(options, steps=9, dtype=torch.float32)
    whole = ntm_memory(inputs, weights, state, options, backend=backend)
    for cut in (1, 4, 8):
        first = ntm_memory(inputs[:, :cut], weights, state, options, backend=backend)
        second = ntm_memory(inputs[:, cut:], weights, first.state, options, backend=backend)
        assert relative(torch.cat([first.outputs, second.outputs], 1), whole.outputs) < 1e-5
        assert relative(second.state.memory, whole.state.memory) < 1e-5


@pytest.mark.parametrize("backend", FAST)
def test_long_sequences_without_gradients_run_in_blocks(backend):
    options = NTMOptions()
    inputs, weights, state = layer(options, batch=1, steps=300, dtype=torch.float32)
    with torch.no_grad():
        fast = ntm_memory(inputs, weights, state, options, backend=backend)
        slow = ntm_memory_reference(
            inputs.double(), *[type(t)(*[x.double() for x in t]) for t in (weights, state)], options
        )
    assert relative(fast.outputs, slow.outputs) < 1e-4
    assert (fast.weightings.sum(-1) - 1).abs().max() < 1e-5


def test_gradients_of_the_reference_are_derivatives():
    options = NTMOptions(1, 2)
    inputs, weights, state = layer(options, batch=1, steps=3, features=2, hidden=3, slots=5, width=3)
    leaves = [inputs, *weights, *state]

    def run(*tensors):
        result = ntm_memory_reference(tensors[0], type(weights)(*tensors[1:6]), NTMState(*tensors[6:]), options)
        return result.outputs, result.state.memory, result.state.weightings

    assert torch.autograd.gradcheck(run, leaves, atol=1e-6)


def test_a_second_derivative_raises():
    options = NTMOptions()
    inputs, weights, state = layer(options, dtype=torch.float32)
    result = ntm_memory(inputs, weights, state, options, backend="cpu")
    (first,) = torch.autograd.grad(result.outputs.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_backward_twice_gives_the_same():
    options = NTMOptions()
    inputs, weights, state = layer(options, dtype=torch.float32)
    loss = ntm_memory(inputs, weights, state, options, backend="cpu").outputs.sum()
    once = torch.autograd.grad(loss, list(weights), retain_graph=True)
    again = torch.autograd.grad(loss, list(weights))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_tiny_numbers_are_flushed_inside_the_loops_only():
    options = NTMOptions()
    result = ntm_memory(*layer(options, dtype=torch.float32), options, backend="cpu")
    result.outputs.sum().backward()
    assert float(torch.tensor([1e-30]) * torch.tensor([1e-10])) > 0


def test_the_given_state_is_left_alone():
    options = NTMOptions()
    inputs, weights, state = layer(options, dtype=torch.float32)
    before = [tensor.detach().clone() for tensor in state]
    ntm_memory(inputs, weights, state, options, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_a_shift_by_one_wraps_around():
    weighting = torch.eye(4)[3:]
    forward, backward = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert circular_shift(weighting, forward).argmax() == 0
    assert circular_shift(torch.eye(4)[:1], backward).argmax() == 3
    assert torch.equal(circular_shift(weighting, torch.tensor([[0.0, 1.0, 0.0]])), weighting)


def test_sharpening():
    weighting = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(sharpen(weighting, torch.tensor([[1.0]])), weighting, atol=1e-9, rtol=0)
    squared = torch.tensor([[0.01, 0.04, 0.49]], dtype=torch.float64) / 0.54
    torch.testing.assert_close(sharpen(weighting, torch.tensor([[2.0]])), squared, atol=1e-9, rtol=0)


def test_several_heads_erase_before_any_adds():
    memory = torch.full((1, 2, 1), 5.0, dtype=torch.float64)
    weightings = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    everything, nothing = 60.0, -60.0  # erase vectors before the logistic function
    vectors = torch.tensor([[[[nothing], [2.0]], [[everything], [0.0]]]], dtype=torch.float64)
    after = write(memory, weightings, vectors)
    torch.testing.assert_close(
        after[0, :, 0], torch.tensor([torch.tensor(2.0).tanh().item(), 5.0], dtype=torch.float64)
    )


def test_a_copy_by_hand():
    """A head that looks for a slot's content and moves one on reads the next slot."""
    options = NTMOptions()
    memory = torch.eye(4, dtype=torch.float64)[None]
    state = NTMState(
        *[torch.zeros(1, n, dtype=torch.float64) for n in (1, 1, 4)], torch.full((1, 2, 4), 0.25).double(), memory
    )
    head = torch.tensor([9.0, 0, 0, 0, 20.0, 20.0, 20.0, -20.0, -20.0, 20.0], dtype=torch.float64)
    interface = torch.cat([head, head, torch.full((4,), -20.0), torch.zeros(4)]).double()[None]
    after = memory_step(interface, state, options)
    torch.testing.assert_close(after.reads[0], torch.tensor([0, 1.0, 0, 0], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.memory, memory, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_sharpening_never_underflows(backend):
    """A uniform weighting to the power 21 is 128**-21 a slot: zero in float32, but a distribution all the same."""
    options = NTMOptions()
    inputs, weights, state = layer(options, slots=128, width=4, dtype=torch.float32)
    bias = torch.zeros_like(weights.interface_bias)
    bias[6] = bias[6 + 10] = 20.0  # sharpening of both heads
    weights = weights._replace(interface=torch.zeros_like(weights.interface), interface_bias=bias)
    state = state._replace(weightings=torch.full_like(state.weightings, 1 / 128))
    result = ntm_memory(inputs, weights, state, options, backend=backend)
    torch.testing.assert_close(result.weightings.sum(-1), torch.ones(3, 6, 2), atol=1e-5, rtol=0)


def test_cosine_at_zero_has_finite_gradients():
    key, memory = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 4, 3, requires_grad=True)
    cosine(key, memory).sum().backward()
    assert key.grad.isfinite().all() and memory.grad.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_inputs_stay_finite(backend, scale):
    options = NTMOptions(2, 2)
    inputs, weights, state = layer(options, steps=20, dtype=torch.float32)
    state = state._replace(memory=torch.zeros_like(state.memory))
    result = ntm_memory(inputs * scale, weights, state, options, backend=backend)
    grads = torch.autograd.grad(result.outputs.sum(), list(weights))
    assert all(tensor.isfinite().all() for tensor in (result.outputs, *result.state, *grads))


@pytest.mark.parametrize("backend", FAST)
def test_nan_is_passed_on(backend):
    options = NTMOptions()
    inputs, weights, state = layer(options, dtype=torch.float32)
    poisoned = inputs.detach().clone()
    poisoned[0, 2] = float("nan")
    result = ntm_memory(poisoned, weights, state, options, backend=backend)
    assert result.outputs[0, 2:].isnan().all() and result.outputs[1:].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_what_is_masked_does_not_matter(backend):
    options = NTMOptions()
    inputs, weights, state = layer(options, dtype=torch.float32)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    poisoned = inputs.detach().masked_fill(~mask[..., None], float("nan"))
    result = ntm_memory(poisoned, weights, state, options, mask, backend=backend)
    clean = ntm_memory(inputs, weights, state, options, mask, backend=backend)
    assert torch.equal(result.outputs, clean.outputs)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(result.state, state, strict=True))
    grads = torch.autograd.grad(result.outputs.sum(), list(weights))
    assert all(gradient.isfinite().all() for gradient in grads)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x, w, s: (x[:, :0], w, s), "inputs"),
        (lambda x, w, s: (x, w._replace(recurrent=w.recurrent[:, 1:]), s), "weights.recurrent"),
        (lambda x, w, s: (x, w, s._replace(memory=s.memory[:2])), "state.memory"),
        (lambda x, w, s: (x, w, s._replace(weightings=s.weightings[:, :1])), "state.weightings"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, name):
    options = NTMOptions()
    with pytest.raises(ValueError, match=name):
        ntm_memory(*change(*layer(options)), options)


def test_a_backend_that_cannot_run_is_refused():
    options = NTMOptions()
    with pytest.raises(ValueError, match="backend"):
        ntm_memory(*layer(options), options, backend="gpu")
