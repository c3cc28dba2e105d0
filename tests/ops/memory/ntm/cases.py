"""Random layers and losses for the tests of the memory operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_lnlm.ops.memory.layer import MemoryWeights
from hf_lnlm.ops.memory.ntm.layout import NTMOptions, NTMState, num_interface

NAMES = ("inputs", *MemoryWeights._fields, *NTMState._fields)


def layer(options: NTMOptions, batch=3, steps=6, features=4, hidden=11, slots=13, width=5, seed=0, dtype=torch.float64):
    """Inputs, weights and state of one layer, all leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    lstm, reads = options.controller == "lstm", options.num_read_heads
    heads, gates = reads + options.num_write_heads, 4 * hidden if lstm else hidden
    inside = (hidden if lstm else 0) + reads * width
    interface = num_interface(options, width)
    weights = MemoryWeights(
        normal(gates, features, scale=0.5),
        normal(gates, scale=0.1),
        normal(gates, inside, scale=inside**-0.5),
        normal(interface, hidden, scale=2 * hidden**-0.5),
        normal(interface, scale=0.3),
    )
    state = NTMState(
        normal(batch, hidden).tanh(),
        normal(batch, hidden if lstm else 0),
        normal(batch, reads * width, scale=0.3),
        normal(batch, heads, slots).softmax(-1),
        normal(batch, slots, width, scale=0.3),
    )
    leaf = lambda tensor: tensor.to(dtype).requires_grad_()  # noqa: E731
    return leaf(normal(batch, steps, features)), MemoryWeights(*map(leaf, weights)), NTMState(*map(leaf, state))


def gradients(run: Callable[..., Any], arguments: tuple, options: Any, mask: torch.Tensor | None = None, **more: Any):
    """Result of an operation and the gradients of a random loss of outputs and final state."""
    inputs, weights, state = arguments
    result = run(inputs, weights, state, options, mask, **more)
    generator = torch.Generator().manual_seed(9)
    parts = (result.outputs, *result.state)
    random = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in parts]
    loss = sum((part.double() * weight).sum() for part, weight in zip(parts, random, strict=True))
    return result, torch.autograd.grad(loss, [inputs, *weights, *state], allow_unused=True)


def relative(got: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Largest error relative to the largest entry; absent gradients count as zero."""
    if got is None or expected is None or not expected.numel():
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
