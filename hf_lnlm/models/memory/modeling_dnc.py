"""Differentiable Neural Computer: language models, classifiers and sequence transducers.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538
    [2] Csordás, Schmidhuber 2019, arXiv 1904.10278 (masking, de-allocation, sharpness)
    [3] Franke, Niehues, Waibel 2018, arXiv 1807.02658 (no links, normalisation, bypass dropout, both directions)

Glossary (paper symbol: variable): M_t: `memory`, u_t: `usage`, L_t: `link`, p_t: `precedence`; ξ_t: `interface_proj`.

Deliberate deviations: w^w_{t-1} in the usage is differentiated. See ops/memory/dnc for the equations and the layout of ξ_t.

Complexity: see ops/memory/dnc; the state of a row holds memory_size² numbers a write head for the links.
"""

from typing import ClassVar

import torch
from transformers.generation import GenerationMixin

from ...ops.memory.dnc import dnc_memory
from ...ops.memory.dnc.layout import DNCAddressing, DNCOptions, DNCState, num_interface
from ...ops.memory.layer import MemoryWeights
from .configuration_dnc import DNCConfig
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


class DNCCell(MemoryCell):
    """Controller, heads and memory of one direction of one layer. The initial state is zero, as in [1].

    Args:
        config: the model's configuration.
        sizes: input and output width.
    """

    def __init__(self, config: DNCConfig, sizes: tuple[int, int]) -> None:
        self.options = DNCOptions(
            config.num_read_heads,
            config.num_write_heads,
            config.controller_type,
            config.use_temporal_links,
            config.use_masking,
            config.use_deallocation,
            config.use_sharpness,
            float(config.mask_min),
            float(config.interface_clip),
        )
        super().__init__(config, sizes, num_interface(self.options, config.memory_width))
        self.memory_shape = (config.memory_size, config.memory_width)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a row's state."""
        slots, width = self.memory_shape
        size, options = self.controller_size, self.options
        reads, writes = options.num_read_heads, options.num_write_heads
        linked = writes if options.temporal_links else 0
        controller = ((size,), (size if self.lstm else 0,), (reads * width,))
        memory = ((slots, width), (slots,), (linked, slots), (linked, slots, slots), (writes, slots), (reads, slots))
        return dict(zip(DNCState._fields, (*controller, *memory), strict=True))

    def initial_states(self, batch_size: int, like: torch.Tensor) -> States:
        """Return the initial state: zero; see `MemoryCell.initial_states`."""
        return DNCState(*[like.new_zeros(batch_size, *shape) for shape in self.state_shapes().values()])

    def operate(
        self, inputs: torch.Tensor, gates: MemoryWeights, states: States, mask: torch.Tensor | None, backend: str
    ) -> Run:
        """Run the neural computer; see `MemoryCell.operate`."""
        result = dnc_memory(inputs, gates, DNCState(*states), self.options, mask, backend)
        return Run(result.outputs, result.state, tuple(result.addressing))


class DNCPreTrainedModel(MemoryPreTrainedModel):
    """Traits of the neural computers."""

    config: DNCConfig


class DNCModel(DNCPreTrainedModel, MemoryModel):
    """Embeddings and stacked neural computers, without a head; see `MemoryModel`."""

    cell_class: ClassVar[type[DNCCell]] = DNCCell
    state_names: ClassVar[tuple[str, ...]] = DNCState._fields
    addressing_names: ClassVar[tuple[str, ...]] = DNCAddressing._fields


class DNCForCausalLM(DNCPreTrainedModel, MemoryForCausalLM, GenerationMixin):
    """Language model over neural computers; see `MemoryForCausalLM`."""

    body_class = DNCModel


class DNCForMaskedLM(DNCPreTrainedModel, MemoryForMaskedLM):
    """Masked language model over neural computers; see `MemoryForMaskedLM`."""

    body_class = DNCModel


class DNCForSequenceClassification(DNCPreTrainedModel, MemoryForSequenceClassification):
    """Text classifier over neural computers; see `MemoryForSequenceClassification`."""

    body_class = DNCModel


class DNCForTokenClassification(DNCPreTrainedModel, MemoryForTokenClassification):
    """Tagger over neural computers; see `MemoryForTokenClassification`."""

    body_class = DNCModel


class DNCForQuestionAnswering(DNCPreTrainedModel, MemoryForQuestionAnswering):
    """Extractive question answering over neural computers; see `MemoryForQuestionAnswering`."""

    body_class = DNCModel


class DNCForSequenceTransduction(DNCPreTrainedModel, MemoryForSequenceTransduction):
    """The paper's algorithmic tasks; see `MemoryForSequenceTransduction`."""

    body_class = DNCModel


__all__ = [
    "DNCForCausalLM",
    "DNCForMaskedLM",
    "DNCForQuestionAnswering",
    "DNCForSequenceClassification",
    "DNCForSequenceTransduction",
    "DNCForTokenClassification",
    "DNCModel",
    "DNCPreTrainedModel",
]
