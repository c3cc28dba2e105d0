"""Gated convolutional language model and classifier [1].

References:
    [1] Dauphin, Fan, Auli & Grangier 2017, "Language Modeling with Gated Convolutional Networks" (ICML).
    [2] Salimans & Kingma 2016, "Weight Normalization".
    [3] Grave et al. 2017, "Efficient softmax approximation for GPUs".

Glossary (paper symbol ↔ here): X input of a layer ↔ `hidden`; k kernel width ↔ `kernel_size`; W, V with b, c ↔ the two
halves of `convolution.projection`; h = (X∗W + b) ⊗ σ(X∗V + c) (eq. 1) ↔ `time_conv`; g of [2] ↔ `gain`.

Deviations: a residual connection between layers of different width goes through a linear map; a text is read from zeros
before its first token, as in the paper, and packed documents each from zeros of their own. The state is the last k − 1
frames of each layer's wide convolution, so decoding is exact and its cost does not depend on the text before.

Complexity: O(length · k · channels²) a layer, the whole sequence at once; O(k · channels²) for one more token.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.convolution import CausalConvolution, TimeConvolution, justify, left_justify, restore
from ...nn.inputs import CACHE_FIELD, prepare
from ...nn.masks import SegmentInfo, end_token
from ...nn.pooling import max_over_time, mean_over_time
from ...nn.ragged import RowLayout, batch_state, gather_rows, rows_state, scatter_rows
from ..base import LNLMPreTrainedModel
from ..heads import CausalLMHead, SequenceClassificationHead
from .configuration_gated_cnn import GatedCNNConfig

Piece = tuple[torch.Tensor, torch.Tensor]


class GatedCNNLayer(GradientCheckpointingLayer):
    """A causal gated convolution with a residual connection, plain or with a bottleneck (1, k, 1).

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: GatedCNNConfig, layer_idx: int) -> None:
        super().__init__()
        shape, norm = config.layer_shape(layer_idx), config.weight_norm
        inner = shape.bottleneck_size
        self.dropout = nn.Dropout(config.dropout)
        backend = config.backend
        self.narrow = CausalConvolution(shape.in_size, 2 * inner, 1, norm, True, backend) if inner else None
        wide_in, wide_out = (inner, inner) if inner else (shape.in_size, shape.size)
        self.convolution = CausalConvolution(wide_in, 2 * wide_out, shape.kernel_size, norm, True, backend)
        self.widen = CausalConvolution(inner, 2 * shape.size, 1, norm, True, backend) if inner else None
        same = shape.in_size == shape.size
        self.shortcut = None if same else nn.Linear(shape.in_size, shape.size, bias=False)

    @property
    def window_shape(self) -> tuple[int, int]:
        """Shape of one row's state: frames and channels."""
        return self.convolution.window_size, self.convolution.in_features

    def forward(self, hidden: torch.Tensor, window: torch.Tensor | None, segments: SegmentInfo) -> Piece:
        """Run the layer on a piece of the sequence.

        Args:
            hidden: `(batch, length, channels)`.
            window: `(batch, k - 1, channels)` frames before the piece; None at the beginning.
            segments: which positions are real and where documents begin.

        Returns:
            output `(batch, length, channels out)` and the window after the piece.
        """
        frames = self.dropout(hidden)
        if self.narrow is not None:
            frames, _ = self.narrow(frames)
        frames, window = self._convolve(frames, window, segments)
        if self.widen is not None:
            frames, _ = self.widen(frames)
        return frames + (hidden if self.shortcut is None else self.shortcut(hidden)), window

    def _convolve(self, frames: torch.Tensor, window: torch.Tensor | None, segments: SegmentInfo) -> Piece:
        if segments.traced and segments.mask is None and segments.starts is not None:
            segments = segments._replace(mask=torch.ones_like(segments.starts))
        if segments.traced and segments.mask is not None:
            return self._convolve_traced(frames, window, segments.mask, segments.starts)
        if segments.layout is not None and not segments.layout.aligned:
            return self._convolve_rows(frames, window, segments.layout)
        lengths = None if segments.layout is None else segments.layout.lengths
        return self.convolution(frames, window, lengths)

    def _convolve_rows(self, frames: torch.Tensor, window: torch.Tensor | None, layout: RowLayout) -> Piece:
        if window is None:
            window = frames.new_zeros(frames.shape[0], *self.window_shape)
        if layout.lengths.numel() == 0:
            return frames.new_zeros(*frames.shape[:2], self.convolution.output_size), window
        rows = gather_rows(frames, layout.gather_index)
        output, final = self.convolution(rows, rows_state(window, window.new_zeros(1), layout), layout.lengths)
        return scatter_rows(output, layout.scatter_index, layout.mask), batch_state(final, window, layout)

    def _convolve_traced(
        self, frames: torch.Tensor, window: torch.Tensor | None, mask: torch.Tensor, starts: torch.Tensor | None
    ) -> Piece:
        plan = left_justify(mask)
        rows = justify(frames, plan)
        if starts is None:
            output, window = self.convolution(rows, window, plan.lengths)
        else:
            documents = starts.cumsum(1)
            documents = documents if plan.order is None else documents.gather(1, plan.order)
            output, window = self.convolution(rows, window, plan.lengths, documents)
        return restore(output, plan), window


class GatedCNNPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation and traits that the gated convolutional models share."""

    config: GatedCNNConfig
    _no_split_modules = ["GatedCNNLayer"]
    _can_record_outputs = {"hidden_states": GatedCNNLayer}
    _no_weight_decay = (r"\.gain$", r"\.bias$")
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):  # tied logits then have the scale of the inputs
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, TimeConvolution):  # He et al. 2015, as in the paper, section 4.3
            weight = module.projection.weight
            init.normal_(weight, std=(2.0 / weight.shape[1]) ** 0.5)
            loaded = getattr(module.gain, "_is_hf_initialized", False)  # then the weight is, too, and maybe quantised
            if module.gain is not None and not loaded:
                init.copy_(module.gain, torch.linalg.vector_norm(weight, dim=1))


class GatedCNNModel(GatedCNNPreTrainedModel):
    """Embeddings and gated convolutional layers, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: GatedCNNConfig) -> None:
        super().__init__(config)
        width = int(config.embedding_size or config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        same = width == config.hidden_size
        self.embedding_projection = None if same else nn.Linear(width, config.hidden_size, bias=False)
        layers = [GatedCNNLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.state_shapes = [{"window": layer.window_shape} for layer in layers]
        self.gradient_checkpointing = False
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
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, embedding_size)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)`; position 0 begins a document, with a fresh window (packed rows).
            past_key_values: windows so far, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the windows.
            seq_idx: `(batch, length)` document numbers of packed rows.
            kwargs: `cu_seq_lens_q` `(documents + 1,)`, offsets of the documents of a single packed row.

        Returns:
            last hidden state `(batch, length, output_size)` and the windows.

        Raises:
            ValueError: inputs, mask or state do not fit each other or the config.
        """
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        hidden = batch.hidden if self.embedding_projection is None else self.embedding_projection(batch.hidden)
        segments = batch.segments.in_rows()
        for index, layer in enumerate(self.layers):
            states = batch.read(index, self.state_shapes[index]) or {}
            hidden, window = layer(hidden, states.get("window"), segments)
            batch.write(index, {"window": window})
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_FIELD: batch.cache if use_cache else None})


class GatedCNNForCausalLM(CausalLMHead, GatedCNNPreTrainedModel, GenerationMixin):
    """Gated convolutional language model with a full, chunked or adaptive softmax [3]."""

    body_class = GatedCNNModel
    untied_bias = True


class GatedCNNForSequenceClassification(SequenceClassificationHead, GatedCNNPreTrainedModel):
    """Text classifier or regressor over gated convolutions.

    Args:
        config: the model's configuration; `pooling` says how a text is summed up.
    """

    body_class = GatedCNNModel

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text as `config.pooling` says; see `SequenceClassificationHead.pool`."""
        if self.config.pooling == "last":
            return end_token(hidden, mask)
        return (max_over_time if self.config.pooling == "max" else mean_over_time)(hidden.mT, mask)


__all__ = ["GatedCNNForCausalLM", "GatedCNNForSequenceClassification", "GatedCNNModel", "GatedCNNPreTrainedModel"]
