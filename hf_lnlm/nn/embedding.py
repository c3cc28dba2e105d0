"""Token embeddings whose scale as a layer's input is apart from that of the table, which tied logits are read from.

References:
    [1] Vaswani et al. 2017, "Attention Is All You Need", section 3.4: tied embeddings are multiplied by the root of their
        width where they are read.
"""

import torch
from torch import nn


class ScaledEmbedding(nn.Embedding):
    """A table of embeddings, each multiplied by a number when it is looked up ([1], section 3.4).

    A softmax that is tied to the table reads it as it stands. So its logits can begin near zero while the first layer
    reads vectors as large as it needs.

    Args:
        num_embeddings, embedding_dim, padding_idx: as of `nn.Embedding`.
        embed_scale: the factor; under this name peft looks for it.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, embed_scale: float = 1.0
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the scaled embeddings `(..., embedding_dim)` of ids `(...)`."""
        found = super().forward(input_ids)
        return found if self.embed_scale == 1 else found * self.embed_scale
