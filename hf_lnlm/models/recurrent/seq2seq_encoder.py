"""The encoder of a recurrent sequence-to-sequence model, and what encoder and decoder share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from ...nn.dropout import EmbeddingDropout, LockedDropout
from ...nn.inputs import embedded
from ...nn.masks import SegmentInfo, segment_info
from ...nn.ragged import RowBlocks, row_blocks
from ..base import LNLMPreTrainedModel
from .configuration_seq2seq import RNNSeq2SeqConfig
from .layers import RNNDirection, init_embedding, init_gates
from .seq2seq_decoder import AttentionalVector, Bridge
from .source_attention import SourceAttention


@dataclass
class RNNSeq2SeqEncoderOutput(BaseModelOutput):
    """Output of `RNNSeq2SeqEncoder`.

    Args:
        final_state: `(batch, encoder layers, states, encoder width)`, states being h and, of an LSTM, c.
    """

    final_state: torch.Tensor | None = None


class Seq2SeqEncoderLayer(GradientCheckpointingLayer):
    """One layer of the encoder: both directions, or one, which may be the reverse.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: RNNSeq2SeqConfig, layer_idx: int) -> None:
        super().__init__()
        sizes = config.encoder_layer_sizes(layer_idx)
        self.forwards = None if config.reverse_source else RNNDirection(config, *sizes)
        backwards = config.bidirectional or config.reverse_source
        self.backwards = RNNDirection(config, *sizes, reverse=True) if backwards else None

    def forward(
        self, hidden_states: torch.Tensor, segments: SegmentInfo, blocks: RowBlocks | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs `(batch, length, encoder width)` and final states `(batch, states, encoder width)`."""
        directions = [direction for direction in (self.forwards, self.backwards) if direction is not None]
        found = [direction(hidden_states, None, segments, blocks) for direction in directions]
        final = torch.cat([torch.stack(states, dim=1) for _, states in found], dim=-1)
        return torch.cat([outputs for outputs, _ in found], dim=-1), final


class RNNSeq2SeqPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation, ties and traits that the recurrent sequence-to-sequence models share."""

    config: RNNSeq2SeqConfig
    _no_split_modules = ["Seq2SeqEncoderLayer", "DecoderWalk"]
    _is_stateful = True
    _tied_weights_keys: Any = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_module(module, self.config.cell_type)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return tied name → the name whose weight it shares: of the config's two kinds of ties those there are."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        names = dict(self._tied_weights_keys or {})
        model = "model." if hasattr(self, "lm_head") else ""
        source, target = f"{model}encoder.embed_tokens.weight", f"{model}decoder.embed_tokens.weight"
        wanted = {target} if self.config.share_embeddings else set()
        wanted |= {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        shared = source if self.config.share_embeddings else target
        return {name: shared for name in names if name in wanted}


def init_module(module: nn.Module, cell_type: str) -> None:
    """Draw the first values of a module's weights; what lies outside the cells begins Glorot-uniform."""
    if isinstance(module, RNNDirection):
        init_gates(module)
    elif isinstance(module, nn.Embedding):
        init_embedding(module, cell_type)
    elif isinstance(module, (SourceAttention, AttentionalVector, Bridge)):
        for child in module.modules():
            if isinstance(child, nn.Linear):
                init.xavier_uniform_(child.weight)
    for name in ("embedding_projection", "output_projection"):
        projection: Any = getattr(module, name, None)
        if projection is not None:
            init.xavier_uniform_(projection.weight)


def embedding_projection(config: RNNSeq2SeqConfig) -> nn.Linear | None:
    """Return what carries embeddings to `hidden_size`, or None where the first layer reads them as they are."""
    width = int(config.embedding_size or 0)
    projected = config.project_embeddings and width != config.hidden_size
    return nn.Linear(width, config.hidden_size, bias=False) if projected else None


def wanted(config: Any, name: str, given: bool | None) -> bool:
    """Tell whether optional outputs, such as `output_attentions`, are asked for by a call or else by the config."""
    return bool(getattr(config, name, False) if given is None else given)


class RNNSeq2SeqEncoder(RNNSeq2SeqPreTrainedModel):
    """Reads the source.

    Args:
        config: the model's configuration.
    """

    _tied_weights_keys: Any = None

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__(config)
        size = config.source_vocabulary
        self.embed_tokens = nn.Embedding(size, int(config.embedding_size or 0), config.pad_token_id)
        self.embedding_projection = embedding_projection(config)
        self.layers = nn.ModuleList([Seq2SeqEncoderLayer(config, i) for i in range(int(config.encoder_layers or 0))])
        self.embedding_dropout = EmbeddingDropout(config.embedding_dropout)
        self.input_dropout = LockedDropout(config.input_dropout)
        self.hidden_dropout = LockedDropout(config.hidden_dropout)
        self.output_dropout = LockedDropout(config.output_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        use_cache: bool | None = None,
    ) -> RNNSeq2SeqEncoderOutput:
        """Read a source; see `RNNSeq2SeqModel.forward` for the arguments. It has no attentions and no state to give.

        It takes no others: `generate` gives an encoder all that it can take, labels included.

        Returns:
            last hidden state `(batch, source length, encoder width)`, zero at padding, and final states.
        """
        hidden = embedded(self, input_ids, inputs_embeds)
        segments = segment_info(hidden, attention_mask).in_rows()
        blocks = None if segments.layout is None else row_blocks(segments.layout, exact=True)
        hidden, final = self.input_dropout(hidden), []
        hidden = hidden if self.embedding_projection is None else self.embedding_projection(hidden)
        hidden_states = [hidden]
        for index, layer in enumerate(self.layers):
            hidden, ended = layer(hidden, segments, blocks)
            final.append(ended)
            hidden = self.hidden_dropout(hidden) if index + 1 < len(self.layers) else self.output_dropout(hidden)
            hidden_states.append(hidden)
        recorded = wanted(self.config, "output_hidden_states", output_hidden_states)
        return RNNSeq2SeqEncoderOutput(
            last_hidden_state=hidden,
            hidden_states=tuple(hidden_states) if recorded else None,
            final_state=torch.stack(final, dim=1),
        )

    @property
    def num_token_ids(self) -> int:
        """Number of source ids."""
        return self.config.source_vocabulary

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids, with whole words dropped while training."""
        return self.embedding_dropout(self.embed_tokens(input_ids), input_ids, self.num_token_ids)
