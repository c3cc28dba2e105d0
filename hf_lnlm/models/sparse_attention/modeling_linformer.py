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
from typing import Any, ClassVar

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
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.inputs import CACHE_FIELD, Batch, prepare
from ...nn.loss_heads import IGNORED, check_labels, classification_loss, normalised
from ..base import LNLMPreTrainedModel
from ..heads import CausalLMHead, Head, QuestionAnsweringHead, VocabularyHead, passthrough_outputs
from .attention import AttentionPlan, plan_attention
from .configuration_linformer import LinformerConfig
from .linformer_attention import LinformerAttention, LinformerLayer
from .linformer_heads import LinformerPooler, label_loss
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

    def get_position_embeddings(self) -> Any:
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
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        hidden, cache = batch.hidden, batch.cache
        dense = self.config._attn_implementation == "eager"
        weights = bool(kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)))
        packed = "seq_idx" if seq_idx is not None else "cu_seq_lens_q"
        if not self.config.is_decoder and (seq_idx is not None or kwargs.get(packed) is not None):
            raise ValueError(f"a bidirectional Linformer reads one text a row: {packed} must be None")
        plan = self._plan(batch, position_ids, dense, weights)
        hidden = hidden + self.embed_positions(plan.positions) + self._types(token_type_ids, plan.positions)
        hidden = self.embedding_dropout(self.embedding_norm(hidden))
        for layer in self.layers:
            hidden = layer(hidden, plan=plan, shared=self.shared_projection, past_key_values=cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_FIELD: cache if use_cache else None})

    def _types(self, token_type_ids: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Embeddings of the segment types, those of type 0 if none are given."""
        if token_type_ids is None:
            return self.embed_types(torch.zeros_like(positions))
        batch, length = positions.shape
        if tuple(token_type_ids.shape) not in ((batch, length), (1, length)):
            raise ValueError(f"token_type_ids must have shape ({batch}, {length}), got {tuple(token_type_ids.shape)}")
        try:
            return self.embed_types(token_type_ids)
        except IndexError as error:  # torch names neither the argument nor its value
            last = self.config.type_vocab_size - 1
            low, high = (int(value) for value in token_type_ids.aminmax())
            raise ValueError(f"token_type_ids must be between 0 and {last}, got {low} to {high}") from error

    def _plan(
        self, batch: Batch, position_ids: torch.Tensor | None, dense: bool, weights: bool
    ) -> AttentionPlan | TokenPlan:
        longest = self.config.max_position_embeddings
        if not self.config.is_decoder:
            return plan_tokens(batch.hidden, batch.segments.mask, position_ids, longest, dense, weights)
        plan = plan_attention(batch, position_ids, dense or weights, weights)
        if not plan.segments.traced and int(plan.positions.max()) >= longest:
            raise ValueError(
                f"max_position_embeddings is {longest}, the input needs position {int(plan.positions.max())}"
            )
        return plan

    def resize_to(self, longest: int) -> None:
        """Interpolate position embeddings and projections to `longest` positions; `resize_position_embeddings`
        checks."""
        self.embed_positions = resized_embedding(self.embed_positions, longest)
        if self.config.is_decoder:
            return
        for module in self.modules():
            if isinstance(module, (LearnedProjection, WindowProjection)):
                module.resize(longest)


class LinformerForCausalLM(CausalLMHead, LinformerPreTrainedModel, GenerationMixin):
    """Language model on the segment-causal variant: exact within a segment, summaries of the completed ones.

    Args:
        config: the model's configuration; the head sets its `is_decoder`.

    Raises:
        ValueError: `causal_variant` is None: a plain Linformer cannot be causal.
    """

    _keys_to_ignore_on_load_unexpected = [r"(key|value|shared)_projection"]

    body_class = LinformerModel

    def __init__(self, config: LinformerConfig) -> None:
        config.is_decoder = True
        config.check_bounds()
        super().__init__(config)

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
        """Run the model and, given labels, its loss; see `CausalLMHead.forward` for the other arguments.

        Args:
            token_type_ids: `(batch, length)` segment types; 0 if None.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache)
        return super().forward(*inputs, logits_to_keep, seq_idx, token_type_ids=token_type_ids, **kwargs)


class LinformerEncoderHead(Head, LinformerPreTrainedModel):
    """Base of the bidirectional heads: makes the encoder and runs it; a head adds `make_head` and `read`.

    Args:
        config: the model's configuration; the head unsets its `is_decoder`.
    """

    body_class = LinformerModel
    output_class: ClassVar[Any]

    def __init__(self, config: LinformerConfig) -> None:
        config.is_decoder = False
        super().__init__(config)

    def read(self, hidden: torch.Tensor, mask: Any, labels: Any, items: Any) -> tuple[Any, torch.Tensor | None]:
        """Return loss (None without labels) and logits.

        Args:
            hidden: `(batch, length, hidden_size)` the encoder's output.
            mask: `(batch, length)` zero at padding; None for none.
            labels: as in `forward`.
            items: number of labels of the whole accumulated batch, or None.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it reads")

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
    ) -> Any:
        """Run the encoder and the head; see `LinformerModel.forward` for the other arguments.

        Args:
            labels: what the head is to find, as its class says.

        Returns:
            loss and logits, of the shape that the class says.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        outputs = self.model(*inputs, inputs_embeds=inputs_embeds, **{**kwargs, "use_cache": False})
        items = kwargs.get("num_items_in_batch")
        loss, logits = self.read(outputs.last_hidden_state, attention_mask, labels, items)
        return self.output_class(loss=loss, logits=logits, **passthrough_outputs(outputs, self.output_class))


class LinformerForMaskedLM(VocabularyHead, LinformerEncoderHead):
    """Linformer with a masked-language-model head.

    Labels are `(batch, length)`, the right ids at masked positions and -100 elsewhere; logits `(batch, length,
    vocab_size)`, None while training with a chunked or adaptive head.
    """

    output_class: ClassVar[Any] = MaskedLMOutput

    def make_head(self, config: LinformerConfig) -> None:
        """Make what comes before the softmax, and the softmax."""
        self.transform = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            ACT2FN[config.hidden_act],
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        )
        self.make_vocabulary_head(bias=True)

    def read(self, hidden: torch.Tensor, mask: Any, labels: Any, items: Any) -> tuple[Any, torch.Tensor | None]:
        """Score the vocabulary; see `LinformerEncoderHead.read`."""
        if labels is not None:
            check_labels(labels, self.config.vocab_size, hidden.shape[:2])
        return self.loss_and_logits(self.transform(hidden), labels, 0, items)

    def vocabulary_loss(self, logits: torch.Tensor, targets: torch.Tensor, items: Any) -> torch.Tensor:
        """Return the mean loss in nats a labelled token."""
        return label_loss(logits, targets, items)


class LinformerForSequenceClassification(LinformerEncoderHead):
    """Linformer text classifier or regressor.

    Labels are `(batch,)` class ids, or values as `config.problem_type` wants them; logits `(batch, num_labels)`.
    """

    output_class: ClassVar[Any] = SequenceClassifierOutput

    def make_head(self, config: LinformerConfig) -> None:
        """Make pooler and classifier."""
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.pooler = LinformerPooler(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)

    def read(self, hidden: torch.Tensor, mask: Any, labels: Any, items: Any) -> tuple[Any, torch.Tensor | None]:
        """Classify texts; see `LinformerEncoderHead.read`."""
        logits = self.classifier(self.dropout(self.pooler(hidden, mask)))
        return None if labels is None else classification_loss(logits, labels, self.config, items), logits


class LinformerForTokenClassification(LinformerEncoderHead):
    """Linformer tagger.

    Labels are `(batch, length)` class ids, -100 is ignored; logits `(batch, length, num_labels)`.
    """

    output_class: ClassVar[Any] = TokenClassifierOutput

    def make_head(self, config: LinformerConfig) -> None:
        """Make the classifier."""
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)

    def read(self, hidden: torch.Tensor, mask: Any, labels: Any, items: Any) -> tuple[Any, torch.Tensor | None]:
        """Tag tokens; see `LinformerEncoderHead.read`."""
        logits = self.classifier(self.dropout(hidden))
        return label_loss(logits, labels, items), logits


class LinformerForQuestionAnswering(QuestionAnsweringHead, LinformerPreTrainedModel):
    """Linformer with span start and end logits.

    Args:
        config: the model's configuration; the head unsets its `is_decoder`.
    """

    body_class = LinformerModel
    drops = False

    def __init__(self, config: LinformerConfig) -> None:
        config.is_decoder = False
        super().__init__(config)

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
        """Score where an answer begins and ends; see `QuestionAnsweringHead` and `LinformerModel.forward`."""
        places: Any = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs = (input_ids, attention_mask, inputs_embeds, start_positions, end_positions)
        return super().forward(*inputs, **places, **kwargs)


class LinformerForMultipleChoice(LinformerEncoderHead):
    """Linformer that chooses between continuations.

    Every argument of `forward` has a dimension of choices after the batch: ids `(batch, choices, length)`, embeddings
    `(batch, choices, length, hidden_size)`. Labels are `(batch,)`, the right choice; logits `(batch, choices)`.
    """

    output_class: ClassVar[Any] = MultipleChoiceModelOutput

    def make_head(self, config: LinformerConfig) -> None:
        """Make pooler and the score of a choice."""
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.pooler = LinformerPooler(config)
        self.choice = nn.Linear(config.hidden_size, 1)

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
        """Score choices; see the class for the shapes and `LinformerModel.forward` for the arguments."""
        inputs: Any = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flat = [None if value is None else value.flatten(0, 1) for value in inputs]
        outputs = super().forward(*flat, **{**kwargs, "return_dict": True})
        logits = outputs.logits.view(inputs[0 if inputs_embeds is None else 4].shape[:2])
        loss = label_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(**{**outputs, "loss": loss, "logits": logits})

    def read(self, hidden: torch.Tensor, mask: Any, labels: Any, items: Any) -> tuple[Any, torch.Tensor | None]:
        """Score each text by itself, without a loss; see `LinformerEncoderHead.read`."""
        return None, self.choice(self.dropout(self.pooler(hidden, mask)))


class LinformerForPreTraining(LinformerEncoderHead):
    """ELECTRA-style discriminator [3]: was each token replaced?

    Labels are `(batch, length)`, 1 where the token was replaced and 0 where it is original; -100 and padding are
    ignored. Logits `(batch, length)` are positive for replaced.
    """

    output_class: ClassVar[Any] = TokenClassifierOutput

    def make_head(self, config: LinformerConfig) -> None:
        """Make the discriminator."""
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.discriminator = nn.Linear(config.hidden_size, 1)

    def read(self, hidden: torch.Tensor, mask: Any, labels: Any, items: Any) -> tuple[Any, torch.Tensor | None]:
        """Score tokens; see `LinformerEncoderHead.read`."""
        logits = self.discriminator(self.activation(self.transform(hidden))).squeeze(-1)
        if labels is None:
            return None, logits
        check_labels(labels, 2, logits.shape)
        counted = labels != IGNORED if mask is None else (labels != IGNORED) & mask.bool()
        wanted = labels.clamp(min=0).to(logits)
        each = binary_cross_entropy_with_logits(logits.float(), wanted.float(), reduction="none")
        return normalised((each * counted).sum(), counted.sum(), items), logits


__all__ = [
    "LinformerForCausalLM", "LinformerForMaskedLM", "LinformerForMultipleChoice", "LinformerForPreTraining",
    "LinformerForQuestionAnswering", "LinformerForSequenceClassification", "LinformerForTokenClassification",
    "LinformerModel", "LinformerPreTrainedModel",
]  # fmt: skip
