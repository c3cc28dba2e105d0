"""TextCNN: one layer of convolutions over word windows, max-over-time, a linear classifier [1].

References:
    [1] Kim 2014, "Convolutional Neural Networks for Sentence Classification" (EMNLP).

Glossary (paper symbol ↔ here): x_i word vector ↔ a position of `hidden`; h words in a window ↔ `filter_sizes`;
w, b filter ↔ `TimeConvolution.projection`; c feature map ↔ `maps`; ĉ = max{c} ↔ `pooled`; s bound on ‖w‖ ↔ `max_norm`.

Deviations: windows that see no real word never win the maximum (the paper's code pads every text to the longest one of the
corpus, so that a window of padding always takes part); any mask pattern is read as the text without the masked words.
Several layers are possible; the paper has one. The two channels of `multichannel` are added before the convolution, which
is the same by linearity and half the work. max and ReLU are exchanged, which is the same since ReLU never decreases.

Complexity: O(length · Σ h · width · maps) multiplications; one fused convolution a window size, instead of the usual
two-dimensional convolution over a one-channel image of width `hidden_size`.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.convolution import Justified, TimeConvolution, justify, restore, window_mask
from ...nn.pooling import max_over_time
from ..base import LNLMPreTrainedModel
from .configuration_text_cnn import TextCNNConfig
from .text_classifier import TextClassifier, read_text


class TextCNNEmbeddings(nn.Module):
    """Word vectors in one or two channels; the channels are added (see the file's head).

    Attributes:
        embed_tokens: the learnt channel (frozen in the `static` variant).
        static_tokens: the channel that training leaves alone, or None without `multichannel`.
    """

    def __init__(self, config: TextCNNConfig) -> None:
        super().__init__()
        size = (config.vocab_size, config.hidden_size)
        self.variant = config.variant
        self.embed_tokens = nn.Embedding(*size, padding_idx=config.pad_token_id)
        two = config.variant == "multichannel"
        self.static_tokens = nn.Embedding(*size, padding_idx=config.pad_token_id) if two else None
        self.freeze()

    def freeze(self) -> None:
        """Exclude the static vectors from training."""
        if self.variant == "static":
            self.embed_tokens.weight.requires_grad_(False)
        if self.static_tokens is not None:
            self.static_tokens.weight.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up `(batch, length)` ids: `(batch, length, hidden_size)`."""
        hidden = self.embed_tokens(input_ids)
        return hidden if self.static_tokens is None else hidden + self.static_tokens(input_ids)


class TextCNNLayer(GradientCheckpointingLayer):
    """Convolutions over windows of several sizes, and the maximum of each map.

    Args:
        config: the model's.
        in_features: width of the input.
    """

    def __init__(self, config: TextCNNConfig, in_features: int) -> None:
        super().__init__()
        self.windows = nn.ModuleList(
            TimeConvolution(in_features, config.num_filters, size, padding=(size - 1, size - 1))
            for size in config.filter_sizes
        )

    def forward(
        self, hidden: torch.Tensor, plan: Justified | None = None, wants_maps: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Convolve and pool.

        Args:
            hidden: `(batch, length, width)`.
            plan: where the real positions are; None if all are.
            wants_maps: whether anybody reads the maps themselves.

        Returns:
            maps `(batch, length, features)`, a window's value standing at its middle word, zero at masked positions (None
            if nobody wants them); and their maxima over all windows, those that stick out at the ends included,
            `(batch, features)`.
        """
        mask = None if plan is None else plan.mask
        columns = (hidden if plan is None else justify(hidden, plan)).transpose(1, 2)
        maps = [window(columns) for window in self.windows]
        pooled = torch.cat([self._pool(window, values, mask) for window, values in zip(self.windows, maps)], dim=1)
        return self._aligned(maps, hidden.shape[1], plan) if wants_maps else None, pooled.relu()

    @staticmethod
    def _pool(window: Any, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        size = window.kernel_size
        return max_over_time(values, None if mask is None else window_mask(mask, size, size - 1))

    def _aligned(self, maps: list[torch.Tensor], length: int, plan: Justified | None) -> torch.Tensor:
        starts = [(window.kernel_size - 1) // 2 for window in self.windows]  # type: ignore[operator]
        aligned = torch.cat([values[:, :, start : start + length] for start, values in zip(starts, maps)], dim=1)
        aligned = aligned.relu().transpose(1, 2)
        return aligned if plan is None else restore(aligned, plan)


class TextCNNPreTrainedModel(LNLMPreTrainedModel):
    """Base of the TextCNN classes."""

    config: TextCNNConfig
    _no_split_modules = ["TextCNNLayer"]
    _can_record_outputs = {"hidden_states": TextCNNLayer}


def init_text_cnn(module: nn.Module, config: TextCNNConfig) -> None:
    """Give word vectors the paper's uniform start (§3.1) and filters that of Glorot & Bengio 2010."""
    if isinstance(module, nn.Embedding):
        init.uniform_(module.weight, -config.embedding_range, config.embedding_range)
        if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
            init.zeros_(module.weight[module.padding_idx])
    elif isinstance(module, TimeConvolution):
        init.xavier_uniform_(module.projection.weight)


class TextCNNModel(TextCNNPreTrainedModel):
    """TextCNN without its classifier: a text's feature maps and their maxima.

    Args:
        config: the architecture.
    """

    def __init__(self, config: TextCNNConfig) -> None:
        super().__init__(config)
        self.embeddings = TextCNNEmbeddings(config)
        widths = [config.hidden_size] + [config.output_size] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(TextCNNLayer(config, width) for width in widths)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_text_cnn(module, self.config)

    def get_input_embeddings(self) -> nn.Module:
        """Return the learnt channel's embedding."""
        return self.embeddings.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the learnt channel's embedding, and cut or lengthen the static one to match."""
        self.embeddings.embed_tokens = value
        static = self.embeddings.static_tokens
        if static is not None and static.num_embeddings != value.num_embeddings:
            self.embeddings.static_tokens = self._get_resized_embeddings(static, value.num_embeddings)
        self.embeddings.freeze()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids, all channels added up."""
        return self.embeddings(input_ids)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pooled_only: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 1 at real tokens; the others are as if they were not there.
            inputs_embeds: `(batch, length, hidden_size)` instead of `input_ids`; of `multichannel`, the channels' sum.
            pooled_only: leave out `last_hidden_state`, which a classifier does not read.
            kwargs: `output_hidden_states` and the like.

        Returns:
            `last_hidden_state` `(batch, length, features)`, the maps at each word, and `pooler_output`
            `(batch, features)`, their maxima.

        Raises:
            ValueError: inputs and mask do not fit together.
        """
        hidden, plan = read_text(self, input_ids, attention_mask, inputs_embeds, kwargs)
        pooled = None
        for index, layer in enumerate(self.layers):
            hidden, pooled = layer(hidden, plan, not pooled_only or index + 1 < len(self.layers))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class TextCNNForSequenceClassification(TextClassifier):
    """TextCNN as a classifier, with the paper's dropout and max-norm constraint.

    Args:
        config: the architecture, with `num_labels` and `problem_type`.
    """

    config: TextCNNConfig
    body_class = TextCNNModel
    reads_pooled_only = True
    _no_split_modules = ["TextCNNLayer"]

    def make_head(self, config: TextCNNConfig) -> None:
        """Make dropout and classifier."""
        self.build_head(config.output_size, config.dropout, config.max_norm)


__all__ = ["TextCNNForSequenceClassification", "TextCNNModel", "TextCNNPreTrainedModel"]
