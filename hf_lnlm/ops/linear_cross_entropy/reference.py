"""The definition: all logits at once. Memory O(tokens * vocab_size)."""

import torch
from torch.nn.functional import cross_entropy, linear


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *_options: object
) -> torch.Tensor:
    """Sum of cross-entropies in float32, or in float64 if hidden or weight are; arguments as in `linear_cross_entropy`."""
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    logits = linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return cross_entropy(logits, labels.masked_fill(labels < 0, -100), ignore_index=-100, reduction="sum")
