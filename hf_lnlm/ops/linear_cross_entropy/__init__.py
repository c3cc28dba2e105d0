"""Cross-entropy of a linear projection, `sum_n -log softmax(W h_n + b)[y_n]`, without keeping the logits."""

import torch

from ..backend import Operation, own_precision
from .eager import ChunkedLinearCrossEntropy
from .reference import linear_cross_entropy_reference

__all__ = ["LINEAR_CROSS_ENTROPY", "linear_cross_entropy"]

LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy",
    reference=linear_cross_entropy_reference,
    eager=ChunkedLinearCrossEntropy.apply,
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk_size: int = 256,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T + bias` against `labels`.

    Args:
        hidden: `(tokens, hidden_size)`.
        weight: `(vocab_size, hidden_size)`.
        bias: `(vocab_size,)` or None.
        labels: `(tokens,)` ids; negative ones are ignored.
        chunk_size: tokens whose logits exist at a time: `chunk_size * vocab_size` numbers at most.
        dtype: of the products; bfloat16 is about twice as fast, with gradients within about 3e-3.
        backend: `auto`, `eager` (chunked) or `reference` (whole logits, any dtype of float).

    Returns:
        the sum in nats, a scalar.

    Raises:
        ValueError: there is no such backend.
    """
    run = LINEAR_CROSS_ENTROPY.load(LINEAR_CROSS_ENTROPY.pick(backend, hidden.device))
    with own_precision(hidden.device):
        total: torch.Tensor = run(hidden, weight, bias, labels, chunk_size, dtype)
    return total
