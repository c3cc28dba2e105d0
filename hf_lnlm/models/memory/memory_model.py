"""The memory-augmented model without a head, for any kind of cell.

Glossary: `addressing` where heads read and wrote; `segments` which positions are real and where documents begin.

Complexity: O(T) steps a layer; O(1) time and memory a generated token, whatever came before.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.assign import assign, plain_like
from ...nn.inputs import CACHE_FIELD, Batch, prepare
from ..base import LNLMPreTrainedModel
from .memory_config import MemoryConfig
from .memory_layers import Addressing, MemoryCell, MemoryLayer, States, core_dtype


@dataclass
class AddressingOutput(ModelOutput):
    """What memories did, one tensor a layer, only with `output_addressing`; part of every model's outputs.

    Args:
        read_weightings: `(batch, length, read heads, slots)`.
        write_weightings: `(batch, length, write heads, slots)`.
        usage: `(batch, length, slots)`; neural computer only, as all below.
        free_gates: `(batch, length, read heads)`.
        allocation_gates, write_gates: `(batch, length, write heads)`.
        read_modes: `(batch, length, read heads, modes)`: backward along each write head's links, content, forward.
    """

    read_weightings: tuple[torch.Tensor, ...] | None = None
    write_weightings: tuple[torch.Tensor, ...] | None = None
    usage: tuple[torch.Tensor, ...] | None = None
    free_gates: tuple[torch.Tensor, ...] | None = None
    allocation_gates: tuple[torch.Tensor, ...] | None = None
    write_gates: tuple[torch.Tensor, ...] | None = None
    read_modes: tuple[torch.Tensor, ...] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; one that is None is not among the output's keys, and needs no search through all fields."""
        if value is None:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


@dataclass
class MemoryModelOutput(AddressingOutput, BaseModelOutputWithPast):
    """Output of a memory-augmented model without a head: last hidden state, state, addressing."""


class MemoryPreTrainedModel(LNLMPreTrainedModel):
    """Weight initialisation and traits that the memory-augmented models share."""

    config: MemoryConfig
    _no_split_modules = ["MemoryLayer"]
    _can_record_outputs = {"hidden_states": MemoryLayer}
    _is_stateful = True
    _no_weight_decay: ClassVar[tuple[str, ...]] = (r"initial_", r"bias$", r"norm")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryCell):
            _init_cell(module)
        elif isinstance(module, nn.Embedding) and not self.config.residual:
            init.normal_(module.weight)  # without normalisation smaller embeddings hardly move the controller


def _init_cell(cell: MemoryCell) -> None:
    """Glorot-uniform weights; zero biases but the forget gate's, which is 1."""
    for linear in (cell.input_proj, cell.recurrent_proj, cell.interface_proj, cell.output_proj):
        init.xavier_uniform_(linear.weight)
        if linear.bias is not None:
            init.zeros_(linear.bias)
    if cell.lstm:
        bias = plain_like(cell.input_proj.bias).zero_()
        bias[cell.controller_size : 2 * cell.controller_size] = 1.0
        assign(cell.input_proj.bias, bias)


class MemoryModel(MemoryPreTrainedModel):
    """Embeddings and stacked memory layers. Families name their cell and the state's parts.

    Args:
        config: the model's configuration.
        continuous: whether the model is the body of a sequence transducer.
    """

    cell_class: ClassVar[Any]
    state_names: ClassVar[tuple[str, ...]]
    addressing_names: ClassVar[tuple[str, ...]]

    def __init__(self, config: MemoryConfig, continuous: bool = False) -> None:
        super().__init__(config)
        tokens = config.input_size is None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id) if tokens else None
        projected = config.residual and not tokens
        self.input_projection = nn.Linear(int(config.input_size or 0), config.hidden_size) if projected else None
        layers = [self._layer(config, i, continuous) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.hidden_size) if config.residual else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def _layer(self, config: MemoryConfig, index: int, continuous: bool) -> MemoryLayer:
        return MemoryLayer(config, lambda sizes: self.cell_class(config, sizes), config.layer_sizes(index, continuous))

    def get_input_embeddings(self) -> Any:
        """Return the token embeddings; None if the inputs are continuous."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings.

        Args:
            value: an `nn.Embedding` of width `hidden_size`.
        """
        self.embed_tokens = value  # type: ignore[assignment]

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
        output_addressing: bool | None = None,
        **kwargs: Any,
    ) -> MemoryModelOutput:
        """Run the model.

        Args:
            input_ids: `(batch, length)`; or give `inputs_embeds` `(batch, length, hidden_size or input_size)`.
            attention_mask: `(batch, past + length)`, zero at padding, which may lie anywhere.
            position_ids: `(batch, length)`; position 0 begins a document, with a fresh memory (packed rows).
            past_key_values: state so far, a `DynamicCache(config=model.config)`; updated and returned.
            use_cache: whether to return the state.
            seq_idx: `(batch, length)` document numbers of packed rows.
            output_addressing: whether to return weightings and gates; as the config says if None.
            kwargs: `cu_seq_lens_q` `(documents + 1,)`, offsets of the documents of a single packed row.

        Returns:
            last hidden state `(batch, length, hidden_size)`, the state, and the addressing if wanted.

        Raises:
            ValueError: inputs, mask or state do not fit each other or the config.
        """
        places = (attention_mask, position_ids, seq_idx)
        batch = prepare(self, input_ids, inputs_embeds, places, past_key_values, use_cache, kwargs)
        hidden_states = batch.hidden if self.input_projection is None else self.input_projection(batch.hidden)
        hidden_states = self.dropout(hidden_states)
        segments = batch.segments.in_rows()
        wanted = bool(self.config.output_addressing if output_addressing is None else output_addressing)
        addressing: list[Addressing] = []
        for index, layer in enumerate(self.layers):
            states = self._read(batch, index)
            hidden_states, states, seen = layer(hidden_states, states, segments, wanted)
            addressing.append(seen)
            batch.write(index, dict(zip(self.state_names, states, strict=True)))
        return MemoryModelOutput(
            last_hidden_state=hidden_states if self.norm is None else self.norm(hidden_states),
            **{CACHE_FIELD: batch.cache if use_cache else None},
            **(
                dict[str, Any](zip(self.addressing_names, zip(*addressing, strict=True), strict=True)) if wanted else {}
            ),
        )

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids.

        Raises:
            ValueError: the model reads continuous inputs.
        """
        if self.embed_tokens is None:
            raise ValueError("the model reads continuous inputs (input_size is set): give inputs_embeds, not input_ids")
        return self.embed_tokens(input_ids)

    def _read(self, batch: Batch, index: int) -> States | None:
        cell: Any = self.layers[index].forwards
        found = batch.read(index, cell.state_shapes()) if batch.cache is not None else None
        if found is None:
            return None
        place = next(cell.parameters()).device
        for name in self.state_names:
            _check_state(name, found[name], core_dtype(batch.hidden.dtype), place)
        return tuple(found[name] for name in self.state_names)


def _check_state(name: str, state: torch.Tensor, dtype: torch.dtype, place: torch.device) -> None:
    """Refuse a state that was rounded, or lies where its layer does not; an offloaded layer has no place of its own."""
    if state.dtype != dtype:
        raise ValueError(f"past_key_values: state {name!r} must be {dtype}, as the memory computes, got {state.dtype}")
    if place.type != "meta" and state.device != place:
        raise ValueError(f"past_key_values: state {name!r} must lie on {place}, as its layer does, got {state.device}")
