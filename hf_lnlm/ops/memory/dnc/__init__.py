"""The Differentiable Neural Computer's layer as one operation: controller, allocation, links, reading and writing over a
whole sequence.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods

Backends: `reference` (the equations), `eager` (any device), `cpu` (numba), `gpu` (Triton); the latter two without the
sharpness option. Complexity: see each.
"""

from typing import Any

import torch

from ...backend import own_precision
from ..layer import MemoryWeights, memory_operation
from .eager import dnc_memory_eager
from .layout import DNCOptions, DNCOutputs, DNCState, check_arguments
from .reference import dnc_memory_reference


def _cpu() -> Any:
    from .cpu import dnc_memory_cpu

    return dnc_memory_cpu


def _gpu() -> Any:
    from .gpu import dnc_memory_gpu

    return dnc_memory_gpu


DNC_MEMORY = memory_operation(
    "dnc_memory",
    "; with use_sharpness eager and reference only",
    reference=dnc_memory_reference,
    eager=dnc_memory_eager,
    cpu=_cpu,
    gpu=_gpu,
)


def dnc_memory(
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: DNCState,
    options: DNCOptions,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> DNCOutputs:
    """Runs one neural computer layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: effective weights of the layer.
        state: before the first step, as `DNCState` describes.
        options: settings that change the equations.
        mask: `(B, T)`, true for real steps; a masked step leaves the whole state unchanged and outputs zero.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`; `auto` takes `eager` for fewer than 16 slots.

    Returns:
        Outputs `(B, T, H + R·W)` = [h_t ; r_t], the final state, and the addressing of all steps without gradient.

    Raises:
        ValueError: shapes do not fit each other, or the backend cannot run.
    """
    check_arguments(inputs, weights, state, options, mask)
    facts = *state.memory.shape[1:3], bool(options.sharpness)
    chosen = DNC_MEMORY.pick(backend, inputs.device, inputs.dtype, *facts)
    if mask is not None:
        mask = mask.bool()
        inputs = inputs.masked_fill(~mask[..., None], 0.0)  # what is masked may be anything, NaN too
    with own_precision(inputs.device):
        outputs: DNCOutputs = DNC_MEMORY.load(chosen)(inputs, weights, state, options, mask)
    return outputs
