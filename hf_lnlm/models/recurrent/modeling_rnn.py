"""LSTM and GRU language models, classifiers and taggers.

References:
    [1] Zaremba, Sutskever and Vinyals 2014, "Recurrent Neural Network Regularization".
    [2] Merity, Keskar and Socher 2017, "Regularizing and Optimizing LSTM Language Models" (AWD-LSTM).
    [3] Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder" (GRU).
    [4] Press and Wolf 2017, "Using the Output Embedding to Improve Language Models" (tied embeddings).

Glossary (paper symbol: variable): h_t: `states[0]`, c_t: `states[1]`; W: `input_gates.weight`, U: `recurrent_gates.weight`;
alpha, beta of [2]: `config.activation_penalty`, `config.temporal_penalty`.

Deliberate deviations:
    * Embeddings are scaled by the root of their width where they are read, so that tied logits begin near zero and the
      gates still see their input; [2] begins with a table that is small for both. A tied softmax reads the last layer
      through a linear layer (P of [4]), which learns faster at every vocabulary that was tried.
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
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.dropout import EmbeddingDropout, LockedDropout
from ...nn.embedding import ScaledEmbedding
from ...nn.inputs import CACHE_FIELD, prepare
from ...nn.loss_heads import (
    IGNORED,
    normalised,
)
from ...nn.masks import SegmentInfo
from ...nn.ragged import RowBlocks, row_blocks
from ...ops.recurrence import STATES
from ..base import LNLMPreTrainedModel
from ..heads import (
    CausalLMHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .configuration_rnn import RNNConfig
from .layers import RNNDirection, init_embedding, init_gates, summed_up

logger = logging.get_logger(__name__)


@dataclass
class RNNModelOutput(BaseModelOutputWithPast):
    """Output of `RNNModel`.

    Args:
        raw_hidden_state: `(batch, length, output_size)`, the last layer's output before output dropout; only while
            training with a temporal penalty.
    """

    raw_hidden_state: torch.Tensor | None = None


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
        self, hidden_states: torch.Tensor, segments: SegmentInfo, blocks: RowBlocks | None, *states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run the layer; see `RNNDirection.forward`. Two directions are concatenated in the last dimension.

        States come and go one by one: reentrant checkpointing gives no gradients to tensors inside tuples.
        """
        outputs, final = self.forwards(hidden_states, states or None, segments, blocks)
        if self.backwards is not None:
            outputs = torch.cat([outputs, self.backwards(hidden_states, None, segments, blocks)[0]], dim=-1)
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
            init_gates(module)
        elif isinstance(module, nn.Embedding):
            init_embedding(module, self.config.cell_type, self.config.input_scale)
        for name, gain in (("embedding_projection", 1.0), ("output_projection", 0.5)):  # logits begin near zero
            projection: Any = getattr(module, name, None)
            if projection is not None:
                init.xavier_uniform_(projection.weight, gain=gain)


class RNNModel(RNNPreTrainedModel):
    """Embeddings and stacked LSTM or GRU layers, without a head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: RNNConfig) -> None:
        config.bidirectional = bool(config.bidirectional)  # so that a checkpoint says which it is
        super().__init__(config)
        width = int(config.embedding_size or config.hidden_size)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, width, config.pad_token_id, config.input_scale)
        projected = config.project_embeddings and width != config.hidden_size
        self.embedding_projection = nn.Linear(width, config.hidden_size, bias=False) if projected else None
        self.layers = nn.ModuleList([RNNLayer(config, i) for i in range(config.num_hidden_layers)])
        self.embedding_dropout = EmbeddingDropout(config.embedding_dropout)
        self.input_dropout = LockedDropout(config.input_dropout)
        self.hidden_dropout = LockedDropout(config.hidden_dropout)
        self.output_dropout = LockedDropout(config.output_dropout)
        names, sizes = STATES[config.cell_type], [config.layer_sizes(i)[1] for i in range(config.num_hidden_layers)]
        self.state_shapes = [dict.fromkeys(names, (size,)) for size in sizes]
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
    ) -> RNNModelOutput:
        """Run the model.

        Args:
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, embedding_size)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)`; position 0 begins a document, with a fresh state (packed rows).
            past_key_values: state so far, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the state.
            seq_idx: `(batch, length)` document numbers of packed rows.
            kwargs: `cu_seq_lens_q` `(documents + 1,)`, offsets of the documents of a single packed row.

        Returns:
            last hidden state `(batch, length, output_size)` and the state.

        Raises:
            ValueError: inputs, mask or state do not fit each other or the config.
        """
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        hidden_states = self.input_dropout(batch.hidden)
        if self.embedding_projection is not None:
            hidden_states = self.embedding_projection(hidden_states)
        segments = batch.segments.in_rows()
        blocks = None if segments.layout is None else row_blocks(segments.layout, exact=batch.cache is not None)
        for index, layer in enumerate(self.layers):
            states = batch.read(index, self.state_shapes[index]) or {}
            hidden_states, *ended = layer(hidden_states, segments, blocks, *states.values())
            batch.write(index, dict(zip(self.state_shapes[index], ended, strict=True)))
            if index + 1 < len(self.layers):
                hidden_states = self.hidden_dropout(hidden_states)
        wants_raw = self.training and self.config.temporal_penalty
        return RNNModelOutput(
            last_hidden_state=self.output_dropout(hidden_states),
            raw_hidden_state=hidden_states if wants_raw else None,
            **{CACHE_FIELD: batch.cache if use_cache else None},
        )

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids, with whole words dropped while training."""
        return self.embedding_dropout(self.embed_tokens(input_ids), input_ids, self.config.vocab_size)


class RNNForCausalLM(CausalLMHead, RNNPreTrainedModel, GenerationMixin):
    """LSTM or GRU language model with a full, chunked or adaptive softmax.

    Args:
        config: the model's configuration, not bidirectional.

    Raises:
        ValueError: the config is bidirectional: the backward direction would read the tokens to be predicted.
    """

    body_class = RNNModel
    untied_bias = True

    def __init__(self, config: RNNConfig) -> None:
        if config.bidirectional:
            raise ValueError(
                "a causal language model cannot be bidirectional: config.bidirectional must be False, got True"
            )
        super().__init__(config)

    def penalty(self, outputs: Any, targets: torch.Tensor, items: Any) -> torch.Tensor | float:
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


class RNNForMaskedLM(MaskedLMHead, RNNPreTrainedModel):
    """Bidirectional LSTM or GRU that fills masks, with a full, chunked or adaptive softmax.

    Args:
        config: the model's configuration. `bidirectional=None` becomes true; false, as in a checkpoint that was made
            to read one way, is taken with a warning: a mask's right-hand side is not seen.
    """

    body_class = RNNModel
    untied_bias = True

    def __init__(self, config: RNNConfig) -> None:
        config.bidirectional = config.bidirectional is not False
        if not config.bidirectional:
            logger.warning("RNNForMaskedLM with bidirectional=False does not see what follows a mask")
        super().__init__(config)


class RNNForSequenceClassification(SequenceClassificationHead, RNNPreTrainedModel):
    """Text classifier or regressor over a (bidirectional) LSTM or GRU.

    Args:
        config: the model's configuration; `pooling` says how a text is summed up.
    """

    body_class = RNNModel

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Sum up a text as `config.pooling` says; see `SequenceClassificationHead.pool`."""
        reading = "both" if self.config.bidirectional else "forwards"
        return summed_up(hidden, mask, self.config.pooling, reading)


class RNNForTokenClassification(TokenClassificationHead, RNNPreTrainedModel):
    """Tagger over a (bidirectional) LSTM or GRU."""

    body_class = RNNModel


class RNNForQuestionAnswering(QuestionAnsweringHead, RNNPreTrainedModel):
    """Reader over a (bidirectional) LSTM or GRU that segments an answer's first and last token."""

    body_class = RNNModel


__all__ = [
    "RNNForCausalLM",
    "RNNForMaskedLM",
    "RNNForQuestionAnswering",
    "RNNForSequenceClassification",
    "RNNForTokenClassification",
    "RNNModel",
    "RNNPreTrainedModel",
]
