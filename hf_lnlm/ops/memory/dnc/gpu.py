"""The Differentiable Neural Computer on a graphics processor: the whole sequence, controller included, in one Triton
kernel with a hand-written backward; the memory never leaves the chip, the links stay in place. Nothing waits for the
device.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods

Complexity: see `gpu_kernels` and `gpu_backward`; one kernel launch a block of steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...kernels.triton_math import power_of_two
from ...kernels.triton_rows import PRODUCT_BLOCK, Parameters, warps_for
from ..driver import run_layer
from ..layer import MemoryWeights
from .gpu_backward import Gradients, backward_kernel
from .gpu_kernels import History, Sizes, forward_kernel
from .layout import DNCLoop, DNCOptions, DNCState, num_modes

_LINK_ENTRIES = 4096  # of a tile of links


class GPULoop(DNCLoop):
    """The kernels that Triton compiles."""

    History = History

    def __init__(self, state: DNCState, options: DNCOptions, every: int) -> None:
        super().__init__(state, options, every)
        padded, modes = power_of_two(self.slots), num_modes(options)
        self.sizes = Sizes(
            self.hidden, self.reads, self.writes, self.slots, self.width, self.linked, modes, self.reads * self.width,
            self.places.end, 4 * self.hidden if self.lstm else self.hidden, self.lstm, options.masking,
            options.deallocation, float(options.interface_clip), float(options.mask_min), PRODUCT_BLOCK, padded,
            power_of_two(self.width), power_of_two(modes, 2), min(padded, max(16, _LINK_ENTRIES // padded)),
        )  # fmt: skip
        self.warps = warps_for(padded * max(self.sizes.block_width, self.sizes.rows))

    def extra(self, x: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Forward and backward weightings along the links, and room for the usages that the write heads see; see `Loop`."""
        forwards = x.new_empty(x.shape[0], steps, self.linked, self.reads, self.slots)
        return [forwards, torch.empty_like(forwards), x.new_empty(x.shape[0], self.writes, self.slots)]

    def run_forward(self, history: Any, parts: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights) -> None:
        """Fill a history; see `Loop`."""
        ready = Parameters(weights.recurrent.t(), weights.interface.t(), weights.interface_bias)
        forward_kernel[(mask.shape[0],)](
            history, *parts, mask, ready, mask.shape[1], self.every, history.stored_memory.shape[1], self.sizes,
            self.places, num_warps=self.warps,
        )  # fmt: skip

    def run_backward(
        self, history: Any, gradients: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights
    ) -> None:
        """Run the history backward; see `Loop`."""
        _, _, _, usage, _, _, readings, memory, link, *_ = gradients
        chunk = [part.new_empty(mask.shape[0], self.every, *part.shape[1:]) for part in (memory, link)]
        found = Gradients(*[*gradients, *chunk, torch.empty_like(readings), torch.empty_like(usage)])
        ready = Parameters(weights.recurrent, weights.interface, weights.interface_bias)
        backward_kernel[(mask.shape[0],)](
            history, found, mask, ready, mask.shape[1], self.every, history.stored_memory.shape[1], self.sizes,
            self.places, num_warps=self.warps,
        )  # fmt: skip


dnc_memory_gpu = partial(run_layer, GPULoop)
