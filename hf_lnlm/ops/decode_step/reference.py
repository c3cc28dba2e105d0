"""One decoded token of a whole Mamba-1 or Mamba-2 layer as its equations, in float64: the oracle of the other backends.

References:
    [1] Gu, Dao 2023, "Mamba", arXiv:2312.00752, algorithm 2.
    [2] Dao, Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..causal_conv.reference import causal_conv_reference
from ..mamba_inner.reference import MambaWeights, mamba_inner_reference
from ..rms_norm.reference import rms_norm_reference
from ..ssd.reference import ssd_reference


def enter_reference(
    hidden: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Norm and input projection; arguments and result as in `enter_cpu`."""
    return F.linear(rms_norm_reference(hidden, norm, eps), weight.double(), None if bias is None else bias.double())


def leave_reference(
    mixed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """Output projection and residual sum; arguments and result as in `leave_cpu`."""
    shift = None if bias is None else bias.double()
    return F.linear(mixed.double(), weight.double(), shift) + residual.double()


def s6_token_reference(
    projected: torch.Tensor, *tensors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of [1]; arguments and results as in `s6_token_cpu`."""
    return mamba_inner_reference(projected, MambaWeights(*tensors[:7]), tensors[7:])  # type: ignore[arg-type]


def ssd_token_reference(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    step_bias: torch.Tensor,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    groups: int,
    limit: tuple[float, float],
    conv_state: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of [2]; arguments and results as in `ssd_token_cpu`."""
    heads, inner, channels = a_log.shape[0], norm_weight.shape[0], conv_weight.shape[0]
    shared = (channels - inner) // 2
    z, xbc, dt = projected.double().split([inner, channels, heads], -1)
    xbc, conv = causal_conv_reference(xbc, conv_weight.squeeze(1), conv_bias, conv_state)
    x, b, c = xbc.split([inner, shared, shared], -1)
    step = F.softplus(dt + step_bias.double()).clamp(*limit)
    decay = step * -a_log.double().exp()
    b, c = (tensor.unflatten(-1, (groups, -1)) for tensor in (b, c))
    y, last = ssd_reference(x.unflatten(-1, (heads, -1)), step, decay, b, c, skip, state)
    return rms_norm_reference(y.flatten(2), norm_weight, eps, z, groups), conv, last
