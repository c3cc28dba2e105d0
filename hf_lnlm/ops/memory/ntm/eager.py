"""The Neural Turing Machine in plain torch, batched over samples and heads: any device, any float dtype, double
differentiable.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401

What makes it faster than the listing in `reference`: inputs are projected for all steps at once, all heads address in one
batched product, and the shift is one gather and one product.

Complexity: O(T) small tensor operations, about 30 a step.
"""

import torch
from torch.nn.functional import linear, softplus

from ..layer import MemoryWeights, fused_controller_step, walk
from .layout import NTMOptions, NTMOutputs, NTMState, head_size
from .reference import FLOOR


def _split(interface: torch.Tensor, options: NTMOptions, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads `(B, R+W, head_size)` and raw erase/add vectors `(B, W, 2, M)`."""
    bound = options.interface_clip
    interface = interface.clamp(-bound, bound)
    heads, size = options.num_read_heads + options.num_write_heads, head_size(options, width)
    vectors = interface[:, heads * size :].unflatten(1, (options.num_write_heads, 2, width))
    return interface[:, : heads * size].unflatten(1, (heads, size)), vectors


def _address(heads: torch.Tensor, before: torch.Tensor, memory: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """Weightings `(B, R+W, N)`; `turned` `(S, N)` are the slots that shift j brings to each slot."""
    width = memory.shape[-1]
    key, strength, gate, sharpening, shift = heads.split([width, 1, 1, 1, turned.shape[0]], -1)
    key = key.tanh()
    key = key * (key.square().sum(-1, keepdim=True) + FLOOR).rsqrt()
    norms = (memory.square().sum(-1) + FLOOR).rsqrt()
    scores = torch.bmm(key, memory.mT) * norms[:, None]
    content = (softplus(strength) * scores).softmax(-1)
    gated = torch.lerp(before, content, gate.sigmoid())
    moved = gated[..., turned]
    shifted = torch.matmul(shift.softmax(-1)[..., None, :], moved).squeeze(-2)
    return ((1 + softplus(sharpening)) * (shifted + FLOOR).log()).softmax(-1)


def _write(memory: torch.Tensor, weightings: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """All erases, then all adds."""
    erase, add = vectors[:, :, 0].sigmoid(), vectors[:, :, 1].tanh()
    if weightings.shape[1] == 1:
        erased = memory - memory * torch.bmm(weightings.mT, erase)
    else:
        erased = memory * (1 - weightings[..., None] * erase[:, :, None]).prod(1)
    return torch.baddbmm(erased, weightings.mT, add)


def ntm_memory_eager(
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: NTMState,
    options: NTMOptions,
    mask: torch.Tensor | None = None,
) -> NTMOutputs:
    """Runs one memory layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: of the layer.
        state: before the first step.
        options: settings.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.

    Returns:
        Outputs `(B, T, H + R·M)`, final state, weightings `(B, T, R+W, N)`.
    """
    slots, half = state.memory.shape[1], options.shift_range
    places = torch.arange(slots, device=inputs.device)
    turned = torch.stack([(places - j) % slots for j in range(-half, half + 1)])
    recurrent, interface = weights.recurrent.mT, weights.interface.mT

    def step(projected: torch.Tensor, state: NTMState) -> tuple[torch.Tensor, NTMState]:
        hidden, cells = fused_controller_step(projected, recurrent, state, options)
        raw = torch.addmm(weights.interface_bias, hidden, interface)
        heads, vectors = _split(raw, options, state.memory.shape[-1])
        weightings = _address(heads, state.weightings, state.memory, turned)
        reading, writing = weightings.split([options.num_read_heads, options.num_write_heads], 1)
        memory = _write(state.memory, writing, vectors)
        source = state.memory if options.read_before_write else memory
        return raw, NTMState(hidden, cells, torch.bmm(reading, source).flatten(1), weightings, memory)

    projected = linear(inputs, weights.inputs, weights.inputs_bias).unbind(1)
    outputs, state, (weightings, _) = walk(step, projected, state, mask, ("weightings",))
    return NTMOutputs(outputs, state, weightings)
