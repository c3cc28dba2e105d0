"""The Neural Turing Machine's layer as one operation: controller, addressing, reading and writing over a whole
sequence.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401

Backends: `reference` (the equations), `eager` (any device), `cpu` (numba), `gpu` (Triton). Complexity:
see each.
"""

import torch

from ..backend import pick_backend
from .eager import ntm_memory_eager
from .layout import NTMOptions, NTMOutputs, NTMState, NTMWeights, check_arguments
from .reference import ntm_memory_reference

BACKENDS = ("reference", "eager", "cpu", "gpu")
LARGEST_ON_CHIP = 2**15  # numbers of a memory that one program of the graphics processor keeps in registers
SMALL_MEMORY = 16  # slots below which `auto` does not think the compiler's seconds worth while


def available_backends(memory: torch.Tensor) -> tuple[str, ...]:
    """Backends that can hold a memory `(B, N, M)`: all, but that the largest do not fit on a graphics chip.

    Args:
        memory: of the state.
    """
    return BACKENDS if memory.shape[1] * memory.shape[2] <= LARGEST_ON_CHIP else BACKENDS[:-1]


def ntm_memory(
    inputs: torch.Tensor,
    weights: NTMWeights,
    state: NTMState,
    options: NTMOptions,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> NTMOutputs:
    """Runs one Turing machine layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: effective weights of the layer.
        state: before the first step, as `NTMState` describes.
        options: settings that change the equations.
        mask: `(B, T)`, true for real steps; a masked step leaves the whole state unchanged and outputs zero.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`; `auto` takes `eager` for fewer than 16 slots.
        recompute: keep only every √(2T)-th state for the backward pass (`cpu`, `gpu`; the others ignore
            it).

    Returns:
        Outputs `(B, T, H + R·M)` = [h_t ; r_t], the final state, and all weightings `(B, T, R+W, N)` without gradient.

    Raises:
        ValueError: shapes do not fit each other, or the backend cannot run.
    """
    check_arguments(inputs, weights, state, options, mask)
    small = backend == "auto" and state.memory.shape[1] < SMALL_MEMORY
    chosen = "eager" if small else backend
    if chosen not in ("reference", "eager"):  # these run anywhere; a traced call must not ask what is installed
        chosen = pick_backend(backend, inputs.device, available_backends(state.memory), inputs.dtype)
    if mask is not None:
        mask = mask.bool()
        inputs = inputs.masked_fill(~mask[..., None], 0.0)  # what is masked may be anything, NaN too
    if chosen == "cpu":
        from .cpu import ntm_memory_cpu

        return ntm_memory_cpu(inputs, weights, state, options, mask, recompute)
    if chosen == "gpu":
        from .gpu import ntm_memory_gpu

        return ntm_memory_gpu(inputs, weights, state, options, mask, recompute)
    run = ntm_memory_eager if chosen == "eager" else ntm_memory_reference
    return run(inputs, weights, state, options, mask)
