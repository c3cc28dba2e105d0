"""The Neural Turing Machine's layer as one operation: controller, addressing, reading and writing over a whole sequence.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401

Backends: `reference` (the equations), `eager` (any device), `cpu` (numba), `gpu` (Triton). Complexity: see each.
"""

from typing import Any

import torch

from ...backend import own_precision
from ..layer import MemoryWeights, memory_operation
from .eager import ntm_memory_eager
from .layout import NTMOptions, NTMOutputs, NTMState, check_arguments
from .reference import ntm_memory_reference


def _cpu() -> Any:
    from .cpu import ntm_memory_cpu

    return ntm_memory_cpu


def _gpu() -> Any:
    from .gpu import ntm_memory_gpu

    return ntm_memory_gpu


NTM_MEMORY = memory_operation(
    "ntm_memory",
    reference=ntm_memory_reference,
    eager=ntm_memory_eager,
    cpu=_cpu,
    gpu=_gpu,
)


def ntm_memory(
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: NTMState,
    options: NTMOptions,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> NTMOutputs:
    """Runs one Turing machine layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: effective weights of the layer.
        state: before the first step, as `NTMState` describes.
        options: settings that change the equations.
        mask: `(B, T)`, true for real steps; a masked step leaves the whole state unchanged and outputs zero.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`; `auto` takes `eager` for fewer than 16 slots.

    Returns:
        Outputs `(B, T, H + R·M)` = [h_t ; r_t], the final state, and all weightings `(B, T, R+W, N)` without gradient.

    Raises:
        ValueError: shapes do not fit each other, or the backend cannot run.
    """
    check_arguments(inputs, weights, state, options, mask)
    facts = *state.memory.shape[1:3], False
    chosen = NTM_MEMORY.pick(backend, inputs.device, inputs.dtype, *facts)
    if mask is not None:
        mask = mask.bool()
        inputs = inputs.masked_fill(~mask[..., None], 0.0)  # what is masked may be anything, NaN too
    with own_precision(inputs.device):
        outputs: NTMOutputs = NTM_MEMORY.load(chosen)(inputs, weights, state, options, mask)
    return outputs
