"""GPT-3: GPT-2 blocks whose layers alternate between dense and locally banded attention.

References:
    [1] Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.1.
    [2] Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (the banded layers).
    [3] Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2: blocks and initialisation).

Glossary (paper term: variable): locally banded: `SparsePattern("local", band_size)`; n_ctx: `max_position_embeddings`.

Deliberate deviations:
    * The width of the band and which kind of layer comes first are not public: 256 tokens and dense first are our
      choice.
    * Weights are `nn.Linear`, not GPT-2's transposed Conv1D, under GPT-2's names (`c_attn`, `c_proj`, `c_fc`).
    * Padding is not attended to from anywhere and may lie anywhere; padded queries attend to nothing.

Complexity: a dense layer O(length^2), a banded one O(length * band); a banded layer caches `band_size - 1` entries a
row.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from ..heads import CausalLMHead
from .attention import AttentionPlan
from .configuration_gpt3 import GPT3Config
from .decoder import (
    SparseDecoderForSequenceClassification,
    SparseDecoderModel,
    SparseDecoderPreTrainedModel,
)
from .gpt2_parts import GPT3MLP, GPT3Attention


class GPT3Block(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each with a residual connection.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: GPT3Config, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPT3Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPT3MLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """Run the block over `(batch, length, hidden_size)`."""
        attended, _ = self.attn(self.ln_1(hidden_states), plan, past_key_values)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.ln_2(hidden_states)))


class GPT3PreTrainedModel(SparseDecoderPreTrainedModel):
    """Weight initialisation and traits that the GPT-3 models share."""

    config: GPT3Config
    _no_split_modules = ["GPT3Block"]
    _can_record_outputs = {"hidden_states": GPT3Block, "attentions": GPT3Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (GPT3Attention, GPT3MLP)):  # [3]: residual paths shrink with depth
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.c_proj.weight, std=std)


class GPT3Model(GPT3PreTrainedModel, SparseDecoderModel):
    """Embeddings, alternating dense and banded blocks and a final norm, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: GPT3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([GPT3Block(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def position_embeddings(self, positions: torch.Tensor) -> torch.Tensor:
        """Return `(batch, length, hidden_size)` embeddings of positions `(batch, length)`."""
        return self.embed_positions(positions)


class GPT3ForCausalLM(CausalLMHead, GPT3PreTrainedModel, GenerationMixin):
    """GPT-3 language model."""

    body_class = GPT3Model


class GPT3ForSequenceClassification(GPT3PreTrainedModel, SparseDecoderForSequenceClassification):
    """GPT-3 text classifier or regressor."""

    body_class = GPT3Model


__all__ = ["GPT3ForCausalLM", "GPT3ForSequenceClassification", "GPT3Model", "GPT3PreTrainedModel"]
