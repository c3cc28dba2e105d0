"""What the causal sparse-attention families share: the layer loop, the language-model head and the classifier."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from ...nn.inputs import CACHE_FIELD, prepare
from ...nn.masks import end_token
from ..base import LNLMPreTrainedModel
from ..heads import SequenceClassificationHead
from .attention import AttentionPlan, attend, cached_counts, plan_attention


class SparseSelfAttention(nn.Module):
    """Base of the families' attention: a subclass makes the projections and calls `attend_heads`.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.patterns = config.patterns(layer_idx)
        self.scale = config.attention_scale
        self.attention_dropout = config.attention_dropout
        self.backend = config.backend

    def attend_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: AttentionPlan,
        past_key_values: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split `(batch, length, heads * head_dim)` projections into heads and attend by this layer's patterns."""
        rows = (query.shape[0], query.shape[1], -1, self.head_dim)
        heads = [x.view(rows).transpose(1, 2) for x in (query, key, value)]
        layer: Any = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        dropout = self.attention_dropout if self.training else 0.0
        return attend(
            heads[0], heads[1], heads[2], self.patterns, plan, layer, self.scale, dropout, self.backend
        )  # fmt: skip


class SparseDecoderPreTrainedModel(LNLMPreTrainedModel):
    """Traits that the causal sparse-attention models share."""

    _supports_sdpa = True
    _no_weight_decay = (r"norm", r"\.bias$", r"embed")


class SparseDecoderModel(SparseDecoderPreTrainedModel):
    """Embeddings, layers and a final norm; a subclass makes `embed_tokens`, `layers` and `norm`."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    embedding_dropout: nn.Module
    output_class: ClassVar[Any] = BaseModelOutputWithPast

    def position_embeddings(self, positions: torch.Tensor) -> torch.Tensor:
        """Return `(batch, length, hidden_size)` embeddings of positions `(batch, length)`."""
        raise NotImplementedError(f"{type(self).__name__} must define position_embeddings")

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
        """Run the model.

        Args:
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, hidden_size)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)` for the position embeddings; a real token at position 0 begins a document
                that sees nothing before it (packed rows). Counted over real tokens if None.
            past_key_values: past keys and values, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the cache.
            seq_idx: `(batch, length)` document numbers of packed rows.
            kwargs: `cu_seq_lens_q` `(documents + 1,)`, offsets of the documents of a single packed row.

        Returns:
            last hidden state `(batch, length, hidden_size)` and the cache.

        Raises:
            ValueError: inputs, mask or cache do not fit each other or the config.
        """
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        hidden_states, cache = batch.hidden, batch.cache
        weights = bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)))
        dense = weights or self.config._attn_implementation == "eager"
        plan = plan_attention(batch, position_ids, dense, weights)
        self._check_positions(plan, cache)
        hidden_states = self.embedding_dropout(hidden_states + self.position_embeddings(plan.positions))
        hidden_states, found = self.run_layers(hidden_states, plan, cache)
        found[CACHE_FIELD] = cache if use_cache else None
        return self.output_class(last_hidden_state=self.norm(hidden_states), **found)

    def run_layers(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, cache: Cache | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return what the layers make of `(batch, length, hidden_size)`, and further outputs by name."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, plan=plan, past_key_values=cache)
        return hidden_states, {}

    def _check_positions(self, plan: AttentionPlan, cache: Cache | None) -> None:
        if is_torchdynamo_compiling():
            return
        low, high = plan.positions.aminmax()
        longest, limit = int(high) + 1, self.config.max_position_embeddings
        if longest > limit or int(low) < 0:
            counts = cached_counts(cache)
            past = 0 if counts is None else int(torch.as_tensor(counts).max())
            raise ValueError(
                f"max_position_embeddings is {limit}: the sequence needs position {longest - 1} ({past} are cached)"
            )


class SparseDecoderForSequenceClassification(SequenceClassificationHead, SparseDecoderPreTrainedModel):
    """Classifier over the last real token."""

    def make_head(self, config: Any) -> None:
        """Make `dropout` and `score`, which has no bias."""
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.head_width, config.num_labels, bias=False)

    @property
    def classifier(self) -> nn.Module:
        """The last layer, by the name that other families have for it."""
        return self.score

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Take the last real token; see `SequenceClassificationHead.pool`."""
        return end_token(hidden, mask)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts; see `SequenceClassificationHead.forward` for the other arguments.

        Args:
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            past_key_values: keys and values of what comes before the text, such as a learnt prefix.
        """
        return super().forward(
            input_ids, attention_mask, inputs_embeds, labels, past_key_values=past_key_values, **kwargs
        )
