"""Causal depthwise convolution as its defining sum, in float64: the oracle of the other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    gather_index: torch.Tensor | None = None,
    activation: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the sum in float64; arguments and results as in `causal_conv`, without `reverse`."""
    batch, length, channels = x.shape
    kernel = weight.shape[1]
    x, weight = x.double(), weight.double()
    carried = x.new_zeros(batch, kernel - 1, channels) if state is None else state.double()
    rows = torch.cat([x.new_zeros(batch, 1, channels), carried, x], 1)
    outputs: list[torch.Tensor] = []
    for t in range(length + 1):
        index = torch.arange(kernel - 1) + t + 1 if gather_index is None else gather_index[:, t]
        window = rows.gather(1, index.expand(batch, -1).unsqueeze(2).expand(-1, -1, channels))
        if t == length:
            return torch.stack(outputs, 1), window
        total = (window * weight[:, :-1].t()).sum(1) + x[:, t] * weight[:, -1]
        total = total if bias is None else total + bias.double()
        outputs.append(F.silu(total) if activation else total)
    raise ValueError(f"x must have at least one position, got length {length}")
