"""One layer of a biLM: an LSTM with projection and clipping in each direction, which never see each other's output."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ...nn.assign import assign, plain_like
from ...nn.effective_weight import effective_weight
from ...ops.projected_lstm import projected_lstm
from ...ops.projected_lstm.reference import projected_lstm_traced

States = tuple[torch.Tensor, torch.Tensor]


class Runs(NamedTuple):
    """How the words of a batch lie when both directions run over them.

    Packed, step after step and the longest row first, as in torch's `PackedSequence`; or, where a tracer must not look at
    values, padded rows.

    Attributes:
        batch_sizes: rows of each step; None for padded rows.
        order: `(batch,)` rows by falling length; None for padded rows.
        mask: `(batch, T)` true where there is a word.
        forwards, backwards: which word, of `batch * T`, each direction reads: `(total,)`, or `(batch, T)` padded.
        forwards_back, backwards_back: `(batch, T)` where a word's output is; `total` where there is no word.
    """

    batch_sizes: list[int] | None
    order: torch.Tensor | None
    mask: torch.Tensor
    forwards: torch.Tensor
    backwards: torch.Tensor
    forwards_back: torch.Tensor
    backwards_back: torch.Tensor

    def taken(self, words: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the words `(batch, T, width)` as a direction reads them."""
        return words.flatten(0, 1)[index]

    def put_back(self, outputs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return a direction's outputs `(batch, T, width)`, zero where there is no word."""
        flat = outputs if self.batch_sizes is not None else outputs.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, flat.shape[-1])])[index]


def plan_runs(mask: torch.Tensor, traced: bool) -> Runs:
    """Work out the runs of a batch.

    Args:
        mask: `(batch, T)` true where there is a word, those of a row from its first place on.
        traced: whether shapes must not depend on values.
    """
    batch, width = mask.shape
    lengths, columns = mask.sum(1), torch.arange(width, device=mask.device)
    rows = torch.arange(batch, device=mask.device)[:, None] * width
    turned = torch.where(mask, lengths[:, None] - 1 - columns, columns)
    if traced:
        ahead = rows + columns
        nothing = batch * width
        put = (ahead.where(mask, nothing), (rows + turned).where(mask, nothing))
        return Runs(None, None, mask, ahead, rows + turned, *put)
    order = lengths.argsort(descending=True, stable=True)
    steps = mask[order].T  # (T, batch): the first rows of each step
    sizes = [size for size in steps.sum(1).tolist() if size]
    place = steps.flatten().cumsum(0).view(steps.shape).T - 1  # (batch, T) of the sorted rows
    total = sum(sizes)
    ahead = torch.full((batch, width), total, device=mask.device)
    ahead[order] = place.where(mask[order], total)
    back = ahead.gather(1, turned)
    words = (rows + columns)[mask]
    forwards = torch.empty_like(words).index_copy(0, ahead[mask], words)
    backwards = torch.empty_like(words).index_copy(0, back[mask], words)
    return Runs(sizes, order, mask, forwards, backwards, ahead, back)


class ProjectedLSTM(nn.Module):
    """One direction of one layer.

    Args:
        config: `backend`, `cell_size`, `projection_size`, the clips and `forget_bias` are read.
        skips: whether it adds its input to its output.
    """

    def __init__(self, config: Any, skips: bool) -> None:
        super().__init__()
        self.backend, self.skips, self.forget_bias = config.backend, skips, config.forget_bias
        self.clips = (config.cell_clip, config.projection_clip)
        self.cell_size, self.width = config.cell_size, config.projection_size
        self.input_gates = nn.Linear(self.width, 4 * self.cell_size)
        self.recurrent_gates = nn.Linear(self.width, 4 * self.cell_size, bias=False)
        self.projection = nn.Linear(self.cell_size, self.width, bias=False)

    def weights(self, inputs: torch.Tensor) -> tuple[Any, ...]:
        """Return input weight and bias, recurrent weight and projection, with adapters and the forget bias applied."""
        like = (inputs.dtype, inputs.device)
        bias: Any
        w_input, bias = effective_weight(self.input_gates, self.width, *like)
        recurrent, _ = effective_weight(self.recurrent_gates, self.width, *like)
        projection, _ = effective_weight(self.projection, self.cell_size, *like)
        if self.forget_bias:
            offset = torch.zeros_like(bias)
            offset[self.cell_size : 2 * self.cell_size] = self.forget_bias
            bias = bias + offset
        return w_input, bias, recurrent, projection

    def forward(self, words: torch.Tensor, runs: Runs, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, States]:
        """Run over a batch.

        Args:
            words: as `runs` lays them, `(total, width)` or padded `(batch, T, width)`.
            runs: how the words lie.
            h, c: `(batch, width)` and `(batch, cell_size)`.

        Returns:
            outputs, laid as the words, and final states: those after each row's last word.
        """
        weights = self.weights(words)
        if runs.batch_sizes is None or runs.order is None:
            outputs, final = projected_lstm_traced(words, runs.mask, (h, c), weights, self.clips)
        else:
            sorted_states = (h[runs.order], c[runs.order])
            outputs, ended = projected_lstm(words, runs.batch_sizes, sorted_states, weights, self.clips, self.backend)
            new_h, new_c = (torch.empty_like(state).index_copy(0, runs.order, state) for state in ended)
            final = (new_h, new_c)
        return outputs + words if self.skips else outputs, final


class BiLMLayer(GradientCheckpointingLayer):
    """One layer of both directions.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        skips = config.use_skip_connections and layer_idx > 0
        self.forwards = ProjectedLSTM(config, skips)
        self.backwards = ProjectedLSTM(config, skips)

    def forward(
        self, ahead: torch.Tensor, behind: torch.Tensor, runs: Runs, *states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run the layer.

        Args:
            ahead, behind: what each direction reads; see `ProjectedLSTM.forward`.
            runs: how the words lie.
            states: h and c of the forward direction, then of the backward one.

        Returns:
            both outputs and the four final states.
        """
        ahead, ended = self.forwards(ahead, runs, *states[:2])
        behind, ended_behind = self.backwards(behind, runs, *states[2:])
        return ahead, behind, *ended, *ended_behind


def init_projected_lstm(direction: ProjectedLSTM) -> None:
    """Glorot-uniform input gates and projection, orthogonal recurrent gates; zero biases.

    Drawn in float32: orthogonalisation has no half precision.
    """
    cells = direction.cell_size
    drawn: Any = {"device": direction.input_gates.weight.device, "dtype": torch.float32}
    blocks = [init.xavier_uniform_(torch.empty(cells, direction.width, **drawn)) for _ in range(4)]
    assign(direction.input_gates.weight, torch.cat(blocks))
    blocks = [init.orthogonal_(torch.empty(cells, direction.width, **drawn)) for _ in range(4)]
    assign(direction.recurrent_gates.weight, torch.cat(blocks))
    projection = plain_like(direction.projection.weight, torch.float32)
    assign(direction.projection.weight, init.xavier_uniform_(projection))
    init.zeros_(direction.input_gates.bias)
