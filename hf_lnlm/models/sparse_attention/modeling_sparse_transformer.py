"""Sparse Transformer: a pre-activation decoder whose attention is factorised into sparse steps.

References:
    [1] Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509.

Glossary (paper symbol: variable): l: `config.stride`, c: `config.summary_size`, N: `config.num_hidden_layers`, n_emb:
`len(config.coordinates)`; W_q, W_k, W_v, W_p: `q_proj`, `k_proj`, `v_proj`, `o_proj`; W_1, W_2: `fc1`, `fc2`; A^(1),
A^(2): `config.patterns(layer)`.

Deliberate deviations:
    * The local set has l members, not l + 1, as in the authors' published code.
    * Padding may lie anywhere: patterns are defined over real tokens, so a left-padded row equals the unpadded one.
    * `num_key_value_heads` allows grouped queries, and `attention_dropout` exists; the paper has neither.

Complexity: attention O(length * (2 stride + length / 2 stride)) for strided, O(length * (stride + summary * length /
2 stride)) for fixed; a fixed layer caches at most stride + summary * floor(length / stride) entries a row.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from ..heads import CausalLMHead
from .attention import AttentionPlan
from .configuration_sparse_transformer import SparseTransformerConfig
from .decoder import (
    SparseDecoderForSequenceClassification,
    SparseDecoderModel,
    SparseDecoderPreTrainedModel,
    SparseSelfAttention,
)


class SparseTransformerAttention(SparseSelfAttention):
    """Factorised multi-head attention ([1], eq. 3 to 10).

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: SparseTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        shared = self.head_dim * int(config.num_key_value_heads or config.num_attention_heads)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, shared)
        self.v_proj = nn.Linear(config.hidden_size, shared)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, past_key_values: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over `(batch, length, hidden_size)`; returns the same shape and the weights if wanted."""
        projected = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        out, weights = self.attend_heads(*projected, plan, past_key_values)
        return self.o_proj(out), weights


class SparseTransformerMLP(nn.Module):
    """Two linear layers around x * sigmoid(1.702 x) ([1], section 5.3).

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        width = int(config.intermediate_size or 4 * config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)
        self.activation = ACT2FN["quick_gelu"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform `(batch, length, hidden_size)`."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SparseTransformerBlock(GradientCheckpointingLayer):
    """Pre-activation residual block ([1], eq. 12 to 15): H + a(H) + b(H + a(H)).

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: SparseTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attention = SparseTransformerAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = SparseTransformerMLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """Run the block over `(batch, length, hidden_size)`."""
        attended, _ = self.attention(self.attention_norm(hidden_states), plan, past_key_values)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class CoordinateEmbedding(nn.Module):
    """Learned position embeddings: the sum of one embedding for each coordinate of a position ([1], section 5.3).

    Args:
        extents: size of each coordinate, slowest first; a position's coordinates are its mixed-radix digits.
        width: of the embeddings.
    """

    def __init__(self, extents: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.extents, self.width = extents, width
        self.tables = nn.ModuleList([nn.Embedding(extent, width) for extent in extents])

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Embed positions `(batch, length)` as `(batch, length, width)`."""
        parts = []
        for extent, table in zip(self.extents[::-1], list(self.tables)[::-1], strict=True):
            parts.append(table(positions % extent))
            positions = positions // extent
        return torch.stack(parts).sum(0)


class SparseTransformerPreTrainedModel(SparseDecoderPreTrainedModel):
    """Weight initialisation and traits that the Sparse Transformer models share."""

    config: SparseTransformerConfig
    _no_split_modules = ["SparseTransformerBlock"]
    _can_record_outputs = {"hidden_states": SparseTransformerBlock, "attentions": SparseTransformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        scale = self.config.initializer_range
        if isinstance(module, nn.Linear):  # [1], section 6
            init.normal_(module.weight, std=scale / module.in_features**0.5)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=scale / module.embedding_dim**0.5)
        depth = (2 * self.config.num_hidden_layers) ** 0.5
        for name in ("o_proj", "fc2"):
            linear = getattr(module, name, None)
            if isinstance(linear, nn.Linear):
                init.normal_(linear.weight, std=scale / linear.in_features**0.5 / depth)
        if isinstance(module, CoordinateEmbedding):
            std = scale / (module.width * len(module.extents)) ** 0.5
            for table in module.tables.parameters():
                init.normal_(table, std=std)
        head = getattr(module, "lm_head", None)
        if head is not None and self.config.zero_initial_logits and not self.config.tie_word_embeddings:
            init.zeros_(head.weight)


class SparseTransformerModel(SparseTransformerPreTrainedModel, SparseDecoderModel):
    """Embeddings, sparse blocks and a final norm, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_coordinates = CoordinateEmbedding(config.coordinates, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([SparseTransformerBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def position_embeddings(self, positions: torch.Tensor) -> torch.Tensor:
        """Return `(batch, length, hidden_size)` embeddings of positions `(batch, length)`."""
        return self.embed_coordinates(positions)


class SparseTransformerForCausalLM(CausalLMHead, SparseTransformerPreTrainedModel, GenerationMixin):
    """Sparse Transformer language model."""

    body_class = SparseTransformerModel


class SparseTransformerForSequenceClassification(
    SparseTransformerPreTrainedModel, SparseDecoderForSequenceClassification
):
    """Sparse Transformer text classifier or regressor."""

    body_class = SparseTransformerModel


__all__ = [
    "SparseTransformerForCausalLM",
    "SparseTransformerForSequenceClassification",
    "SparseTransformerModel",
    "SparseTransformerPreTrainedModel",
]
