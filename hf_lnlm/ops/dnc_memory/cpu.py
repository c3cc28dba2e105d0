"""The Differentiable Neural Computer on the processor: the whole sequence, controller included, in one compiled loop
with a hand-written
backward.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods
    [2] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (storing every √T-th state)

Links and memories stay in place and are stored every √T steps; backward runs the writes of one chunk at a time
again. With
`recompute=True` nothing else is stored either: blocks of about √(2T) steps run forward again in the backward pass.

Deviation: the loop computes in float32 only; a second derivative is an error, never a wrong number.

Complexity: see `cpu_kernels` and `backward_kernels`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..ntm_memory.blocks import arrays, put_block, weight_gradients
from ..ntm_memory.product_kernels import FEW, product_weights
from ..ntm_memory.vector_kernels import np
from .backward_kernels import Chunk, Gradients, backward_loop, make_rows
from .cpu_kernels import GROUP, History, Sizes, forward_loop, make_scratch
from .layout import DNCAddressing, DNCOptions, DNCOutputs, DNCState, DNCWeights, Places, gate_history, places

_INFERENCE_BLOCK = 256  # steps whose history exists at one time when no gradient is wanted
Tensors = tuple[torch.Tensor, ...]


class _Plan(NamedTuple):
    """How a sequence is run."""

    sizes: Sizes
    at: Places
    limits: tuple[float, float]  # interface clip and smallest mask
    block: int  # steps between stored states; the sequence's length when the history is kept
    recompute: bool


class _Carried(NamedTuple):
    """The state between blocks, in the loop's layout."""

    hidden: torch.Tensor  # `(B, H + R·W)`
    cells: torch.Tensor  # `(B, H)`
    usage: torch.Tensor  # `(B, N)`
    precedence: torch.Tensor  # `(B, K, N)`
    write: torch.Tensor  # `(B, K, N)`
    read: torch.Tensor  # `(B, R, N)`
    memory: torch.Tensor  # `(B, W, N)`
    link: torch.Tensor  # `(B, K, N, N)`


def _plan(steps: int, state: DNCState, options: DNCOptions, keep: bool, recompute: bool) -> _Plan:
    """Chooses block lengths for `steps` steps."""
    block = steps
    if not keep:
        block = min(steps, _INFERENCE_BLOCK)
    elif recompute:
        block = min(steps, math.ceil(math.sqrt(2 * steps)))
    every = max(1, math.isqrt(block)) if keep else block
    sizes = Sizes(
        state.hidden.shape[1], options.num_read_heads, options.num_write_heads, state.memory.shape[2], every,
        options.controller == "lstm", options.temporal_links, options.masking, options.deallocation,
        min(GROUP, state.memory.shape[0]) >= FEW,
    )  # fmt: skip
    at = places(options, state.memory.shape[2])
    return _Plan(sizes, at, (options.interface_clip, options.mask_min), block, recompute)


def _limits(plan: _Plan) -> Any:
    """The limits as float32 numbers of numpy."""
    return tuple(np.float32(limit) for limit in plan.limits)


def _start_history(plan: _Plan, x: torch.Tensor, weights: Tensors, state: _Carried) -> History:
    """Allocates a block's history, with projected inputs and the state before it."""
    inputs, bias, _, interface, _ = weights
    batch, steps = x.shape[:2]
    writes, slots = state.write.shape[1:]
    linked, reads = state.link.shape[1], state.read.shape[1]
    chunks = -(-steps // plan.sizes.every)
    gates = x.new_empty(batch, steps, inputs.shape[0])
    torch.addmm(bias, x.reshape(batch * steps, -1), inputs.t(), out=gates.view(batch * steps, -1))
    following = [x.new_empty(batch, steps, linked, reads, slots) for _ in range(2)]
    tensors = [
        gates,
        x.new_empty(batch, steps + 1 if plan.sizes.lstm else 1, plan.sizes.hidden),
        x.new_empty(batch, steps + 1, state.hidden.shape[1]),
        x.new_empty(batch, steps, interface.shape[0]),
        *[x.new_empty(batch, steps + 1, *rows.shape[1:]) for rows in state[2:6]],
        torch.empty(batch, steps, writes, slots, dtype=torch.int32, device="cpu"),
        *following,
        x.new_empty(batch, chunks, *state.memory.shape[1:]),
        x.new_empty(batch, chunks, *state.link.shape[1:]),
    ]
    history = History(*tensors)
    if plan.sizes.lstm:
        history.cells[:, 0] = state.cells
    for name in ("hidden", "usage", "precedence", "write", "read"):
        getattr(history, name)[:, 0] = getattr(state, name)
    return history


def _run_block(
    plan: _Plan, x: torch.Tensor, mask: torch.Tensor, weights: Tensors, products: list[torch.Tensor], state: _Carried
) -> tuple[History, _Carried]:
    """One block forward: its history and the state after it (copies; the given state is left alone)."""
    memory, link = state.memory.clone(), state.link.clone()  # first, for they outlive the history
    history = _start_history(plan, x, weights, state)
    recurrent, interface = products
    forward_loop(
        plan.sizes, plan.at, arrays(history), memory.numpy(), link.numpy(), mask.numpy(), recurrent.numpy(),
        interface.numpy(), weights[4].numpy(), _limits(plan), make_scratch(plan.sizes, memory.shape[2], plan.at.end),
    )  # fmt: skip
    last = [getattr(history, name)[:, -1] for name in ("hidden", "cells", "usage", "precedence", "write", "read")]
    return history, _Carried(*[*last, memory, link])


def _block_gradients(
    plan: _Plan,
    x: torch.Tensor,
    mask: torch.Tensor,
    products: list[torch.Tensor],
    history: History,
    gradients: Gradients,
) -> list[torch.Tensor]:
    """One block backward: leaves the state's gradients in place, returns those of the weights."""
    recurrent, interface = products
    slots = gradients.memory.shape[2]
    shape = (min(GROUP, x.shape[0]), min(plan.sizes.every, x.shape[1]) + 1)
    chunk = Chunk(x.new_empty(*shape, *gradients.memory.shape[1:]), x.new_empty(*shape, *gradients.link.shape[1:]))
    backward_loop(
        plan.sizes, plan.at, arrays(history), arrays(gradients), arrays(chunk), mask.numpy(), recurrent.numpy(),
        interface.numpy(), _limits(plan), make_scratch(plan.sizes, slots, plan.at.end), make_rows(plan.sizes, slots),
    )  # fmt: skip
    return weight_gradients(x, history.hidden, gradients, plan.sizes.hidden, plan.sizes.lstm)


class _Run(NamedTuple):
    """A whole sequence forward."""

    outputs: torch.Tensor
    looks: list[torch.Tensor]  # readings, writings, usages, interfaces
    state: _Carried
    kept: list[torch.Tensor]


def _run(plan: _Plan, mask: torch.Tensor, x: torch.Tensor, weights: Tensors, state: _Carried) -> _Run:
    """Runs block after block; `kept` is what the backward pass needs."""
    products = product_weights(plan.sizes.tiled, weights[2].t(), weights[3].t())
    kept: list[torch.Tensor] = []
    wholes: list[Any] = [None] * 5
    for start in range(0, x.shape[1], plan.block):
        part = slice(start, start + plan.block)
        if plan.recompute:
            kept += state
        history, state = _run_block(plan, x[:, part], mask[:, part].contiguous(), weights, products, state)
        seen = (history.hidden, history.read, history.write, history.usage)
        blocks = [*[rows[:, 1:] for rows in seen], history.interface]
        wholes = [put_block(*pair, part, x.shape[1]) for pair in zip(wholes, blocks, strict=True)]
    copies = [tensor.clone() for tensor in state[1:6]]  # views would keep the history alive
    after = _Carried(*[state.hidden, *copies, state.memory, state.link])
    return _Run(wholes[0], wholes[1:], after, kept if plan.recompute else list(history))


class _Loop(torch.autograd.Function):
    """The recurrence: outputs, the carried state but for its first part, and four histories to look at."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, mask: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        run = _run(plan, mask, x, tensors[:5], _Carried(*tensors[5:]))
        ctx.plan = plan
        ctx.save_for_backward(mask, x, *tensors[:5], *run.kept)
        ctx.mark_non_differentiable(*run.looks)
        return run.outputs, *run.state[1:], *run.looks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, *d_rest: torch.Tensor) -> Any:
        mask, x, *saved = ctx.saved_tensors
        plan, weights, kept = ctx.plan, tuple(saved[:5]), saved[5:]
        after = [d_out.new_zeros(d_out.shape[0], 1, d_out.shape[2])]
        after += [d.clone(memory_format=torch.contiguous_format) for d in d_rest[:7]]
        products = product_weights(plan.sizes.tiled, weights[2], weights[3])
        again = product_weights(plan.sizes.tiled, weights[2].t(), weights[3].t()) if plan.recompute else []
        totals: list[torch.Tensor] = []
        d_x = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        for start in reversed(range(0, x.shape[1], plan.block)):
            part = slice(start, start + plan.block)
            x_part, mask_part = x[:, part], mask[:, part].contiguous()
            if plan.recompute:
                index = len(_Carried._fields) * (start // plan.block)
                state = _Carried(*kept[index : index + len(_Carried._fields)])
                history, _ = _run_block(plan, x_part, mask_part, weights, again, state)
            else:
                history = History(*kept)
            fresh = torch.empty_like(history.gates), torch.empty_like(history.interface)
            gradients = Gradients(*[d_out[:, part].contiguous(), *after, *fresh])
            found = _block_gradients(plan, x_part, mask_part, products, history, gradients)
            totals = [total.add_(more) for total, more in zip(totals, found, strict=True)] if totals else found
            if d_x is not None:
                d_x[:, part] = gradients.gates @ weights[0]
        return None, None, d_x, *totals, after[0].squeeze(1), *after[1:]


def _carry(state: DNCState, lstm: bool) -> list[torch.Tensor]:
    """The state in the loop's layout, contiguous float32, connected to the graph."""
    rows = torch.cat([state.hidden, state.reads], -1)
    cells = state.cells if lstm else state.hidden
    heads = (state.usage, state.precedence, state.write_weightings, state.read_weightings)
    return [tensor.float().contiguous() for tensor in (rows, cells, *heads, state.memory.mT, state.link)]


def dnc_memory_cpu(
    inputs: torch.Tensor,
    weights: DNCWeights,
    state: DNCState,
    options: DNCOptions,
    mask: torch.Tensor | None = None,
    recompute: bool = False,
) -> DNCOutputs:
    """Runs one memory layer over a sequence.

    Args:
        inputs: `(B, T, D)`, float32.
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
    ones = torch.ones(inputs.shape[:2], dtype=torch.uint8, device="cpu") if mask is None else mask.to(torch.uint8)
    rows = [tensor.float().contiguous() for tensor in (inputs, *weights)]
    carried = _carry(state, plan.sizes.lstm)
    if keep:
        results = _Loop.apply(plan, ones, *rows, *carried)
    else:
        run = _run(plan, ones, rows[0], tuple(rows[1:]), _Carried(*carried))
        results = (run.outputs, *run.state[1:], *run.looks)
    outputs, cells, usage, precedence, write, read, memory, link, *looks = results
    last = outputs[:, -1].clone()  # a view would keep all outputs alive
    cells = cells if plan.sizes.lstm else state.cells
    after = DNCState(last[:, :size], cells, last[:, size:], memory.mT, usage, precedence, link, write, read)
    if mask is not None:
        outputs = outputs.masked_fill(~mask[..., None], 0.0)
    addressing = DNCAddressing(*looks[:3], *gate_history(looks[3], options, state.memory.shape[2], mask))
    return DNCOutputs(outputs, after, addressing)
