"""Transformer-XL: attention with relative positions over a segment and a memory of what came before it.

References:
    [1] Dai, Yang, Yang, Carbonell, Le and Salakhutdinov 2019, "Transformer-XL: Attentive Language Models beyond a
        Fixed-Length Context".
    [2] Baevski and Auli 2019, "Adaptive Input Representations for Neural Language Modeling".

Glossary (paper symbol: variable): W_q: `q_net`, W_{k,E} and W_v: `kv_net`, W_{k,R}: `r_net`; u: `content_bias`, v:
`position_bias`; R: `distance_encodings`; m: `SegmentMemoryLayer`, M: `mem_len`.

Deliberate deviations:
    * Keys and values of the memory are kept outside training, where weights stand still; the paper makes them anew from
      hidden states in every call, as training here does.
    * Distances and memory count real tokens: padding is not seen, not counted and not remembered, wherever it lies.
    * A new document in a row (`position_ids` 0, `seq_idx`) sees nothing before it, neither in the row nor in the memory.
    * Layers start with Glorot's standard deviations, which for the paper's widths are those of its N(0, 0.02) and more.
    * The queries' part of `qkv_net` is a layer of its own, so that none are made for the memory.

Complexity: O(length * (mem_len + length)) a layer; a generated token costs O(mem_len) whatever came before.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from ...nn.inputs import CACHE_FIELD, Batch, prepare
from ...nn.masks import end_token
from ..base import LNLMPreTrainedModel
from ..heads import CausalLMHead, SequenceClassificationHead
from .adaptive_vocabulary import AdaptiveEmbedding, ProjectedAdaptiveSoftmax, TransposedProjection
from .configuration_transfo_xl import TransformerXLConfig
from .relative_attention import (
    FeedForward,
    RelativeAttention,
    RelativeBiases,
    SegmentPlan,
    TransformerXLLayer,
    distance_encodings,
    plan_segment,
)
from .segment_memory import SegmentMemoryLayer


class TransformerXLPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation and traits that the Transformer-XL models share."""

    config: TransformerXLConfig
    _no_split_modules = ["TransformerXLLayer"]
    _can_record_outputs = {"hidden_states": TransformerXLLayer, "attentions": RelativeAttention}
    _no_weight_decay = (r"norm", r"bias", r"embed")
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        unit = self.config.hidden_size**-0.5  # of projections: they keep the variance of what they are given
        if isinstance(module, RelativeBiases):
            for bias in module.parameters():
                init.normal_(bias, std=self.config.initializer_range)
        elif isinstance(module, (RelativeAttention, FeedForward)):  # [1]'s 0.02 is small for narrow layers
            for child in module.children():
                if isinstance(child, nn.Linear):
                    init.xavier_uniform_(child.weight)
        elif isinstance(module, TransposedProjection):
            init.normal_(module.weight, std=unit)
        elif isinstance(module, AdaptiveEmbedding):
            for projection in module.projections:
                init.normal_(projection.weight, std=unit)  # type: ignore[arg-type]
        for name in ("embedding_projection", "output_projection"):
            projected = getattr(module, name, None)
            if projected is not None:
                init.normal_(projected.weight, std=unit)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embeddings, as in transformers.

        Raises:
            ValueError: they are adaptive: clusters belong to one vocabulary.
        """
        size = self.config.vocab_size
        if self.config.has_adaptive_embeddings and new_num_tokens not in (None, size):
            raise ValueError(f"adaptive embeddings cannot be resized from {size} to {new_num_tokens} tokens")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class TransformerXLModel(TransformerXLPreTrainedModel):
    """Embeddings and layers with a memory each, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__(config)
        width, wanted = int(config.embedding_size or config.hidden_size), config.hidden_size
        self.embed_tokens: nn.Module
        if config.has_adaptive_embeddings:
            self.embed_tokens = AdaptiveEmbedding(config.cluster_sizes, config.cluster_widths, wanted)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        plain = config.has_adaptive_embeddings or width == wanted
        self.embedding_projection = None if plain else nn.Linear(width, wanted, bias=False)
        heads = config.num_attention_heads
        self.biases = None if config.untie_r else RelativeBiases(heads, int(config.head_dim or 1))
        self.layers = nn.ModuleList([TransformerXLLayer(config) for _ in range(config.num_hidden_layers)])
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the model over a segment.

        Args:
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, config.input_width)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)`; position 0 begins a document, which sees nothing before it (packed rows).
            past_key_values: the memory, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the memory.
            seq_idx: `(batch, length)` document numbers of packed rows.
            kwargs: `cu_seq_lens_q` `(documents + 1,)`, offsets of the documents of a single packed row.

        Returns:
            last hidden state `(batch, length, hidden_size)` and the memory.

        Raises:
            ValueError: inputs, mask or memory do not fit each other or the config.
        """
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        memories = self._memories(batch)
        weights = bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)))
        dense = weights or batch.segments.traced or self.config._attn_implementation == "eager"
        zeros = self.config.mem_init == "zeros"
        plan = plan_segment(batch, memories[0], self.config.reach, zeros, dense, weights)
        hidden_states = batch.hidden
        if self.embedding_projection is not None:
            hidden_states = self.embedding_projection(hidden_states)
        hidden_states = self.dropout(hidden_states * self.config.hidden_size**0.5)
        keeps = not self.training and not is_torchdynamo_compiling()  # keys and values
        encodings = self._encodings(hidden_states, plan, memories[0], keeps and batch.cache is not None)
        shared = None if self.biases is None else self.biases(hidden_states)
        for layer, memory in zip(self.layers, memories, strict=True):
            past = memory.hidden if memory.columns else None
            entering = hidden_states
            hidden_states = layer(hidden_states, plan, encodings, shared, past, memory if keeps else None)
            if batch.cache is not None:
                begins = zeros and plan.news.fresh is not None
                memory.remember(entering, plan.news, self._initial(layer, entering, memory) if begins else None)
        hidden_states = self.dropout(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, **{CACHE_FIELD: batch.cache if use_cache else None}
        )

    def _memories(self, batch: Batch) -> list[SegmentMemoryLayer]:
        """Each layer's memory, begun if it is empty: the cache's, or ones for this call alone."""
        reach, rows = self.config.reach, batch.hidden.shape[0]
        held: list[Any] = [SegmentMemoryLayer() for _ in self.layers] if batch.cache is None else batch.cache.layers
        zeros = self.config.mem_init == "zeros" and reach.mem_len > 0
        for memory in held:
            memory.check_reach(reach)
            if zeros and memory.lengths is None:
                memory.begin(batch.hidden.new_zeros(rows, reach.mem_len, self.config.hidden_size))
        return held

    def _encodings(
        self, hidden_states: torch.Tensor, plan: SegmentPlan, memory: SegmentMemoryLayer, kept: bool
    ) -> torch.Tensor | None:
        """Encodings of the distances, or None where the memory has them: then of some more, for the tokens to come."""
        span = plan.span(memory.columns, hidden_states.shape[1])
        known = memory.relative
        if kept and known is not None and known.shape[2] >= span and known.dtype == hidden_states.dtype:
            return None
        if kept:
            span = max(span, min(self.config.mem_len + 1, 2 * span))
        width, furthest = self.config.hidden_size, self.config.clamp_len
        return self.dropout(distance_encodings(span, width, furthest, hidden_states))

    @staticmethod
    def _initial(layer: Any, hidden_states: torch.Tensor, memory: SegmentMemoryLayer) -> dict[str, torch.Tensor]:
        """One column of a memory of zeros, of those tensors that the memory has."""
        if memory.keys is None:
            return {"hidden": hidden_states.new_zeros(1, 1, hidden_states.shape[-1])}
        return layer.attention.initial(hidden_states)


class TransformerXLForCausalLM(CausalLMHead, TransformerXLPreTrainedModel, GenerationMixin):
    """Transformer-XL language model with a full, chunked or adaptive softmax."""

    body_class = TransformerXLModel

    def make_head(self, config: TransformerXLConfig) -> None:
        """Make the softmax; an adaptive one shares the embeddings' weights, and their projections where it is told to."""
        if config.loss_head != "adaptive":
            self.make_vocabulary_head(bias=True)
            return
        self.output_projection = None
        shared = not config.has_adaptive_embeddings
        self.lm_head = ProjectedAdaptiveSoftmax(config.cluster_sizes, config.cluster_widths, config.hidden_size, shared)
        self._tied_weights_keys = self._adaptive_ties(config, shared)

    def _adaptive_ties(self, config: TransformerXLConfig, shared: bool) -> dict[str, str]:
        """Names of the softmax's weights → names of the embeddings' that they are."""
        source = "model.embed_tokens"
        parts = range(len(config.cluster_sizes))
        ties = {f"lm_head.layers.{i}.weight": f"{source}.layers.{i}.weight" for i in parts}
        if shared:
            ties = {"lm_head.layers.0.weight": f"{source}.weight"}
        projected = config.tie_projections
        for i in range(len(self.lm_head.projections)):
            if projected[i] if projected is not None else i > 0:
                inner = "model.embedding_projection" if shared else f"{source}.projections.{i}"
                ties[f"lm_head.projections.{i}.weight"] = f"{inner}.weight"
        return ties


class TransformerXLForSequenceClassification(SequenceClassificationHead, TransformerXLPreTrainedModel):
    """Transformer-XL text classifier or regressor over the last real token."""

    body_class = TransformerXLModel

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Take the last real token; see `SequenceClassificationHead.pool`."""
        return end_token(hidden, mask)


__all__ = [
    "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification",
    "TransformerXLModel",
    "TransformerXLPreTrainedModel",
]
