"""Neural Turing Machine: language models, classifiers and sequence transducers.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401
    [2] Collier, Beel 2018, Implementing Neural Turing Machines, arXiv 1807.08518 (initialisation, activations)

Glossary (paper symbol: variable): M_t: `memory`, w_t: `weightings`, r_t: `reads`; interface of the heads: `interface_proj`.

Deliberate deviations: initial weightings, reads and controller state are learned [2]; heads may begin as on a tape
(`initial_addressing`), which is ours; sharpening is computed in log space; several write heads erase before any adds.
See ops/memory/ntm for the equations.

Complexity: see ops/memory/ntm.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin

from ...nn.assign import assign, plain_like
from ...ops.memory.layer import MemoryWeights
from ...ops.memory.ntm import ntm_memory
from ...ops.memory.ntm.layout import NTMOptions, NTMState, head_size, num_interface
from .configuration_ntm import NTMConfig
from .memory_heads import (
    MemoryForCausalLM,
    MemoryForMaskedLM,
    MemoryForQuestionAnswering,
    MemoryForSequenceClassification,
    MemoryForSequenceTransduction,
    MemoryForTokenClassification,
)
from .memory_layers import MemoryCell, Run, States
from .memory_model import MemoryModel, MemoryPreTrainedModel

_PEAK = 10.0  # logit of the first slot in a peaked initial weighting
_TAPE_GAIN = 0.1  # gain of a tape's interface: at first the controller hardly moves it
_TAPE = 2.0  # how far a tape's gate lies below, and its sharpening above, the neutral one, as interface parameters


class NTMCell(MemoryCell):
    """Controller, heads and memory of one direction of one layer.

    Args:
        config: the model's configuration.
        sizes: input and output width.
    """

    def __init__(self, config: NTMConfig, sizes: tuple[int, int]) -> None:
        self.options = NTMOptions(
            config.num_read_heads,
            config.num_write_heads,
            config.shift_range,
            config.controller_type,
            config.read_before_write,
            float(config.interface_clip),
        )
        super().__init__(config, sizes, num_interface(self.options, config.memory_width))
        slots, width = config.memory_size, config.memory_width
        self.memory_init, self.memory_value = config.memory_init, float(config.memory_init_value)
        self.memory_shape, self.initial_weighting = (slots, width), config.initial_weighting
        self.initial_addressing = config.initial_addressing
        heads = config.num_read_heads + config.num_write_heads
        self.initial_weightings = nn.Parameter(torch.empty(heads, slots))
        self.initial_reads = nn.Parameter(torch.empty(config.num_read_heads * width))
        self.initial_hidden = nn.Parameter(torch.empty(self.controller_size)) if self.lstm else None
        self.initial_cells = nn.Parameter(torch.empty(self.controller_size)) if self.lstm else None
        if config.memory_init == "learned":
            self.initial_memory = nn.Parameter(torch.empty(slots, width))
        elif config.memory_init == "random":
            self.register_buffer("initial_memory", torch.empty(slots, width))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a row's state."""
        slots, width = self.memory_shape
        size, heads = self.controller_size, self.initial_weightings.shape[0]
        shapes = ((size,), (size if self.lstm else 0,), tuple(self.initial_reads.shape), (heads, slots), (slots, width))
        return dict(zip(NTMState._fields, shapes, strict=True))

    def initial_states(self, batch_size: int, like: torch.Tensor) -> States:
        """Return the learned initial state; see `MemoryCell.initial_states`."""
        if self.initial_hidden is None or self.initial_cells is None:
            hidden, cells = like.new_zeros(self.controller_size), like.new_zeros(0)
        else:
            hidden, cells = self.initial_hidden.tanh(), self.initial_cells
        if self.memory_init == "constant":
            memory = like.new_full(self.memory_shape, self.memory_value)
        else:
            memory = self.initial_memory
        parts = (hidden, cells, self.initial_reads.tanh(), self.initial_weightings.to(like.dtype).softmax(-1), memory)
        rows = [part.to(like.dtype).expand(batch_size, *part.shape) for part in parts]
        return NTMState(*rows)

    def operate(
        self, inputs: torch.Tensor, gates: MemoryWeights, states: States, mask: torch.Tensor | None, backend: str
    ) -> Run:
        """Run the Turing machine; see `MemoryCell.operate`."""
        result = ntm_memory(inputs, gates, NTMState(*states), self.options, mask, backend)
        reads = self.options.num_read_heads
        return Run(result.outputs, result.state, (result.weightings[:, :, :reads], result.weightings[:, :, reads:]))


class NTMPreTrainedModel(MemoryPreTrainedModel):
    """Weight initialisation of the Turing machines."""

    config: NTMConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NTMCell):
            _init_state(module)


def _init_state(cell: NTMCell) -> None:
    """What the first step begins with."""
    if cell.initial_weighting == "random":
        init.normal_(cell.initial_weightings, std=0.5)
    else:
        logits = plain_like(cell.initial_weightings).zero_()
        logits[:, 0] = _PEAK if cell.initial_weighting == "peaked" else 0.0
        assign(cell.initial_weightings, logits)
    if cell.initial_addressing == "tape":
        init.xavier_uniform_(cell.interface_proj.weight, gain=_TAPE_GAIN)
        assign(cell.interface_proj.bias, _tape_interface_bias(cell))
    for parameter in (cell.initial_reads, cell.initial_hidden, cell.initial_cells):
        if parameter is not None:
            init.normal_(parameter, std=0.1)
    if cell.memory_init != "constant":
        bound = sum(cell.memory_shape) ** -0.5
        init.uniform_(cell.initial_memory, -bound, bound)


def _tape_interface_bias(cell: NTMCell) -> torch.Tensor:
    """Biases of the interface: heads keep their weighting sharp rather than look up; readers wait, writers walk on."""
    bias, width = plain_like(cell.interface_proj.bias).zero_(), cell.memory_shape[1]
    heads, size = cell.initial_weightings.shape[0], head_size(cell.options, width)
    head = bias[: heads * size].view(heads, size)
    head[:, width + 1], head[:, width + 2] = -_TAPE, _TAPE
    shifts = head[:, width + 3 :]
    ahead = torch.arange(shifts.shape[1], device=bias.device) - cell.options.shift_range
    shifts[cell.options.num_read_heads :] = ahead.clamp(-1, 1).to(bias.dtype)
    shifts[: cell.options.num_read_heads] = torch.where(ahead == 0, 1.0, torch.where(ahead < 0, -1.0, 0.0))
    return bias


class NTMModel(NTMPreTrainedModel, MemoryModel):
    """Embeddings and stacked Turing machines, without a head; see `MemoryModel`."""

    cell_class: ClassVar[type[NTMCell]] = NTMCell
    state_names: ClassVar[tuple[str, ...]] = NTMState._fields
    addressing_names: ClassVar[tuple[str, ...]] = ("read_weightings", "write_weightings")


class NTMForCausalLM(NTMPreTrainedModel, MemoryForCausalLM, GenerationMixin):
    """Language model over Turing machines; see `MemoryForCausalLM`."""

    body_class = NTMModel


class NTMForMaskedLM(NTMPreTrainedModel, MemoryForMaskedLM):
    """Masked language model over Turing machines; see `MemoryForMaskedLM`."""

    body_class = NTMModel


class NTMForSequenceClassification(NTMPreTrainedModel, MemoryForSequenceClassification):
    """Text classifier over Turing machines; see `MemoryForSequenceClassification`."""

    body_class = NTMModel


class NTMForTokenClassification(NTMPreTrainedModel, MemoryForTokenClassification):
    """Tagger over Turing machines; see `MemoryForTokenClassification`."""

    body_class = NTMModel


class NTMForQuestionAnswering(NTMPreTrainedModel, MemoryForQuestionAnswering):
    """Extractive question answering over Turing machines; see `MemoryForQuestionAnswering`."""

    body_class = NTMModel


class NTMForSequenceTransduction(NTMPreTrainedModel, MemoryForSequenceTransduction):
    """The paper's algorithmic tasks; see `MemoryForSequenceTransduction`."""

    body_class = NTMModel


__all__ = [
    "NTMForCausalLM",
    "NTMForMaskedLM",
    "NTMForQuestionAnswering",
    "NTMForSequenceClassification",
    "NTMForSequenceTransduction",
    "NTMForTokenClassification",
    "NTMModel",
    "NTMPreTrainedModel",
]
