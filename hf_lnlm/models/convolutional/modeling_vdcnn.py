"""VDCNN: very deep convolutional networks over characters, the ResNet of text [1].

References:
    [1] Conneau, Schwenk, Barrault & LeCun 2017, "Very Deep Convolutional Networks for Text Classification" (EACL).
    [2] He, Zhang, Ren & Sun 2015, "Delving Deep into Rectifiers".

Glossary (paper ↔ here): s characters ↔ `max_position_embeddings`; temporal convolution, 64 ↔ `VDCNNLayer.stem`;
convolutional block, figure 2 ↔ `VDCNNLayer`; pool/2 ↔ `halve`; optional shortcut ↔ `VDCNNLayer.shortcut`; k-max
pooling, k=8 ↔ `k_max`; fc(4096, 2048), fc(2048, 2048) ↔ `dense`.

Deviations: a text is not padded to 1,024 characters: masked frames are zeros before every convolution and absent from
pooling and normalisation, so a text's scores do not depend on its batch. The default normalisation is over groups of
channels of each text, since statistics of a batch are not those of its accumulated parts; `normalization="batch"` is the
paper's (leaving padding out of the statistics). A shortcut to another width or length is a pointwise convolution. The
weights of every row begin with a mean of zero and the classifier begins near zero: with [2]'s as they are, texts are told
apart by a twentieth of the last features under group normalisation, and the dense units die before they learn (measured
on AG News, `model_cards/vdcnn.md`).

Complexity: O(length · k · channels²) multiplications a block; a stage has half the frames and twice the channels of the
one before, so its cost is twice that.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.convolution import TimeConvolution, init_centred, justify, mask_frames, strided_mask
from ...nn.pooling import MaskedBatchNorm, MaskedGroupNorm, k_max_over_time, local_max
from ..base import LNLMPreTrainedModel
from .configuration_vdcnn import VDCNNConfig
from .text_classifier import TextClassifier, read_text


def make_norm(config: VDCNNConfig, channels: int) -> nn.Module:
    """Return the normalisation that a config asks for."""
    if config.normalization == "batch":
        return MaskedBatchNorm(channels)
    return MaskedGroupNorm(config.num_groups, channels)


class VDCNNLayer(GradientCheckpointingLayer):
    """Halving where a stage begins, then a convolutional block: (convolution, normalisation, ReLU) twice.

    The first layer begins with the temporal convolution that reads the embeddings.

    Args:
        config: the model's configuration.
        layer_idx: which block, from 0.
    """

    def __init__(self, config: VDCNNConfig, layer_idx: int) -> None:
        super().__init__()
        stages = config.stages()
        before, stage = stages[max(layer_idx - 1, 0)], stages[layer_idx]
        inside, outside = config.stage_channels[before], config.stage_channels[stage]
        self.pooling, self.halvings = config.pooling, stage - before
        self.stride = 2**self.halvings if config.pooling == "convolution" else 1
        size, around = config.kernel_size, (config.kernel_size // 2, config.kernel_size // 2)
        self.stem = TimeConvolution(config.hidden_size, inside, size, around) if layer_idx == 0 else None
        self.first = TimeConvolution(inside, outside, size, around, stride=self.stride, bias=False)
        self.first_norm = make_norm(config, outside)
        self.second = TimeConvolution(outside, outside, size, around, bias=False)
        self.second_norm = make_norm(config, outside)
        changes = inside != outside or self.stride > 1
        pointwise = config.shortcut and changes
        self.bridged = config.shortcut
        self.shortcut = TimeConvolution(inside, outside, 1, stride=self.stride, bias=False) if pointwise else None

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the block.

        Args:
            hidden: `(batch, frames, channels)`.
            mask: `(batch, frames)` true at real frames, which come first; None if all are.

        Returns:
            `(batch, frames out, channels out)`, zero at masked frames, and its mask.
        """
        features = hidden.mT if self.stem is None else mask_frames(self.stem(hidden.mT), mask)
        if self.pooling != "convolution":
            for _ in range(self.halvings):
                features, mask = self.halve(features, mask)
        features = mask_frames(features, mask)
        after = strided_mask(mask, self.stride)
        inner = mask_frames(self.first_norm(mask_frames(self.first(features), after), after).relu(), after)
        outer = self.second_norm(mask_frames(self.second(inner), after), after)
        if self.bridged:
            outer = outer + (features if self.shortcut is None else self.shortcut(features))
        return mask_frames(outer.relu(), after).mT, after

    def halve(self, features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Halve the frames of `(batch, C, T)` by pooling; a row of n real frames keeps the greater half, ceil(n / 2)."""
        half = -(-features.shape[2] // 2)
        if self.pooling == "max":
            return local_max(features, mask, 3, 2, 1), strided_mask(mask, 2)
        keep = None if mask is None else (mask.sum(1) + 1) // 2
        return k_max_over_time(features, mask, half, keep), strided_mask(mask, 2)


class VDCNNPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation that the very deep networks share: that of [2], as in [1], section 4.2."""

    config: VDCNNConfig
    _no_split_modules = ["VDCNNLayer"]
    _can_record_outputs = {"hidden_states": VDCNNLayer}
    _no_weight_decay = (r"_norm\.(weight|bias)$", r"\.bias$")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TimeConvolution):
            weight = module.projection.weight
            init_centred(weight, (2.0 / weight.shape[1]) ** 0.5)
        elif isinstance(module, VDCNNModel):
            for dense in module.get_submodule("dense").children():
                weight = dense.get_parameter("weight")
                init_centred(weight, (2.0 / weight.shape[1]) ** 0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])


class VDCNNModel(VDCNNPreTrainedModel):
    """The network up to its last hidden layer.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: VDCNNConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(VDCNNLayer(config, index) for index in range(config.num_hidden_layers))
        flat = config.k_max * config.stage_channels[config.stages()[-1]]
        self.dense = nn.ModuleList(
            [nn.Linear(flat, config.intermediate_size), nn.Linear(config.intermediate_size, config.intermediate_size)]
        )
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: `(batch, length)`; of longer texts the beginning is read.
            attention_mask: `(batch, length)`, 1 at real characters; the others are as if they were not there.
            inputs_embeds: `(batch, length, hidden_size)` instead of `input_ids`.
            kwargs: `output_hidden_states` and the like.

        Returns:
            `last_hidden_state` `(batch, frames, channels)` and `pooler_output` `(batch, intermediate_size)`. Hidden states
            have the real frames first.

        Raises:
            ValueError: inputs and mask do not fit together.
        """
        hidden, plan = read_text(self, input_ids, attention_mask, inputs_embeds, kwargs)
        if plan is not None:
            hidden = justify(hidden, plan)
        limit = self.config.max_position_embeddings
        hidden, mask = hidden[:, :limit], None if plan is None else plan.mask[:, :limit]
        for layer in self.layers:
            hidden, mask = layer(hidden, mask)
        pooled = k_max_over_time(hidden.mT, mask, self.config.k_max).flatten(1)
        for dense in self.dense:
            pooled = self.dropout(dense(pooled).relu())
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class VDCNNForSequenceClassification(TextClassifier):
    """VDCNN as a classifier.

    Args:
        config: the architecture, with `num_labels` and `problem_type`.
    """

    config: VDCNNConfig
    body_class = VDCNNModel
    _no_split_modules = ["VDCNNLayer"]
    quiet_start = True
    _no_weight_decay = VDCNNPreTrainedModel._no_weight_decay

    def make_head(self, config: VDCNNConfig) -> None:
        """Make dropout and classifier."""
        self.build_head(config.intermediate_size, 0.0, None)


__all__ = ["VDCNNForSequenceClassification", "VDCNNModel", "VDCNNPreTrainedModel"]
