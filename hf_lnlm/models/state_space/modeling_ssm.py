"""Selective state space models: language models, masked language models, classifiers, taggers, readers.

References:
    [1] Gu, Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.
    [2] Dao, Gu 2024, "Transformers are SSMs", arXiv 2405.21060.
    [3] Lahoti et al. 2026, "Mamba-3", arXiv 2603.15569.
    [4] Schiff et al. 2024, "Caduceus", arXiv 2403.03234 (two directions between one pair of projections).

Glossary: see mixers.py. A layer is `x + mixer(norm(x))`.

Deliberate deviations:
    * Initial weights are those of the authors' code: N(0, 0.02) embeddings, output projections smaller by
      `sqrt(num_hidden_layers)`, and for mamba2 A uniform in [1, 16].
    * No weight decay on A_log, D, step biases and norms, through `_no_weight_decay`.
    * Masked tokens and documents of packed rows are exact in every path; see mixers.py.

Complexity: O(length) time, O(1) state, but for the attention layers of hybrid models.
"""

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...nn.loss_heads import next_token_labels
from ...nn.masks import end_token
from ...nn.pooling import max_over_time, mean_over_time
from ..base import LNLMPreTrainedModel
from ..heads import QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .attention import SSMSelfAttention, attention_scores_mask
from .configuration_ssm import ATTENTION, SelectiveSSMConfig
from .layers import SSMRMSNorm
from .marks import ScanMarks, scan_marks
from .mixers import MIXER_CLASSES, Mixer, S6Mixer, SSDMixer, States, TrapezoidalMixer


class SelectiveSSMBlock(GradientCheckpointingLayer):
    """One layer: norm, mixer (in one or both directions) or attention, residual.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: SelectiveSSMConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.attends = config.layer_types[layer_idx] == ATTENTION
        self.norm = SSMRMSNorm(config.hidden_size, config.layer_norm_epsilon, config.backend)
        self.mixer: Any = SSMSelfAttention(config, layer_idx) if self.attends else MIXER_CLASSES[config.mixer](config)
        self.reverse_mixer: Any = None
        if config.bidirectional == "add" and not self.attends:
            self.reverse_mixer = MIXER_CLASSES[config.mixer](config)
        if config.bidirectional == "tied" and not self.attends:
            self.mixer.reverse = MIXER_CLASSES[config.mixer](config, projections=False)
        self.decodes_fused = not self.attends and not config.reads_both_ways and self.mixer.fuses

    def forward(
        self,
        hidden_states: torch.Tensor,
        states: States | None,
        marks: ScanMarks,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, States | None]:
        """Run the layer.

        Args:
            hidden_states: `(batch, length, hidden_size)`.
            states: the mixer's carried states, or None for zeros.
            marks: real tokens and documents.
            attention_mask: added to an attention layer's scores.
            past_key_values: an attention layer's keys.

        Returns:
            the same shape, and the mixer's new states (None for attention).
        """
        alone = hidden_states.shape[1] == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if alone and self.decodes_fused:
            decoded = self.mixer.token(hidden_states, self.norm, states, marks)
            if decoded is not None:
                return decoded
        normal = self.norm(hidden_states.to(self.norm.weight.dtype))
        widen = self.residual_in_fp32 and hidden_states.dtype != torch.float64
        residual = hidden_states.float() if widen else hidden_states
        if self.attends:
            return residual + self.mixer(normal, attention_mask, past_key_values)[0], None
        if self.reverse_mixer is not None:
            backwards = self.reverse_mixer(normal.flip(1), None, marks.reversed())[0]
            return residual + self.mixer(normal, None, marks)[0] + backwards.flip(1), None
        mixed, states = self.mixer(normal, states, marks)
        return residual + mixed, states


class SelectiveSSMPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation and traits that the selective state space models share."""

    config: SelectiveSSMConfig
    _no_split_modules = ["SelectiveSSMBlock"]
    _can_record_outputs = {
        "hidden_states": SelectiveSSMBlock,
        "attentions": OutputRecorder(SSMSelfAttention, index=1),
    }
    _is_stateful = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_weight_decay: ClassVar[tuple[str, ...]] = (
        r"(^|\.)(A_log|D|dt_bias|B_bias|C_bias)$",
        r"dt_proj\.bias$",
        r"norm\.weight$",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, Mixer):
            return
        if isinstance(module, S6Mixer):
            _init_s6(module, self.config)
        elif isinstance(module, SSDMixer):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log())
            init.copy_(module.dt_bias, _step_bias(module.dt_bias, self.config))
        elif isinstance(module, TrapezoidalMixer):
            init.copy_(module.dt_bias, _step_bias(module.dt_bias, self.config))
            init.ones_(module.B_bias)
            init.ones_(module.C_bias)
        init.ones_(module.D)
        _init_projections(module, self.config)


def _step_bias(like: torch.Tensor, config: SelectiveSSMConfig) -> torch.Tensor:
    """Biases whose softplus is log-uniform in `[time_step_min, time_step_max]`, at least `time_step_floor`."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    step = torch.exp(
        torch.empty(like.shape, dtype=torch.float32, device=like.device).uniform_(0, 1) * (high - low) + low
    )
    step = step.clamp(min=config.time_step_floor)
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus


def _init_s6(mixer: S6Mixer, config: SelectiveSSMConfig) -> None:
    """S4D-real decays, and a step projection that keeps its input's variance ([1], section 3.6)."""
    decay = torch.arange(1, mixer.state_size + 1, dtype=torch.float32, device=mixer.A_log.device)
    init.copy_(mixer.A_log, decay.log().expand(mixer.inner, -1))
    spread = mixer.rank**-0.5 * config.time_step_scale
    if config.time_step_init_scheme == "constant":
        init.constant_(mixer.dt_proj.weight, spread)
    else:
        init.uniform_(mixer.dt_proj.weight, -spread, spread)
    init.copy_(mixer.dt_proj.bias, _step_bias(mixer.dt_proj.bias, config))
    init.kaiming_uniform_(mixer.x_proj.weight, a=math.sqrt(5))


def _init_projections(mixer: Any, config: SelectiveSSMConfig) -> None:
    """torch's own initial weights, which the authors keep; output projections divided by the root of the depth."""
    if hasattr(mixer, "conv1d"):
        bound = config.conv_kernel**-0.5
        init.uniform_(mixer.conv1d.weight, -bound, bound)
        if mixer.conv1d.bias is not None:
            init.uniform_(mixer.conv1d.bias, -bound, bound)
    if not hasattr(mixer, "in_proj"):
        return
    init.kaiming_uniform_(mixer.in_proj.weight, a=math.sqrt(5))
    out = torch.empty_like(mixer.out_proj.weight, dtype=torch.float32)
    init.kaiming_uniform_(out, a=math.sqrt(5))
    scale = math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else 1.0
    init.copy_(mixer.out_proj.weight, out / scale)


class SelectiveSSMModel(SelectiveSSMPreTrainedModel):
    """Embeddings and stacked selective state space layers, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: SelectiveSSMConfig) -> None:
        super().__init__(config)
        # No padding row: published models pad with their end-of-text token, whose embedding must learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SelectiveSSMBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SSMRMSNorm(config.hidden_size, config.layer_norm_epsilon, config.backend)
        self.gradient_checkpointing = False
        # A config's attributes are slow to read, which a decoded token would feel.
        self.kernel, self.kind, self.reads_both_ways = config.conv_kernel, config.mixer, config.reads_both_ways
        self.has_attention = bool(config.attn_layer_indices)
        blocks: list[Any] = list(self.layers)
        self.state_shapes = [None if layer.attends else layer.mixer.state_shapes() for layer in blocks]
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, hidden_size)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)`; position 0 begins a document, with a fresh state (packed rows).
            past_key_values: state so far, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the state.
            seq_idx: `(batch, length)` document numbers of packed rows.
            kwargs: `cu_seq_lens_q` `(documents + 1,)`, offsets of the documents of a single packed row.

        Returns:
            last hidden state `(batch, length, hidden_size)` and the state.

        Raises:
            ValueError: inputs, mask or state do not fit each other or the config.
        """
        hidden = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        offsets = kwargs.get("cu_seq_lens_q")
        marks = scan_marks(hidden, attention_mask, position_ids, seq_idx, offsets, past, self.kernel)
        scores_mask = self._scores_mask(hidden, attention_mask, marks, past)
        for index, layer in enumerate(self.layers):
            states = self._read(cache, index, hidden.shape[0])
            keys = cache if layer.attends else None
            hidden, states = layer(hidden, states, marks, scores_mask, past_key_values=keys)
            if cache is not None and states is not None:
                cache.layers[index].write(self.kind, states, hidden.shape[1])
        normal = self.norm(hidden.to(self.norm.weight.dtype))
        return BaseModelOutputWithPast(last_hidden_state=normal, past_key_values=cache if use_cache else None)

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            given = ("neither", "both")[input_ids is not None]
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {given}")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.shape[1] == 0:
            raise ValueError(f"the input has no positions: shape {tuple(hidden.shape[:2])}")
        return hidden

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.reads_both_ways:
            if past_key_values is not None:
                raise ValueError("a bidirectional model reads whole sequences: past_key_values must be None")
            return None
        if past_key_values is None:
            return DynamicCache(config=self.config) if use_cache else None
        layers = getattr(past_key_values, "layers", [])
        fits = len(layers) == len(self.layers)
        if not fits or any(hasattr(state, "read") == layer.attends for state, layer in zip(layers, self.layers)):
            raise ValueError(
                f"past_key_values must hold the states of {len(self.layers)} layers, as DynamicCache(config=model.config) "
                f"makes them, got {past_key_values!r}"
            )
        return past_key_values

    def _read(self, cache: Cache | None, index: int, batch_size: int) -> States | None:
        shapes = self.state_shapes[index]
        if cache is None or shapes is None:
            return None
        return cache.layers[index].read(self.kind, batch_size, shapes)

    def _scores_mask(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, marks: ScanMarks, past: int
    ) -> torch.Tensor | None:
        if not self.has_attention or (attention_mask is None and hidden.shape[1] == 1):
            return None
        like = hidden.to(self.norm.weight.dtype)
        return attention_scores_mask(like, attention_mask, marks, past, not self.reads_both_ways)


class SelectiveSSMForCausalLM(SelectiveSSMPreTrainedModel, GenerationMixin):
    """Selective state space language model.

    Args:
        config: the model's configuration, not bidirectional.

    Raises:
        ValueError: the config is bidirectional: the backward direction would read the tokens to be predicted.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SelectiveSSMConfig) -> None:
        if config.reads_both_ways:
            raise ValueError(
                f"a causal language model cannot be bidirectional, nor generate: bidirectional must be 'none', "
                f"got {config.bidirectional!r}"
            )
        super().__init__(config)
        self.model = SelectiveSSMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a call of `forward` for `generate`, as the base class does.

        A generated token is always real and never begins a document: without attention layers, a model that reads it alone
        needs neither mask nor positions, and nothing that has to be prepared.
        """
        alone = next_sequence_length == 1 and not is_first_iteration and not self.model.has_attention
        if alone and input_ids.device == self.lm_head.weight.device:
            unread = ("position_ids", "token_type_ids", "inputs_embeds", "labels")
            kept = {name: value for name, value in kwargs.items() if name not in unread}
            return {**kept, "input_ids": input_ids[:, -1:].contiguous()}
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Run the model and, given labels, its loss; see `SelectiveSSMModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the input ids; shifted inside. -100 is ignored.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            kwargs: `shift_labels` and `num_items_in_batch`, as Trainer gives them.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)` and the state.
        """
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
        shift_labels: Any = kwargs.get("shift_labels")
        if labels is not None or shift_labels is not None:
            targets = next_token_labels(labels, shift_labels)  # type: ignore[arg-type]
            loss = self.loss_function(logits, None, self.config.vocab_size, shift_labels=targets, **_items(kwargs))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SelectiveSSMForMaskedLM(SelectiveSSMPreTrainedModel):
    """Bidirectional selective state space model that fills masks.

    Args:
        config: the model's configuration. `bidirectional=None` becomes `tied`.

    Raises:
        ValueError: the config says `bidirectional="none"`: a mask's right-hand side would not be seen.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SelectiveSSMConfig) -> None:
        if config.bidirectional == "none":
            raise ValueError(
                "a masked language model must be bidirectional ('add' or 'tied'), got bidirectional='none'"
            )
        if config.bidirectional is None:
            config.bidirectional = "tied"
        super().__init__(config)
        self.model = SelectiveSSMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Fill masks; see `SelectiveSSMModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the ids to be found; -100 is ignored.

        Returns:
            loss in nats a labelled token and logits `(batch, length, vocab_size)`.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, seq_idx=seq_idx, **_whole(kwargs)
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **_items(kwargs))
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _whole(kwargs: Any) -> dict[str, Any]:
    """Keyword arguments for the base model of a head that reads whole sequences."""
    return {**kwargs, "use_cache": False}


def _items(kwargs: Any) -> dict[str, Any]:
    """The number of labels of the whole accumulated batch, if Trainer gave it."""
    return {"num_items_in_batch": kwargs.get("num_items_in_batch")}


class SelectiveSSMForSequenceClassification(SequenceClassificationHead, SelectiveSSMPreTrainedModel):
    """Text classifier or regressor.

    Args:
        config: the model's configuration; `pooling` says how a text is summed up.
    """

    def __init__(self, config: SelectiveSSMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SelectiveSSMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text as `config.pooling` says; see `SequenceClassificationHead.pool`."""
        pooling = self.config.pooling or ("mean" if self.config.reads_both_ways else "last")
        if pooling == "mean":
            return mean_over_time(hidden.mT, mask)
        if pooling == "max":
            return max_over_time(hidden.mT, mask)
        return end_token(hidden, mask, first=pooling == "first")


class SelectiveSSMForTokenClassification(TokenClassificationHead, SelectiveSSMPreTrainedModel):
    """Tagger.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: SelectiveSSMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SelectiveSSMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SelectiveSSMForQuestionAnswering(QuestionAnsweringHead, SelectiveSSMPreTrainedModel):
    """Reader that marks an answer's first and last token.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: SelectiveSSMConfig) -> None:
        super().__init__(config)
        self.model = SelectiveSSMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "SelectiveSSMForCausalLM",
    "SelectiveSSMForMaskedLM",
    "SelectiveSSMForQuestionAnswering",
    "SelectiveSSMForSequenceClassification",
    "SelectiveSSMForTokenClassification",
    "SelectiveSSMModel",
    "SelectiveSSMPreTrainedModel",
]
