"""Random layers for the tests of the neural computer's operation."""

from __future__ import annotations

import torch

from hf_lnlm.ops.memory.dnc.layout import DNCOptions, DNCState, num_interface
from hf_lnlm.ops.memory.layer import MemoryWeights

NAMES = ("inputs", *MemoryWeights._fields, *DNCState._fields)


def layer(options: DNCOptions, batch=3, steps=6, features=4, hidden=11, slots=13, width=5, seed=0, dtype=torch.float64):
    """Inputs, weights and state of one layer, all leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    lstm, reads, writes = options.controller == "lstm", options.num_read_heads, options.num_write_heads
    linked, gates = writes if options.temporal_links else 0, 4 * hidden if lstm else hidden
    inside = (hidden if lstm else 0) + reads * width
    interface = num_interface(options, width)
    weights = MemoryWeights(
        normal(gates, features, scale=0.5),
        normal(gates, scale=0.1),
        normal(gates, inside, scale=inside**-0.5),
        normal(interface, hidden, scale=2 * hidden**-0.5),
        normal(interface, scale=0.3),
    )
    link = normal(batch, linked, slots, slots).sigmoid() / slots
    state = DNCState(
        normal(batch, hidden).tanh(),
        normal(batch, hidden if lstm else 0),
        normal(batch, reads * width, scale=0.3),
        normal(batch, slots, width, scale=0.3),
        normal(batch, slots).sigmoid(),
        normal(batch, linked, slots).softmax(-1) * 0.7,
        link * (1 - torch.eye(slots, dtype=torch.float64)),
        normal(batch, writes, slots).softmax(-1) * 0.6 / writes,
        normal(batch, reads, slots).softmax(-1) * 0.9,
    )
    leaf = lambda tensor: tensor.to(dtype).requires_grad_()  # noqa: E731
    return leaf(normal(batch, steps, features)), MemoryWeights(*map(leaf, weights)), DNCState(*map(leaf, state))


def empty(state: DNCState) -> DNCState:
    """The initial state of the paper: all zero."""
    return DNCState(*[torch.zeros_like(tensor) for tensor in state])
