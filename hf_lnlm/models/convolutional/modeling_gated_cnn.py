"""Gated convolutional language model and classifier [1].

References:
    [1] Dauphin, Fan, Auli & Grangier 2017, "Language Modeling with Gated Convolutional Networks" (ICML).
    [2] Salimans & Kingma 2016, "Weight Normalization".
    [3] Grave et al. 2017, "Efficient softmax approximation for GPUs".

Glossary (paper symbol ↔ here): X input of a layer ↔ `hidden`; k kernel width ↔ `kernel_size`; W, V with b, c ↔ the two
halves of `convolution.projection`; h = (X∗W + b) ⊗ σ(X∗V + c) (eq. 1) ↔ `gated_windows`; g of [2] ↔ `gain`.

Deviations: a residual connection between layers of different width goes through a linear map; a text is read from zeros
before its first token, as in the paper, and packed documents each from zeros of their own. The state is the last k − 1
frames of each layer's wide convolution, so decoding is exact and its cost does not depend on the text before.

Complexity: O(length · k · channels²) a layer, the whole sequence at once; O(k · channels²) for one more token.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.convolution import CausalConvolution, TimeConvolution, justify, left_justify, restore
from ...nn.masks import SequenceMarks, end_token, sequence_marks
from ...nn.pooling import max_over_time, mean_over_time
from ...nn.ragged import RowLayout, batch_state, gather_rows, rows_state, scatter_rows
from ..base import LNLMPreTrainedModel
from ..heads import SequenceClassificationHead, VocabularyHead, targets_of
from .configuration_gated_cnn import GatedCNNConfig
from .text_classifier import embed_inputs

STATE_KIND = "gated_cnn"
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
        self.tap_by_tap = config.backend == "reference"
        self.dropout = nn.Dropout(config.dropout)
        self.narrow = CausalConvolution(shape.in_size, 2 * inner, 1, norm, gated=True) if inner else None
        wide_in, wide_out = (inner, inner) if inner else (shape.in_size, shape.size)
        self.convolution = CausalConvolution(wide_in, 2 * wide_out, shape.kernel_size, norm, gated=True)
        self.widen = CausalConvolution(inner, 2 * shape.size, 1, norm, gated=True) if inner else None
        same = shape.in_size == shape.size
        self.shortcut = None if same else nn.Linear(shape.in_size, shape.size, bias=False)

    @property
    def window_shape(self) -> tuple[int, int]:
        """Shape of one row's state: frames and channels."""
        return self.convolution.window_size, self.convolution.in_features

    def forward(self, hidden: torch.Tensor, window: torch.Tensor | None, marks: SequenceMarks) -> Piece:
        """Run the layer on a piece of the sequence.

        Args:
            hidden: `(batch, length, channels)`.
            window: `(batch, k - 1, channels)` frames before the piece; None at the beginning.
            marks: which positions are real and where documents begin.

        Returns:
            output `(batch, length, channels out)` and the window after the piece.
        """
        frames = self.dropout(hidden)
        if self.narrow is not None:
            frames, _ = self.narrow(frames)
        frames, window = self._convolve(frames, window, marks)
        if self.widen is not None:
            frames, _ = self.widen(frames)
        return frames + (hidden if self.shortcut is None else self.shortcut(hidden)), window

    def _convolve(self, frames: torch.Tensor, window: torch.Tensor | None, marks: SequenceMarks) -> Piece:
        if marks.traced and marks.mask is None and marks.starts is not None:
            marks = marks._replace(mask=torch.ones_like(marks.starts))
        if marks.traced and marks.mask is not None:
            return self._convolve_traced(frames, window, marks.mask, marks.starts)
        if marks.layout is not None and not marks.layout.aligned:
            return self._convolve_rows(frames, window, marks.layout)
        lengths = None if marks.layout is None else marks.layout.lengths
        return self._run(frames, window, lengths)

    def _run(self, frames: torch.Tensor, window: torch.Tensor | None, lengths: torch.Tensor | None) -> Piece:
        if not self.tap_by_tap:
            return self.convolution(frames, window, lengths)
        batch, length, _ = frames.shape
        lengths = torch.full((batch,), length, device=frames.device) if lengths is None else lengths
        documents = torch.zeros(batch, length, dtype=torch.long, device=frames.device)
        return self.convolution(frames, window, lengths, documents)

    def _convolve_rows(self, frames: torch.Tensor, window: torch.Tensor | None, layout: RowLayout) -> Piece:
        if window is None:
            window = frames.new_zeros(frames.shape[0], *self.window_shape)
        if layout.lengths.numel() == 0:
            return frames.new_zeros(*frames.shape[:2], self.convolution.output_size), window
        rows = gather_rows(frames, layout.index)
        output, final = self._run(rows, rows_state(window, window.new_zeros(1), layout), layout.lengths)
        return scatter_rows(output, layout.place, layout.mask), batch_state(final, window, layout)

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
            if module.gain is not None:
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
        self.layers = nn.ModuleList([GatedCNNLayer(config, i) for i in range(config.num_hidden_layers)])
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, embedding_size)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)`; position 0 begins a document, with a fresh window (packed rows).
            past_key_values: windows so far, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the windows.
            seq_idx: `(batch, length)` document numbers of packed rows.

        Returns:
            last hidden state `(batch, length, output_size)` and the windows.

        Raises:
            ValueError: inputs, mask or state do not fit each other or the config.
        """
        hidden = embed_inputs(self.embed_tokens, input_ids, inputs_embeds)
        hidden = hidden if self.embedding_projection is None else self.embedding_projection(hidden)
        cache = self._cache(past_key_values, use_cache)
        marks = sequence_marks(hidden, attention_mask, position_ids, seq_idx, cache)
        for index, layer in enumerate(self.layers):
            hidden, window = layer(hidden, self._read(cache, index, hidden.shape[0]), marks)
            if cache is not None:
                cache.layers[index].write(STATE_KIND, {"window": window}, hidden.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache if use_cache else None)

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        if past_key_values is None:
            return DynamicCache(config=self.config) if use_cache else None
        layers = getattr(past_key_values, "layers", [])
        if len(layers) != len(self.layers) or not all(hasattr(layer, "read") for layer in layers):
            raise ValueError(
                f"past_key_values must hold {len(self.layers)} windows, as DynamicCache(config=model.config) makes "
                f"them, got {past_key_values!r}"
            )
        return past_key_values

    def _read(self, cache: Cache | None, index: int, batch_size: int) -> torch.Tensor | None:
        if cache is None:
            return None
        shapes = {"window": self.layers[index].window_shape}
        states = cache.layers[index].read(STATE_KIND, batch_size, shapes)
        return None if states is None else states["window"]


class GatedCNNForCausalLM(VocabularyHead, GatedCNNPreTrainedModel, GenerationMixin):
    """Gated convolutional language model with a full, chunked or adaptive softmax [3].

    Args:
        config: the model's configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GatedCNNConfig) -> None:
        super().__init__(config)
        self.model = GatedCNNModel(config)
        self.make_vocabulary_head()
        self.post_init()

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
        """Run the model and, given labels, its loss; see `GatedCNNModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the input ids; shifted inside. -100 is ignored.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            kwargs: `num_items_in_batch`; `shift_labels` `(batch, length)`, already shifted, in place of `labels`.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)` and the windows. While training with a chunked or
            adaptive head the logits are None: they are never computed.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no named argument: Trainer would wait for it as for labels
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
        targets, items = targets_of(labels, shift_labels), kwargs.get("num_items_in_batch")
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, targets, logits_to_keep, items)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class GatedCNNForSequenceClassification(SequenceClassificationHead, GatedCNNPreTrainedModel):
    """Text classifier or regressor over gated convolutions.

    Args:
        config: the model's configuration; `pooling` says how a text is summed up.
    """

    def __init__(self, config: GatedCNNConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GatedCNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.output_size, config.num_labels)
        self.post_init()

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text as `config.pooling` says; see `SequenceClassificationHead.pool`."""
        if self.config.pooling == "last":
            return end_token(hidden, mask)
        return (max_over_time if self.config.pooling == "max" else mean_over_time)(hidden.mT, mask)


__all__ = ["GatedCNNForCausalLM", "GatedCNNForSequenceClassification", "GatedCNNModel", "GatedCNNPreTrainedModel"]
