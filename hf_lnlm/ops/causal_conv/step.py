"""One position of a causal convolution, for decoding: a weighted sum over the window."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    _gather_index: None,
    activation: bool,
    _save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve one position.

    Args:
        x: `(batch, 1, channels)`.
        weight: `(channels, kernel)`.
        bias: `(channels,)` or None.
        state: `(batch, kernel - 1, channels)` or None for zeros.
        activation: whether SiLU follows.

    Returns:
        `y` like `x`, and the next state.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=dtype)
    window = torch.cat([state.to(dtype), x.to(dtype)], 1)
    y = (window * weight.to(dtype).t()).sum(1, keepdim=True)
    y = y if bias is None else y.add_(bias.to(dtype))
    return (F.silu(y, inplace=True) if activation else y).to(x.dtype), window[:, 1:]
