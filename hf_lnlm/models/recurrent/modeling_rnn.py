"""LSTM and GRU language models, classifiers and taggers.

References:
    [1] Zaremba, Sutskever and Vinyals 2014, "Recurrent Neural Network Regularization".
    [2] Merity, Keskar and Socher 2017, "Regularizing and Optimizing LSTM Language Models" (AWD-LSTM).
    [3] Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder" (GRU).

Glossary (paper symbol: variable): h_t: `states[0]`, c_t: `states[1]`; W: `input_gates.weight`, U: `recurrent_gates.weight`;
alpha, beta of [2]: `config.activation_penalty`, `config.temporal_penalty`.

Deliberate deviations:
    * Gates are two `nn.Linear` children a direction, whose weights go to torch's fused kernels. So LoRA, quantisation
      and offloading work on them as on any linear layer, and every code path sees the same effective weight.
    * AR and TAR of [2] are averaged over the positions that carry a label, so that accumulated batches add up exactly.
    * GRU resets after the recurrent product, as torch and cuDNN do; [3] resets before it.

Complexity: O(length * hidden^2) a layer, O(1) memory and time a generated token whatever came before.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.assign import assign
from ...nn.dropout import EmbeddingDropout, LockedDropout
from ...nn.effective_weight import effective_weight
from ...nn.loss_heads import (
    IGNORED,
    normalised,
)
from ...nn.masks import SequenceMarks, end_token, sequence_marks
from ...nn.pooling import max_over_time, mean_over_time
from ...nn.ragged import RowBlocks, batch_state, gather_blocks, row_blocks, rows_state, scatter_blocks
from ...ops.recurrence import NUM_GATES, STATES, recurrence, recurrence_blocks
from ...ops.recurrence.reference import recurrence_reference
from ..base import LNLMPreTrainedModel
from ..heads import (
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    VocabularyHead,
    targets_of,
)
from .configuration_rnn import RNNConfig

logger = logging.get_logger(__name__)

States = tuple[torch.Tensor, ...]

EMBEDDING_STD = {"lstm": 1.0, "gru": 0.25}
"""Standard deviation of initial embeddings. Smaller ones leave an LSTM's gates blind to their input for a long time
(after 120 steps on Python sources, 160 wide, tied: 4.78 nats a token at 1.0, 5.07 at 0.25, 5.60 at 0.1); a GRU's output
has no gate to shrink it, so that tied logits start too large (5.15 at 1.0, 4.35 at 0.25, 4.44 at 0.1)."""


@dataclass
class RNNModelOutput(BaseModelOutputWithPast):
    """Output of `RNNModel`.

    Args:
        raw_hidden_state: `(batch, length, output_size)`, the last layer's output before output dropout; only while
            training with a temporal penalty.
    """

    raw_hidden_state: torch.Tensor | None = None


class RNNDirection(nn.Module):
    """One direction of one layer: the gates' weights and the recurrence over them.

    Args:
        config: the model's configuration.
        input_size, hidden_size: widths of its input and state.
        reverse: whether it reads from the last token to the first.
    """

    def __init__(self, config: RNNConfig, input_size: int, hidden_size: int, reverse: bool = False) -> None:
        super().__init__()
        self.cell_type = config.cell_type
        self.backend = config.backend
        self.weight_dropout = config.weight_dropout
        self.forget_bias = config.forget_bias
        self.input_size, self.hidden_size, self.reverse = input_size, hidden_size, reverse
        gates = NUM_GATES[config.cell_type] * hidden_size
        self.input_gates = nn.Linear(input_size, gates)
        self.recurrent_gates = nn.Linear(hidden_size, gates)

    def weights(self, inputs: torch.Tensor) -> tuple[Any, ...]:
        """Return input weight, recurrent weight and their biases, with adapters and weight drop applied."""
        w_ih, b_ih = effective_weight(self.input_gates, self.input_size, inputs.dtype, inputs.device)
        w_hh, b_hh = effective_weight(self.recurrent_gates, self.hidden_size, inputs.dtype, inputs.device)
        if self.training and self.weight_dropout:
            w_hh = dropout(w_hh, self.weight_dropout)
        return w_ih, w_hh, b_ih, b_hh

    def initial_states(self, inputs: torch.Tensor) -> States:
        """Return zero states `(batch, hidden_size)`, one for each of the cell's state tensors."""
        zeros = inputs.new_zeros(inputs.shape[0], self.hidden_size)
        return (zeros,) * len(STATES[self.cell_type])

    def forward(
        self, inputs: torch.Tensor, states: States | None, marks: SequenceMarks, blocks: RowBlocks | None = None
    ) -> tuple[torch.Tensor, States]:
        """Run over a batch.

        Args:
            inputs: `(batch, length, input_size)`.
            states: carried states `(batch, hidden_size)`, or None for zeros.
            marks: which positions are real and where documents begin.
            blocks: the rows of a ragged batch, or None if it is full.

        Returns:
            outputs `(batch, length, hidden_size)` and final states, which in a ragged batch are those after each row's
            last real token if the blocks are exact.
        """
        states = self.initial_states(inputs) if states is None else states
        weights = self.weights(inputs)
        if blocks is not None:
            return self._run_blocks(inputs, states, weights, blocks)
        if marks.traced:
            return self._run_traced(inputs, states, weights, marks)
        if not self.reverse:
            return recurrence(self.cell_type, inputs, states, weights, backend=self.backend)
        outputs, states = recurrence(self.cell_type, inputs.flip(1), states, weights, backend=self.backend)
        return outputs.flip(1), states

    def _run_blocks(
        self, inputs: torch.Tensor, states: States, weights: Any, blocks: RowBlocks
    ) -> tuple[torch.Tensor, States]:
        index = blocks.reversed_index if self.reverse else blocks.index
        place = blocks.reversed_place if self.reverse else blocks.place
        layout, order = blocks.layout, blocks.order
        begin = tuple(rows_state(state, state.new_zeros(1), layout)[order] for state in states)
        tokens = gather_blocks(inputs, index)
        outputs, ended = recurrence_blocks(
            self.cell_type, tokens, blocks.sizes, blocks.batch_sizes, begin, weights, self.backend
        )
        final = tuple(torch.empty_like(state).index_copy(0, order, state) for state in ended)
        final = tuple(batch_state(new, old, layout) for new, old in zip(final, states, strict=True))
        return scatter_blocks(outputs, place), final

    def _run_traced(
        self, inputs: torch.Tensor, states: States, weights: Any, marks: SequenceMarks
    ) -> tuple[torch.Tensor, States]:
        mask, starts = marks.mask, marks.starts
        if not self.reverse:
            return recurrence_reference(self.cell_type, inputs, states, weights, mask=mask, starts=starts)
        outputs, states = recurrence_reference(
            self.cell_type,
            inputs.flip(1),
            states,
            weights,
            mask=None if mask is None else mask.flip(1),
            starts=marks.reversed_starts(),
        )
        return outputs.flip(1), states


class RNNLayer(GradientCheckpointingLayer):
    """One recurrent layer, in one or both directions.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: RNNConfig, layer_idx: int) -> None:
        super().__init__()
        sizes = config.layer_sizes(layer_idx)
        self.forwards = RNNDirection(config, *sizes)
        self.backwards = RNNDirection(config, *sizes, reverse=True) if config.bidirectional else None

    def forward(
        self, hidden_states: torch.Tensor, marks: SequenceMarks, blocks: RowBlocks | None, *states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run the layer; see `RNNDirection.forward`. Two directions are concatenated in the last dimension.

        States come and go one by one: reentrant checkpointing gives no gradients to tensors inside tuples.
        """
        outputs, final = self.forwards(hidden_states, states or None, marks, blocks)
        if self.backwards is not None:
            outputs = torch.cat([outputs, self.backwards(hidden_states, None, marks, blocks)[0]], dim=-1)
        return outputs, *final


class RNNPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation and traits that the recurrent models share."""

    config: RNNConfig
    _no_split_modules = ["RNNLayer"]
    _can_record_outputs = {"hidden_states": RNNLayer}
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RNNDirection):
            _init_gates(module)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=EMBEDDING_STD[self.config.cell_type])
            # The slice loses the flag by which init spares loaded weights, so it is asked for here.
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        for name in ("embedding_projection", "output_projection"):
            projection = getattr(module, name, None)
            if projection is not None:
                init.xavier_uniform_(projection.weight)


def _init_gates(direction: RNNDirection) -> None:
    """Glorot-uniform input weights, orthogonal recurrent weights, gate by gate; zero biases but the forget gate's.

    Drawn in float32: orthogonalisation has no half precision.
    """
    size, gates = direction.hidden_size, NUM_GATES[direction.cell_type]
    drawn: Any = {"device": direction.input_gates.weight.device, "dtype": torch.float32}
    wide = [torch.empty(size, direction.input_size, **drawn) for _ in range(gates)]
    square = [torch.empty(size, size, **drawn) for _ in range(gates)]
    assign(direction.input_gates.weight, torch.cat([init.xavier_uniform_(block) for block in wide]))
    assign(direction.recurrent_gates.weight, torch.cat([init.orthogonal_(block) for block in square]))
    bias = torch.zeros(gates * size, **drawn)
    if direction.cell_type == "lstm":
        bias[size : 2 * size] = direction.forget_bias
    assign(direction.input_gates.bias, bias)
    init.zeros_(direction.recurrent_gates.bias)


class RNNModel(RNNPreTrainedModel):
    """Embeddings and stacked LSTM or GRU layers, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: RNNConfig) -> None:
        config.bidirectional = bool(config.bidirectional)  # so that a checkpoint says which it is
        super().__init__(config)
        width = int(config.embedding_size or config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        projected = config.project_embeddings and width != config.hidden_size
        self.embedding_projection = nn.Linear(width, config.hidden_size, bias=False) if projected else None
        self.layers = nn.ModuleList([RNNLayer(config, i) for i in range(config.num_hidden_layers)])
        self.embedding_dropout = EmbeddingDropout(config.embedding_dropout)
        self.input_dropout = LockedDropout(config.input_dropout)
        self.hidden_dropout = LockedDropout(config.hidden_dropout)
        self.output_dropout = LockedDropout(config.output_dropout)
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
    ) -> RNNModelOutput:
        """Run the model.

        Args:
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, embedding_size)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)`; position 0 begins a document, with a fresh state (packed rows).
            past_key_values: state so far, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the state.
            seq_idx: `(batch, length)` document numbers of packed rows.

        Returns:
            last hidden state `(batch, length, output_size)` and the state.

        Raises:
            ValueError: inputs, mask or state do not fit each other or the config.
        """
        hidden_states = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        marks = sequence_marks(hidden_states, attention_mask, position_ids, seq_idx, cache)
        blocks = None if marks.layout is None else row_blocks(marks.layout, exact=cache is not None)
        for index, layer in enumerate(self.layers):
            states = self._read(cache, index, hidden_states.shape[0])
            hidden_states, *states = layer(hidden_states, marks, blocks, *states)
            if cache is not None:
                named = dict(zip(STATES[self.config.cell_type], states, strict=True))
                cache.layers[index].write(self.config.cell_type, named, hidden_states.shape[1])
            if index + 1 < len(self.layers):
                hidden_states = self.hidden_dropout(hidden_states)
        wants_raw = self.training and self.config.temporal_penalty
        return RNNModelOutput(
            last_hidden_state=self.output_dropout(hidden_states),
            past_key_values=cache if use_cache else None,
            raw_hidden_state=hidden_states if wants_raw else None,
        )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "give exactly one of input_ids and inputs_embeds, got " + ("neither", "both")[input_ids is not None]
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            inputs_embeds = self.embedding_dropout(inputs_embeds, input_ids, self.config.vocab_size)
        if inputs_embeds.shape[1] == 0:
            raise ValueError(f"the input has no positions: shape {tuple(inputs_embeds.shape[:2])}")
        embeddings = self.input_dropout(inputs_embeds)
        return embeddings if self.embedding_projection is None else self.embedding_projection(embeddings)

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.config.bidirectional:
            if past_key_values is not None:
                raise ValueError("a bidirectional model reads whole sequences: past_key_values must be None")
            return None
        if past_key_values is None:
            return DynamicCache(config=self.config) if use_cache else None
        layers = getattr(past_key_values, "layers", [])
        if len(layers) != len(self.layers) or not all(hasattr(layer, "read") for layer in layers):
            raise ValueError(
                f"past_key_values must hold {len(self.layers)} recurrent states, as DynamicCache(config=model.config) "
                f"makes them, got {past_key_values!r}"
            )
        return past_key_values

    def _read(self, cache: Cache | None, index: int, batch_size: int) -> States:
        if cache is None:
            return ()
        size = self.config.layer_sizes(index)[1]
        names = STATES[self.config.cell_type]
        states = cache.layers[index].read(self.config.cell_type, batch_size, dict.fromkeys(names, (size,)))
        return () if states is None else tuple(states[name] for name in names)


class RNNForCausalLM(VocabularyHead, RNNPreTrainedModel, GenerationMixin):
    """LSTM or GRU language model with a full, chunked or adaptive softmax.

    Args:
        config: the model's configuration, not bidirectional.

    Raises:
        ValueError: the config is bidirectional: the backward direction would read the tokens to be predicted.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RNNConfig) -> None:
        if config.bidirectional:
            raise ValueError(
                "a causal language model cannot be bidirectional: config.bidirectional must be False, got True"
            )
        super().__init__(config)
        self.model = RNNModel(config)
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
        """Run the model and, given labels, its loss; see `RNNModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the input ids; shifted inside. -100 is ignored.
            logits_to_keep: how many last positions (or which) get logits; 0 for all.
            kwargs: `shift_labels` `(batch, length)`, labels already shifted, used in place of `labels`, and
                `num_items_in_batch`, by which the summed loss is divided, as Trainer gives them.

        Returns:
            loss in nats a token, logits `(batch, kept, vocab_size)` and the state. While training with a chunked or
            adaptive head the logits are None: they are never computed.
        """
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # in the signature, Trainer would take it for a column of labels
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
        if loss is not None and targets is not None:
            loss = loss + self._penalties(outputs, targets, items)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _penalties(self, outputs: Any, targets: torch.Tensor, items: Any) -> torch.Tensor | float:
        """AR and TAR of [2], section 4.5, per labelled token; 0 in evaluation, so that losses stay comparable."""
        config = self.config
        if not self.training or not (config.activation_penalty or config.temporal_penalty):
            return 0.0
        labelled = (targets != IGNORED).unsqueeze(-1)
        width = outputs.last_hidden_state.shape[-1]
        total = config.activation_penalty * (outputs.last_hidden_state.pow(2) * labelled).sum()
        if config.temporal_penalty:
            raw = outputs.raw_hidden_state
            total = total + config.temporal_penalty * ((raw[:, 1:] - raw[:, :-1]).pow(2) * labelled[:, :-1]).sum()
        return normalised(total / width, labelled.sum(), items)


class RNNForMaskedLM(VocabularyHead, RNNPreTrainedModel):
    """Bidirectional LSTM or GRU that fills masks, with a full, chunked or adaptive softmax.

    Args:
        config: the model's configuration. `bidirectional=None` becomes true; false, as in a checkpoint that was made
            to read one way, is taken with a warning: a mask's right-hand side is not seen.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RNNConfig) -> None:
        config.bidirectional = config.bidirectional is not False
        if not config.bidirectional:
            logger.warning("RNNForMaskedLM with bidirectional=False does not see what follows a mask")
        super().__init__(config)
        self.model = RNNModel(config)
        self.make_vocabulary_head()
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
        """Fill masks; see `RNNModel.forward` for the other arguments.

        Args:
            labels: `(batch, length)`, the ids to be found; -100 is ignored.

        Returns:
            loss in nats a labelled token and logits `(batch, length, vocab_size)`, None while training with a chunked
            or adaptive head.
        """
        kwargs["use_cache"] = False
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, seq_idx=seq_idx, **kwargs
        )
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, labels, 0, kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def vocabulary_loss(self, logits: torch.Tensor, targets: torch.Tensor, items: Any) -> torch.Tensor:
        """Return the mean loss in nats a labelled token, by the loss that transformers gives a masked model."""
        return self.loss_function(logits, targets, self.config.vocab_size, num_items_in_batch=items)


class RNNForSequenceClassification(SequenceClassificationHead, RNNPreTrainedModel):
    """Text classifier or regressor over a (bidirectional) LSTM or GRU.

    Args:
        config: the model's configuration; `pooling` says how a text is summed up.
    """

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.output_size, config.num_labels)
        self.post_init()

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text as `config.pooling` says; see `SequenceClassificationHead.pool`."""
        if self.config.pooling == "mean":
            return mean_over_time(hidden.mT, mask)
        if self.config.pooling == "max":
            return max_over_time(hidden.mT, mask)
        if not self.config.bidirectional:
            return end_token(hidden, mask)
        forwards, backwards = hidden.chunk(2, dim=-1)
        return torch.cat([end_token(forwards, mask), end_token(backwards, mask, first=True)], dim=-1)


class RNNForTokenClassification(TokenClassificationHead, RNNPreTrainedModel):
    """Tagger over a (bidirectional) LSTM or GRU.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.output_size, config.num_labels)
        self.post_init()


class RNNForQuestionAnswering(QuestionAnsweringHead, RNNPreTrainedModel):
    """Reader over a (bidirectional) LSTM or GRU that marks an answer's first and last token.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: RNNConfig) -> None:
        super().__init__(config)
        self.model = RNNModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.output_size, 2)
        self.post_init()


__all__ = [
    "RNNForCausalLM",
    "RNNForMaskedLM",
    "RNNForQuestionAnswering",
    "RNNForSequenceClassification",
    "RNNForTokenClassification",
    "RNNModel",
    "RNNPreTrainedModel",
]
