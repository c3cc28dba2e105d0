"""Linformer: a BERT-shaped encoder whose keys and values are projected along the sequence to a fixed number of slots.

References:
    [1] Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768.
    [2] Devlin et al. 2019, "BERT"; Liu et al. 2019, "RoBERTa" (blocks and heads).
    [3] Clark et al. 2020, "ELECTRA" (the discriminator); [4] Zhu et al. 2021, "Long-Short Transformer" (causality).

Glossary (paper symbol: variable): n: `max_position_embeddings`, k: `projected_size`; E, F: `key_projection`,
`value_projection`; W^Q, W^K, W^V, W^O: `query`, `key`, `value`, `dense`.

Deliberate deviations:
    * Padding is zeroed before it is projected, and E and F are indexed by position, so a padded batch equals its
      unpadded rows. The published implementations let padding into every slot.
    * E and F start with standard deviation n^-1/2, so that projected keys have the scale of keys; [1] has k^-1/2.
    * A causal Linformer is the segment variant only: in [1] every slot mixes all positions, which no mask undoes.

Complexity: O(length * projected_size) a layer in time. Memory of a training step is about that of fused full attention,
which stores no scores either; it is far below that of eager attention.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.loss_heads import IGNORED, classification_loss, next_token_labels, normalised
from ..base import LNLMPreTrainedModel
from .attention import AttentionPlan, check_mask_values, own_cache, plan_attention
from .configuration_linformer import LinformerConfig
from .linformer_attention import LinformerAttention, LinformerLayer
from .linformer_heads import LinformerPooler, encoder_inputs, label_loss, position_loss
from .linformer_projection import (
    LearnedProjection,
    TokenPlan,
    WindowProjection,
    build_projection,
    plan_tokens,
    resized_embedding,
)


class LinformerPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation and traits that the Linformer models share."""

    config: LinformerConfig
    _no_split_modules = ["LinformerLayer"]
    _can_record_outputs = {"hidden_states": LinformerLayer, "attentions": LinformerAttention}
    _supports_sdpa = True
    _is_stateful = True
    _no_weight_decay = (r"norm", r"\.bias$", r"embed")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LearnedProjection):
            init.normal_(module.weight, std=module.weight.shape[-2] ** -0.5)
        if isinstance(module, WindowProjection) and module.weight is not None:
            init.constant_(module.weight, 1.0 / module.window)

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Make room for longer (or shorter) inputs: interpolates the position embeddings, E and F along the positions.

        Args:
            new_num_position_embeddings: the new n, in tokens.

        Raises:
            ValueError: the new n does not fit the projection (fewer than k, or not a multiple where windows need it).
        """
        config = copy.deepcopy(self.config)
        config.projected_size = config.projected(0) if config.projected_size is None else config.projected_size
        config.segment_size, config.segment_summaries = config.segment
        config.max_position_embeddings = new_num_position_embeddings
        config.check_bounds()
        for module in self.modules():
            if isinstance(module, LinformerModel):
                module.resize_to(new_num_position_embeddings)
        for name in ("projected_size", "segment_size", "segment_summaries", "max_position_embeddings"):
            setattr(self.config, name, getattr(config, name))

    def get_position_embeddings(self) -> nn.Embedding:
        """Return the position embeddings."""
        return self.base_model.embed_positions


class LinformerModel(LinformerPreTrainedModel):
    """Embeddings and Linformer layers, without a head.

    Args:
        config: the model's configuration; with `is_decoder` the layers are the causal variant's.
    """

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        one_for_all = config.sharing == "layerwise" and not config.is_decoder
        self.shared_projection = build_projection(config, 0) if one_for_all else None
        self.layers = nn.ModuleList([LinformerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
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
            attention_mask: `(batch, length)` (causal: `(batch, past + length)`), zero at padding, which may lie
                anywhere.
            token_type_ids: `(batch, length)` segment types; 0 if None.
            position_ids: `(batch, length)`, all different within a row; counted over real tokens if None.
            past_key_values: the causal variant's past, a `DynamicCache(config=model.config)`.
            use_cache: whether the causal variant returns its cache.
            seq_idx: `(batch, length)` document numbers of packed rows; the causal variant keeps them apart.

        Returns:
            last hidden state `(batch, length, hidden_size)` and, if causal, the cache.

        Raises:
            ValueError: inputs do not fit each other or the config, or are longer than the model.
        """
        hidden = self._embed_tokens(input_ids, inputs_embeds)
        dense = self.config._attn_implementation == "eager"
        weights = bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)))
        check_mask_values(attention_mask)
        cache, plan = self._plan(
            hidden, attention_mask, (position_ids, seq_idx), past_key_values, use_cache, dense, weights
        )
        types = torch.zeros_like(plan.positions) if token_type_ids is None else token_type_ids
        hidden = hidden + self.embed_positions(plan.positions) + self.embed_types(types)
        hidden = self.embedding_dropout(self.embedding_norm(hidden))
        for layer in self.layers:
            hidden = layer(hidden, plan=plan, shared=self.shared_projection, past_key_values=cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache if use_cache else None)

    def _embed_tokens(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            found = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {found}")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.shape[1] == 0:
            raise ValueError(f"the input has no positions: shape {tuple(hidden.shape[:2])}")
        return hidden

    def _plan(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        markers: tuple[torch.Tensor | None, torch.Tensor | None],
        past_key_values: Cache | None,
        use_cache: bool | None,
        dense: bool,
        weights: bool,
    ) -> tuple[Cache | None, AttentionPlan | TokenPlan]:
        longest, (position_ids, seq_idx) = self.config.max_position_embeddings, markers
        if not self.config.is_decoder:
            if past_key_values is not None:
                raise ValueError("a bidirectional Linformer reads whole sequences: past_key_values must be None")
            if seq_idx is not None:
                raise ValueError("a bidirectional Linformer reads one text a row: seq_idx must be None")
            return None, plan_tokens(hidden, attention_mask, position_ids, longest, dense, weights)
        cache = own_cache(past_key_values, use_cache, self.config, hidden.shape[0])
        plan = plan_attention(hidden, attention_mask, position_ids, seq_idx, cache, dense or weights, weights)
        if not plan.marks.traced and int(plan.positions.max()) >= longest:
            raise ValueError(
                f"max_position_embeddings is {longest}, the input needs position {int(plan.positions.max())}"
            )
        return cache, plan

    def resize_to(self, longest: int) -> None:
        """Interpolate position embeddings and projections to `longest` positions; `resize_position_embeddings`
        checks."""
        self.embed_positions = resized_embedding(self.embed_positions, longest)
        if self.config.is_decoder:
            return
        for module in self.modules():
            if isinstance(module, (LearnedProjection, WindowProjection)):
                module.resize(longest)


class LinformerForCausalLM(LinformerPreTrainedModel, GenerationMixin):
    """Language model on the segment-causal variant: exact within a segment, summaries of the completed ones.

    Args:
        config: the model's configuration; the head sets its `is_decoder`.

    Raises:
        ValueError: `causal_variant` is None: a plain Linformer cannot be causal.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = [r"(key|value|shared)_projection"]

    def __init__(self, config: LinformerConfig) -> None:
        config.is_decoder = True
        config.check_bounds()
        super().__init__(config)
        self.model = LinformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model and, given labels, its loss; see `LinformerModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the input ids; shifted inside. -100 is ignored.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)` and the cache.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss, given = None, shift_labels if labels is None else labels
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


class LinformerEncoderHead(LinformerPreTrainedModel):
    """Base of the bidirectional heads: makes the encoder and runs it.

    Args:
        config: the model's configuration; the head unsets its `is_decoder`.
    """

    def __init__(self, config: LinformerConfig) -> None:
        config.is_decoder = False
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = LinformerModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)

    def encode(self, inputs: dict[str, Any], kwargs: dict[str, Any]) -> BaseModelOutputWithPast:
        """Run the encoder on `inputs` of `forward`, leaving what only losses read to the head."""
        kept = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        return self.model(**inputs, **{**kept, "use_cache": False})


class LinformerForMaskedLM(LinformerEncoderHead):
    """Linformer with a masked-language-model head.

    Args:
        config: the model's configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.transform = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            ACT2FN[config.hidden_act],
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict masked tokens; see `LinformerModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the right ids at masked positions, -100 elsewhere.

        Returns:
            loss in nats a masked token and logits `(batch, length, vocab_size)`.
        """
        inputs = encoder_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.encode(inputs, kwargs)
        logits = self.lm_head(self.transform(outputs.last_hidden_state))
        loss = None if labels is None else label_loss(logits, labels, kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForSequenceClassification(LinformerEncoderHead):
    """Linformer text classifier or regressor.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.pooler = LinformerPooler(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts; see `LinformerModel.forward` for the other arguments.

        Args:
            labels: `(batch,)` class ids, or values as `config.problem_type` wants them.

        Returns:
            loss and logits `(batch, num_labels)`.
        """
        inputs = encoder_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.encode(inputs, kwargs)
        logits = self.classifier(self.dropout(self.pooler(outputs.last_hidden_state, attention_mask)))
        loss = (
            None
            if labels is None
            else classification_loss(logits, labels, self.config, kwargs.get("num_items_in_batch"))
        )
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForTokenClassification(LinformerEncoderHead):
    """Linformer tagger.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Tag tokens; see `LinformerModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)` class ids; -100 is ignored.

        Returns:
            loss and logits `(batch, length, num_labels)`.
        """
        inputs = encoder_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.encode(inputs, kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else label_loss(logits, labels, kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForQuestionAnswering(LinformerEncoderHead):
    """Linformer with span start and end logits.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Score where an answer begins and ends; see `LinformerModel.forward` for the other arguments.

        Args:
            start_positions: `(batch,)` column of the first token of the answer; columns outside the text are ignored.
            end_positions: `(batch,)` that of the last.

        Returns:
            loss (the mean of both ends') and logits `(batch, length)` for each end.
        """
        inputs = encoder_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.encode(inputs, kwargs)
        start, end = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (position_loss(start, start_positions, kwargs) + position_loss(end, end_positions, kwargs)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LinformerForMultipleChoice(LinformerEncoderHead):
    """Linformer that chooses between continuations.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.pooler = LinformerPooler(config)
        self.choice = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Score choices; every argument has a dimension of choices after the batch.

        Args:
            input_ids: `(batch, choices, length)`; or give `inputs_embeds`.
            attention_mask: `(batch, choices, length)`, zero at padding.
            token_type_ids: `(batch, choices, length)` segment types.
            position_ids: `(batch, choices, length)`.
            inputs_embeds: `(batch, choices, length, hidden_size)`.
            labels: `(batch,)` the right choice.

        Returns:
            loss and logits `(batch, choices)`.

        Raises:
            ValueError: neither `input_ids` nor `inputs_embeds` is given.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds, got neither")
        flat = {
            name: None if value is None else value.flatten(0, 1)
            for name, value in encoder_inputs(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
            ).items()
        }
        outputs = self.encode(flat, kwargs)
        pooled = self.pooler(outputs.last_hidden_state, flat["attention_mask"])
        logits = self.choice(self.dropout(pooled)).view(given.shape[0], given.shape[1])
        loss = None if labels is None else label_loss(logits, labels, kwargs)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LinformerForPreTraining(LinformerEncoderHead):
    """ELECTRA-style discriminator [3]: was each token replaced?

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.discriminator = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Score tokens; see `LinformerModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, 1 where the token was replaced, 0 where it is original; -100 and padding are
                ignored.

        Returns:
            loss in nats a token and logits `(batch, length)`, positive for replaced.
        """
        inputs = encoder_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.encode(inputs, kwargs)
        logits = self.discriminator(self.activation(self.transform(outputs.last_hidden_state))).squeeze(-1)
        loss = None
        if labels is not None:
            counted = labels != IGNORED if attention_mask is None else (labels != IGNORED) & attention_mask.bool()
            wanted = labels.clamp(min=0).to(logits)
            each = binary_cross_entropy_with_logits(logits.float(), wanted.float(), reduction="none")
            total = (each * counted).sum()
            loss = normalised(total, counted.sum(), kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "LinformerForCausalLM", "LinformerForMaskedLM", "LinformerForMultipleChoice", "LinformerForPreTraining",
    "LinformerForQuestionAnswering", "LinformerForSequenceClassification", "LinformerForTokenClassification",
    "LinformerModel", "LinformerPreTrainedModel",
]  # fmt: skip
