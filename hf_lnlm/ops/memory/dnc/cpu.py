"""The Differentiable Neural Computer on the processor: the whole sequence, controller included, in one compiled loop with
a hand-written backward.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods

Complexity: see `cpu_kernels` and `backward_kernels`.
"""

from functools import partial
from typing import Any

import torch

from ...kernels.products import FEW, packed
from ...kernels.rows import np
from ..driver import run_layer
from ..layer import MemoryWeights
from .backward_kernels import Chunk, Gradients, backward_loop, make_rows
from .cpu_kernels import GROUP, History, Limits, Sizes, forward_loop, make_scratch
from .layout import DNCLoop, DNCOptions, DNCState


class CPULoop(DNCLoop):
    """The loops that numba compiles."""

    History, slots_last = History, True

    def __init__(self, state: DNCState, options: DNCOptions, every: int) -> None:
        super().__init__(state, options, every)
        tiled = min(GROUP, state.memory.shape[0]) >= FEW
        self.pack = packed if tiled else torch.Tensor.contiguous
        self.sizes = Sizes(
            self.hidden, self.reads, self.writes, self.width, every, self.lstm, options.temporal_links,
            options.masking, options.deallocation, tiled,
        )  # fmt: skip
        self.limits = Limits(np.float32(options.interface_clip), np.float32(options.mask_min))
        self.scratch = make_scratch(self.sizes, self.slots, self.places.end)

    def extra(self, x: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Orders of usage, and forward and backward weightings along the links; see `Loop`."""
        order = torch.empty(x.shape[0], steps, self.writes, self.slots, dtype=torch.int32, device="cpu")
        forwards = x.new_empty(x.shape[0], steps, self.linked, self.reads, self.slots)
        return [order, forwards, torch.empty_like(forwards)]

    def run_forward(self, history: Any, parts: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights) -> None:
        """Fill a history; see `Loop`."""
        tensors = *parts, mask, weights.recurrent, weights.interface, weights.interface_bias
        arrays = History(*map(torch.Tensor.numpy, history))
        forward_loop(self.sizes, self.places, arrays, *map(torch.Tensor.numpy, tensors), self.limits, self.scratch)

    def run_backward(
        self, history: Any, gradients: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights
    ) -> None:
        """Run the history backward; see `Loop`."""
        found = Gradients(*map(torch.Tensor.numpy, gradients))
        shape = (min(GROUP, mask.shape[0]), self.every + 1)
        memories, links = (np.empty(shape + part.shape[1:], np.float32) for part in (found.memory, found.link))
        backward_loop(
            self.sizes, self.places, History(*map(torch.Tensor.numpy, history)), found, Chunk(memories, links),
            mask.numpy(), weights.recurrent.numpy(), weights.interface.numpy(), self.limits, self.scratch,
            make_rows(self.sizes, self.slots),
        )  # fmt: skip


dnc_memory_cpu = partial(run_layer, CPULoop)
