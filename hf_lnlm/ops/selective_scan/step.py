"""One token of a selective scan, for decoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def selective_scan_step(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    _mask: None,
    _reset: None,
    softplus: bool,
    _save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance one token; arguments and results as in `selective_scan`, with a length of 1."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x = u.to(dtype)
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = F.softplus(step, threshold=30.0) if softplus else step
    source = B.to(dtype).mT * (step * x)
    if state is not None:
        decay = (A.to(dtype).t() * step).exp_()
        source = torch.addcmul(source, decay, state.to(dtype))
    y = C.to(dtype) @ source
    y = y if D is None else y.addcmul_(x, D.to(dtype))
    y = y if z is None else y.mul_(F.silu(z.to(dtype)))
    return y.to(u.dtype), source
