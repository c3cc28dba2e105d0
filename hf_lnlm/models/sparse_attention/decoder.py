"""What the causal sparse-attention families share: the layer loop, the language-model head and the classifier."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from ...nn.loss_heads import classification_loss, next_token_labels
from ...nn.masks import end_token
from ..base import LNLMPreTrainedModel
from .attention import AttentionPlan, attend, cached_counts, own_cache, plan_attention


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
        heads = [x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value)]
        layer: Any = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        dropout = self.attention_dropout if self.training else 0.0
        return attend(
            heads[0], heads[1], heads[2], self.patterns, plan, layer, self.scale, dropout, self.backend
        )  # fmt: skip


class SparseDecoderPreTrainedModel(LNLMPreTrainedModel):
    """Traits that the causal sparse-attention models share."""

    _is_stateful = True
    _supports_sdpa = True
    _no_weight_decay = (r"norm", r"\.bias$", r"embed")


class SparseDecoderModel(SparseDecoderPreTrainedModel):
    """Embeddings, layers and a final norm; a subclass makes `embed_tokens`, `layers` and `norm`."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    embedding_dropout: nn.Module

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

        Returns:
            last hidden state `(batch, length, hidden_size)` and the cache.

        Raises:
            ValueError: inputs, mask or cache do not fit each other or the config.
        """
        hidden_states = self._embed(input_ids, inputs_embeds)
        cache = own_cache(past_key_values, use_cache, self.config, hidden_states.shape[0])
        weights = bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)))
        dense = weights or self.config._attn_implementation == "eager"
        plan = plan_attention(hidden_states, attention_mask, position_ids, seq_idx, cache, dense, weights)
        self._check_positions(plan, cache)
        hidden_states = self.embedding_dropout(hidden_states + self.position_embeddings(plan.positions))
        for layer in self.layers:
            hidden_states = layer(hidden_states, plan=plan, past_key_values=cache)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=cache if use_cache else None
        )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            found = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {found}")
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if embeddings.shape[1] == 0:
            raise ValueError(f"the input has no positions: shape {tuple(embeddings.shape[:2])}")
        return embeddings

    def _check_positions(self, plan: AttentionPlan, cache: Cache | None) -> None:
        if is_torchdynamo_compiling():
            return
        longest, limit = int(plan.positions.max()) + 1, self.config.max_position_embeddings
        if longest > limit or int(plan.positions.min()) < 0:
            counts = cached_counts(cache)
            past = 0 if counts is None else int(counts.max())
            raise ValueError(
                f"max_position_embeddings is {limit}: the sequence needs position {longest - 1} ({past} are cached)"
            )


class SparseDecoderForCausalLM(SparseDecoderPreTrainedModel):
    """Language-model head; a subclass makes `model` and `lm_head`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model: SparseDecoderModel
    lm_head: nn.Linear

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model and, given labels, its loss; see `SparseDecoderModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the input ids; shifted inside. -100 is ignored.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            kwargs: `shift_labels` `(batch, length)`, labels already shifted, used in place of `labels`, and
                `num_items_in_batch`, by which the summed loss is divided, as Trainer gives them.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)` and the cache.
        """
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # in the signature, Trainer would take it for a column of labels
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        given = shift_labels if labels is None else labels
        if given is not None:
            targets = next_token_labels(given, shift_labels)
            loss = self.loss_function(
                logits, None, self.config.vocab_size, shift_labels=targets, num_items_in_batch=items
            )  # fmt: skip
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SparseDecoderForSequenceClassification(SparseDecoderPreTrainedModel):
    """Classifier over the last real token; a subclass makes `model`, `dropout` and `score`."""

    model: SparseDecoderModel
    dropout: nn.Module
    score: nn.Linear

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, zero at padding, which may lie anywhere.
            inputs_embeds: `(batch, length, hidden_size)` instead of `input_ids`.
            labels: `(batch,)` class ids, or values as `config.problem_type` wants them.

        Returns:
            loss and logits `(batch, num_labels)`. A row without any real token is classified from zeros.
        """
        kwargs["use_cache"] = False
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        mask = None if attention_mask is None else attention_mask.bool()
        logits = self.score(self.dropout(end_token(outputs.last_hidden_state, mask)))
        loss = None if labels is None else classification_loss(logits, labels, self.config, items)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
