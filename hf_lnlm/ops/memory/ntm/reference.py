"""The Neural Turing Machine as its paper writes it: the oracle of every faster implementation.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401, section 3, whose equation numbers these are

Glossary: M memory · w weighting · k key · β `strength` · g `gate` · s `shift` · γ `sharpening` · e erase · a add · r read
vector.

Deliberate choices where [1] is silent: all heads address M_{t-1}; with several write heads all erases come before all
adds; cosine has ε² = 1e-12 inside its roots; sharpening is computed from logarithms with 1e-12 added, so that it always
sums to 1.

Complexity: a Python loop over time, samples' heads and shifts; for any float dtype, float64 in the tests.
"""

import torch
from torch.nn.functional import softplus

from ..layer import MemoryWeights, controller_step, walk
from .layout import NTMOptions, NTMOutputs, NTMState, head_size

FLOOR = 1e-12


def cosine(key: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """K[k, M(n)], eq. 6.

    Args:
        key: `(B, M)`.
        memory: `(B, N, M)`.

    Returns:
        `(B, N)`.
    """
    key = key / (key.square().sum(-1, keepdim=True) + FLOOR).sqrt()
    memory = memory / (memory.square().sum(-1, keepdim=True) + FLOOR).sqrt()
    return torch.einsum("bm,bnm->bn", key, memory)


def circular_shift(weighting: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """w~(i) = Σ_j w(i − j) s(j), j from −shift_range to shift_range, eq. 8.

    Args:
        weighting: `(B, N)`.
        shift: `(B, 2·shift_range+1)`, sums to 1; its middle entry is no shift.
    """
    middle = shift.shape[-1] // 2
    moved = [shift[:, j : j + 1] * torch.roll(weighting, j - middle, -1) for j in range(shift.shape[-1])]
    return torch.stack(moved).sum(0)


def sharpen(weighting: torch.Tensor, sharpening: torch.Tensor) -> torch.Tensor:
    """w^γ / Σ w^γ, eq. 9.

    Args:
        weighting: `(B, N)`.
        sharpening: γ ≥ 1, `(B, 1)`.
    """
    return (sharpening * (weighting + FLOOR).log()).softmax(-1)


def address(head: torch.Tensor, before: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """One head's weighting, eqs. 5 to 9.

    Args:
        head: its clipped part of the interface, `(B, head_size)`.
        before: w_{t-1}, `(B, N)`.
        memory: M_{t-1}, `(B, N, M)`.
    """
    width = memory.shape[-1]
    key, strength = head[:, :width].tanh(), softplus(head[:, width : width + 1])
    gate, sharpening = head[:, width + 1 : width + 2].sigmoid(), 1 + softplus(head[:, width + 2 : width + 3])
    content = (strength * cosine(key, memory)).softmax(-1)
    gated = gate * content + (1 - gate) * before
    return sharpen(circular_shift(gated, head[:, width + 3 :].softmax(-1)), sharpening)


def write(memory: torch.Tensor, weightings: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Eqs. 3 and 4 for all write heads.

    Args:
        memory: M_{t-1}, `(B, N, M)`.
        weightings: of the write heads, `(B, W, N)`.
        vectors: raw erase and add vectors, `(B, W, 2, M)`.
    """
    added = torch.zeros_like(memory)
    for i in range(weightings.shape[1]):
        w = weightings[:, i, :, None]
        memory = memory * (1 - w * vectors[:, i, None, 0].sigmoid())
        added = added + w * vectors[:, i, None, 1].tanh()
    return memory + added


def memory_step(interface: torch.Tensor, state: NTMState, options: NTMOptions) -> NTMState:
    """One step of the memory.

    Args:
        interface: raw, `(B, I)`.
        state: of the step before; `hidden` and `cells` are passed through.
        options: settings.
    """
    batch, _, width = state.memory.shape
    reads, size = options.num_read_heads, head_size(options, width)
    heads = reads + options.num_write_heads
    interface = interface.clamp(-options.interface_clip, options.interface_clip)
    parts = interface[:, : heads * size].reshape(batch, heads, size)
    weightings = torch.stack([address(parts[:, h], state.weightings[:, h], state.memory) for h in range(heads)], dim=1)
    vectors = interface[:, heads * size :].reshape(batch, options.num_write_heads, 2, width)
    after = write(state.memory, weightings[:, reads:], vectors)
    source = state.memory if options.read_before_write else after
    read = torch.einsum("brn,bnm->brm", weightings[:, :reads], source)
    return state._replace(reads=read.flatten(1), weightings=weightings, memory=after)


def ntm_memory_reference(
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: NTMState,
    options: NTMOptions,
    mask: torch.Tensor | None = None,
) -> NTMOutputs:
    """Runs one memory layer over a sequence, step by step.

    Args:
        inputs: `(B, T, D)`.
        weights: of the layer.
        state: before the first step.
        options: settings.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.

    Returns:
        Outputs `(B, T, H + R·M)`, final state, weightings `(B, T, R+W, N)`.
    """

    def step(projected: torch.Tensor, state: NTMState) -> tuple[torch.Tensor, NTMState]:
        hidden, cells = controller_step(projected, weights, state, options)
        interface = hidden @ weights.interface.T + weights.interface_bias
        return interface, memory_step(interface, state._replace(hidden=hidden, cells=cells), options)

    rows = (inputs[:, t] @ weights.inputs.T + weights.inputs_bias for t in range(inputs.shape[1]))
    outputs, state, (weightings, _) = walk(step, rows, state, mask, ("weightings",))
    return NTMOutputs(outputs, state, weightings)
