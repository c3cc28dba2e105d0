"""What the neural computer's options do, by hand: de-allocation, sharpness, no links, masks."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.memory.dnc import dnc_memory
from hf_lnlm.ops.memory.dnc.layout import DNCOptions, DNCState, num_interface, places
from hf_lnlm.ops.memory.dnc.reference import sharpened

from .cases import empty, layer

BACKENDS = ("reference", "eager", "cpu")
backends = pytest.mark.parametrize("backend", BACKENDS)
WIDTH = 5


def stepped(options: DNCOptions, orders: dict[str, float], backend: str, **parts: torch.Tensor) -> DNCState:
    """The state after one step whose interface says `orders`, by names of its parts, and nothing else."""
    inputs, weights, state = layer(options, batch=1, steps=1, slots=17, width=WIDTH, dtype=torch.float32)
    bias, at = torch.zeros_like(weights.interface_bias), places(options, WIDTH)
    for name, value in orders.items():
        end = min(place for place in at if place > getattr(at, name))
        bias[getattr(at, name) : end] = value
    weights = weights._replace(interface=torch.zeros_like(weights.interface), interface_bias=bias)
    return dnc_memory(inputs, weights, empty(state)._replace(**parts), options, backend=backend).state


def one_hot(slot: int) -> torch.Tensor:
    return torch.eye(17)[slot].view(1, 1, 17)


@backends
@pytest.mark.parametrize("deallocation", [True, False])
def test_a_freed_slot_is_erased_by_deallocation_only(deallocation, backend):
    options, memory = DNCOptions(deallocation=deallocation), torch.ones(1, 17, WIDTH)
    orders = {"free_gates": 20.0, "write_gates": -20.0}
    usage = torch.ones(1, 17)
    after = stepped(options, orders, backend, memory=memory, usage=usage, read_weightings=one_hot(3))
    wanted = memory.clone()
    wanted[0, 3] = 0.0 if deallocation else 1.0
    torch.testing.assert_close(after.memory, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.usage, usage - one_hot(3)[0], atol=1e-5, rtol=0)


def test_sharpening_by_hand():
    weighting = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(sharpened(weighting, torch.ones(1, 1)), weighting, atol=1e-5, rtol=0)
    squared = torch.tensor([[4.0, 1.0, 1.0]], dtype=torch.float64) / 6
    torch.testing.assert_close(sharpened(weighting, torch.full((1, 1), 2.0)), squared, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_blurred_link_is_followed_sharply_if_wanted(backend):
    link = torch.zeros(1, 1, 17, 17)
    link[0, 0, 5, 3], link[0, 0, 6, 3] = 0.6, 0.4  # after slot 3 came slot 5, perhaps 6
    found = {}
    for sharpness in (True, False):
        options = DNCOptions(sharpness=sharpness)
        at = places(options, WIDTH)
        inputs, weights, state = layer(options, batch=1, steps=1, slots=17, width=WIDTH, dtype=torch.float32)
        bias = torch.zeros_like(weights.interface_bias)
        bias[at.write_gates], bias[at.modes + 2] = -20.0, 20.0  # nothing is written, links are followed forward
        bias[at.sharpness : at.end] = 9.0
        weights = weights._replace(interface=torch.zeros_like(weights.interface), interface_bias=bias)
        begin = empty(state)._replace(link=link, read_weightings=one_hot(3))
        found[sharpness] = dnc_memory(inputs, weights, begin, options, backend=backend).state.read_weightings[0, 0]
    torch.testing.assert_close(found[False][5:7], torch.tensor([0.6, 0.4]), atol=1e-5, rtol=0)
    share = 0.6**10 / (0.6**10 + 0.4**10)
    torch.testing.assert_close(found[True][5:7], torch.tensor([share, 1 - share]), atol=1e-3, rtol=0)


@backends
def test_without_links_a_head_looks_up_only_and_no_link_is_kept(backend):
    options = DNCOptions(2, 2, temporal_links=False)
    assert num_interface(DNCOptions(2, 2), WIDTH) - num_interface(options, WIDTH) == 2 * (1 + 2 * 2)
    after = stepped(options, {}, backend, read_weightings=one_hot(3).expand(1, 2, 17).contiguous())
    assert after.link.numel() == after.precedence.numel() == 0
    torch.testing.assert_close(after.read_weightings.sum(-1), torch.ones(1, 2))


@backends
def test_a_masked_lookup_ignores_parts_of_a_word(backend):
    """Key and words differ in the last number only, which the mask hides: the right word is found all the same."""
    options = DNCOptions(masking=True, temporal_links=False)
    inputs, weights, state = layer(options, batch=1, steps=1, slots=17, width=WIDTH, dtype=torch.float32)
    at, bias = places(options, WIDTH), torch.zeros_like(weights.interface_bias)
    bias[at.read_strengths], bias[at.write_gates] = 20.0, -20.0
    bias[at.read_keys + 1], bias[at.read_keys + 4] = 1.0, -9.0
    bias[at.read_masks : at.read_masks + WIDTH] = 20.0
    memory = torch.zeros(1, 17, WIDTH)
    memory[0, :, 0], memory[0, 7, 0], memory[0, 7, 1], memory[0, 7, 4] = 1.0, 0.0, 1.0, 9.0
    found = {}
    for hidden in (True, False):
        bias[at.read_masks + 4] = -20.0 if hidden else 20.0
        given = weights._replace(interface=torch.zeros_like(weights.interface), interface_bias=bias.clone())
        after = dnc_memory(inputs, given, empty(state)._replace(memory=memory), options, backend=backend).state
        found[hidden] = float(after.read_weightings[0, 0, 7].detach())
    assert found[True] > 0.99 and found[False] < 0.01
