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
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ...nn.assign import assign, plain_like
from ...nn.inputs import CACHE_FIELD, Batch, prepare
from ...nn.masks import SegmentInfo, end_token
from ...nn.pooling import max_over_time, mean_over_time
from ..base import LNLMPreTrainedModel
from ..heads import (
    CausalLMHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .attention import SSMSelfAttention, attention_scores_mask
from .configuration_ssm import ATTENTION, SelectiveSSMConfig
from .layers import SSMRMSNorm
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
        segments: SegmentInfo,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, States | None]:
        """Run the layer.

        Args:
            hidden_states: `(batch, length, hidden_size)`.
            states: the mixer's carried states, or None for zeros.
            segments: real tokens and documents.
            attention_mask: added to an attention layer's scores.
            past_key_values: an attention layer's keys.

        Returns:
            the same shape, and the mixer's new states (None for attention).
        """
        alone = hidden_states.shape[1] == 1 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if alone and self.decodes_fused:
            decoded = self.mixer.token(hidden_states, self.norm, states, segments)
            if decoded is not None:
                return decoded
        normal = self.norm(hidden_states.to(self.norm.weight.dtype))
        widen = self.residual_in_fp32 and hidden_states.dtype != torch.float64
        residual = hidden_states.float() if widen else hidden_states
        if self.attends:
            return residual + self.mixer(normal, attention_mask, past_key_values)[0], None
        if self.reverse_mixer is not None:
            backwards = self.reverse_mixer(normal.flip(1), None, segments.reversed())[0]
            return residual + self.mixer(normal, None, segments)[0] + backwards.flip(1), None
        mixed, states = self.mixer(normal, states, segments)
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
            assign(module.A_log, plain_like(module.A_log).uniform_(1, 16).log())
            assign(module.dt_bias, _step_bias(module.dt_bias, self.config))
        elif isinstance(module, TrapezoidalMixer):
            assign(module.dt_bias, _step_bias(module.dt_bias, self.config))
            init.ones_(module.B_bias)
            init.ones_(module.C_bias)
        init.ones_(module.get_parameter("D"))
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
    assign(mixer.A_log, decay.log().expand(mixer.inner, -1))
    spread = mixer.rank**-0.5 * config.time_step_scale
    if config.time_step_init_scheme == "constant":
        init.constant_(mixer.dt_proj.weight, spread)
    else:
        init.uniform_(mixer.dt_proj.weight, -spread, spread)
    assign(mixer.dt_proj.bias, _step_bias(mixer.dt_proj.bias, config))
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
    out = plain_like(mixer.out_proj.weight, torch.float32)
    init.kaiming_uniform_(out, a=math.sqrt(5))
    scale = math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else 1.0
    assign(mixer.out_proj.weight, out / scale)


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
        self.kernel, self.has_attention = config.conv_kernel, bool(config.attn_layer_indices)
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
        **kwargs: Any,
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
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        segments = batch.segments.for_convolution(self.kernel)
        scores_mask = self._scores_mask(batch, attention_mask)
        hidden = batch.hidden
        for index, (layer, shapes) in enumerate(zip(self.layers, self.state_shapes, strict=True)):
            states = None if shapes is None else batch.read(index, shapes)
            keys = batch.cache if layer.attends else None
            hidden, states = layer(hidden, states, segments, scores_mask, past_key_values=keys)
            if states is not None:
                batch.write(index, states)
        normal = self.norm(hidden.to(self.norm.weight.dtype))
        return BaseModelOutputWithPast(last_hidden_state=normal, **{CACHE_FIELD: batch.cache if use_cache else None})

    def _scores_mask(self, batch: Batch, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        if not self.has_attention:
            return None
        hidden, keys = batch.hidden, batch.past + batch.hidden.shape[1]
        if batch.cache is not None:
            keys = batch.cache.get_mask_sizes(hidden.shape[1], self.layer_types.index(ATTENTION))[0]
        if attention_mask is None and hidden.shape[1] == 1 and keys == batch.past + 1:
            return None
        like = hidden.to(self.norm.weight.dtype)
        return attention_scores_mask(like, attention_mask, batch.segments, batch.past, keys, not self.reads_both_ways)


class SelectiveSSMForCausalLM(CausalLMHead, SelectiveSSMPreTrainedModel, GenerationMixin):
    """Selective state space language model.

    Args:
        config: the model's configuration, not bidirectional.

    Raises:
        ValueError: the config is bidirectional: the backward direction would read the tokens to be predicted.
    """

    body_class = SelectiveSSMModel

    def __init__(self, config: SelectiveSSMConfig) -> None:
        if config.reads_both_ways:
            raise ValueError(
                f"a causal language model cannot be bidirectional, nor generate: bidirectional must be 'none', "
                f"got {config.bidirectional!r}"
            )
        super().__init__(config)

    def prepare_inputs_for_generation(  # type: ignore[override]  # the others of the base's arguments are in kwargs
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        attention_mask: Any = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a call of `forward` for `generate`, as the base class does.

        A generated token is always real and never begins a document: without attention layers, a model that reads it alone
        needs neither mask nor positions, and nothing that has to be prepared.
        """
        if cache is not None:  # an argument, because `generate` takes only what a signature names
            kwargs["cache"] = cache
        alone = next_sequence_length == 1 and not is_first_iteration and not self.model.has_attention
        if alone and input_ids.device == self.model.embed_tokens.weight.device:
            unread = ("position_ids", "token_type_ids", "labels")
            kept = {name: value for name, value in kwargs.items() if name not in unread}
            return {**kept, "input_ids": input_ids[:, -1:].contiguous()}
        base: Any = super()  # transformers annotates its own `self` as a protocol that no model class meets
        return base.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class SelectiveSSMForMaskedLM(MaskedLMHead, SelectiveSSMPreTrainedModel):
    """Bidirectional selective state space model that fills masks.

    Args:
        config: the model's configuration. `bidirectional=None` becomes `tied`.

    Raises:
        ValueError: the config says `bidirectional="none"`: a mask's right-hand side would not be seen.
    """

    body_class = SelectiveSSMModel

    def __init__(self, config: SelectiveSSMConfig) -> None:
        if config.bidirectional == "none":
            raise ValueError(
                "a masked language model must be bidirectional ('add' or 'tied'), got bidirectional='none'"
            )
        if config.bidirectional is None:
            config.bidirectional = "tied"
        super().__init__(config)


class SelectiveSSMForSequenceClassification(SequenceClassificationHead, SelectiveSSMPreTrainedModel):
    """Text classifier or regressor.

    Args:
        config: the model's configuration; `pooling` says how a text is summed up.
    """

    body_class = SelectiveSSMModel

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text as `config.pooling` says; see `SequenceClassificationHead.pool`."""
        pooling = self.config.pooling or ("mean" if self.config.reads_both_ways else "last")
        if pooling == "mean":
            return mean_over_time(hidden.mT, mask)
        if pooling == "max":
            return max_over_time(hidden.mT, mask)
        return end_token(hidden, mask, first=pooling == "first")


class SelectiveSSMForTokenClassification(TokenClassificationHead, SelectiveSSMPreTrainedModel):
    """Tagger."""

    body_class = SelectiveSSMModel


class SelectiveSSMForQuestionAnswering(QuestionAnsweringHead, SelectiveSSMPreTrainedModel):
    """Reader that segments an answer's first and last token."""

    body_class = SelectiveSSMModel
    drops = False


__all__ = [
    "SelectiveSSMForCausalLM",
    "SelectiveSSMForMaskedLM",
    "SelectiveSSMForQuestionAnswering",
    "SelectiveSSMForSequenceClassification",
    "SelectiveSSMForTokenClassification",
    "SelectiveSSMModel",
    "SelectiveSSMPreTrainedModel",
]
