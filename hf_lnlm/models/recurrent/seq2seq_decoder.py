"""The decoder of a recurrent sequence-to-sequence model: its layers, what it begins with, and how it walks a sequence."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout
from transformers.modeling_layers import GradientCheckpointingLayer

from ...nn.effective_weight import effective_weight
from ...nn.masks import SegmentInfo
from ...nn.ragged import RowBlocks, row_blocks
from ...ops.dense import Dense
from .configuration_seq2seq import RNNSeq2SeqConfig
from .decoder_steps import LoopCell, LoopWeight, States, chosen
from .layers import RNNDirection
from .source_attention import Source, SourceAttention


class Bridge(nn.Module):
    """Takes the encoder's final states to the decoder's first ones.

    Args:
        config: `bridge`, `state_names`, `source_width` and `hidden_size` are read.
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.kind, self.hidden_size, self.states = config.bridge, config.hidden_size, len(config.state_names)
        self.beside = [config.encoder_layer_beside(layer) for layer in range(config.num_hidden_layers)]
        mapped = self.kind in ("linear", "tanh")
        maps = [nn.Linear(config.source_width, config.hidden_size) for _ in config.state_names] if mapped else []
        self.maps = nn.ModuleList(maps)

    def forward(self, final: torch.Tensor | None, like: torch.Tensor) -> list[States]:
        """Return each decoder layer's states.

        Args:
            final: `(batch, encoder layers, states, encoder width)`.
            like: any tensor `(batch, ...)` of the wanted type.

        Raises:
            ValueError: the final states are missing.
        """
        if self.kind == "zero":
            zero = like.new_zeros(like.shape[0], self.hidden_size)
            return [(zero,) * self.states for _ in self.beside]
        if final is None:
            raise ValueError(
                f"bridge={self.kind!r} needs the encoder's final states: encoder_outputs must have final_state, as the "
                "encoder returns it, got None"
            )
        states = [final[:, :, number] for number in range(self.states)]
        states = [project(state) for project, state in zip(self.maps, states, strict=True)] if self.maps else states
        states = [torch.tanh(state) for state in states] if self.kind == "tanh" else states
        return [tuple(state[:, layer] for state in states) for layer in self.beside]


class Seq2SeqDecoderLayer(GradientCheckpointingLayer):
    """One layer of the decoder.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: RNNSeq2SeqConfig, layer_idx: int) -> None:
        super().__init__()
        self.forwards = RNNDirection(config, *config.decoder_layer_sizes(layer_idx))

    def forward(
        self, hidden_states: torch.Tensor, segments: SegmentInfo, blocks: RowBlocks | None, *states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run the layer; see `RNNDirection.forward`. States come and go one by one, for reentrant checkpointing."""
        outputs, final = self.forwards(hidden_states, states, segments, blocks)
        return outputs, *final


class AttentionalVector(nn.Module):
    """~h_t = tanh(W_c [c_t; h_t]) (Luong 2015, eq. 5); without attention h_t itself.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.width = config.source_width + config.hidden_size
        attends = config.attention != "none"
        self.combine = Dense(self.width, config.hidden_size, bias=False) if attends else None

    def forward(self, context: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
        """Return `(..., hidden_size)` of contexts `(..., encoder width)` and states `(..., hidden_size)`."""
        if self.combine is None or context is None:
            return hidden
        return torch.tanh(self.combine(torch.cat([context, hidden], dim=-1)))


class DecoderWalk(nn.Module):
    """Layers, attention and attentional vector: over a whole sequence at once where no step reads the one before.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: RNNSeq2SeqConfig) -> None:
        super().__init__()
        self.config, self.feeding = config, config.input_feeding
        self.looks_back = config.attention == "additive"
        self.layers = nn.ModuleList([Seq2SeqDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.attention = SourceAttention(config) if config.attention != "none" else None
        self.vector = AttentionalVector(config)
        self.hidden_dropout = config.hidden_dropout
        self.num_states = len(config.state_names)

    def at_once(
        self, hidden: torch.Tensor, states: list[States], source: Source | None, segments: SegmentInfo, exact: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        """Run each layer over the whole sequence, then the attention.

        Args:
            hidden: `(batch, length, embedding)`.
            states: each layer's first states.
            source: what is attended to, if anything.
            segments: which positions are real.
            exact: whether final states are wanted of ragged rows.

        Returns:
            outputs of the layers and at last the attentional vectors, `(batch, length, hidden)` each; the final states of
            all layers, flat; and the alignment `(batch, length, source length)` or None.
        """
        segments = segments.in_rows()
        blocks = None if segments.layout is None else row_blocks(segments.layout, exact=exact)
        outputs, flat = [], []
        for index, layer in enumerate(self.layers):
            hidden, *ended = layer(hidden, segments, blocks, *states[index])
            outputs.append(hidden)
            flat += ended
            if index + 1 < len(self.layers):
                hidden = hidden * self._locked(hidden)
        context, alignment = (None, None) if self.attention is None else self.attention(hidden, source)
        return [*outputs, self.vector(context, hidden)], flat, alignment

    def _locked(self, hidden: torch.Tensor) -> torch.Tensor | float:
        """Return one dropout mask for all steps, `(batch, 1, width)`."""
        if not self.training or not self.hidden_dropout:
            return 1.0
        return dropout(hidden.new_ones(hidden.shape[0], 1, hidden.shape[-1]), self.hidden_dropout)

    def step_by_step(
        self, mask: torch.Tensor | None, sizes: tuple[int, int], tokens: torch.Tensor, *given: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """Run all layers step by step; tensors come and go one by one, for reentrant checkpointing.

        Args:
            mask: `(batch, length)` real tokens; None if all are. Elsewhere a step leaves all states as they were.
            sizes: number of layers, and of states a layer.
            tokens: `(batch, length, embedding)`.
            given: `fed` `(batch, hidden)`; the source's values, keys and mask; each layer's states.

        Returns:
            attentional vectors and outputs of each layer `(batch, length, hidden)`, alignment or None, `fed`, and the final
            states.
        """
        fed, values, keys, seen, *flat = given
        source = None if values is None or keys is None else Source(values, keys, seen)
        count, kinds = sizes
        states: list[Any] = [tuple(flat[i * kinds : (i + 1) * kinds]) for i in range(count)]
        steps = Steps(self, tokens, source)
        made: list[list[Any]] = [[] for _ in range(count + 2)]
        for t in range(tokens.shape[1]):
            keep = None if mask is None else mask[:, t, None]
            outputs, alignment, ended = steps(t, fed, states)
            fed = outputs[-1] if keep is None else torch.where(keep, outputs[-1], fed)
            states = [chosen(keep, new, old) for new, old in zip(ended, states, strict=True)]
            for column, value in zip(made, [*outputs, alignment], strict=True):
                column.append(value)
        alignment = None if self.attention is None else torch.stack(made.pop(), dim=1)
        *layers, vectors = (torch.stack(column, dim=1) for column in made[: count + 1])
        return vectors, *layers, alignment, fed, *(state for layer in states for state in layer)

    def forward(
        self,
        tokens: torch.Tensor,
        states: list[States],
        fed: torch.Tensor | None,
        source: Source | None,
        segments: SegmentInfo,
        exact: bool,
        checkpointing: Any = None,
    ) -> tuple[list[torch.Tensor], Mapping[str, Any]]:
        """Run a sequence.

        Args:
            tokens: `(batch, length, embedding)`.
            states: each layer's first states.
            fed: `(batch, hidden)`, the attentional vector of the step before; None without input feeding.
            source: what is attended to, if anything.
            segments: which positions are real.
            exact: whether final states are wanted of ragged rows.
            checkpointing: transformers' function that runs another and keeps nothing for the backward pass; None: not.

        Returns:
            outputs of the layers and at last the attentional vectors, `(batch, length, hidden)` each; final `states` and
            `fed`, and the `alignment` `(batch, length, source length)` or None.
        """
        if not self.config.reads_its_output:
            outputs, flat, alignment = self.at_once(tokens, states, source, segments, exact)
        else:
            count, given = len(states), (None, None, None) if source is None else source
            first = fed if fed is not None else tokens.new_zeros(tokens.shape[0], self.config.hidden_size)
            run = self.step_by_step if checkpointing is None else partial(checkpointing, self.step_by_step)
            flat_states = [state for layer in states for state in layer]
            sizes = (count, self.num_states)
            walked: Any = run(segments.mask, sizes, tokens, first, *given, *flat_states)
            vectors, *rest = walked
            outputs, (alignment, fed, *flat) = [*rest[:count], vectors], rest[count:]
        kinds = self.num_states
        ended = [tuple(flat[i : i + kinds]) for i in range(0, len(flat), kinds)]
        return outputs, {"states": ended, "fed": fed, "alignment": alignment}


class Steps:
    """The loop's body, its weights read once.

    Args:
        walk: whose layers it runs.
        tokens: `(batch, length, embedding)`.
        source: what is attended to, if anything.
    """

    def __init__(self, walk: DecoderWalk, tokens: torch.Tensor, source: Source | None) -> None:
        steps, width = tokens.shape[1], tokens.shape[2]
        self.walk, self.source = walk, source
        directions = [layer.forwards for layer in walk.layers]
        self.cells = [LoopCell(direction, tokens, steps, 0 if i else width) for i, direction in enumerate(directions)]
        self.gates = self.cells[0].gates(tokens).unbind(1)
        self.nothing = tokens.new_zeros(tokens.shape[0], 0)
        hidden = tokens.new_empty(tokens.shape[0], 1, walk.config.hidden_size)
        self.masks = [walk._locked(hidden) for _ in self.cells[1:]]
        combine: Any = walk.vector.combine
        self.combine: LoopWeight | None = None
        if combine is not None:
            weight, self.shift = effective_weight(combine, walk.vector.width, tokens.dtype, tokens.device)
            self.combine = LoopWeight(weight, steps, tokens.shape[0])

    def __call__(
        self, t: int, fed: torch.Tensor | None, states: list[States]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, list[States]]:
        """Return the layers' outputs and at last the attentional vector, the alignment, and the states of a step."""
        context, alignment = self._look(states[-1][0]) if self.walk.looks_back else (None, None)
        given: tuple[Any, Any] = (context, fed if self.walk.feeding else None)
        parts = [part for part in given if part is not None]
        inputs: Any = torch.cat([self.nothing, *parts], dim=-1) if len(parts) != 1 else parts[0]
        outputs: list[torch.Tensor] = []
        ended: list[States] = []
        for index, cell in enumerate(self.cells):
            ended.append(cell(inputs, states[index], None if index else self.gates[t]))
            inputs = ended[-1][0]
            outputs.append(inputs)
            if index < len(self.masks):
                mask = self.masks[index]
                inputs = inputs * (mask if isinstance(mask, float) else mask.squeeze(1))
        if not self.walk.looks_back:
            context, alignment = self._look(inputs)
        if self.combine is not None and context is not None:
            inputs = torch.tanh(self.combine(torch.cat([context, inputs], dim=-1), self.shift))
        return [*outputs, inputs], alignment, ended

    def _look(self, query: torch.Tensor) -> tuple[Any, Any]:
        if self.walk.attention is None or self.source is None:
            return None, None
        context, alignment = self.walk.attention(query.unsqueeze(1), self.source)
        return context.squeeze(1), alignment.squeeze(1)
