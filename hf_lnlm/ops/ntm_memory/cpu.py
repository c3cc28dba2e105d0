"""The Neural Turing Machine on the processor: the whole sequence, controller included, in one compiled loop with a
hand-written backward.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401
    [2] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (storing every √T-th state)

Weight gradients and input projections are matrix products over all steps outside the loop. Memories are stored every √T
steps and recomputed from the stored writes. With `recompute=True` nothing else is stored either: blocks of about √(2T)
steps run forward again in the backward pass.

Deviation: the loop computes in float32 only; a second derivative is an error, never a wrong number.

Complexity: see `cpu_kernels`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .blocks import arrays, put_block, weight_gradients
from .cpu_kernels import Gradients, History, Sizes, backward_loop, forward_loop, make_scratch
from .layout import NTMOptions, NTMOutputs, NTMState, NTMWeights
from .product_kernels import FEW, product_weights
from .vector_kernels import GROUP, np

Tensors = tuple[torch.Tensor, ...]
_INFERENCE_BLOCK = 256  # steps whose history exists at one time when no gradient is wanted


class _Plan(NamedTuple):
    """How a sequence is run."""

    sizes: Sizes
    clip: float
    block: int  # steps between stored states; the sequence's length when the history is kept
    recompute: bool


def _plan(steps: int, state: NTMState, options: NTMOptions, keep: bool, recompute: bool) -> _Plan:
    """Chooses block lengths for `steps` steps."""
    block = steps
    if not keep:
        block = min(steps, _INFERENCE_BLOCK)
    elif recompute:
        block = min(steps, math.ceil(math.sqrt(2 * steps)))
    every = max(1, math.isqrt(block)) if keep else block
    sizes = Sizes(
        state.hidden.shape[1], options.num_read_heads, options.num_write_heads, state.memory.shape[2],
        2 * options.shift_range + 1, every, options.controller == "lstm", options.read_before_write,
        state.memory.shape[0] >= FEW,
    )  # fmt: skip
    return _Plan(sizes, options.interface_clip, block, recompute)


def _bound(clip: float) -> Any:
    """`clip` as a float32 number of numpy."""
    return np.float32(clip)


def _start_history(plan: _Plan, x: torch.Tensor, weights: Tensors, state: list[torch.Tensor]) -> History:
    """Allocates a block's history, with projected inputs and the state before it."""
    inputs, bias, _, interface, _ = weights
    hidden, cells, weightings, memory = state
    batch, steps = x.shape[:2]
    gates = x.new_empty(batch, steps, inputs.shape[0])
    torch.addmm(bias, x.reshape(batch * steps, -1), inputs.t(), out=gates.view(batch * steps, -1))
    every = plan.sizes.every
    history = History(
        gates,
        x.new_empty(batch, steps + 1 if plan.sizes.lstm else 1, plan.sizes.hidden),
        x.new_empty(batch, steps + 1, hidden.shape[1]),
        x.new_empty(batch, steps, interface.shape[0]),
        x.new_empty(batch, steps + 1, *weightings.shape[1:]),
        x.new_empty(batch, -(-steps // every), *memory.shape[1:]),
    )
    history.hidden[:, 0], history.weightings[:, 0] = hidden, weightings
    if plan.sizes.lstm:
        history.cells[:, 0] = cells
    return history


def _run_block(
    plan: _Plan, x: torch.Tensor, mask: torch.Tensor, weights: Tensors, products: list[torch.Tensor],
    state: list[torch.Tensor],
) -> tuple[History, list[torch.Tensor]]:  # fmt: skip
    """One block forward: its history and the state after it (copies; the given state is left alone)."""
    memory = state[3].clone()  # first, for it outlives the history: what that leaves free then lies in one piece
    history = _start_history(plan, x, weights, state)
    forward_loop(
        plan.sizes, arrays(history), memory.numpy(), mask.numpy(), products[0].numpy(), products[1].numpy(),
        weights[4].numpy(), _bound(plan.clip), make_scratch(plan.sizes, memory.shape[2]),
    )  # fmt: skip
    return history, [history.hidden[:, -1], history.cells[:, -1], history.weightings[:, -1], memory]


def _start_gradients(x: torch.Tensor, history: History, out: torch.Tensor, after: list[torch.Tensor]) -> Gradients:
    """Gradients of a block, given those of its outputs and of the state after it."""
    return Gradients(*[out.contiguous(), *after, torch.empty_like(history.gates), torch.empty_like(history.interface)])


def _block_gradients(
    plan: _Plan, x: torch.Tensor, mask: torch.Tensor, products: list[torch.Tensor], history: History,
    gradients: Gradients,
) -> list[torch.Tensor]:  # fmt: skip
    """One block backward: leaves the state's gradients in place, returns those of the weights."""
    recurrent, interface = products
    rows = min(GROUP, x.shape[0])
    memories = x.new_empty(rows, min(plan.sizes.every, x.shape[1]) + 1, *gradients.memory.shape[1:])
    backward_loop(
        plan.sizes, arrays(history), arrays(gradients), mask.numpy(), recurrent.numpy(), interface.numpy(),
        _bound(plan.clip), memories.numpy(), make_scratch(plan.sizes, memories.shape[3]),
    )  # fmt: skip
    return weight_gradients(x, history.hidden, gradients, plan.sizes.hidden, plan.sizes.lstm)


class _Run(NamedTuple):
    """A whole sequence forward."""

    outputs: torch.Tensor
    looks: torch.Tensor
    state: list[torch.Tensor]
    kept: list[torch.Tensor]


def _run(plan: _Plan, mask: torch.Tensor, x: torch.Tensor, weights: Tensors, state: list[torch.Tensor]) -> _Run:
    """Runs block after block; `kept` is what the backward pass needs."""
    products = product_weights(plan.sizes.tiled, weights[2].t(), weights[3].t())
    joined: Any = None
    looks: Any = None
    kept: list[torch.Tensor] = []
    for start in range(0, x.shape[1], plan.block):
        part = slice(start, start + plan.block)
        if plan.recompute:
            kept += state
        history, state = _run_block(plan, x[:, part], mask[:, part].contiguous(), weights, products, state)
        joined = put_block(joined, history.hidden[:, 1:], part, x.shape[1])
        looks = put_block(looks, history.weightings[:, 1:], part, x.shape[1])
    after = [state[0], state[1].clone(), state[2].clone(), state[3]]  # views would keep the history alive
    return _Run(joined, looks, after, kept if plan.recompute else list(history))


class _Loop(torch.autograd.Function):
    """The recurrence; state tensors are [h;r], c, weightings and memory (B, M, N)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, mask: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        run = _run(plan, mask, x, tensors[:5], list(tensors[5:]))
        ctx.plan = plan
        ctx.save_for_backward(mask, x, *tensors[:5], *run.kept)
        ctx.mark_non_differentiable(run.looks)
        return run.outputs, *run.state[1:], run.looks

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: torch.Tensor, d_cells: torch.Tensor, d_w: torch.Tensor, d_m: torch.Tensor, _: Any
    ) -> Any:
        mask, x, *saved = ctx.saved_tensors
        weights, kept = saved[:5], saved[5:]
        after = [
            d_out.new_zeros(d_out.shape[0], 1, d_out.shape[2]),
            *[d.clone(memory_format=torch.contiguous_format) for d in (d_cells, d_w, d_m)],
        ]
        products = product_weights(ctx.plan.sizes.tiled, weights[2], weights[3])
        again = product_weights(ctx.plan.sizes.tiled, weights[2].t(), weights[3].t()) if ctx.plan.recompute else []
        totals: list[torch.Tensor] = []
        d_x = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        for start in reversed(range(0, x.shape[1], ctx.plan.block)):
            part = slice(start, start + ctx.plan.block)
            x_part, mask_part = x[:, part], mask[:, part].contiguous()
            history = History(*kept) if not ctx.plan.recompute else None
            if history is None:
                index = 4 * (start // ctx.plan.block)
                history, _ = _run_block(ctx.plan, x_part, mask_part, weights, again, list(kept[index : index + 4]))
            gradients = _start_gradients(x_part, history, d_out[:, part], after)
            found = _block_gradients(ctx.plan, x_part, mask_part, products, history, gradients)
            totals = [total.add_(more) for total, more in zip(totals, found, strict=True)] if totals else found
            if d_x is not None:
                d_x[:, part] = gradients.gates @ weights[0]
        return None, None, d_x, *totals, after[0].squeeze(1), *after[1:]


def _float_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous float32 tensors, connected to the graph."""
    return [tensor.float().contiguous() for tensor in tensors]


def ntm_memory_cpu(
    inputs: torch.Tensor,
    weights: NTMWeights,
    state: NTMState,
    options: NTMOptions,
    mask: torch.Tensor | None = None,
    recompute: bool = False,
) -> NTMOutputs:
    """Runs one memory layer over a sequence.

    Args:
        inputs: `(B, T, D)`, float32.
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
    ones = torch.ones(inputs.shape[:2], dtype=torch.uint8, device="cpu") if mask is None else mask.to(torch.uint8)
    tensors = _float_rows(inputs, *weights, rows, cells, state.weightings, state.memory.mT)
    if keep:
        outputs, cells, weightings, memory, looks = _Loop.apply(plan, ones, *tensors)
    else:
        outputs, looks, (_, cells, weightings, memory), _ = _run(
            plan, ones, tensors[0], tuple(tensors[1:6]), tensors[6:]
        )
    last = outputs[:, -1].clone()  # a view would keep all outputs alive
    if not plan.sizes.lstm:
        cells = state.cells
    after = NTMState(last[:, :size], cells, last[:, size:], weightings, memory.mT)
    if mask is not None:
        outputs = outputs.masked_fill(~mask[..., None], 0.0)
    return NTMOutputs(outputs, after, looks)
