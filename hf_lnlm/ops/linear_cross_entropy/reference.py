"""The definition: all logits at once. Memory O(tokens * vocab_size)."""

import torch
from torch.nn.functional import cross_entropy, linear


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of cross-entropies; see `linear_cross_entropy` for the arguments."""
    return cross_entropy(
        linear(hidden, weight, bias), labels.masked_fill(labels < 0, -100), ignore_index=-100, reduction="sum"
    )
