"""One decoded token between a mixer's projections in plain torch: as few calls as the equations allow."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def enter_eager(
    hidden: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Norm and input projection of one token; arguments and result as in `enter_cpu`, float32 or float64."""
    return F.linear(F.rms_norm(hidden, norm.shape, norm, eps), weight, bias)


def leave_eager(
    mixed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """Output projection and residual sum of one token; arguments and result as in `leave_cpu`."""
    return F.linear(mixed, weight, bias).add_(residual)


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve `(batch, 1, channels)` and apply SiLU; returns `(batch, channels)` and the next state."""
    kernel = weight.shape[2]
    window = torch.cat([x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if state is None else state, x], 1)
    y = (window * weight.view(-1, kernel).t()).sum(1)
    return F.silu(y if bias is None else y.add_(bias), inplace=True), window[:, 1:]


def s6_token_eager(
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    x_weight: torch.Tensor,
    step_weight: torch.Tensor,
    step_bias: torch.Tensor | None,
    a_log: torch.Tensor,
    skip: torch.Tensor,
    conv_state: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token of Mamba-1; arguments and results as in `s6_token_cpu`, on any device, float32 or float64."""
    x, z = projected.chunk(2, -1)
    u, conv = _convolve(x, conv_weight, conv_bias, conv_state)
    rank, states = step_weight.shape[1], a_log.shape[1]
    mixed, b, c = F.linear(u, x_weight).split([rank, states, states], 1)
    step = F.softplus(F.linear(mixed, step_weight, step_bias), threshold=30.0)
    u, step = u.unsqueeze(1), step.unsqueeze(1)
    last = b.unsqueeze(2) * (step * u)
    if state is not None:
        decay = torch.mul(a_log.exp().t(), -step, out=torch.empty_like(last))  # else it would lie transposed
        last.addcmul_(decay.exp_(), state)
    y = torch.bmm(c.unsqueeze(1), last).addcmul_(u, skip)
    return y.mul_(F.silu(z)), conv, last


def ssd_token_eager(
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
    """One token of Mamba-2; arguments and results as in `ssd_token_cpu`, on any device, float32 or float64."""
    batch, heads, inner, channels = projected.shape[0], a_log.shape[0], norm_weight.shape[0], conv_weight.shape[0]
    z, xbc, dt = projected.split([inner, channels, heads], -1)
    mixed, conv = _convolve(xbc, conv_weight, conv_bias, conv_state)
    shared = (channels - inner) // 2
    x, b, c = mixed.split([inner, shared, shared], -1)
    x = x.view(batch, groups, heads // groups, -1)
    step = F.softplus(dt + step_bias).clamp_(*limit).view(batch, groups, -1, 1)
    last = (x * step).unsqueeze(-1) * b.view(batch, groups, 1, 1, -1)
    if state is not None:
        kept = (step * -a_log.exp().view(groups, -1, 1)).exp_().unsqueeze(-1)
        last = last.addcmul_(kept, state.view(last.shape))
    y = (last @ c.view(batch, groups, 1, -1, 1)).squeeze(-1).addcmul_(skip.view(groups, -1, 1), x)
    gated = (y.view(batch, 1, inner) * F.silu(z)).view(batch, 1, groups, -1)
    normal = F.rms_norm(gated, gated.shape[-1:], None, eps).view(batch, 1, inner)
    return normal * norm_weight, conv, last.view(batch, heads, inner // heads, -1)
