"""EncoderCNN: convolutions and max-over-time on the hidden states of any encoder (BERT-CNN [1]).

References:
    [1] Safaya, Abdullatif & Yuret 2020, "KUISAIL at SemEval-2020 Task 12: BERT-CNN for Offensive Speech Identification".
    [2] Kim 2014, "Convolutional Neural Networks for Sentence Classification".
    [3] Peters et al. 2018, "Deep contextualized word representations" (scalar mix, eq. 1).

Glossary (paper ↔ here): last four hidden layers as channels ↔ `mode="last_n"`, `num_layers`; k × 768 filters ↔ `windows`;
γ, s_j of [3] ↔ `ScalarMix.scale`, softmax of `ScalarMix.weights`.

Deviations: padding never takes part in the maximum, so that scores do not depend on a text's batch (they do in the code of
[1]), nor where in its row a text stands: rows are left-justified before the encoder, and one that itself reads padding
(ConvBERT) is run on rows of equal length at a time. A text shorter than a window is read as if zeros followed it. Any
number of classes, several labels or regression instead of one sigmoid. Convolving n channels of an image of width H is
convolving n · H features, and done so.

Complexity: the encoder's, and O(length · Σ k · n · H · maps) multiplications.
"""

import inspect
import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from ...nn.convolution import Justified, TimeConvolution, left_justify, mask_frames, restore
from ...nn.inputs import check_given, check_ids, check_keywords, take_cache
from ...nn.loss_heads import check_labels
from ...nn.masks import current_mask
from ...nn.pooling import max_over_time
from ...nn.scalar_mix import ScalarMix
from ..base import LNLMPreTrainedModel
from ..heads import (
    ClassificationHead,
    MaskedLMHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    passthrough_outputs,
)
from ..parts import build_part, longest_input, name_of, part_class
from .by_length import READ_PADDING, run_by_length
from .configuration_encoder_cnn import EncoderCNNConfig


class Maps(NamedTuple):
    """Feature maps of a batch.

    Attributes:
        aligned: `(batch, frames, features)`, a window's value standing at its middle frame, zero at masked ones.
        pooled: `(batch, features)`, the maxima over the windows that lie in the text.
    """

    aligned: torch.Tensor
    pooled: torch.Tensor


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an encoder; of a family with a decoder, its encoder alone.

    Raises:
        ValueError: there is none, or only one with a decoder.
    """
    if part_class(config, "AutoModelForTextEncoding") is not None:
        return build_part("encoder", config, "AutoModelForTextEncoding")
    if config.is_encoder_decoder:
        raise ValueError(f"encoder: transformers has no encoder of its own for the model type {config.model_type!r}")
    return build_part("encoder", config, "AutoModel")


def encoder_given(encoder: str | os.PathLike | PreTrainedModel, options: dict[str, Any]) -> PreTrainedModel:
    """Return the encoder that a composed model is to be built on, without its head.

    Args:
        encoder: a checkpoint's name or folder, or a model.
        options: arguments of `from_pretrained`.

    Raises:
        ValueError: a model is given and options too, or it is composed already.
    """
    if isinstance(encoder, (str, os.PathLike)):
        source = AutoModel.from_pretrained(encoder, **options)
    elif options:
        names = ", ".join(f"encoder_{name}" for name in options)
        raise ValueError(f"{names}: only for a checkpoint's name or folder, got them beside a {type(encoder).__name__}")
    else:
        source = encoder.base_model
    if source.config.model_type == EncoderCNNConfig.model_type:
        raise ValueError(
            f"encoder must be a checkpoint without convolutions, got one of {EncoderCNNConfig.model_type}: load it by "
            "from_pretrained"
        )
    return source


def _selected(hidden: tuple[torch.Tensor | None, ...] | None, shown: bool | int | list[int] | None) -> Any:
    """The hidden states asked for: all, none, or (None in place of the others) those of some layers."""
    if hidden is None or shown is None or shown is False:
        return None
    if shown is True:
        return hidden
    places = {place % len(hidden) for place in ([shown] if isinstance(shown, int) else shown)}
    return tuple(states if place in places else None for place, states in enumerate(hidden))


def _moved(value: Any, order: torch.Tensor) -> Any:
    """Reorder the positions of an argument `(batch, length[, width])`; anything else is left as it is."""
    if not isinstance(value, torch.Tensor) or value.shape[:2] != order.shape:
        return value
    return value.gather(1, order if value.dim() == 2 else order[:, :, None].expand_as(value))


class WindowHead(nn.Module):
    """Convolutions over windows of several sizes and the maximum of each map ([2], as in [1]).

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: EncoderCNNConfig) -> None:
        super().__init__()
        channels = int(config.num_layers or 1) if config.mode == "last_n" else 1
        self.windows = nn.ModuleList(
            TimeConvolution(channels * config.encoder_size, config.num_filters, size, ((size - 1) // 2, size // 2))
            for size in config.filter_sizes
        )

    def forward(self, hidden: torch.Tensor, plan: Justified | None) -> Maps:
        """Convolve and pool.

        Args:
            hidden: `(batch, frames, width)`, real frames first.
            plan: how many are real in each row, and their places in the input; None if all are.

        Returns:
            the maps, in the order of the input.
        """
        length = hidden.shape[1]
        rows = mask_frames(hidden.mT, None if plan is None else plan.mask)
        lengths = rows.new_full((rows.shape[0],), length, dtype=torch.long) if plan is None else plan.lengths
        maps = [self._convolve(window, rows) for window in self.windows]
        pooled = [
            max_over_time(values, self._inside(window, values, lengths)) for window, values in zip(self.windows, maps)
        ]
        aligned = torch.cat([values[:, :, :length] for values in maps], dim=1).relu().mT
        return Maps(aligned if plan is None else restore(aligned, plan), torch.cat(pooled, dim=1).relu())

    @staticmethod
    def _convolve(window: Any, rows: torch.Tensor) -> torch.Tensor:
        return window(F.pad(rows, (0, max(window.kernel_size - rows.shape[2], 0))))

    @staticmethod
    def _inside(window: Any, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Which windows lie in the text, by their middle frame; one window if the text is shorter."""
        size = window.kernel_size
        first = torch.arange(values.shape[2], device=values.device) - (size - 1) // 2
        last = (lengths - size).clamp(min=0)
        return (first >= 0) & (first <= last[:, None]) & (lengths > 0)[:, None]


class SoftmaxNorm(nn.LayerNorm):
    """The layer norm before a softmax, with a gain that makes the first logits small: a fresh model knows nothing.

    With weights of standard deviation `spread` the first logits' is 0.1.
    """

    def first_gain(self, spread: float) -> float:
        """The gain to begin with, at most 1."""
        return min(1.0, 0.1 / (max(spread, 1e-6) * self.normalized_shape[0] ** 0.5))


class EncoderCNNPreTrainedModel(LNLMPreTrainedModel):
    """Traits that the EncoderCNN classes share. Attention implementations are the encoder's."""

    config: EncoderCNNConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_weight_decay = (r"layer_mix\.",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScalarMix):
            init.zeros_(module.weights)
            init.ones_(module.scale)
        elif isinstance(module, SoftmaxNorm):
            init.constant_(module.weight, module.first_gain(self.config.initializer_range))
        elif isinstance(module, TimeConvolution):
            init.xavier_uniform_(module.projection.weight)
        classifier: Any = getattr(module, "classifier", None)
        if isinstance(classifier, nn.Linear):  # maxima over time are large, and many: logits begin near zero
            init.normal_(
                classifier.weight, std=min(self.config.initializer_range, 0.1 / math.sqrt(classifier.in_features))
            )

    @classmethod
    def from_encoder_pretrained(
        cls, encoder: str | os.PathLike | PreTrainedModel, **kwargs: Any
    ) -> "EncoderCNNPreTrainedModel":
        """Build the model on a pre-trained encoder; the convolutions and the classifier are new.

        Args:
            encoder: a checkpoint's name or folder, or a model (with or without a head), whose weights are copied.
            kwargs: fields of `EncoderCNNConfig` (`mode`, `num_labels`, …), `dtype` and `attn_implementation` as in
                `from_pretrained` (those of the encoder if not given), and arguments of the encoder's `from_pretrained`,
                with `encoder_` before their names (`encoder_dtype`, `encoder_revision`, …).

        Returns:
            the model, in evaluation mode.

        Raises:
            ValueError: the checkpoint lacks weights of the encoder or is composed already, or arguments for loading it
                are given beside a model.
        """
        inner = {
            name.removeprefix("encoder_"): kwargs.pop(name) for name in list(kwargs) if name.startswith("encoder_")
        }
        dtype = kwargs.pop("dtype", None)
        source = encoder_given(encoder, inner if dtype is None else {"dtype": dtype, **inner})
        fields = {**source.config.to_dict(), "attn_implementation": source.config._attn_implementation}
        model = cls(EncoderCNNConfig(encoder=fields, **kwargs))
        target: Any = model.base_model.encoder
        nn.Module.to(model, source.dtype)
        missing = target.load_state_dict(source.state_dict(), strict=False).missing_keys
        missing = [name for name in missing if name not in source.all_tied_weights_keys]
        if missing:
            raise ValueError(
                f"encoder: the checkpoint lacks weights of a {type(target).__name__}, got none for {missing[:5]}"
            )
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embeddings."""
        encoder: Any = self.base_model.encoder
        return encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's token embeddings."""
        encoder: Any = self.base_model.encoder
        encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the encoder's token embeddings, as in transformers."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.mirror()
        return embeddings


class EncoderCNNModel(EncoderCNNPreTrainedModel):
    """An encoder and convolutions over its hidden states.

    Args:
        config: the model's configuration, with the encoder's.
    """

    def __init__(self, config: EncoderCNNConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config.get_text_config())
        self.encoder_reads = frozenset(inspect.signature(self.encoder.forward).parameters)
        mixes = config.mode == "scalar_mix"
        self.layer_mix = ScalarMix(config.num_hidden_layers) if mixes else None
        self.window_head = WindowHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 1 at real tokens.
            inputs_embeds: `(batch, length, width)` instead of `input_ids`, for encoders that take them.
            token_type_ids: `(batch, length)`, for encoders that take them.
            kwargs: what else the encoder takes; `output_hidden_states`, `output_attentions`.

        Returns:
            `last_hidden_state` `(batch, length, features)`, the feature maps (in mode `all_cls` one frame a layer);
            `pooler_output` `(batch, features)`, their maxima; the encoder's hidden states and attentions if asked for,
            with every row's real tokens first.

        Raises:
            ValueError: inputs do not fit together, or the encoder gives no hidden states.
        """
        if take_cache(kwargs.pop("past_key_values", None), kwargs) is not None:
            raise ValueError("a model that reads both ways reads whole sequences: past_key_values must be None")
        check_keywords(kwargs, self.encoder_reads)
        width = getattr(self.get_input_embeddings(), "embedding_dim", None)
        check_given(input_ids, inputs_embeds, width, self.dtype)
        check_ids(input_ids, self.config.vocab_size)
        self._check_length(input_ids if inputs_embeds is None else inputs_embeds)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids, **kwargs}
        inputs, plan = self._left_justified(inputs, attention_mask)
        shown = inputs.pop("output_hidden_states", None)
        shown = self.config.output_hidden_states if shown is None else shown
        wanted = shown if self.config.mode == "last" else True
        outputs = self._encode({**inputs, "output_hidden_states": wanted}, plan)
        maps = self._convolve(outputs, plan)
        return BaseModelOutputWithPooling(
            last_hidden_state=maps.aligned,
            pooler_output=maps.pooled,
            hidden_states=_selected(outputs.get("hidden_states"), shown),
            attentions=outputs.get("attentions"),
        )

    def _check_length(self, given: Any) -> None:
        """Refuse rows that the encoder has no positions for."""
        limit = longest_input(self.config)
        if limit is not None and given.shape[1] > limit:
            raise ValueError(
                f"max_position_embeddings of the encoder allows {limit} positions, the input has {given.shape[1]}: "
                "cut it (truncation=True)"
            )

    def _encode(self, inputs: dict[str, Any], plan: Justified | None) -> Any:
        reads_padding = self.config.get_text_config().model_type in READ_PADDING
        if plan is None or not reads_padding or torch.compiler.is_compiling() or bool(plan.mask.all()):
            return self.encoder(**inputs)
        inputs.pop("attention_mask")
        return run_by_length(self.encoder, inputs, plan.lengths, plan.mask.shape[1])

    def _left_justified(
        self, inputs: dict[str, Any], attention_mask: torch.Tensor | None
    ) -> tuple[dict[str, Any], Justified | None]:
        """The encoder's arguments with every row's real tokens first: encoders count positions from the first column."""
        skipped = ("num_items_in_batch", "return_dict")
        given = {name: value for name, value in inputs.items() if value is not None and name not in skipped}
        given = {"output_attentions": self.config.output_attentions, **given}
        mask = current_mask(attention_mask, *given["input_ids" if "input_ids" in given else "inputs_embeds"].shape[:2])
        if attention_mask is None or mask is None:
            return {**given, "attention_mask": None}, None
        plan = left_justify(mask)
        if plan.order is None:
            return {**given, "attention_mask": attention_mask}, plan
        moved = {name: _moved(value, plan.order) for name, value in given.items()}
        return {**moved, "attention_mask": plan.mask.to(attention_mask.dtype)}, plan

    def _convolve(self, outputs: Any, plan: Justified | None) -> Maps:
        last = outputs.last_hidden_state
        if self.config.mode == "last":
            return self.window_head(last, plan)
        layers = self._layers(outputs)
        if self.config.mode == "all_cls":
            return self.window_head(self._first_tokens(layers, plan), None)
        if self.layer_mix is not None:
            return self.window_head(self.layer_mix(layers), plan)
        return self.window_head(torch.cat(layers[-int(self.config.num_layers or 1) :], dim=2), plan)

    def _layers(self, outputs: Any) -> list[torch.Tensor]:
        """Output of each layer, without the embeddings."""
        hidden = outputs.get("hidden_states")
        if hidden is None or len(hidden) != self.config.num_hidden_layers + 1:
            found = "none" if hidden is None else len(hidden)
            raise ValueError(
                f"mode {self.config.mode!r} needs the hidden states of the embeddings and of all "
                f"{self.config.num_hidden_layers} layers of the encoder, a {type(self.encoder).__name__}, got {found}"
            )
        return list(hidden[1:])

    @staticmethod
    def _first_tokens(layers: list[torch.Tensor], plan: Justified | None) -> torch.Tensor:
        """State of each row's first real token in all layers, `(batch, layers, width)`; zeros in a row without one."""
        first = torch.stack([layer[:, 0] for layer in layers], dim=1)
        return first if plan is None else first.masked_fill((plan.lengths == 0)[:, None, None], 0.0)


def refuse_one_token(config: EncoderCNNConfig, purpose: str) -> None:
    """Refuse a config whose windows slide over one token's layers.

    Raises:
        ValueError: the mode is `all_cls`.
    """
    if config.mode == "all_cls":
        raise ValueError(f"mode must be last, last_n or scalar_mix to {purpose}, got 'all_cls'")


class EncoderCNNHead(ClassificationHead, EncoderCNNPreTrainedModel):
    """What both heads have: the encoder with its convolutions, and a linear map of the maps."""

    body_class = EncoderCNNModel

    def make_head(self, config: EncoderCNNConfig) -> None:
        """Make `dropout` and `classifier`."""
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.output_size, config.num_labels)

    def body_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what the encoder is given: what it takes is its own affair."""
        return given


class EncoderCNNForMaskedLM(MaskedLMHead, EncoderCNNPreTrainedModel):
    """EncoderCNN that fills masks: every token is told from the windows around it.

    As BERT's head does, a dense layer, GELU and a layer norm lead from the feature maps to the width of the encoder, and a
    softmax, tied to the encoder's embeddings by default, to the vocabulary.

    Args:
        config: the model's configuration; not in mode `all_cls`, which sees one token only.

    Raises:
        ValueError: the mode is `all_cls`, or the embeddings to tie are not of the width that the config says.
    """

    body_class = EncoderCNNModel

    def make_head(self, config: EncoderCNNConfig) -> None:
        """Make what comes before the softmax, and the softmax."""
        refuse_one_token(config, "fill masks")
        self.dropout = nn.Dropout(config.dropout)
        self.transform = nn.Sequential(
            nn.Linear(config.output_size, config.head_width), nn.GELU(), SoftmaxNorm(config.head_width)
        )
        self.make_vocabulary_head(bias=config.loss_head != "adaptive")
        if config.tie_word_embeddings:
            table: Any = self.get_input_embeddings()
            if getattr(self.lm_head, "weight", table.weight).shape != table.weight.shape:
                raise ValueError(
                    f"tie_word_embeddings needs embeddings of width {config.embedding_size}, the encoder's "
                    f"{tuple(table.weight.shape)} can't be tied: it must be false, got true"
                )
            self._tied_weights_keys = {"lm_head.weight": f"{name_of(table, self)}.weight"}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Fill masks; see `EncoderCNNModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the ids to be found; -100 is ignored.

        Returns:
            loss in nats a labelled token and logits `(batch, length, vocab_size)`, None while training with a chunked
            or adaptive head.

        Raises:
            ValueError: labels are no token ids, or of another shape.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds, token_type_ids, **kwargs)
        hidden = self.transform(self.dropout(outputs.last_hidden_state))
        if labels is not None:
            check_labels(labels, self.config.vocab_size, tuple(hidden.shape[:2]))
        loss, logits = self.loss_and_logits(hidden, labels, 0, kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(loss=loss, logits=logits, **passthrough_outputs(outputs, MaskedLMOutput))


class EncoderCNNForSequenceClassification(EncoderCNNHead, SequenceClassificationHead):
    """EncoderCNN as a classifier or regressor of texts.

    Args:
        config: the model's configuration, with `num_labels` and `problem_type`.
    """

    def pooled(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Take the maps' maxima; see `SequenceClassificationHead`."""
        return outputs.pooler_output

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Score texts; see `EncoderCNNModel.forward` for the other arguments.

        Args:
            labels: `(batch,)` ids or values, or `(batch, num_labels)`; see `config.problem_type`.

        Returns:
            loss (with labels) and logits `(batch, num_labels)`, which do not depend on padding.
        """
        kwargs["token_type_ids"] = token_type_ids
        return super().forward(input_ids, attention_mask, inputs_embeds, labels, **kwargs)


class EncoderCNNForTokenClassification(EncoderCNNHead, TokenClassificationHead):
    """EncoderCNN as a tagger: every token is classified from the windows around it.

    Args:
        config: the model's configuration; not in mode `all_cls`, which sees one token only.

    Raises:
        ValueError: the mode is `all_cls`.
    """

    def __init__(self, config: EncoderCNNConfig) -> None:
        refuse_one_token(config, "classify tokens")
        super().__init__(config)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Tag tokens; see `EncoderCNNModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)` class ids; -100 is ignored.

        Returns:
            loss (with labels) and logits `(batch, length, num_labels)`.
        """
        kwargs["token_type_ids"] = token_type_ids
        return super().forward(input_ids, attention_mask, inputs_embeds, labels, **kwargs)


__all__ = [
    "EncoderCNNForMaskedLM",
    "EncoderCNNForSequenceClassification",
    "EncoderCNNForTokenClassification",
    "EncoderCNNModel",
    "EncoderCNNPreTrainedModel",
]
