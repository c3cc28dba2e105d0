"""The neural computer's numerical pitfalls on every backend: ties, vanishing usage, aliasing, long sequences, all heads."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hf_lnlm.ops.memory.dnc import dnc_memory
from hf_lnlm.ops.memory.dnc.layout import DNCOptions, places
from hf_lnlm.ops.memory.dnc.reference import dnc_memory_reference

from ..ntm.cases import gradients, relative
from ..ntm.laws import check_masked_steps_keep_the_state, check_nothing_given_is_written_to
from .cases import NAMES, empty, layer

FAST = ("eager", "cpu")
backends = pytest.mark.parametrize("backend", FAST)


def compared(options: DNCOptions, backend: str, change=lambda state: state, **shape) -> dict[str, float]:
    """Relative errors against the float64 equations: of all that comes out, and of every gradient."""

    def case(dtype):
        inputs, weights, state = layer(options, **shape, dtype=dtype)
        state = type(state)(*[tensor.detach().requires_grad_() for tensor in change(state)])
        return inputs, weights, state

    expected, wanted = gradients(dnc_memory_reference, case(torch.float64), options)
    result, got = gradients(dnc_memory, case(torch.float32), options, backend=backend)
    pairs = zip((result.outputs, *result.state), (expected.outputs, *expected.state), strict=True)
    errors = {
        "outputs": max(relative(one, other) for one, other in pairs) * 5
    }  # held to a fifth of the gradients' bound
    return errors | {f"d {name}": relative(*pair) for name, *pair in zip(NAMES, got, wanted, strict=True)}


@backends
@pytest.mark.parametrize("heads", list(product((1, 2, 4), repeat=2)), ids=str)
@pytest.mark.core
def test_any_heads_equal_the_reference(heads, backend):
    errors = compared(DNCOptions(*heads), backend, batch=3, steps=4, slots=9, width=3, seed=3)
    assert not {name: error for name, error in errors.items() if error > 5e-5}


def writes_to_free_slots(options: DNCOptions, width: int, weights):
    """Weights whose write heads do nothing but allocate, fully."""
    at, bias = places(options, width), torch.zeros_like(weights.interface_bias)
    bias[at.allocation_gates : at.modes] = 20.0
    return weights._replace(interface=torch.zeros_like(weights.interface), interface_bias=bias)


@pytest.mark.parametrize("backend", ("reference", *FAST))
@pytest.mark.parametrize("slots", [17, 128])
def test_of_equal_usages_the_first_slot_is_taken(backend, slots):
    """At first all usages are equal: without a stable order every backend would break the tie in its own way."""
    options = DNCOptions(1, 1)
    inputs, weights, state = layer(options, batch=3, steps=1, slots=slots, dtype=torch.float32)
    weights, usage = writes_to_free_slots(options, 5, weights), torch.zeros(3, slots)
    usage[1] = 0.5
    usage[2, ::2], usage[2, 1::2] = 0.75, 0.25
    result = dnc_memory(inputs, weights, empty(state)._replace(usage=usage), options, backend=backend)
    floored, written = 1e-6 + (1 - 1e-6) * usage, result.addressing.write_weightings[:, 0, 0]
    expected = torch.zeros(3, slots)
    for row in range(3):
        order = sorted(range(slots), key=lambda slot: (float(usage[row, slot]), slot))
        before = torch.cat([torch.ones(1), floored[row, order].cumprod(0)[:-1]])
        expected[row, order] = (1 - floored[row, order]) * before
    torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-6)


def moved_by_rounding(backend: str) -> float:
    """How far allocations move when usages, many of them equal, move by one unit in the last place either way."""
    options, generator = DNCOptions(1, 1), torch.Generator().manual_seed(0)
    inputs, weights, state = layer(options, batch=4, steps=1, slots=33, dtype=torch.float32)
    weights = writes_to_free_slots(options, 5, weights)
    levels = torch.rand(4, 4, generator=generator).masked_fill(torch.eye(4).bool(), 0.0)
    usage = levels.gather(1, torch.randint(4, (4, 33), generator=generator))
    towards = torch.randint(2, (4, 33), generator=generator).float()
    written = [
        dnc_memory(
            inputs, weights, empty(state)._replace(usage=u), options, backend=backend
        ).addressing.write_weightings
        for u in (usage, usage.nextafter(towards), usage.nextafter(1 - towards))
    ]
    return max(float((other - written[0]).abs().max()) for other in written[1:])


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_rounding_does_not_choose_among_equal_usages(backend):
    assert moved_by_rounding(backend) < 1e-5


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_a_second_write_head_takes_another_slot(backend):
    options = DNCOptions(1, 2)
    inputs, weights, state = layer(options, batch=1, steps=3, slots=17, dtype=torch.float32)
    weights = writes_to_free_slots(options, 5, weights)
    written = dnc_memory(inputs, weights, empty(state), options, backend=backend).addressing.write_weightings[0]
    assert written.amax(-1).min() > 0.99 and len(set(written.argmax(-1).flatten().tolist())) == 6


@backends
@pytest.mark.parametrize("tiny", [0.0, 1e-30, 1e-8])
def test_vanishing_usages_have_right_gradients(backend, tiny):
    """A product of 128 usages underflows, and its gradient by division would be 0 / 0."""

    def almost_unused(state):
        order = torch.arange(128, dtype=torch.float64).to(state.usage) / 128
        usage = torch.where(order < 0.7, tiny * (1 + order), order).expand_as(state.usage)
        nothing = torch.zeros_like(state.write_weightings)
        return state._replace(usage=usage.clone(), write_weightings=nothing, read_weightings=state.read_weightings * 0)

    errors = compared(DNCOptions(1, 1), backend, almost_unused, batch=1, steps=1, slots=128, width=4)
    assert not {name: error for name, error in errors.items() if error > 5e-5}


@backends
@pytest.mark.parametrize("links", [True, False])
def test_ranges_hold_after_two_thousand_steps(backend, links):
    options = DNCOptions(2, 1, temporal_links=links)
    inputs, weights, state = layer(options, batch=1, steps=2000, slots=19, dtype=torch.float32)
    with torch.no_grad():
        result = dnc_memory(inputs, weights, empty(state), options, backend=backend)
    found, looks = result.state, result.addressing
    assert all(tensor.isfinite().all() for tensor in (result.outputs, *found, *looks))
    assert looks.usage.min() >= 0 and looks.usage.max() <= 1 + 1e-6
    for weighting in (looks.write_weightings, looks.read_weightings):
        assert weighting.min() >= -1e-6 and weighting.sum(-1).max() <= 1 + 1e-5
    if links:
        assert found.link.min() >= -1e-6 and found.link.diagonal(dim1=-2, dim2=-1).abs().max() == 0
        assert found.link.sum(-1).max() <= 1 + 1e-5 and found.link.sum(-2).max() <= 1 + 1e-5
        assert found.precedence.sum(-1).max() <= 1 + 1e-5


@backends
def test_strengths_beyond_what_exp_can_hold(backend):
    options = DNCOptions(interface_clip=1000.0)
    inputs, weights, state = layer(options, slots=17, dtype=torch.float32)
    bias, at = weights.interface_bias.detach().clone(), places(options, 5)
    bias[at.read_strengths], bias[at.write_strengths] = 1000.0, 1000.0
    weights = weights._replace(interface_bias=bias.requires_grad_())
    result = dnc_memory(inputs, weights, state, options, backend=backend)
    grads = torch.autograd.grad(result.outputs.square().sum(), [inputs, *weights, *state])
    assert all(tensor.isfinite().all() for tensor in (result.outputs, *result.state, *grads))


@pytest.mark.parametrize("backend", ("reference", *FAST))
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_given_is_written_to(backend, grad):
    """A state that two calls share is the same for both; links most of all, which are updated in place inside."""
    options = DNCOptions(2, 2, masking=True, deallocation=True)
    check_nothing_given_is_written_to(dnc_memory, layer(options, dtype=torch.float32), options, backend, grad)


@backends
def test_a_masked_step_keeps_every_part_of_the_state(backend):
    options = DNCOptions(2, 2)
    arguments = layer(options, batch=1, steps=7, dtype=torch.float32, seed=3)
    check_masked_steps_keep_the_state(dnc_memory, arguments, options, backend)
