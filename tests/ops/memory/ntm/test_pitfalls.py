"""The Turing machine's numerical pitfalls on every backend: underflow, overflow, aliasing, long sequences, all heads."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hf_lnlm.ops.memory.ntm import ntm_memory
from hf_lnlm.ops.memory.ntm.layout import NTMOptions
from hf_lnlm.ops.memory.ntm.reference import ntm_memory_reference

from .cases import NAMES, gradients, layer, relative
from .laws import check_masked_steps_keep_the_state, check_nothing_given_is_written_to

FAST = ("eager", "cpu")
backends = pytest.mark.parametrize("backend", FAST)


@backends
@pytest.mark.parametrize("heads", list(product((1, 2, 4), repeat=2)), ids=str)
@pytest.mark.core
def test_any_heads_equal_the_reference(heads, backend):
    options, shape = NTMOptions(*heads), {"batch": 3, "steps": 4, "slots": 9, "width": 3}
    expected, wanted = gradients(ntm_memory_reference, layer(options, **shape), options)
    result, got = gradients(ntm_memory, layer(options, **shape, dtype=torch.float32), options, backend=backend)
    pairs = zip((result.outputs, *result.state), (expected.outputs, *expected.state), strict=True)
    assert max(relative(one, other) for one, other in pairs) <= 1e-5
    errors = {name: relative(*pair) for name, *pair in zip(NAMES, got, wanted, strict=True)}
    assert not {name: error for name, error in errors.items() if error > 5e-5}


@backends
def test_strengths_and_powers_beyond_what_exp_can_hold(backend):
    """exp(β K) unshifted overflows from β = 89 on; a power of 1,000 leaves nothing of a weighting that isn't shifted."""
    options = NTMOptions(interface_clip=1000.0)
    inputs, weights, state = layer(options, slots=17, width=4, dtype=torch.float32)
    bias = weights.interface_bias.detach().clone()
    for head in range(2):
        bias[10 * head + 4] = 1000.0  # strength; a head has width + 3 + 3 = 10 numbers
        bias[10 * head + 6] = 1000.0  # sharpening
    weights = weights._replace(interface_bias=bias.requires_grad_())
    result = ntm_memory(inputs, weights, state, options, backend=backend)
    loss = (result.outputs * torch.linspace(-1, 1, result.outputs.shape[-1])).sum()
    grads = torch.autograd.grad(loss, [inputs, *weights, *state])
    assert all(tensor.isfinite().all() for tensor in (result.outputs, *result.state, *grads))
    torch.testing.assert_close(result.weightings.sum(-1), torch.ones(3, 6, 2), atol=1e-5, rtol=0)
    assert result.weightings.max() > 0.9


@backends
def test_equal_keys_and_an_empty_memory_share_the_weight(backend):
    """All slots alike, so all cosines alike: content addressing must not prefer any, nor divide by zero."""
    options = NTMOptions()
    inputs, weights, state = layer(options, slots=16, width=4, dtype=torch.float32)
    even = torch.full_like(state.weightings, 1 / 16)
    for value in (0.0, 0.7):
        memory = torch.full_like(state.memory, value).requires_grad_()
        begin = state._replace(memory=memory, weightings=even)
        result = ntm_memory(inputs[:, :1], weights, begin, options, backend=backend)
        torch.testing.assert_close(result.weightings[:, 0], even, atol=1e-6, rtol=0)
        grads = torch.autograd.grad(result.outputs.sum() + result.state.memory.sum(), [memory, *weights])
        assert all(tensor.isfinite().all() for tensor in grads)


@backends
def test_weightings_sum_to_one_after_two_thousand_steps(backend):
    options = NTMOptions(2, 1)
    inputs, weights, state = layer(options, batch=1, steps=2000, slots=19, dtype=torch.float32)
    with torch.no_grad():
        result = ntm_memory(inputs, weights, state, options, backend=backend)
    assert (result.weightings.sum(-1) - 1).abs().max() < 1e-5 and result.weightings.min() >= 0
    assert all(tensor.isfinite().all() for tensor in (result.outputs, *result.state))


@pytest.mark.parametrize("backend", ("reference", *FAST))
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_given_is_written_to(backend, grad):
    """A state that two calls share is the same for both."""
    options = NTMOptions(2, 2)
    check_nothing_given_is_written_to(ntm_memory, layer(options, dtype=torch.float32), options, backend, grad)


@backends
def test_a_masked_step_keeps_every_part_of_the_state(backend):
    options = NTMOptions(2, 2)
    arguments = layer(options, batch=1, steps=7, dtype=torch.float32)
    check_masked_steps_keep_the_state(ntm_memory, arguments, options, backend)
