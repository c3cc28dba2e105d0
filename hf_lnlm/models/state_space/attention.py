"""Self-attention layers of hybrid models: no positions (the scans around them know the order), transformers' interface."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...nn.masks import SegmentInfo
from .configuration_ssm import SelectiveSSMConfig


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, one product after the other.

    Args:
        module: the attention layer.
        query: `(batch, heads, length, width)`.
        key, value: `(batch, key heads, keys, width)`.
        attention_mask: `(batch, 1, length, keys)`, added to the scores, or None.
        scaling: factor of the scores.
        dropout: of the weights, while training.
        kwargs: what other implementations take.

    Returns:
        `(batch, length, heads, width)` and the weights `(batch, heads, length, keys)`.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SSMSelfAttention(nn.Module):
    """Multi-head attention with grouped keys.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0: where its keys are in the cache.
    """

    def __init__(self, config: SelectiveSSMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        key_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // key_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = not config.reads_both_ways
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_heads * self.head_dim, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_heads * self.head_dim, bias=config.use_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden: `(batch, length, hidden_size)`.
            attention_mask: `(batch, 1, length, keys)`, added to the scores, or None.
            past_key_values: cache that holds and takes the keys.

        Returns:
            `(batch, length, hidden_size)` and the weights, if the implementation gives them.
        """
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(mixed.flatten(2)), weights


def attention_scores_mask(
    inputs: torch.Tensor, attention_mask: torch.Tensor | None, segments: SegmentInfo, past: int, keys: int, causal: bool
) -> torch.Tensor:
    """Return what is added to the scores: 0 where a query may look, the lowest number elsewhere.

    Args:
        inputs: `(batch, length, width)`.
        attention_mask: `(batch, length)` or `(batch, past + length)`, or None.
        segments: what is known of the batch's positions.
        past: number of cached keys.
        keys: how many the attention is given: `past + length`, or all places of a static cache.
        causal: whether only earlier keys count.

    Returns:
        `(batch, 1, length, keys)`.

    Raises:
        ValueError: a document begins inside a cached sequence, whose keys it could not tell apart.
    """
    batch, length = inputs.shape[:2]
    allowed = torch.ones(batch, length, keys, dtype=torch.bool, device=inputs.device)
    allowed = allowed.tril(past) if causal else allowed
    if attention_mask is not None:
        seen = past + length
        whole = F.pad(attention_mask.to(torch.bool), (seen - attention_mask.shape[1], keys - seen), value=True)
        allowed = allowed & whole.unsqueeze(1)
    if segments.starts is not None:
        if past:
            raise ValueError("a document cannot begin inside a cached sequence of a model with attention layers")
        document = segments.starts.cumsum(1)
        same = document.unsqueeze(2) == document.unsqueeze(1)
        allowed = allowed & F.pad(same, (0, keys - length), value=False)
    lowest = torch.finfo(inputs.dtype).min
    return torch.zeros_like(allowed, dtype=inputs.dtype).masked_fill(~allowed, lowest).unsqueeze(1)
