"""A learnt weighted sum of layers (Peters et al. 2018, "Deep contextualized word representations", eq. 1).

Glossary (paper: variable): s_j: softmax of `weights`; gamma: `scale`.
"""

from collections.abc import Sequence

import torch
from torch import nn


class ScalarMix(nn.Module):
    """A softmax-weighted sum of layers, times a scale.

    Args:
        num_layers: layers to mix.
        layer_norm: whether each layer is first brought to mean 0 and variance 1 over all real entries of the *batch*, as
            ELMo's option does: what a text gives then depends on its batch.
    """

    def __init__(self, num_layers: int, layer_norm: bool = False) -> None:
        super().__init__()
        self.layer_norm = layer_norm
        self.weights = nn.Parameter(torch.zeros(num_layers))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, layers: Sequence[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mix tensors `(batch, length, width)`.

        Args:
            layers: one tensor a layer.
            mask: `(batch, length)` true at real positions, of which the statistics are taken; None if all are.
        """
        shares = self.weights.softmax(0) * self.scale
        if self.layer_norm:
            layers = [_normalised(layer, mask) for layer in layers]
        return torch.einsum("l,lbtw->btw", shares, torch.stack(list(layers)))


def _normalised(layer: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    real = torch.ones_like(layer[..., :1]) if mask is None else mask[..., None].to(layer.dtype)
    count = (real.sum() * layer.shape[-1]).clamp(min=1)
    mean = (layer * real).sum() / count
    variance = ((layer - mean) * real).square().sum() / count
    return (layer - mean) / (variance + 1e-12).sqrt()
