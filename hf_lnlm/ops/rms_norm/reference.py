"""RMS norm with an optional gate, as its equations: the oracle of the other backends.

References:
    [1] Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, equation (4).
    [2] Dao, Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 7 (the gate comes before the norm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, z: torch.Tensor | None = None, groups: int = 1
) -> torch.Tensor:
    """Normalise in float64; arguments as in `rms_norm`, result float64."""
    gated = x.double() if z is None else x.double() * F.silu(z.double())
    apart = gated.unflatten(-1, (groups, -1))
    normal = apart / torch.sqrt((apart * apart).mean(-1, keepdim=True) + eps)
    return normal.flatten(-2) * weight.double()
