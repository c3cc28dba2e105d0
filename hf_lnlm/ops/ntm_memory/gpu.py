"""The Neural Turing Machine on a graphics processor: the whole sequence, controller included, in one Triton kernel with
a hand-written backward; the memory never leaves the chip.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401
    [2] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (storing every √T-th state)

Input projections and weight gradients are matrix products over all steps outside the kernel. Memories are stored every
√T steps and recomputed from the stored writes. With `recompute=True` nothing else is stored either: blocks of about
√(2T) steps run forward again in the backward pass. Nothing waits for the device.

Deviation: the kernels compute in float32 only; a second derivative is an error, never a wrong number.

Complexity: see `gpu_kernels`; one kernel launch a block of steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..triton_math import power_of_two
from .gpu_kernels import Gradients, History, Parameters, Sizes, backward_kernel, forward_kernel
from .layout import NTMOptions, NTMOutputs, NTMState, NTMWeights, num_interface

_INFERENCE_BLOCK = 256  # steps whose history exists at one time when no gradient is wanted
_PRODUCT_BLOCK = 64  # rows and columns of a weight tile
Tensors = tuple[torch.Tensor, ...]


class _Plan(NamedTuple):
    """How a sequence is run."""

    sizes: Sizes
    block: int  # steps between stored states; the sequence's length when the history is kept
    every: int  # steps between stored memories
    recompute: bool
    warps: int


def _plan(steps: int, state: NTMState, options: NTMOptions, keep: bool, recompute: bool) -> _Plan:
    """Chooses block lengths for `steps` steps."""
    block = steps
    if not keep:
        block = min(steps, _INFERENCE_BLOCK)
    elif recompute:
        block = min(steps, math.ceil(math.sqrt(2 * steps)))
    every = max(1, math.isqrt(block)) if keep else block
    slots, width = state.memory.shape[1:]
    hidden, lstm, shifts = state.hidden.shape[1], options.controller == "lstm", 2 * options.shift_range + 1
    padded = power_of_two(slots), power_of_two(width)
    sizes = Sizes(
        hidden, options.num_read_heads, options.num_write_heads, slots, width, shifts, options.num_read_heads * width,
        num_interface(options, width), 4 * hidden if lstm else hidden, lstm, options.read_before_write,
        float(options.interface_clip), _PRODUCT_BLOCK, *padded, power_of_two(shifts, 2),
    )  # fmt: skip
    return _Plan(sizes, block, every, recompute, warps_for(padded[0] * padded[1]))


def warps_for(entries: int) -> int:
    """Warps of a program that keeps tiles of so many entries in registers: about 32 entries a thread.

    Args:
        entries: of the largest tile, a power of two.
    """
    return min(16, max(4, entries // 1024))


def _start_history(plan: _Plan, x: torch.Tensor, weights: Tensors, state: list[torch.Tensor]) -> History:
    """Allocates a block's history, with projected inputs and the state before it."""
    hidden, cells, weightings, memory = state
    batch, steps = x.shape[:2]
    gates = torch.addmm(weights[1], x.reshape(batch * steps, -1), weights[0].t())
    history = History(
        gates.view(batch, steps, -1),
        x.new_empty(batch, steps + 1 if plan.sizes.lstm else 1, plan.sizes.hidden),
        x.new_empty(batch, steps + 1, hidden.shape[1]),
        x.new_empty(batch, steps, plan.sizes.interface),
        x.new_empty(batch, steps + 1, *weightings.shape[1:]),
        x.new_empty(batch, -(-steps // plan.every), *memory.shape[1:]),
    )
    history.hidden[:, 0], history.weightings[:, 0] = hidden, weightings
    if plan.sizes.lstm:
        history.cells[:, 0] = cells
    return history


def _run_block(
    plan: _Plan, x: torch.Tensor, mask: torch.Tensor, weights: Tensors, state: list[torch.Tensor]
) -> tuple[History, list[torch.Tensor]]:
    """One block forward: its history and the state after it (copies; the given state is left alone)."""
    history = _start_history(plan, x, weights, state)
    memory = state[3].clone()
    batch, steps = x.shape[:2]
    forward_kernel[(batch,)](
        history, memory, mask, Parameters(*weights[2:]), steps, plan.every, history.stored.shape[1], plan.sizes,
        num_warps=plan.warps,
    )  # fmt: skip
    return history, [history.hidden[:, -1], history.cells[:, -1], history.weightings[:, -1], memory]


def _block_gradients(
    plan: _Plan, x: torch.Tensor, mask: torch.Tensor, weights: Tensors, history: History, out: torch.Tensor,
    after: list[torch.Tensor], totals: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """One block backward: adds to the weights' `totals`, turns the state's gradients `after` the block into those
    before it, returns that of `x`."""
    batch, steps = x.shape[:2]
    memories = x.new_empty(batch, min(plan.every, steps), *after[3].shape[1:])
    fresh = [torch.empty_like(history.gates), torch.empty_like(history.interface), memories]
    gradients = Gradients(*[out.contiguous(), *after, *fresh])
    backward_kernel[(batch,)](
        history, gradients, mask, Parameters(*weights[2:]), steps, min(plan.every, steps), history.stored.shape[1],
        plan.sizes, num_warps=plan.warps,
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
    """The recurrence; state tensors are [h;r], c, weightings and memory."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, mask: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        weights, state = tensors[:5], list(tensors[5:])
        outputs, weightings, kept = [], [], []
        for start in range(0, x.shape[1], plan.block):
            part = slice(start, start + plan.block)
            if plan.recompute:
                kept += state
            history, state = _run_block(plan, x[:, part], mask[:, part].contiguous(), weights, state)
            outputs.append(history.hidden[:, 1:])
            weightings.append(history.weightings[:, 1:])
        if not plan.recompute:
            kept = list(history)
        ctx.plan = plan
        ctx.save_for_backward(mask, x, *weights, *kept)
        looks = torch.cat(weightings, 1)
        ctx.mark_non_differentiable(looks)
        return torch.cat(outputs, 1), state[1].clone(), state[2].clone(), state[3], looks

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: torch.Tensor, d_cells: torch.Tensor, d_w: torch.Tensor, d_m: torch.Tensor, _: Any
    ) -> Any:
        mask, x, *saved = ctx.saved_tensors
        weights, kept = tuple(saved[:5]), saved[5:]
        after = [d.clone(memory_format=torch.contiguous_format) for d in (d_cells, d_w, d_m)]
        after = [d_out.new_zeros(d_out.shape[0], d_out.shape[2]), *after]
        totals = [torch.zeros_like(weight) for weight in weights]
        d_x = torch.empty_like(x)
        for start in reversed(range(0, x.shape[1], ctx.plan.block)):
            part = slice(start, start + ctx.plan.block)
            x_part, mask_part = x[:, part], mask[:, part].contiguous()
            if ctx.plan.recompute:
                index = 4 * (start // ctx.plan.block)
                history, _ = _run_block(ctx.plan, x_part, mask_part, weights, list(kept[index : index + 4]))
            else:
                history = History(*kept)
            d_x[:, part] = _block_gradients(
                ctx.plan, x_part, mask_part, weights, history, d_out[:, part], after, totals
            )
        return None, None, d_x, *totals, *after


def ntm_memory_gpu(
    inputs: torch.Tensor,
    weights: NTMWeights,
    state: NTMState,
    options: NTMOptions,
    mask: torch.Tensor | None = None,
    recompute: bool = False,
) -> NTMOutputs:
    """Runs one memory layer over a sequence.

    Args:
        inputs: `(B, T, D)`.
        weights: of the layer.
        state: before the first step.
        options: settings.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.
        recompute: store only every √(2T)-th state for the backward pass and run the steps between again.

    Returns:
        Outputs `(B, T, H + R·M)`, final state, weightings `(B, T, R+W, N)`.
    """
    size, steps = state.hidden.shape[1], inputs.shape[1]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (inputs, *weights, *state))
    plan = _plan(steps, state, options, keep, keep and recompute)
    cells = state.cells if plan.sizes.lstm else state.hidden
    rows = torch.cat([state.hidden, state.reads], -1)
    real = inputs.new_ones(inputs.shape[:2], dtype=torch.uint8) if mask is None else mask.to(torch.uint8)
    tensors = [t.float().contiguous() for t in (inputs, *weights, rows, cells, state.weightings, state.memory)]
    outputs, cells, weightings, memory, looks = _Loop.apply(plan, real, *tensors)
    last = outputs[:, -1].clone()  # a view would keep all outputs alive
    cells = cells if plan.sizes.lstm else state.cells
    after = NTMState(last[:, :size], cells, last[:, size:], weightings, memory)
    if mask is not None:
        outputs = outputs.masked_fill(~mask[..., None], 0.0)
    return NTMOutputs(outputs, after, looks)
