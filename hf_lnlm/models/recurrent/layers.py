"""What recurrent families are made of: one direction of a layer, its initial values, and how a text is summed up."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout
from transformers import initialization as init

from ...nn.assign import assign
from ...nn.effective_weight import effective_weight
from ...nn.masks import SegmentInfo, end_token
from ...nn.pooling import max_over_time, mean_over_time
from ...nn.ragged import RowBlocks, batch_state, gather_blocks, rows_state, scatter_blocks
from ...ops.recurrence import NUM_GATES, STATES, recurrence, recurrence_blocks
from ...ops.recurrence.reference import recurrence_reference

States = tuple[torch.Tensor, ...]

CELL_TYPES = ("lstm", "gru")
POOLINGS = ("last", "mean", "max")
EMBEDDING_STD = {"lstm": 1.0, "gru": 0.25}
"""Most standard deviation of a table's first values. Where tied logits read the table that the layers read, unscaled, a
smaller one leaves an LSTM's gates blind to their input for a long time (after 120 steps on Python sources, 160 wide: 4.78
nats a token at 1.0, 5.07 at 0.25, 5.60 at 0.1), and a larger one makes a GRU's first logits too large (5.15 at 1.0, 4.35 at
0.25, 4.44 at 0.1). A scale apart has neither fault: see `init_embedding`."""


class RNNDirection(nn.Module):
    """One direction of one layer: the gates' weights and the recurrence over them.

    Args:
        config: of a recurrent family: `cell_type`, `backend`, `weight_dropout` and `forget_bias` are read.
        input_size, hidden_size: widths of its input and state.
        reverse: whether it reads from the last token to the first.
    """

    def __init__(self, config: Any, input_size: int, hidden_size: int, reverse: bool = False) -> None:
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
        self, inputs: torch.Tensor, states: States | None, segments: SegmentInfo, blocks: RowBlocks | None = None
    ) -> tuple[torch.Tensor, States]:
        """Run over a batch.

        Args:
            inputs: `(batch, length, input_size)`.
            states: carried states `(batch, hidden_size)`, or None for zeros.
            segments: which positions are real and where documents begin.
            blocks: the rows of a ragged batch, or None if it is full.

        Returns:
            outputs `(batch, length, hidden_size)` and final states, which in a ragged batch are those after each row's
            last real token if the blocks are exact.
        """
        states = self.initial_states(inputs) if states is None else states
        weights = self.weights(inputs)
        if blocks is not None:
            return self._run_blocks(inputs, states, weights, blocks)
        if segments.traced:
            return self._run_traced(inputs, states, weights, segments)
        if not self.reverse:
            return recurrence(self.cell_type, inputs, states, weights, backend=self.backend)
        outputs, states = recurrence(self.cell_type, inputs.flip(1), states, weights, backend=self.backend)
        return outputs.flip(1), states

    def _run_blocks(
        self, inputs: torch.Tensor, states: States, weights: Any, blocks: RowBlocks
    ) -> tuple[torch.Tensor, States]:
        index = blocks.reversed_gather_index if self.reverse else blocks.gather_index
        place = blocks.reversed_scatter_index if self.reverse else blocks.scatter_index
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
        self, inputs: torch.Tensor, states: States, weights: Any, segments: SegmentInfo
    ) -> tuple[torch.Tensor, States]:
        if self.reverse:
            inputs, segments = inputs.flip(1), segments.reversed()
        told = {"mask": segments.mask, "starts": segments.starts}
        outputs, states = recurrence_reference(self.cell_type, inputs, states, weights, **told)
        return outputs.flip(1) if self.reverse else outputs, states


def init_gates(direction: RNNDirection) -> None:
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


def init_embedding(embedding: nn.Embedding, cell_type: str, scale: float = 1.0) -> None:
    """Draw token embeddings with standard deviation 1 as a cell, which gets them times `scale`, reads them.

    At most `EMBEDDING_STD` in the table. The padding row is zero.
    """
    init.normal_(embedding.weight, std=min(EMBEDDING_STD[cell_type], 1 / scale))
    # The slice loses the flag by which init spares loaded weights, so it is asked for here.
    if embedding.padding_idx is not None and not getattr(embedding.weight, "_is_hf_initialized", False):
        init.zeros_(embedding.weight[embedding.padding_idx])


def summed_up(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str, reading: str) -> torch.Tensor:
    """Sum up a text.

    Args:
        hidden: `(batch, length, width)`.
        mask: `(batch, length)` booleans; None if every token is real.
        pooling: `last` real token that was read, `mean` or `max`.
        reading: `forwards`, `backwards`, or `both`, each in one half of the width.

    Returns:
        `(batch, width)`; zeros for a row without any real token.
    """
    if pooling == "mean":
        return mean_over_time(hidden.mT, mask)
    if pooling == "max":
        return max_over_time(hidden.mT, mask)
    if reading != "both":
        return end_token(hidden, mask, first=reading == "backwards")
    forwards, backwards = hidden.chunk(2, dim=-1)
    return torch.cat([end_token(forwards, mask), end_token(backwards, mask, first=True)], dim=-1)
