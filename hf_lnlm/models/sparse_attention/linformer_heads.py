"""What several heads of Linformer share: losses and the pooler."""

from typing import Any

import torch
from torch import nn

from ...nn.loss_heads import IGNORED, check_labels, normalised
from ...nn.masks import end_token
from .configuration_linformer import LinformerConfig


def label_loss(logits: torch.Tensor, labels: torch.Tensor | None, items: Any) -> Any:
    """Return the cross-entropy over the labelled positions, None without labels.

    Args:
        logits: `(..., classes)`.
        labels: `(...)` class ids; -100 is ignored.
        items: number of labels of the whole accumulated batch, or None.

    Raises:
        ValueError: labels are no classes, or of another shape.
    """
    if labels is None:
        return None
    check_labels(labels, logits.shape[-1], logits.shape[:-1])
    flat = labels.reshape(-1).to(logits.device)
    scores = logits.float().reshape(-1, logits.shape[-1])
    total = nn.functional.cross_entropy(scores, flat, ignore_index=IGNORED, reduction="sum")
    return normalised(total, (flat != IGNORED).sum(), items)


class LinformerPooler(nn.Module):
    """A dense layer and tanh over the first real token.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Pool `(batch, length, hidden_size)` to `(batch, hidden_size)`."""
        mask = None if attention_mask is None else attention_mask.bool()
        return torch.tanh(self.dense(end_token(hidden_states, mask, first=True)))
