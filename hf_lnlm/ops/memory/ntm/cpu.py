"""The Neural Turing Machine on the processor: the whole sequence, controller included, in one compiled loop with a
hand-written backward.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401

Complexity: see `cpu_kernels`.
"""

from functools import partial
from typing import Any

import torch

from ...kernels.products import FEW, packed
from ...kernels.rows import GROUP, np
from ..driver import run_layer
from ..layer import MemoryWeights
from .cpu_kernels import Gradients, History, Sizes, backward_loop, forward_loop, make_scratch
from .layout import NTMLoop, NTMOptions, NTMState


class CPULoop(NTMLoop):
    """The loops that numba compiles."""

    History, slots_last = History, True

    def __init__(self, state: NTMState, options: NTMOptions, every: int) -> None:
        super().__init__(state, options, every)
        tiled = state.memory.shape[0] >= FEW
        self.pack = packed if tiled else torch.Tensor.contiguous
        self.sizes = Sizes(
            self.hidden, options.num_read_heads, options.num_write_heads, self.width, 2 * options.shift_range + 1,
            every, self.lstm, options.read_before_write, tiled,
        )  # fmt: skip
        self.clip, self.scratch = np.float32(options.interface_clip), make_scratch(self.sizes, state.memory.shape[1])

    def run_forward(self, history: Any, parts: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights) -> None:
        """Fill a history; see `Loop`."""
        tensors = parts[0], mask, weights.recurrent, weights.interface, weights.interface_bias
        arrays = History(*map(torch.Tensor.numpy, history))
        forward_loop(self.sizes, arrays, *map(torch.Tensor.numpy, tensors), self.clip, self.scratch)

    def run_backward(
        self, history: Any, gradients: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights
    ) -> None:
        """Run the history backward; see `Loop`."""
        found = Gradients(*map(torch.Tensor.numpy, gradients))
        memories = np.empty((min(GROUP, mask.shape[0]), self.every + 1, *found.memory.shape[1:]), np.float32)
        backward_loop(
            self.sizes, History(*map(torch.Tensor.numpy, history)), found, mask.numpy(), weights.recurrent.numpy(),
            weights.interface.numpy(), self.clip, memories, self.scratch,
        )  # fmt: skip


ntm_memory_cpu = partial(run_layer, CPULoop)
