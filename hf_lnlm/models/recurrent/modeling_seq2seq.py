"""Recurrent sequence-to-sequence models with attention.

References:
    [1] Sutskever, Vinyals and Le 2014, "Sequence to Sequence Learning with Neural Networks".
    [2] Bahdanau, Cho and Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and Translate".
    [3] Luong, Pham and Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation".
    [4] Merity, Keskar and Socher 2017, "Regularizing and Optimizing LSTM Language Models" (the dropouts).

Glossary (paper symbol: variable): hbar_s of [3], h_j of [2]: `encoder_hidden_states`; h_t of [3], s_i of [2]: the decoder's
states; c_t: context; ~h_t: `AttentionalVector`, which `fed` is of the step before; a_t: `cross_attentions`.

Deliberate deviations:
    * `additive` attention reads s_{i-1} and gives its context to the cell, as [2] does; the output is [3]'s ~h_t of the
      context and s_i in place of [2]'s maxout layer.
    * [2] starts the decoder from the backward encoder alone; `bridge="tanh"` maps both directions' final states.
    * Final states of the encoder are those after each row's last real token, wherever padding lies.

Complexity: O(length * hidden^2 + source length * length * hidden); O(source length) a generated token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from ...nn.dropout import EmbeddingDropout, LockedDropout
from ...nn.inputs import CACHE_FIELD, check_keywords, prepare, take_cache
from ...nn.loss_heads import IGNORED, check_labels
from ...nn.masks import current_mask
from ..heads import SequenceClassificationHead, VocabularyHead, passthrough_outputs
from .configuration_seq2seq import RNNSeq2SeqConfig
from .layers import summed_up
from .seq2seq_decoder import Bridge, DecoderWalk
from .seq2seq_encoder import (
    RNNSeq2SeqEncoder,
    RNNSeq2SeqEncoderOutput,
    RNNSeq2SeqPreTrainedModel,
    embedding_projection,
    wanted,
)
from .source_attention import Source


@dataclass
class RNNSeq2SeqDecoderOutput(BaseModelOutput):
    """Output of `RNNSeq2SeqDecoder`.

    Args:
        cross_attentions: one `(batch, 1, length, source length)`, the alignment; only if asked for.
        state: the state so far, an `EncoderDecoderCache`.
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None
    state: EncoderDecoderCache | None = None


class RNNSeq2SeqDecoder(RNNSeq2SeqPreTrainedModel):
    """Writes the target, looking at the source.

    Args:
        config: the model's configuration.
    """

    _tied_weights_keys: Any = None

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, int(config.embedding_size or 0), config.pad_token_id)
        self.embedding_projection = embedding_projection(config)
        self.bridge = Bridge(config)
        self.walk = DecoderWalk(config)
        self.embedding_dropout = EmbeddingDropout(config.embedding_dropout)
        self.input_dropout = LockedDropout(config.input_dropout)
        self.output_dropout = LockedDropout(config.output_dropout)
        shapes = dict.fromkeys(config.state_names, (config.hidden_size,))
        self.state_shapes = [dict(shapes) for _ in range(config.num_hidden_layers)]
        if config.input_feeding:
            self.state_shapes[0]["fed"] = (config.hidden_size,)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: RNNSeq2SeqEncoderOutput | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> RNNSeq2SeqDecoderOutput:
        """Run the decoder; see `RNNSeq2SeqModel.forward`, whose names for these begin with `decoder_`.

        Raises:
            ValueError: inputs, masks, source or state do not fit each other or the config.
        """
        cache = own_pair(self, past_key_values, use_cache)
        own = None if cache is None else cache.self_attention_cache
        batch = prepare(self, input_ids, inputs_embeds, (attention_mask, None, None), own, use_cache, {}, "decoder_")
        if encoder_outputs is None:
            raise ValueError("the decoder needs what the encoder read: encoder_outputs must be given, got None")
        source = self._source(encoder_outputs[0], encoder_attention_mask, cache)
        if source is not None and source.values.shape[0] != batch.hidden.shape[0]:
            rows = batch.hidden.shape[0]
            raise ValueError(f"encoder_outputs must have the decoder's {rows} rows, got {source.values.shape[0]}")
        read = [batch.read(index, shapes) for index, shapes in enumerate(self.state_shapes)]
        fed = None if read[0] is None else read[0].pop("fed", None)
        if read[0] is None:
            states = self.bridge(getattr(encoder_outputs, "final_state", None), batch.hidden)
        else:
            states = [tuple(layer.values()) for layer in read if layer is not None]
        checkpointing = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
        hidden = self.input_dropout(batch.hidden)
        hidden = hidden if self.embedding_projection is None else self.embedding_projection(hidden)
        exact = cache is not None
        outputs, ended = self.walk(hidden, states, fed, source, batch.segments, exact, checkpointing)
        for index, final in enumerate(ended["states"]):
            more = {"fed": ended["fed"]} if "fed" in self.state_shapes[index] else {}
            batch.write(index, dict(zip(self.config.state_names, final, strict=True)) | more)
        last = self.output_dropout(outputs.pop())
        recorded = wanted(self.config, "output_hidden_states", output_hidden_states)
        looked = wanted(self.config, "output_attentions", output_attentions)
        return RNNSeq2SeqDecoderOutput(
            last_hidden_state=last,
            hidden_states=(hidden, *outputs[:-1], last) if recorded else None,
            cross_attentions=alignments(ended["alignment"]) if looked else None,
            state=cache,
        )

    def _source(self, values: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any) -> Source | None:
        """Return what is attended to; the keys are computed once a source and kept with the state."""
        attention: Any = self.walk.attention
        mask = current_mask(attention_mask, values.shape[0], values.shape[1])
        if attention is None:
            return None
        kept: Any = None if cache is None else cache.cross_attention_cache.layers[0]
        width = self.config.source_width if attention.key is None else attention.key_width
        kind, shapes = f"{self.state_kind}'s source", {"keys": (values.shape[1], width)}
        found = None if kept is None else kept.read(kind, values.shape[0], shapes)
        if found is not None:
            return Source(values, found["keys"], mask)
        source = attention.read(values, mask)
        if kept is not None:
            kept.write(kind, {"keys": source.keys}, values.shape[1])
            cache.is_updated = dict.fromkeys(cache.is_updated, True)
        return source

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids, with whole words dropped while training."""
        return self.embedding_dropout(self.embed_tokens(input_ids), input_ids, self.config.vocab_size)


def own_pair(model: Any, cache: Cache | None, use_cache: bool | None) -> Any:
    """Return the pair of caches to use: the one given, else a new one if wanted.

    Raises:
        ValueError: what is given isn't a pair of the decoder's states and the source.
    """
    if cache is None:
        return EncoderDecoderCache(*(DynamicCache(config=model.config) for _ in range(2))) if use_cache else None
    halves = [getattr(cache, f"{half}_attention_cache", None) for half in ("self", "cross")]
    if any(len(getattr(half, "layers", ())) != len(model.layer_types) for half in halves):
        raise ValueError(
            f"past_key_values must be an EncoderDecoderCache of two DynamicCache(config=model.config), got {cache!r}"
        )
    return cache


def alignments(alignment: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
    """Return an alignment `(batch, length, source length)` as transformers gives attentions: one with one head."""
    return None if alignment is None else (alignment.unsqueeze(1),)


class RNNSeq2SeqModel(RNNSeq2SeqPreTrainedModel):
    """Encoder and decoder, without a head.

    Args:
        config: the model's configuration.
    """

    _follows_input = False

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = RNNSeq2SeqEncoder(config)
        self.decoder = RNNSeq2SeqDecoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the source's table of embeddings."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the source's table of embeddings."""
        encoder: Any = self.encoder
        encoder.embed_tokens = value

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Run encoder and decoder.

        Args:
            input_ids: `(batch, source length)`; or give `inputs_embeds` or `encoder_outputs`.
            attention_mask: `(batch, source length)`, zero at padding, which may lie anywhere.
            decoder_input_ids: `(batch, length)`; or give `decoder_inputs_embeds`.
            decoder_attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            encoder_outputs: what the encoder returned, or a tuple of it; then the source isn't read again.
            past_key_values: the state so far, an `EncoderDecoderCache`; updated and returned.
            inputs_embeds, decoder_inputs_embeds: `(batch, source length or length, embedding_size)`.
            use_cache: whether to return the state.
            kwargs: `output_hidden_states`; `output_attentions`, for the alignment `(batch, 1, length, source length)`.

        Returns:
            last hidden state `(batch, length, hidden_size)`, the state, and the encoder's last hidden state
            `(batch, source length, encoder width)`.

        Raises:
            ValueError: inputs, masks or state do not fit each other or the config.
            TypeError: an argument would be ignored.
        """
        cache = take_cache(past_key_values, kwargs)
        check_keywords(kwargs)
        recorded, looked = kwargs.get("output_hidden_states"), kwargs.get("output_attentions")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, recorded, return_dict=True)
        encoder_outputs = as_encoder_output(encoder_outputs)
        outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            attention_mask,
            cache,
            decoder_inputs_embeds,
            use_cache,
            recorded,
            looked,
            return_dict=True,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            **{CACHE_FIELD: outputs.state if use_cache else None},
        )

    def _resize_token_embeddings(
        self, new_num_tokens: Any, pad_to_multiple_of: Any = None, mean_resizing: bool = True
    ) -> Any:
        return resize_both(super()._resize_token_embeddings, self, new_num_tokens, pad_to_multiple_of, mean_resizing)


def as_encoder_output(given: Any) -> Any:
    """Return what an encoder gave out by its fields' names, if it was given as a tuple."""
    if hasattr(given, "last_hidden_state"):
        return given
    return RNNSeq2SeqEncoderOutput(**dict(zip(("last_hidden_state", "final_state"), given, strict=False)))


def resize_both(resize: Any, model: Any, size: Any, multiple: Any, mean: bool) -> Any:
    """Resize the tables of source and target alike.

    Args:
        resize: transformers' own method, which resizes the source's table and the output layer.
        model: with encoder and decoder.
        size, multiple, mean: as in transformers' `resize_token_embeddings`.

    Raises:
        ValueError: the model has two vocabularies, which one number can't resize.
    """
    config = model.config
    if config.source_vocabulary != config.vocab_size and not (size is None and multiple is None):
        raise ValueError(
            "a model with two vocabularies can't be resized to one size: "
            f"source_vocab_size {config.source_vocabulary} and vocab_size {config.vocab_size}, got {size}"
        )
    embeddings, decoder = resize(size, multiple, mean), model.get_decoder()
    if size is not None or multiple is not None:
        rows = embeddings.weight.shape[0]
        decoder.embed_tokens = model._get_resized_embeddings(decoder.embed_tokens, rows, None, mean)
        config.source_vocab_size = None
    return embeddings


class RNNSeq2SeqForConditionalGeneration(VocabularyHead, RNNSeq2SeqPreTrainedModel, GenerationMixin):
    """Recurrent sequence-to-sequence model with a full, chunked or adaptive softmax.

    Args:
        config: the model's configuration.
    """

    body_class = RNNSeq2SeqModel
    untied_bias = True
    _tied_weights_keys: Any = {
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "lm_head.weight": "model.decoder.embed_tokens.weight",
    }
    _follows_input = False

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return what the decoder reads to write `labels` `(batch, length)`: each row's start token, then the labels.

        Ignored labels (-100) become padding. Where a row begins with them, which is padding on the left, its start token
        stands right before the first label.

        Raises:
            ValueError: the config has no decoder_start_token_id.
        """
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError("labels need a start token: config.decoder_start_token_id must be given, got None")
        padding = start if self.config.pad_token_id is None else self.config.pad_token_id
        shifted = torch.full_like(labels, padding)
        shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, padding)
        first = leading(labels).sum(1, keepdim=True).clamp(max=labels.shape[1] - 1)
        return shifted.scatter(1, first, start)

    def _to_write(self, labels: Any, mask: torch.Tensor | None) -> tuple[Any, torch.Tensor]:
        """Return the decoder's input for `labels` `(batch, length)` and its mask, where none is given."""
        check_labels(labels, self.config.vocab_size, (labels.shape[0], labels.shape[-1]))
        shifted = self.prepare_decoder_input_ids_from_labels(labels)
        return shifted, (~leading(labels)).long() if mask is None else mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Run the model and, given labels, its loss; see `RNNSeq2SeqModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the tokens to be written, -100 where ignored; they are the decoder's input too,
                shifted, unless that is given.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            kwargs: `num_items_in_batch`, by which the summed loss is divided, as Trainer gives it.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)`, and what `RNNSeq2SeqModel` returns besides its last
            hidden state. While training with a chunked or adaptive head the logits are None: they are never computed.

        Raises:
            ValueError: labels are no token ids, or of another shape.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids, decoder_attention_mask = self._to_write(labels, decoder_attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if labels is not None:
            check_labels(labels, self.config.vocab_size, tuple(hidden.shape[:2]))
        loss, logits = self.loss_and_logits(hidden, labels, logits_to_keep, kwargs.get("num_items_in_batch"))
        return Seq2SeqLMOutput(loss=loss, logits=logits, **passthrough_outputs(outputs, Seq2SeqLMOutput))

    def _resize_token_embeddings(
        self, new_num_tokens: Any, pad_to_multiple_of: Any = None, mean_resizing: bool = True
    ) -> Any:
        return resize_both(super()._resize_token_embeddings, self, new_num_tokens, pad_to_multiple_of, mean_resizing)


def leading(labels: torch.Tensor) -> torch.Tensor:
    """Mark the ignored labels before each row's first real one, `(batch, length)`: padding on the left."""
    return (labels != IGNORED).cumsum(1) == 0


class RNNSeq2SeqEncoderModel(RNNSeq2SeqPreTrainedModel):
    """The encoder alone, under the names that it has in a whole model.

    Args:
        config: the model's configuration.
    """

    _tied_weights_keys: Any = None
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^lm_head\.", r"^output_projection\."]

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = RNNSeq2SeqEncoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> RNNSeq2SeqEncoderOutput:
        """Read a source; see `RNNSeq2SeqModel.forward`."""
        check_keywords(kwargs)
        recorded = kwargs.get("output_hidden_states")
        return self.encoder(input_ids, attention_mask, inputs_embeds, recorded, return_dict=True)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of embeddings."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of embeddings."""
        encoder: Any = self.encoder
        encoder.embed_tokens = value


class RNNSeq2SeqForSequenceClassification(SequenceClassificationHead, RNNSeq2SeqPreTrainedModel):
    """Text classifier or regressor over the encoder.

    Args:
        config: the model's configuration; `pooling` says how a text is summed up.
    """

    body_class = RNNSeq2SeqEncoderModel
    accepts_loss_kwargs = True  # Trainer looks for **kwargs otherwise

    def make_head(self, config: RNNSeq2SeqConfig) -> None:
        """Make `dropout` and `classifier`."""
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.source_width, config.num_labels)

    _tied_weights_keys: Any = None
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^lm_head\.", r"^output_projection\."]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Classify texts; see `SequenceClassificationHead.forward`. There is no decoder, nor any argument for one.

        Args:
            num_items_in_batch: number of texts of the whole accumulated batch, as Trainer gives it.
            token_type_ids: all zero.
            output_attentions, use_cache, cache_position: mean nothing here, and come with pipelines.
        """
        return super().forward(
            input_ids,
            attention_mask,
            inputs_embeds,
            labels,
            num_items_in_batch=num_items_in_batch,
            token_type_ids=token_type_ids,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text as `config.pooling` says; see `SequenceClassificationHead.pool`."""
        one_way = "backwards" if self.config.reverse_source else "forwards"
        return summed_up(hidden, mask, self.config.pooling, "both" if self.config.bidirectional else one_way)


__all__ = [
    "RNNSeq2SeqForConditionalGeneration",
    "RNNSeq2SeqForSequenceClassification",
    "RNNSeq2SeqModel",
    "RNNSeq2SeqPreTrainedModel",
]
