"""The Differentiable Neural Computer's layer as one operation: controller, allocation, links, reading and writing
over a whole sequence.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods

Backends: `reference` (the equations), `eager` (any device), `cpu` (numba), `gpu` (Triton); the latter two
without the sharpness option. Complexity: see each.
"""

import torch

from ..backend import pick_backend
from .eager import dnc_memory_eager
from .layout import DNCOptions, DNCOutputs, DNCState, DNCWeights, check_arguments
from .reference import dnc_memory_reference

LARGEST_ON_CHIP = 2**15  # numbers of a memory that one program of the graphics processor keeps in registers
SMALL_MEMORY = 16  # slots below which `auto` does not think the compiler's seconds worth while


def available_backends(options: DNCOptions, memory: torch.Tensor) -> tuple[str, ...]:
    """Backends that implement these options and can hold a memory `(B, N, W)`.

    Args:
        options: settings; `sharpness` has no compiled form.
        memory: of the state; the largest do not fit on a graphics chip.
    """
    if options.sharpness:
        return ("reference", "eager")
    fits = memory.shape[1] * memory.shape[2] <= LARGEST_ON_CHIP
    return ("reference", "eager", "cpu", "gpu") if fits else ("reference", "eager", "cpu")


def dnc_memory(
    inputs: torch.Tensor,
    weights: DNCWeights,
    state: DNCState,
    options: DNCOptions,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> DNCOutputs:
    """Runs one neural computer layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: effective weights of the layer.
        state: before the first step, as `DNCState` describes.
        options: settings that change the equations.
        mask: `(B, T)`, true for real steps; a masked step leaves the whole state unchanged and outputs zero.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`; `auto` takes `eager` for fewer than 16 slots.
        recompute: keep only every √(2T)-th state for the backward pass (`cpu`, `gpu`; the others ignore
            it).

    Returns:
        Outputs `(B, T, H + R·W)` = [h_t ; r_t], the final state, and the addressing of all steps without gradient.

    Raises:
        ValueError: shapes do not fit each other, or the backend cannot run.
    """
    check_arguments(inputs, weights, state, options, mask)
    small = backend == "auto" and state.memory.shape[1] < SMALL_MEMORY
    chosen = "eager" if small else backend
    if chosen not in ("reference", "eager"):  # these run anywhere; a traced call must not ask what is installed
        chosen = pick_backend(backend, inputs.device, available_backends(options, state.memory), inputs.dtype)
    if mask is not None:
        mask = mask.bool()
        inputs = inputs.masked_fill(~mask[..., None], 0.0)  # what is masked may be anything, NaN too
    if chosen == "cpu":
        from .cpu import dnc_memory_cpu

        return dnc_memory_cpu(inputs, weights, state, options, mask, recompute)
    if chosen == "gpu":
        from .gpu import dnc_memory_gpu

        return dnc_memory_gpu(inputs, weights, state, options, mask, recompute)
    run = dnc_memory_eager if chosen == "eager" else dnc_memory_reference
    return run(inputs, weights, state, options, mask)
