"""Dropouts of recurrent language models (Merity, Keskar and Socher 2017, section 4.2; Gal and Ghahramani 2016)."""

import torch
from torch import nn
from torch.nn.functional import dropout


class LockedDropout(nn.Module):
    """Variational dropout: one mask `(batch, 1, width)` for all time steps of a sequence.

    Args:
        p: share of features to drop, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Drop features of `(batch, length, width)`; the identity in evaluation or when `p` is 0."""
        if not self.training or not self.p:
            return inputs
        mask = dropout(inputs.new_ones(inputs.shape[0], 1, inputs.shape[2]), self.p)
        return inputs * mask

    def extra_repr(self) -> str:
        """Show `p`."""
        return f"p={self.p}"


class EmbeddingDropout(nn.Module):
    """Drop whole words: one Bernoulli draw a vocabulary row and forward pass, kept rows scaled by 1 / (1 - p).

    Args:
        p: share of vocabulary rows to drop, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, embeddings: torch.Tensor, input_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Zero the embeddings of dropped words.

        Args:
            embeddings: `(batch, length, width)`, the embeddings of `input_ids`.
            input_ids: `(batch, length)`.
            vocab_size: number of rows to draw for.
        """
        if not self.training or not self.p:
            return embeddings
        row_mask = dropout(embeddings.new_ones(vocab_size), self.p)
        return embeddings * row_mask[input_ids].unsqueeze(-1)

    def extra_repr(self) -> str:
        """Show `p`."""
        return f"p={self.p}"
