"""Character-level convolutional network for text classification, the AlexNet of text [1].

References:
    [1] Zhang, Zhao & LeCun 2015, "Character-level Convolutional Networks for Text Classification" (NeurIPS).

Glossary (paper ↔ here): m characters of the alphabet ↔ `hidden_size`; l0 = 1014 input length ↔ `max_position_embeddings`;
character quantization, section 2.2 ↔ `CharCNNModel._quantise`; threshold h(x) = max{0, x} ↔ ReLU; large and small
frames, table 1 ↔ `num_filters`; fully connected layers 7 and 8, table 2 ↔ `dense`.

Deviations: special tokens are blank like characters outside the alphabet. All blanks at the end of a text give the same
frames, so the network runs on the batch's longest text and a receptive field of blanks, and repeats the last frame; this
is exactly the network on all 1014 characters. The paper's normal weights begin with a mean of zero in every row and the
classifier begins near zero: without that the network stays at chance for epochs, and its units die (measured on AG News,
`model_cards/char_cnn.md`).

Complexity: O(length · k · maps²) multiplications in the convolutions; the fully connected layers see `frames · maps`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.convolution import Justified, TimeConvolution, init_centred, justify
from ..base import LNLMPreTrainedModel
from .configuration_char_cnn import CharCNNConfig
from .text_classifier import TextClassifier, read_text


class CharCNNLayer(GradientCheckpointingLayer):
    """Convolution, threshold and pooling; without padding, so that every layer shortens the text.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: CharCNNConfig, layer_idx: int) -> None:
        super().__init__()
        channels = config.hidden_size if layer_idx == 0 else config.num_filters
        self.convolution = TimeConvolution(channels, config.num_filters, config.kernel_size(layer_idx))
        self.pool = config.pool(layer_idx)

    def forward(self, hidden: torch.Tensor, blanks: int = 0) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden: `(batch, frames, channels)`.
            blanks: zero frames to add at the end.

        Returns:
            `(batch, (frames + blanks - k + 1) // pool, maps)`.
        """
        features = self.convolution(F.pad(hidden.mT, (0, blanks))).relu()
        return features.mT if self.pool == 1 else F.max_pool1d(features, self.pool).mT


class CharCNNPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation that the character networks share: normal, as in [1], section 2.3, each row's mean zero."""

    config: CharCNNConfig
    _no_split_modules = ["CharCNNLayer"]
    _can_record_outputs = {"hidden_states": CharCNNLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        if isinstance(module, TimeConvolution):
            init_centred(module.projection.weight, config.initializer_range)
        elif isinstance(module, CharCNNModel):
            for dense in module.get_submodule("dense").children():
                init_centred(dense.get_parameter("weight"), config.initializer_range)
        elif isinstance(module, nn.Embedding) and config.quantization == "one-hot":
            alphabet = torch.arange(config.vocab_size, device=module.weight.device) - config.num_special_tokens
            channels = torch.arange(config.hidden_size, device=module.weight.device)
            init.copy_(module.weight, (alphabet[:, None] == channels).to(module.weight.dtype))


class CharCNNModel(CharCNNPreTrainedModel):
    """The network up to its last hidden layer.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: CharCNNConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_tokens.weight.requires_grad_(config.quantization == "learned")
        self.layers = nn.ModuleList(CharCNNLayer(config, index) for index in range(config.num_hidden_layers))
        flat = config.frames(config.max_position_embeddings) * config.num_filters
        self.dense = nn.ModuleList(
            [nn.Linear(flat, config.intermediate_size), nn.Linear(config.intermediate_size, config.intermediate_size)]
        )
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding; one-hot vectors stay out of training."""
        self.embed_tokens = value
        value.weight.requires_grad_(self.config.quantization == "learned")

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
            input_ids: `(batch, length)`; of longer texts the end is read (`backwards`) or the beginning.
            attention_mask: `(batch, length)`, 1 at real characters; the others are as if they were not there.
            inputs_embeds: `(batch, length, hidden_size)` instead of `input_ids`.
            kwargs: `output_hidden_states` and the like.

        Returns:
            `last_hidden_state` `(batch, frames, maps)` and `pooler_output` `(batch, intermediate_size)`. Hidden states
            are in the order of reading.

        Raises:
            ValueError: inputs and mask do not fit together.
        """
        hidden = self._quantise(*read_text(self, input_ids, attention_mask, inputs_embeds, kwargs))
        if torch.is_grad_enabled() and (kwargs.get("output_hidden_states") or self.config.output_hidden_states):
            hidden = hidden.requires_grad_()  # one-hot vectors have no gradient, but which character matters is asked
        blanks = self._blanks(hidden.shape[1])
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, blanks if index == 0 else 0)
        missing = self.config.frames(self.config.max_position_embeddings) - hidden.shape[1]
        if missing:  # the last frame saw blanks only, and so would all those after it
            hidden = torch.cat([hidden, hidden[:, -1:].expand(-1, missing, -1)], dim=1)
        pooled = hidden.flatten(1)
        for dense in self.dense:
            pooled = self.dropout(dense(pooled).relu())
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def _quantise(self, hidden: torch.Tensor, plan: Justified | None) -> torch.Tensor:
        """Put the characters in the order of reading, blanks last, and cut what is too long."""
        if plan is not None:
            hidden = justify(hidden, plan)
        if self.config.backwards:
            hidden = hidden.flip(1)
            if plan is not None:  # the blanks are now in front: move the text back to the beginning
                length = hidden.shape[1]
                order = torch.arange(length, device=hidden.device) + (length - plan.lengths)[:, None]
                hidden = hidden.gather(1, (order % length)[:, :, None].expand_as(hidden))
        return hidden[:, : self.config.max_position_embeddings]

    def _blanks(self, length: int) -> int:
        """Number of blanks to append to `length` characters so that the last frame sees nothing else."""
        field, step = self.config.shortest_blank()
        wanted = -(-length // step) * step + field
        return min(wanted, self.config.max_position_embeddings) - length


class CharCNNForSequenceClassification(TextClassifier):
    """Character-level network as a classifier.

    Args:
        config: the architecture, with `num_labels` and `problem_type`.
    """

    config: CharCNNConfig
    body_class = CharCNNModel
    _no_split_modules = ["CharCNNLayer"]
    quiet_start = True

    def make_head(self, config: CharCNNConfig) -> None:
        """Make dropout and classifier."""
        self.build_head(config.intermediate_size, 0.0, None)


__all__ = ["CharCNNForSequenceClassification", "CharCNNModel", "CharCNNPreTrainedModel"]
