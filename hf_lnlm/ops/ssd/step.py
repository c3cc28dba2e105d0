"""One token of the SSD recurrence, for decoding."""

from __future__ import annotations

import torch


def ssd_step(
    x: torch.Tensor,
    scale: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor | None,
    diagonal: torch.Tensor | None,
    _reset: None,
    _chunk_size: int,
    _save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance one token; arguments and results as in `ssd`, with a length of 1."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, heads, width = x.shape
    groups, states = B.shape[2:]
    value = x.to(dtype).view(batch, groups, heads // groups, width)
    source = (value * scale.to(dtype).view(batch, groups, -1, 1)).unsqueeze(-1) * B.to(dtype).view(
        batch, groups, 1, 1, states
    )
    query = C.to(dtype).view(batch, groups, 1, states, 1)
    seen = source if diagonal is None else source * diagonal.to(dtype).view(batch, groups, -1, 1, 1)
    if state is not None:
        kept = state.to(dtype).view(source.shape) * log_decay.to(dtype).exp().view(batch, groups, -1, 1, 1)
        source = source.add_(kept) if diagonal is None else source + kept
        seen = source if diagonal is None else seen.add_(kept)
    y = (seen @ query).view(batch, 1, heads, width)
    y = y if D is None else y.addcmul_(x.to(dtype), D.to(dtype)[:, None])
    return y.to(x.dtype), source.view(batch, heads, width, states)
