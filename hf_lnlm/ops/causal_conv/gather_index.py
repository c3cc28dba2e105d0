"""Which input each tap of a causal convolution reads when positions are masked or rows hold several documents.

A tap at distance `j` reads the `j`-th *real* token before the current one, in the same document; beyond the row's
beginning it reads the carried state, and beyond a document's beginning zero. One integer table says so for every
position, is made once a batch and shared by all layers.
"""

from __future__ import annotations

import torch


def conv_gather_index(mask: torch.Tensor, reset: torch.Tensor | None, kernel: int) -> torch.Tensor:
    """Make the table of sources.

    Args:
        mask: `(batch, length)`, non-zero at real tokens.
        reset: `(batch, length)` booleans, true at a real token that begins a document, or None.
        kernel: the convolution's width `K`.

    Returns:
        `(batch, length + 1, K - 1)` integers, oldest tap first, as rows of the concatenation of one zero row, the
        `K - 1` state rows and the `length` input rows. The last position stands for the token after the input: its
        sources are the next state.
    """
    batch, _length = mask.shape
    real = mask != 0
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    starts = torch.zeros_like(real) if reset is None else reset & real
    document = starts.cumsum(1)
    position = torch.cat([real.new_zeros(batch, 1, dtype=torch.long), real.cumsum(1)], 1)  # real tokens before each
    current = torch.cat([document, document[:, -1:]], 1)
    distance = torch.arange(kernel - 1, 0, -1, device=mask.device)
    rank = position.unsqueeze(2) - distance
    inside = order.gather(1, rank.clamp(min=0).flatten(1)).view(rank.shape)
    source_document = torch.where(rank >= 0, document.gather(1, inside.flatten(1)).view(rank.shape), 0)
    source = torch.where(rank >= 0, inside + kernel, rank + kernel)
    return torch.where(source_document == current.unsqueeze(2), source, 0)
