"""Everything between the projections of a Mamba-1 mixer as its equations, in float64: the oracle of the other backends.

References:
    [1] Gu, Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..causal_conv.reference import causal_conv_reference
from ..selective_scan.reference import selective_scan_reference

Tensors = tuple[torch.Tensor | None, ...]


class MambaWeights(NamedTuple):
    """Weights between the projections.

    Attributes:
        conv_weight, conv_bias: `(channels, 1, kernel)` and `(channels,)` or None.
        x_weight: `(rank + 2 · states, channels)`, the projection to step sizes, B and C.
        step_weight, step_bias: `(channels, rank)` and `(channels,)` or None.
        a_log: `(channels, states)`; A is `-exp(a_log)`.
        skip: `(channels,)`, the weight D.
    """

    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    x_weight: torch.Tensor
    step_weight: torch.Tensor
    step_bias: torch.Tensor | None
    a_log: torch.Tensor
    skip: torch.Tensor


def mamba_inner_reference(
    projected: torch.Tensor, weights: MambaWeights, states: Tensors = (None, None), marks: Tensors = (None, None, None)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run convolution, projections, scan and gate [1] in float64; arguments and results as in `mamba_inner`."""
    doubled: Any = (None if weight is None else weight.double() for weight in weights)
    w = MambaWeights(*doubled)
    x, z = projected.double().chunk(2, -1)
    rank, count = w.step_weight.shape[1], w.a_log.shape[1]
    x, conv = causal_conv_reference(x, w.conv_weight.squeeze(1), w.conv_bias, states[0], marks[0])
    steps, b, c = F.linear(x, w.x_weight).split([rank, count, count], -1)
    scanned = (x, F.linear(steps, w.step_weight), -w.a_log.exp(), b, c, w.skip, z, w.step_bias)
    y, last = selective_scan_reference(*scanned, states[1], marks[1], marks[2])
    return y, conv, last
