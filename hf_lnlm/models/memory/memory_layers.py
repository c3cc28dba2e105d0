"""Blocks of the memory-augmented families: a cell with its projections, and the layer that runs it, one way or both.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401
    [2] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538
    [3] Franke, Niehues, Waibel 2018, Robust and Scalable Differentiable Neural Computer, arXiv 1807.02658

Glossary: `addressing` where heads read and wrote, without gradient; x_t `inputs`; [h_t ; r_t] `outputs` of the operation.

With `recompute_states` training runs chunks of about √T steps, output projection included, keeps the state before each
and runs a chunk again when its gradients are wanted (Chen et al. 2016, arXiv 1604.06174).

Deliberate deviations: the memory's core runs in float32 whatever the model's type (its products of usages and its
powers leave bfloat16 nothing); layers are residual blocks unless the config says otherwise.

Complexity: that of the operation, O(T) steps a layer.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...nn.effective_weight import effective_weight
from ...nn.masks import SegmentInfo
from ...nn.ragged import RowLayout, batch_state, gather_rows, rows_state, scatter_rows
from ...ops.backend import own_precision
from ...ops.memory.layer import MemoryWeights
from ...ops.recompute import recomputed
from .memory_config import MemoryConfig

States = tuple[torch.Tensor, ...]
Addressing = tuple[torch.Tensor, ...]


class Run(NamedTuple):
    """Results of a cell's operation over whole rows."""

    outputs: torch.Tensor  # `(B, T, controller + reads)`
    states: States
    addressing: Addressing  # `(B, T, ...)` each


Operate = Callable[..., Run]  # inputs, gates, states, mask, backend


def core_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type a memory computes in: float32, or float64 if it is given that.

    Args:
        dtype: of the inputs.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


class MemoryCell(nn.Module):
    """Controller and memory of one direction of one layer. Families say what their state is and which operation runs.

    Args:
        config: the model's configuration.
        sizes: input and output width.
        num_interface: length of the interface vector.
    """

    def __init__(self, config: MemoryConfig, sizes: tuple[int, int], num_interface: int) -> None:
        super().__init__()
        size, reads = int(config.controller_size or 0), config.num_read_heads * config.memory_width
        lstm = config.controller_type == "lstm"
        gates = 4 * size if lstm else size
        self.controller_size, self.input_size, self.lstm = size, sizes[0], lstm
        self.backend, self.recompute = config.backend, config.recompute_states
        self.recurrent_size = (size if lstm else 0) + reads
        self.input_proj = nn.Linear(sizes[0], gates)
        self.recurrent_proj = nn.Linear(self.recurrent_size, gates, bias=False)
        self.interface_proj = nn.Linear(size, num_interface)
        self.output_features = size + reads
        self.output_proj = nn.Linear(size + reads, sizes[1])
        self.output_norm = nn.LayerNorm(size + reads) if config.layer_norm else None
        self.bypass_dropout = nn.Dropout(config.bypass_dropout)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a row's state, by name."""
        raise NotImplementedError

    def initial_states(self, batch_size: int, like: torch.Tensor) -> States:
        """Return the state before the first step, connected to what of it is learned.

        Args:
            batch_size: rows.
            like: a tensor of the wanted type and device.
        """
        raise NotImplementedError

    def operate(
        self, inputs: torch.Tensor, gates: MemoryWeights, states: States, mask: torch.Tensor | None, backend: str
    ) -> Run:
        """Run the family's operation.

        Args:
            inputs: `(B, T, D)`.
            gates: effective weights.
            states: before the first step.
            mask: `(B, T)` booleans or None.
            backend: which implementation.
        """
        raise NotImplementedError

    def gates(self, inputs: torch.Tensor) -> MemoryWeights:
        """Return the effective weights, adapters included, in the core's type.

        Args:
            inputs: of the layer: their type and device count.
        """
        found: list[torch.Tensor] = []
        for module, width in (
            (self.input_proj, self.input_size),
            (self.recurrent_proj, self.recurrent_size),
            (self.interface_proj, self.controller_size),
        ):
            weight, bias = effective_weight(module, width, inputs.dtype, inputs.device)
            found.append(weight)
            if module is not self.recurrent_proj:
                found.append(weight.new_zeros(weight.shape[0]) if bias is None else bias)
        return MemoryWeights(*[tensor.to(core_dtype(inputs.dtype)) for tensor in found])

    def forward(
        self,
        inputs: torch.Tensor,
        states: States | None,
        segments: SegmentInfo,
        reverse: bool = False,
        keep_addressing: bool = True,
    ) -> tuple[torch.Tensor, States, Addressing]:
        """Run over a batch.

        Args:
            inputs: `(B, T, D)`.
            states: carried state, or None for the initial one.
            segments: which positions are real and where documents begin.
            reverse: whether to read from the last position to the first.
            keep_addressing: whether anybody wants the addressing; without it recomputed chunks drop theirs.

        Returns:
            outputs `(B, T, output width)`, final state, addressing `(B, T, ...)`.
        """
        with own_precision(inputs.device):
            core = inputs.to(core_dtype(inputs.dtype))
            initial = self.initial_states(inputs.shape[0], core)
            states = initial if states is None else tuple(s.to(core.dtype) for s in states)
            gates = self.gates(inputs)
        operate: Operate = self.operate
        chunked = self.recompute and torch.is_grad_enabled() and not segments.traced
        if chunked:
            operate = partial(self._operate_chunks, dtype=inputs.dtype, keep_addressing=keep_addressing)
        if segments.layout is not None:
            run = self._run_rows(operate, core, gates, states, initial, segments.layout, reverse)
        elif segments.traced:
            run = self._run_traced(core, gates, states, initial, segments, reverse)
        else:
            run = operate(core.flip(1) if reverse else core, gates, states, None, self.backend)
            run = _flip(run) if reverse else run
        if not chunked:
            return self._project(run.outputs, inputs.dtype), run.states, run.addressing
        outputs = run.outputs
        if (
            segments.layout is not None
        ):  # scattered chunks are zero at masked positions, where projections of zero belong
            nothing = core.new_zeros(1, 1, self.output_features)
            outputs = torch.where(segments.layout.mask[..., None], outputs, self._project(nothing, inputs.dtype))
        return outputs, run.states, run.addressing

    def _project(self, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """From [h ; r] in the core's type to the layer's output."""
        outputs = outputs.to(dtype)
        if self.output_norm is not None:
            outputs = self.output_norm(outputs)
        if self.training and self.bypass_dropout.p:
            hidden, reads = outputs.split([self.controller_size, outputs.shape[-1] - self.controller_size], -1)
            outputs = torch.cat([self.bypass_dropout(hidden), reads], -1)
        return self.output_proj(outputs)

    def _operate_chunks(
        self,
        inputs: torch.Tensor,
        gates: MemoryWeights,
        states: States,
        mask: torch.Tensor | None,
        backend: str,
        dtype: torch.dtype,
        keep_addressing: bool,
    ) -> Run:
        """`operate` and `_project` in chunks that keep nothing but the state before them."""
        count = len(gates)

        def chunk(inputs: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            state, real = (tensors[count:], None) if mask is None else (tensors[count:-1], tensors[-1])
            run = self.operate(inputs, MemoryWeights(*tensors[:count]), state, real, backend)
            return self._project(run.outputs, dtype), *run.states, *(run.addressing if keep_addressing else ())

        size = math.ceil(math.sqrt(8 * inputs.shape[1]))  # shorter ones would need less, but cost a call each
        parts = inputs.split(size, 1)
        masks = [()] * len(parts) if mask is None else [(real,) for real in mask.split(size, 1)]
        parameters = [
            *self.output_proj.parameters(),
            *([] if self.output_norm is None else self.output_norm.parameters()),
        ]
        outputs, addressing = [], []
        for part, real in zip(parts, masks, strict=True):
            results = recomputed(chunk, [part, *gates, *states, *real], parameters, 1 + len(states))
            outputs.append(results[0])
            addressing.append(results[1 + len(states) :])
            states = results[1 : 1 + len(states)]
        return Run(torch.cat(outputs, 1), states, tuple(torch.cat(seen, 1) for seen in zip(*addressing, strict=True)))

    def _run_rows(
        self,
        operate: Operate,
        inputs: torch.Tensor,
        gates: MemoryWeights,
        states: States,
        initial: States,
        layout: RowLayout,
        reverse: bool,
    ) -> Run:
        """Every document in a row of its own, its real tokens first."""
        index = layout.reversed_gather_index if reverse else layout.gather_index
        place = layout.reversed_scatter_index if reverse else layout.scatter_index
        if index.shape[0] == 0:
            return self._run_nothing(operate, inputs, gates, states)
        mask = torch.arange(index.shape[1], device=inputs.device) < layout.lengths[:, None]
        begin = tuple(rows_state(s, first[:1], layout) for s, first in zip(states, initial, strict=True))
        run = operate(gather_rows(inputs, index), gates, begin, mask, self.backend)
        final = tuple(batch_state(new, old, layout) for new, old in zip(run.states, states, strict=True))
        addressing = tuple(_scatter(run.addressing, place, layout.mask))
        return Run(scatter_rows(run.outputs, place, layout.mask), final, addressing)

    def _run_nothing(self, operate: Operate, inputs: torch.Tensor, gates: MemoryWeights, states: States) -> Run:
        """A batch without any real token: outputs of zero, the state as it was."""
        run = operate(inputs[:, :1], gates, states, torch.zeros_like(inputs[:, :1, 0], dtype=torch.bool), "eager")
        shapes = [(*inputs.shape[:2], *part.shape[2:]) for part in run.addressing]
        outputs = run.outputs.expand(-1, inputs.shape[1], -1)
        return Run(outputs, states, tuple(inputs.new_zeros(shape) for shape in shapes))

    def _run_traced(
        self,
        inputs: torch.Tensor,
        gates: MemoryWeights,
        states: States,
        initial: States,
        segments: SegmentInfo,
        reverse: bool,
    ) -> Run:
        """Plain torch, step by step where documents begin inside."""
        inputs, segments = (inputs.flip(1), segments.reversed()) if reverse else (inputs, segments)
        mask, starts = segments.mask, segments.starts
        if starts is None:
            run = self.operate(inputs, gates, states, mask, "eager")
            return _flip(run) if reverse else run
        steps = []
        for t in range(inputs.shape[1]):
            states = _restart(states, initial, starts[:, t])
            step = self.operate(
                inputs[:, t : t + 1], gates, states, mask[:, t : t + 1] if mask is not None else None, "eager"
            )
            states = step.states
            steps.append((step.outputs, *step.addressing))
        outputs, *addressing = [torch.cat(parts, 1) for parts in zip(*steps, strict=True)]
        run = Run(outputs, states, tuple(addressing))
        return _flip(run) if reverse else run


def _restart(states: States, initial: States, starts: torch.Tensor) -> States:
    """The initial state in the rows where `starts` `(B,)` is true."""
    pairs = zip(initial, states, strict=True)
    return tuple(torch.where(starts.view(-1, *[1] * (old.dim() - 1)), new, old) for new, old in pairs)


def _flip(run: Run) -> Run:
    """The results in the order of the input."""
    return Run(run.outputs.flip(1), run.states, tuple(part.flip(1) for part in run.addressing))


def _scatter(addressing: Addressing, place: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """Addressing of rows back to the batch's positions; zero where masked."""
    for part in addressing:
        yield scatter_rows(part.flatten(2), place, mask).unflatten(2, part.shape[2:])


class MemoryLayer(GradientCheckpointingLayer):
    """One layer: a pre-norm residual block around a cell, or the bare cell of the papers.

    Args:
        config: the model's configuration.
        make_cell: builds a cell of the given input and output width.
        sizes: input and output width.
    """

    def __init__(
        self, config: MemoryConfig, make_cell: Callable[[tuple[int, int]], MemoryCell], sizes: tuple[int, int]
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes[0]) if config.residual else None
        self.forwards = make_cell(sizes)
        self.backwards = make_cell(sizes) if config.bidirectional else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, states: States | None, segments: SegmentInfo, keep_addressing: bool = True
    ) -> tuple[torch.Tensor, States, Addressing]:
        """Run the layer; see `MemoryCell.forward`. The state and addressing are those of the forward direction."""
        inputs = hidden_states if self.norm is None else self.norm(hidden_states)
        outputs, states, addressing = self.forwards(inputs, states, segments, keep_addressing=keep_addressing)
        if self.backwards is not None:
            outputs = outputs + self.backwards(inputs, None, segments, reverse=True, keep_addressing=False)[0]
        outputs = self.dropout(outputs)
        return outputs if self.norm is None else hidden_states + outputs, states, addressing
