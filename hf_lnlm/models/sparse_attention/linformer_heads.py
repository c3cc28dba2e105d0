"""What several heads of Linformer share: their inputs, losses and the pooler."""

from typing import Any

import torch
from torch import nn

from ...nn.loss_heads import IGNORED, normalised
from ...nn.masks import end_token
from .configuration_linformer import LinformerConfig


def encoder_inputs(
    input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any, inputs_embeds: Any
) -> dict[str, Any]:
    """Collect the arguments of `LinformerModel.forward` that every head passes on."""
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
    }


def label_loss(logits: torch.Tensor, labels: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy over the labelled positions, divided by the items of the accumulated batch."""
    flat = labels.reshape(-1).to(logits.device)
    total = nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), flat, ignore_index=IGNORED, reduction="sum"
    )
    return normalised(total, (flat != IGNORED).sum(), kwargs.get("num_items_in_batch"))


def position_loss(logits: torch.Tensor, columns: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy of columns `(batch,)` under logits `(batch, length)`; columns outside are ignored."""
    labels = columns.view(-1).to(logits.device)
    labels = labels.masked_fill((labels < 0) | (labels >= logits.shape[1]), IGNORED)
    return label_loss(logits, labels, kwargs)


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
