"""The Differentiable Neural Computer on a graphics processor: the whole sequence, controller included, in one Triton
kernel with a hand-written backward; the memory never leaves the chip, the links stay in place.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods
    [2] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (storing every √T-th state)

Input projections and weight gradients are matrix products over all steps outside the kernel. Memories and links are
stored every √T steps; backward runs the writes of one chunk at a time again. With `recompute=True` nothing else is stored
either: blocks of about √(2T) steps run forward again in the backward pass. Nothing waits for the device.

Deviation: the kernels compute in float32 only; a second derivative is an error, never a wrong number.

Complexity: see `gpu_kernels` and `gpu_backward`; one kernel launch a block of steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..ntm_memory.gpu import warps_for
from ..ntm_memory.gpu_kernels import Parameters
from ..triton_math import power_of_two
from .gpu_backward import Gradients, backward_kernel
from .gpu_kernels import History, Sizes, forward_kernel
from .layout import DNCAddressing, DNCOptions, DNCOutputs, DNCState, DNCWeights, Places, gate_history, num_modes, places

_INFERENCE_BLOCK = 256  # steps whose history exists at one time when no gradient is wanted
_PRODUCT_BLOCK = 64  # rows and columns of a weight tile
_LINK_ENTRIES = 4096  # of a tile of links
Tensors = tuple[torch.Tensor, ...]


class _Plan(NamedTuple):
    """How a sequence is run."""

    sizes: Sizes
    at: Places
    block: int  # steps between stored states; the sequence's length when the history is kept
    every: int  # steps between stored memories and links
    recompute: bool
    warps: int


class _Carried(NamedTuple):
    """The state between blocks."""

    hidden: torch.Tensor  # `(B, H + R·W)`
    cells: torch.Tensor  # `(B, H)`
    usage: torch.Tensor  # `(B, N)`
    precedence: torch.Tensor  # `(B, K, N)`
    write: torch.Tensor  # `(B, K, N)`
    read: torch.Tensor  # `(B, R, N)`
    memory: torch.Tensor  # `(B, N, W)`
    link: torch.Tensor  # `(B, K, N, N)`


def _sizes(state: DNCState, options: DNCOptions, at: Places) -> Sizes:
    """What the kernels are compiled for."""
    slots, width = state.memory.shape[1:]
    hidden, lstm, modes = state.hidden.shape[1], options.controller == "lstm", num_modes(options)
    padded = power_of_two(slots)
    return Sizes(
        hidden, options.num_read_heads, options.num_write_heads, slots, width, state.link.shape[1], modes,
        options.num_read_heads * width, at.end, 4 * hidden if lstm else hidden, lstm, options.masking,
        options.deallocation, float(options.interface_clip), float(options.mask_min), _PRODUCT_BLOCK, padded,
        power_of_two(width), power_of_two(modes, 2), min(padded, max(16, _LINK_ENTRIES // padded)),
    )  # fmt: skip


def _plan(steps: int, state: DNCState, options: DNCOptions, keep: bool, recompute: bool) -> _Plan:
    """Chooses block lengths for `steps` steps."""
    block = steps
    if not keep:
        block = min(steps, _INFERENCE_BLOCK)
    elif recompute:
        block = min(steps, math.ceil(math.sqrt(2 * steps)))
    every = max(1, math.isqrt(block)) if keep else block
    at = places(options, state.memory.shape[2])
    sizes = _sizes(state, options, at)
    warps = warps_for(sizes.block_slots * max(sizes.block_width, sizes.rows))
    return _Plan(sizes, at, block, every, recompute, warps)


def _start_history(plan: _Plan, x: torch.Tensor, weights: Tensors, state: _Carried) -> History:
    """Allocates a block's history, with projected inputs and the state before it."""
    batch, steps = x.shape[:2]
    gates = torch.addmm(weights[1], x.reshape(batch * steps, -1), weights[0].t())
    chunks, following = -(-steps // plan.every), (batch, steps, plan.sizes.linked, *state.read.shape[1:])
    tensors = [
        gates.view(batch, steps, -1),
        x.new_empty(batch, steps + 1 if plan.sizes.lstm else 1, plan.sizes.hidden),
        x.new_empty(batch, steps + 1, state.hidden.shape[1]),
        x.new_empty(batch, steps, plan.sizes.interface),
        *[x.new_empty(batch, steps + 1, *rows.shape[1:]) for rows in state[2:6]],
        x.new_empty(following),
        x.new_empty(following),
        x.new_empty(batch, chunks, *state.memory.shape[1:]),
        x.new_empty(batch, chunks, *state.link.shape[1:]),
        torch.empty_like(state.write),
    ]
    history = History(*tensors)
    if plan.sizes.lstm:
        history.cells[:, 0] = state.cells
    for name in ("hidden", "usage", "precedence", "write", "read"):
        getattr(history, name)[:, 0] = getattr(state, name)
    return history


def _run_block(
    plan: _Plan, x: torch.Tensor, mask: torch.Tensor, weights: Tensors, state: _Carried
) -> tuple[History, _Carried]:
    """One block forward: its history and the state after it (copies; the given state is left alone)."""
    history = _start_history(plan, x, weights, state)
    memory, link = state.memory.clone(), state.link.clone()
    forward_kernel[(x.shape[0],)](
        history, memory, link, mask, Parameters(*weights[2:]), x.shape[1], plan.every, history.stored_memory.shape[1],
        plan.sizes, plan.at, num_warps=plan.warps,
    )  # fmt: skip
    last = [getattr(history, name)[:, -1] for name in ("hidden", "cells", "usage", "precedence", "write", "read")]
    return history, _Carried(*[*last, memory, link])


def _block_gradients(
    plan: _Plan, x: torch.Tensor, mask: torch.Tensor, weights: Tensors, history: History, out: torch.Tensor,
    after: list[torch.Tensor], totals: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """One block backward: adds to the weights' `totals`, turns the state's gradients `after` the block into those
    before it, returns that of `x`."""
    batch, steps = x.shape[:2]
    every = min(plan.every, steps)
    chunk = [x.new_empty(batch, every, *tensor.shape[1:]) for tensor in after[6:]]
    fresh = [torch.empty_like(history.gates), torch.empty_like(history.interface)]
    scratch = [torch.empty_like(after[5]), torch.empty_like(after[2])]
    gradients = Gradients(*[out.contiguous(), *after, *fresh, *chunk, *scratch])
    backward_kernel[(batch,)](
        history, gradients, mask, Parameters(*weights[2:]), steps, every, history.stored_memory.shape[1], plan.sizes,
        plan.at, num_warps=plan.warps,
    )  # fmt: skip
    d_gates, d_interface = gradients.gates.flatten(0, 1), gradients.interface.flatten(0, 1)
    first = 0 if plan.sizes.lstm else plan.sizes.hidden
    totals[0].addmm_(d_gates.t(), x.reshape(d_gates.shape[0], -1))
    totals[1].add_(d_gates.sum(0))
    totals[2].addmm_(d_gates.t(), history.hidden[:, :-1, first:].flatten(0, 1))
    totals[3].addmm_(d_interface.t(), history.hidden[:, 1:, : plan.sizes.hidden].flatten(0, 1))
    totals[4].add_(d_interface.sum(0))
    return (d_gates @ weights[0]).view_as(x)


class _Loop(torch.autograd.Function):
    """The recurrence: outputs, the carried state but for its first part, and four histories to look at."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, mask: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        weights, state = tensors[:5], _Carried(*tensors[5:])
        kept: list[torch.Tensor] = []
        parts: list[list[torch.Tensor]] = [[], [], [], [], []]
        for start in range(0, x.shape[1], plan.block):
            part = slice(start, start + plan.block)
            if plan.recompute:
                kept += state
            history, state = _run_block(plan, x[:, part], mask[:, part].contiguous(), weights, state)
            seen = (history.hidden, history.read, history.write, history.usage)
            for list_, tensor in zip(parts, [*[rows[:, 1:] for rows in seen], history.interface], strict=True):
                list_.append(tensor)
        ctx.plan = plan
        ctx.save_for_backward(mask, x, *weights, *(kept if plan.recompute else history))
        outputs, *looks = [torch.cat(part, 1) for part in parts]
        ctx.mark_non_differentiable(*looks)
        return outputs, *[tensor.clone() for tensor in state[1:6]], state.memory, state.link, *looks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, *d_rest: torch.Tensor) -> Any:
        mask, x, *saved = ctx.saved_tensors
        plan, weights, kept = ctx.plan, tuple(saved[:5]), saved[5:]
        after = [d_out.new_zeros(d_out.shape[0], d_out.shape[2])]
        after += [d.clone(memory_format=torch.contiguous_format) for d in d_rest[:7]]
        totals, d_x = [torch.zeros_like(weight) for weight in weights], torch.empty_like(x)
        for start in reversed(range(0, x.shape[1], plan.block)):
            part = slice(start, start + plan.block)
            x_part, mask_part = x[:, part], mask[:, part].contiguous()
            if plan.recompute:
                index = len(_Carried._fields) * (start // plan.block)
                state = _Carried(*kept[index : index + len(_Carried._fields)])
                history, _ = _run_block(plan, x_part, mask_part, weights, state)
            else:
                history = History(*kept)
            d_x[:, part] = _block_gradients(plan, x_part, mask_part, weights, history, d_out[:, part], after, totals)
        return None, None, d_x, *totals, *after


def _carry(state: DNCState, lstm: bool) -> list[torch.Tensor]:
    """The state as the kernels read it, contiguous float32, connected to the graph."""
    rows = torch.cat([state.hidden, state.reads], -1)
    cells = state.cells if lstm else state.hidden
    heads = (state.usage, state.precedence, state.write_weightings, state.read_weightings)
    return [tensor.float().contiguous() for tensor in (rows, cells, *heads, state.memory, state.link)]


def dnc_memory_gpu(
    inputs: torch.Tensor,
    weights: DNCWeights,
    state: DNCState,
    options: DNCOptions,
    mask: torch.Tensor | None = None,
    recompute: bool = False,
) -> DNCOutputs:
    """Runs one memory layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: of the layer.
        state: before the first step.
        options: settings, without `sharpness`.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.
        recompute: store only every √(2T)-th state for the backward pass and run the steps between again.

    Returns:
        Outputs `(B, T, H + R·W)`, final state, addressing.
    """
    size, steps = state.hidden.shape[1], inputs.shape[1]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (inputs, *weights, *state))
    plan = _plan(steps, state, options, keep, keep and recompute)
    real = inputs.new_ones(inputs.shape[:2], dtype=torch.uint8) if mask is None else mask.to(torch.uint8)
    rows = [tensor.float().contiguous() for tensor in (inputs, *weights)]
    results = _Loop.apply(plan, real, *rows, *_carry(state, plan.sizes.lstm))
    outputs, cells, usage, precedence, write, read, memory, link, *looks = results
    last = outputs[:, -1].clone()  # a view would keep all outputs alive
    cells = cells if plan.sizes.lstm else state.cells
    after = DNCState(last[:, :size], cells, last[:, size:], memory, usage, precedence, link, write, read)
    if mask is not None:
        outputs = outputs.masked_fill(~mask[..., None], 0.0)
    addressing = DNCAddressing(*looks[:3], *gate_history(looks[3], options, state.memory.shape[2], mask))
    return DNCOutputs(outputs, after, addressing)
