"""The Neural Turing Machine on a graphics processor: the whole sequence, controller included, in one Triton kernel with
a hand-written backward; the memory never leaves the chip. Nothing waits for the device.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401

Complexity: see `gpu_kernels`; one kernel launch a block of steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...kernels.triton_math import power_of_two
from ...kernels.triton_rows import PRODUCT_BLOCK, Parameters, warps_for
from ..driver import run_layer
from ..layer import MemoryWeights
from .gpu_kernels import Gradients, History, Sizes, backward_kernel, forward_kernel
from .layout import NTMLoop, NTMOptions, NTMState, num_interface


class GPULoop(NTMLoop):
    """The kernels that Triton compiles."""

    History = History

    def __init__(self, state: NTMState, options: NTMOptions, every: int) -> None:
        super().__init__(state, options, every)
        slots, shifts = state.memory.shape[1], 2 * options.shift_range + 1
        padded = power_of_two(slots), power_of_two(self.width)
        self.sizes = Sizes(
            self.hidden, options.num_read_heads, options.num_write_heads, slots, self.width, shifts,
            options.num_read_heads * self.width, num_interface(options, self.width),
            4 * self.hidden if self.lstm else self.hidden, self.lstm, options.read_before_write,
            float(options.interface_clip), PRODUCT_BLOCK, *padded, power_of_two(shifts, 2),
        )  # fmt: skip
        self.warps = warps_for(padded[0] * padded[1])

    def run_forward(self, history: Any, parts: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights) -> None:
        """Fill a history; see `Loop`."""
        ready = Parameters(weights.recurrent.t(), weights.interface.t(), weights.interface_bias)
        forward_kernel[(mask.shape[0],)](
            history, *parts, mask, ready, mask.shape[1], self.every, history.stored.shape[1], self.sizes,
            num_warps=self.warps,
        )  # fmt: skip

    def run_backward(
        self, history: Any, gradients: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights
    ) -> None:
        """Run the history backward; see `Loop`."""
        memory = gradients[4]
        found = Gradients(*[*gradients, memory.new_empty(mask.shape[0], self.every, *memory.shape[1:])])
        ready = Parameters(weights.recurrent, weights.interface, weights.interface_bias)
        backward_kernel[(mask.shape[0],)](
            history, found, mask, ready, mask.shape[1], self.every, history.stored.shape[1], self.sizes,
            num_warps=self.warps,
        )  # fmt: skip


ntm_memory_gpu = partial(run_layer, GPULoop)
