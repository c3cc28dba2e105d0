"""The Differentiable Neural Computer in plain torch, batched over samples and heads: any device, any float dtype, double
differentiable.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods
    [2] Csordás, Schmidhuber 2019, arXiv 1904.10278 (masking, de-allocation, sharpness)

Only the allocation of several write heads is sequential, since each sees what the one before takes.

Complexity: O(T) small tensor operations, about 50 a step; the links cost O(N²) a step.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import linear, softplus

from ..layer import MemoryWeights, fused_controller_step, walk
from .layout import SEEN, DNCOptions, DNCOutputs, DNCState, Places, gate_history, named_outputs, num_modes, places
from .reference import FLOOR, TIE, USAGE_FLOOR


class _Fixed(NamedTuple):
    """What does not change over time."""

    options: DNCOptions
    at: Places
    width: int
    off_diagonal: torch.Tensor  # `(N, N)`: 1, and 0 on the diagonal
    ranks: torch.Tensor  # `(N,)`: n·`TIE`


def _content(
    keys: torch.Tensor, strengths: torch.Tensor, memory: torch.Tensor, masks: torch.Tensor | None
) -> torch.Tensor:
    """Content weightings `(B, heads, N)`."""
    if masks is None:
        norms = (memory.square().sum(-1) + FLOOR).rsqrt()[:, None]
        keys = keys * (keys.square().sum(-1, keepdim=True) + FLOOR).rsqrt()
        scores = torch.bmm(keys, memory.mT) * norms
    else:
        norms = (torch.bmm(masks.square(), memory.square().mT) + FLOOR).rsqrt()
        masked = keys * masks
        unit = masked * (masked.square().sum(-1, keepdim=True) + FLOOR).rsqrt()
        scores = torch.bmm(unit * masks, memory.mT) * norms
    return (strengths[..., None] * scores).softmax(-1)


def _allocation(usage: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Allocation weighting `(B, N)`; the order is not differentiated."""
    order = (usage.detach() + ranks).sort(dim=-1, stable=True).indices
    floored = USAGE_FLOOR + (1 - USAGE_FLOOR) * usage.gather(1, order)
    before = torch.nn.functional.pad(floored[:, :-1], (1, 0), value=1.0).cumprod(1)
    return torch.zeros_like(usage).scatter(1, order, (1 - floored) * before)


def _write_weightings(
    by_content: torch.Tensor, usage: torch.Tensor, gates: tuple[torch.Tensor, torch.Tensor], ranks: torch.Tensor
) -> torch.Tensor:
    """w^w `(B, K, N)`."""
    heads = []
    for i, content in enumerate(by_content.unbind(1)):
        free = _allocation(usage, ranks)
        gate, write = (gate[:, i : i + 1] for gate in gates)
        heads.append(write * torch.lerp(content, free, gate))
        if i + 1 < by_content.shape[1]:
            usage = usage + (1 - usage) * (gate * write) * free
    return torch.stack(heads, 1)


def _sharpened(weightings: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """d^s, scaled to sum 1; `weightings` `(B, R, 2K, N)`, `powers` `(B, R, 2K)`."""
    return (powers[..., None] * (weightings + USAGE_FLOOR).log()).softmax(-1)


def _along_links(raw: torch.Tensor, before: torch.Tensor, link: torch.Tensor, fixed: _Fixed) -> torch.Tensor:
    """Backward, then forward weightings, `(B, R, 2K, N)`."""
    flat = before[:, None].expand(-1, link.shape[1], -1, -1)
    both = torch.cat([(flat @ link), (flat @ link.mT)], 1).transpose(1, 2)
    if fixed.options.sharpness:
        powers = 1 + softplus(raw[:, fixed.at.sharpness :])
        both = _sharpened(both, powers.unflatten(1, (before.shape[1], both.shape[2])))
    return both


def _masks(raw: torch.Tensor, fixed: _Fixed) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Masks of the read heads `(B, R, W)` and of the write heads `(B, K, W)`."""
    if not fixed.options.masking:
        return None, None
    low = fixed.options.mask_min
    masks = low + (1 - low) * raw[:, fixed.at.read_masks : fixed.at.sharpness].sigmoid()
    heads = [fixed.options.num_read_heads, fixed.options.num_write_heads]
    reading, writing = masks.unflatten(1, (sum(heads), fixed.width)).split(heads, 1)
    return reading, writing


def _erased(memory: torch.Tensor, weightings: torch.Tensor, erases: torch.Tensor) -> torch.Tensor:
    """Memory after the erases of all write heads."""
    if weightings.shape[1] == 1:
        return memory - memory * torch.bmm(weightings.mT, erases)
    return memory * (1 - weightings[..., None] * erases[:, :, None]).prod(1)


def _next_links(state: DNCState, weightings: torch.Tensor, fixed: _Fixed) -> tuple[torch.Tensor, torch.Tensor]:
    """L_t and p_t."""
    keep = 1 - weightings[..., :, None] - weightings[..., None, :]
    added = weightings[..., :, None] * state.precedence[..., None, :]
    link = torch.addcmul(added, keep, state.link) * fixed.off_diagonal
    return link, (1 - weightings.sum(-1, keepdim=True)) * state.precedence + weightings


def _write(
    raw: torch.Tensor, state: DNCState, masks: torch.Tensor | None, fixed: _Fixed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u_t, w^w_t and M_t."""
    at, (writes, width) = fixed.at, (fixed.options.num_write_heads, fixed.width)
    free, allocation_gates, write_gates, _ = gate_history(raw, fixed.options, at)
    retention = (1 - free[..., None] * state.read_weightings).prod(1)
    written = 1 - (1 - state.write_weightings).prod(1)
    usage = torch.lerp(state.usage, torch.ones_like(written), written) * retention
    keys = raw[:, at.write_keys : at.write_strengths].unflatten(1, (writes, width))
    strengths = 1 + softplus(raw[:, at.write_strengths : at.erases])
    by_content = _content(keys, strengths, state.memory, masks)
    weightings = _write_weightings(by_content, usage, (allocation_gates, write_gates), fixed.ranks)
    erases, adds = raw[:, at.erases : at.free_gates].unflatten(1, (2, writes, width)).unbind(1)
    memory = _erased(state.memory, weightings, erases.sigmoid())
    if fixed.options.deallocation:
        memory = memory * retention[..., None]
    return usage, weightings, torch.baddbmm(memory, weightings.mT, adds)


def _read(
    raw: torch.Tensor, before: torch.Tensor, memory: torch.Tensor, link: torch.Tensor, masks: torch.Tensor | None,
    fixed: _Fixed,
) -> torch.Tensor:  # fmt: skip
    """w^r_t."""
    at, reads = fixed.at, fixed.options.num_read_heads
    keys = raw[:, : at.read_strengths].unflatten(1, (reads, fixed.width))
    strengths = 1 + softplus(raw[:, at.read_strengths : at.write_keys])
    by_content = _content(keys, strengths, memory, masks)
    if not fixed.options.temporal_links:
        return by_content
    modes = raw[:, at.modes : at.read_masks].unflatten(1, (reads, num_modes(fixed.options))).softmax(-1)
    backward, forward = _along_links(raw, before, link, fixed).chunk(2, 2)
    choices = torch.cat([backward, by_content[:, :, None], forward], 2)
    return torch.matmul(modes[:, :, None], choices).squeeze(2)


def _memory_step(raw: torch.Tensor, state: DNCState, fixed: _Fixed) -> DNCState:
    """One step of the memory; `hidden` and `cells` are passed through."""
    raw = raw.clamp(-fixed.options.interface_clip, fixed.options.interface_clip)
    read_masks, write_masks = _masks(raw, fixed)
    usage, weightings, memory = _write(raw, state, write_masks, fixed)
    link, precedence = state.link, state.precedence
    if fixed.options.temporal_links:
        link, precedence = _next_links(state, weightings, fixed)
    reading = _read(raw, state.read_weightings, memory, link, read_masks, fixed)
    read = torch.bmm(reading, memory).flatten(1)
    return DNCState(state.hidden, state.cells, read, memory, usage, precedence, link, weightings, reading)


def dnc_memory_eager(
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: DNCState,
    options: DNCOptions,
    mask: torch.Tensor | None = None,
) -> DNCOutputs:
    """Runs one memory layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: of the layer.
        state: before the first step.
        options: settings.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.

    Returns:
        Outputs `(B, T, H + R·W)`, final state, addressing.
    """
    slots, width = state.memory.shape[1:]
    off_diagonal = 1 - torch.eye(slots, dtype=inputs.dtype, device=inputs.device)
    ranks = TIE * torch.arange(slots, dtype=inputs.dtype, device=inputs.device)
    fixed = _Fixed(options, places(options, width), width, off_diagonal, ranks)
    recurrent, interface = weights.recurrent.mT, weights.interface.mT

    def step(projected: torch.Tensor, state: DNCState) -> tuple[torch.Tensor, DNCState]:
        hidden, cells = fused_controller_step(projected, recurrent, state, options)
        raw = torch.addmm(weights.interface_bias, hidden, interface)
        return raw, _memory_step(raw, state._replace(hidden=hidden, cells=cells), fixed)

    projected = linear(inputs, weights.inputs, weights.inputs_bias).unbind(1)
    return named_outputs(*walk(step, projected, state, mask, SEEN), options, mask)
