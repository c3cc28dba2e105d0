"""The neural computer's operation: equations by hand, every backend against the reference, and the numerical pitfalls."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.memory.dnc import dnc_memory
from hf_lnlm.ops.memory.dnc.layout import DNCAddressing, DNCOptions, DNCState, num_interface
from hf_lnlm.ops.memory.dnc.reference import allocation, content, dnc_memory_reference, next_links, next_usage

from ..ntm.cases import gradients, relative
from .cases import NAMES, empty, layer

FAST = ("eager", "cpu")
HEADS = [(1, 1), (2, 1), (1, 2), (4, 4)]
SHAPES = [{"batch": 1, "steps": 1, "slots": 7, "width": 3}, {"batch": 5, "steps": 9, "slots": 13, "width": 5}]
EXTRAS = {
    "plain": {},
    "slim": {"temporal_links": False},
    "masking": {"masking": True, "mask_min": 0.1},
    "deallocation": {"deallocation": True},
    "all": {"masking": True, "deallocation": True, "sharpness": True},
    "slim_masking": {"temporal_links": False, "masking": True, "deallocation": True},
}


def assert_equal(result, expected, got, wanted):
    pairs = zip((result.outputs, *result.state), (expected.outputs, *expected.state), strict=True)
    assert max(relative(one, other) for one, other in pairs) <= 1e-5
    looks = zip(DNCAddressing._fields, result.addressing, expected.addressing, strict=True)
    assert not [name for name, one, other in looks if relative(one, other) > 1e-5]
    errors = {name: relative(one, other) for name, one, other in zip(NAMES, got, wanted, strict=True)}
    assert not {name: error for name, error in errors.items() if error > 5e-5}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=("one", "odd"))
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_backends_equal_the_reference(heads, extras, shape, backend):
    if backend == "cpu" and EXTRAS[extras].get("sharpness"):
        with pytest.raises(ValueError, match="backend"):
            dnc_memory(
                *layer(DNCOptions(*heads, **EXTRAS[extras])), DNCOptions(*heads, **EXTRAS[extras]), backend="cpu"
            )
        return
    for controller, masked in (("lstm", False), ("lstm", True), ("feedforward", True)):
        options = DNCOptions(*heads, controller, **EXTRAS[extras])
        mask = torch.rand(shape["batch"], shape["steps"], generator=torch.Generator().manual_seed(3)) < 0.6
        mask = mask if masked else None
        # where two ranks coincide rounding chooses: the seed is one without
        expected, wanted = gradients(dnc_memory_reference, layer(options, **shape, seed=3), options, mask)
        arguments = layer(options, **shape, seed=3, dtype=torch.float32)
        result, got = gradients(dnc_memory, arguments, options, mask, backend=backend)
        assert_equal(result, expected, got, wanted)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_a_sequence_in_pieces_gives_the_same(backend):
    options = DNCOptions(1, 2)
    inputs, weights, state = layer(options, steps=9, dtype=torch.float32)
    whole = dnc_memory(inputs, weights, state, options, backend=backend)
    for cut in (1, 4, 8):
        first = dnc_memory(inputs[:, :cut], weights, state, options, backend=backend)
        second = dnc_memory(inputs[:, cut:], weights, first.state, options, backend=backend)
        assert relative(torch.cat([first.outputs, second.outputs], 1), whole.outputs) < 1e-5
        assert relative(second.state.link, whole.state.link) < 1e-5


@pytest.mark.parametrize("extras", ["plain", "all", "slim_masking"])
def test_gradients_of_the_reference_are_derivatives(extras):
    options = DNCOptions(1, 1, **EXTRAS[extras])
    inputs, weights, state = layer(options, batch=1, steps=3, features=2, hidden=3, slots=5, width=3)
    leaves = [inputs, *weights, *state]

    def run(*tensors):
        result = dnc_memory_reference(tensors[0], type(weights)(*tensors[1:6]), DNCState(*tensors[6:]), options)
        return result.outputs, result.state.memory, result.state.link, result.state.usage

    assert torch.autograd.gradcheck(run, leaves, atol=1e-6)


def test_a_second_derivative_raises():
    options = DNCOptions()
    inputs, weights, state = layer(options, dtype=torch.float32)
    result = dnc_memory(inputs, weights, state, options, backend="cpu")
    (first,) = torch.autograd.grad(result.outputs.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_the_interface_has_the_length_of_the_paper():
    for reads, width in ((1, 20), (4, 64)):
        assert num_interface(DNCOptions(reads), width) == width * reads + 3 * width + 5 * reads + 3


def test_allocation_by_hand():
    found = allocation(torch.tensor([[0.9, 0.1, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[0.005, 0.9, 0.05]], dtype=torch.float64), atol=1e-5, rtol=0)


def test_equal_usage_is_filled_in_order():
    found = allocation(torch.zeros(1, 4, dtype=torch.float64))
    torch.testing.assert_close(found, torch.eye(4, dtype=torch.float64)[:1], atol=2e-6, rtol=0)


def one_hot(slot: int) -> torch.Tensor:
    return torch.eye(3, dtype=torch.float64)[slot].view(1, 1, 3)


def test_links_remember_the_order_of_writes():
    options = DNCOptions()
    state = empty(layer(options, batch=1, slots=3)[2])
    for slot in (2, 0, 1):
        link, precedence = next_links(state, one_hot(slot))
        state = state._replace(link=link, precedence=precedence)
    assert link[0, 0, 0, 2] == link[0, 0, 1, 0] == 1 and link.sum() == 2
    assert torch.equal(link[0, 0] @ one_hot(2)[0, 0], one_hot(0)[0, 0])
    assert torch.equal(link[0, 0] @ one_hot(0)[0, 0], one_hot(1)[0, 0])
    assert torch.equal(link[0, 0].T @ one_hot(1)[0, 0], one_hot(0)[0, 0])


def test_free_gates_release_what_was_read():
    options = DNCOptions()
    state = empty(layer(options, batch=1, slots=3)[2])._replace(
        usage=torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64),
        read_weightings=one_hot(0),
        write_weightings=one_hot(2),
    )
    usage, retention = next_usage(state, torch.ones(1, 1, dtype=torch.float64))
    assert usage.tolist() == [[0.0, 1.0, 1.0]] and retention.tolist() == [[0.0, 1.0, 1.0]]


def test_masks_hide_parts_of_a_word():
    memory = torch.tensor([[[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]]], dtype=torch.float64)
    key, strength = torch.tensor([[1.0, 0.0, -5.0]], dtype=torch.float64), torch.full((1, 1), 30.0, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(content(key, strength, memory, mask), torch.tensor([[1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_ranges_hold_over_long_sequences(backend, scale):
    options = DNCOptions(2, 1)
    inputs, weights, state = layer(options, batch=2, steps=120, slots=16, dtype=torch.float32)
    result = dnc_memory(inputs * scale, weights, empty(state), options, backend=backend)
    found = result.state
    grads = torch.autograd.grad(result.outputs.sum(), list(weights))
    assert all(tensor.isfinite().all() for tensor in (result.outputs, *found, *grads))
    assert found.usage.min() >= -1e-5 and found.usage.max() <= 1 + 1e-5
    assert found.link.min() >= -1e-5 and found.link.sum(-1).max() <= 1 + 1e-4 and found.link.sum(-2).max() <= 1 + 1e-4
    assert found.link.diagonal(dim1=-2, dim2=-1).abs().max() == 0
    for weighting in (result.addressing.write_weightings, result.addressing.read_weightings):
        assert weighting.min() >= -1e-5 and weighting.sum(-1).max() <= 1 + 1e-4


@pytest.mark.parametrize("backend", FAST)
def test_nan_is_passed_on(backend):
    options = DNCOptions()
    inputs, weights, state = layer(options, dtype=torch.float32)
    poisoned = inputs.detach().clone()
    poisoned[0, 2] = float("nan")
    result = dnc_memory(poisoned, weights, state, options, backend=backend)
    assert result.outputs[0, 2:].isnan().all() and result.outputs[1:].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_what_is_masked_does_not_matter(backend):
    options = DNCOptions(2, 2)
    inputs, weights, state = layer(options, dtype=torch.float32)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    poisoned = inputs.detach().masked_fill(~mask[..., None], float("nan"))
    result = dnc_memory(poisoned, weights, state, options, mask, backend=backend)
    clean = dnc_memory(inputs, weights, state, options, mask, backend=backend)
    assert torch.equal(result.outputs, clean.outputs)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(result.state, state, strict=True))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x, w, s: (x[:, :0], w, s), "inputs"),
        (lambda x, w, s: (x, w._replace(interface=w.interface[1:]), s), "weights.interface"),
        (lambda x, w, s: (x, w, s._replace(link=s.link[:, :0])), "state.link"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, name):
    options = DNCOptions()
    with pytest.raises(ValueError, match=name):
        dnc_memory(*change(*layer(options)), options)
