"""The two halves of a GPT-2 block, which GPT-3 and the sparse mixtures share: attention and MLP.

References:
    [1] Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from .attention import AttentionPlan
from .decoder import SparseSelfAttention


class GPT3Attention(SparseSelfAttention):
    """Dense or banded multi-head attention with GPT-2's fused projection.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, past_key_values: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over `(batch, length, hidden_size)`; returns the same shape and the weights if wanted."""
        query, key, value = self.c_attn(hidden_states).chunk(3, dim=-1)
        out, weights = self.attend_heads(query, key, value, plan, past_key_values)
        return self.c_proj(out), weights


class GPT3MLP(nn.Module):
    """Two linear layers and an activation.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = int(config.intermediate_size or 4 * config.hidden_size)
        self.c_fc = nn.Linear(config.hidden_size, width)
        self.c_proj = nn.Linear(width, config.hidden_size)
        # the same function: gelu_new writes it out in eight operations
        one_pass = {"gelu_new": "gelu_pytorch_tanh"}
        self.activation = ACT2FN[one_pass.get(config.activation_function, config.activation_function)]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform `(batch, length, hidden_size)`."""
        return self.c_proj(self.activation(self.c_fc(hidden_states)))
