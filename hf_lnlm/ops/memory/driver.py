"""What runs the compiled whole-sequence loops of both memories, on the processor and on a graphics processor.

References:
    [1] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174 (storing every √T-th state)

Input projections and weight gradients are matrix products over all steps outside the loop. What of the state is large
(memories, links) changes in place and is stored every √T steps; the backward loop runs the writes of one chunk at a time
again. Everything else of the state is kept at every step. Without gradients a history exists for a block of steps at a
time.

Deviation: the loops compute in float32 only; a second derivative is an error, never a wrong number.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.autograd.function import once_differentiable

from ..backend import own_precision
from ..operator import check_tensor
from .layer import MemoryWeights

_READABLE = (torch.float32, torch.bfloat16, torch.float16)
_INFERENCE_BLOCK = 256  # steps whose history exists at one time when no gradient is wanted


class Loop:
    """One operation's loops on one kind of device, for one call.

    A history is the tuple of `gates` `(B, T, G)` (projected inputs at first), `cells` `(B, T+1, H)` (`(B, 1, H)` for a
    feed-forward controller), `hidden` `(B, T+1, H + R·M)` = [h ; r], `interface` `(B, T, I)`, an entry `(B, T+1, ...)`
    for each name in `followed`, `extra()`, and an entry `(B, ceil(T / every), ...)` for each name in `in_place`.

    `pack` makes of a weight what the loops read: in forward, of the transposed recurrent and interface weight; in backward,
    of both as they are.

    Args:
        state: before the first step.
        options: settings.
        every: steps between stored parts.
    """

    History: ClassVar[Any]
    followed: ClassVar[tuple[str, ...]]  # parts of the state that are kept at every step
    in_place: ClassVar[tuple[str, ...]]  # parts of the state that change in place
    seen: ClassVar[tuple[str, ...]]  # parts of the history that make the addressing
    slots_last: ClassVar[bool] = False  # whether memories are `(B, M, N)` within the loops

    def __init__(self, state: Any, options: Any, every: int) -> None:
        self.options, self.every = options, every
        self.pack: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
        self.lstm, self.hidden, self.width = options.controller == "lstm", state.hidden.shape[1], state.memory.shape[2]

    def extra(self, x: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Fresh arrays for what else the loops keep.

        Args:
            x: of the type and device wanted.
            steps: T.
        """
        return []

    def run_forward(self, history: Any, parts: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights) -> None:
        """Fill a history.

        Args:
            history: with projected inputs and the state before the first step.
            parts: those `in_place`: go from the first step to the last.
            mask: `(B, T)` uint8.
            weights: of the layer; recurrent and interface packed.
        """
        raise NotImplementedError

    def run_backward(
        self, history: Any, gradients: list[torch.Tensor], mask: torch.Tensor, weights: MemoryWeights
    ) -> None:
        """Run the history backward.

        Args:
            history: from `run_forward`.
            gradients: that of the outputs; those of [h ; r] `(B, 1, H + R·M)`, of the cells and of the parts `followed`
                and `in_place`, which go from the last step to the first in place; those of `gates` and of the raw
                interface, to be filled.
            mask: `(B, T)` uint8.
            weights: of the layer; recurrent and interface packed.
        """
        raise NotImplementedError

    def outputs(self, outputs: torch.Tensor, state: Any, seen: list[torch.Tensor], mask: torch.Tensor | None) -> Any:
        """The operation's named results.

        Args:
            outputs: `(B, T, H + R·M)`.
            state: after the last step.
            seen: `(B, T, ...)` each, in the order of `seen`.
            mask: `(B, T)` bool or None.
        """
        raise NotImplementedError

    def carried(self, state: Any) -> list[torch.Tensor]:
        """The state as the loops read it, connected to the graph: [h ; r], cells, parts `followed`, parts `in_place`."""
        memory = state.memory.mT if self.slots_last else state.memory
        cells = state.cells if self.lstm else state.hidden
        parts = [memory if name == "memory" else getattr(state, name) for name in (*self.followed, *self.in_place)]
        return [torch.cat([state.hidden, state.reads], -1), cells, *parts]

    def restored(self, state: Any, last: torch.Tensor, carried: list[torch.Tensor]) -> Any:
        """The state after the last step, whose output is `last` `(B, H + R·M)`."""
        parts = dict(zip((*self.followed, *self.in_place), carried[2:], strict=True))
        if self.slots_last:
            parts["memory"] = parts["memory"].mT
        cells = carried[1] if self.lstm else state.cells
        return state._replace(hidden=last[:, : self.hidden], cells=cells, reads=last[:, self.hidden :], **parts)


def _start_history(loop: Loop, x: torch.Tensor, weights: MemoryWeights, carried: tuple[torch.Tensor, ...]) -> Any:
    """A history with projected inputs and the state before the first step."""
    (batch, steps, _), count = x.shape, len(loop.followed)
    gates = x.new_empty(batch, steps, weights.inputs.shape[0])
    rows = gates.view(batch * steps, -1)
    torch.addmm(weights.inputs_bias, x.reshape(batch * steps, -1), weights.inputs.t(), out=rows)
    cells = x.new_empty(batch, steps + 1 if loop.lstm else 1, loop.hidden)
    kept, found = carried[2 : 2 + count], [gates, cells, x.new_empty(batch, steps + 1, carried[0].shape[1])]
    found.append(x.new_empty(batch, steps, weights.interface.shape[0]))
    for tensor in kept:
        found.append(x.new_empty(batch, steps + 1, *tensor.shape[1:]))
    found += loop.extra(x, steps)
    for tensor in carried[2 + count :]:
        found.append(x.new_empty(batch, -(-steps // loop.every), *tensor.shape[1:]))
    for array, tensor in zip((found[2], cells, *found[4 : 4 + count]), carried):
        array[:, 0] = tensor
    return loop.History(*found)


class _Recurrence(torch.autograd.Function):
    """A block of steps: outputs, the carried state but for its first part, and what is seen."""

    @staticmethod
    def forward(ctx: Any, loop: Loop, mask: torch.Tensor, x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        weights, carried = MemoryWeights(*tensors[:5]), tensors[5:]
        count, steps = len(loop.followed), x.shape[1]
        parts = [tensor.clone() for tensor in carried[2 + count :]]  # first, for they outlive the history: what that
        history = _start_history(loop, x, weights, carried)  # leaves free then lies in one piece
        recurrent, interface = loop.pack(weights.recurrent.t()), loop.pack(weights.interface.t())
        loop.run_forward(history, parts, mask, weights._replace(recurrent=recurrent, interface=interface))
        last = [rows[:, -1].clone() for rows in (history.cells, *history[4 : 4 + count])]  # views would keep the rest
        seen = [getattr(history, name)[:, -steps:] for name in loop.seen]
        ctx.loop = loop
        ctx.save_for_backward(mask, x, *weights, *history)
        ctx.mark_non_differentiable(*seen)
        return history.hidden[:, 1:], *last, *parts, *seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor, *d_rest: torch.Tensor) -> Any:
        mask, x, *saved = ctx.saved_tensors
        loop, weights, history = ctx.loop, MemoryWeights(*saved[:5]), ctx.loop.History(*saved[5:])
        after = [
            d.clone(memory_format=torch.contiguous_format) for d in d_rest[: 1 + len(loop.followed + loop.in_place)]
        ]
        after = [d_out.new_zeros(d_out.shape[0], 1, d_out.shape[2]), *after]
        d_gates, d_interface = torch.empty_like(history.gates), torch.empty_like(history.interface)
        recurrent, interface = loop.pack(weights.recurrent), loop.pack(weights.interface)
        packed = weights._replace(recurrent=recurrent, interface=interface)
        loop.run_backward(history, [d_out.contiguous(), *after, d_gates, d_interface], mask, packed)
        with own_precision(x.device):
            d_weights = _weight_gradients(x, history.hidden, d_gates.flatten(0, 1), d_interface.flatten(0, 1), loop)
            d_x = d_gates @ weights.inputs if ctx.needs_input_grad[2] else None
        return None, None, d_x, *d_weights, after[0].squeeze(1), *after[1:]


def _weight_gradients(
    x: torch.Tensor, hidden: torch.Tensor, d_gates: torch.Tensor, d_interface: torch.Tensor, loop: Loop
) -> MemoryWeights:
    """Gradients of the weights over a block, each one matrix product or sum over all steps."""
    return MemoryWeights(
        inputs=d_gates.t() @ x.reshape(d_gates.shape[0], -1),
        inputs_bias=d_gates.sum(0),
        recurrent=d_gates.t() @ hidden[:, :-1, 0 if loop.lstm else loop.hidden :].flatten(0, 1),
        interface=d_interface.t() @ hidden[:, 1:, : loop.hidden].flatten(0, 1),
        interface_bias=d_interface.sum(0),
    )


def run_layer(
    loop_type: type[Loop],
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: Any,
    options: Any,
    mask: torch.Tensor | None = None,
) -> Any:
    """Run one memory layer over a sequence by compiled loops.

    Args:
        loop_type: which ones.
        inputs: `(B, T, D)`.
        weights: of the layer.
        state: before the first step.
        options: settings.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.

    Returns:
        The operation's results.

    Raises:
        ValueError: a tensor is not dense, neither float32 nor narrower, or on another device than the inputs.
    """
    named = {"inputs": inputs}
    named |= {f"weights.{name}": tensor for name, tensor in weights._asdict().items()}
    named |= {f"state.{name}": tensor for name, tensor in state._asdict().items()}
    for name, tensor in named.items():
        check_tensor(name, tensor, inputs, _READABLE)
    steps, keep = inputs.shape[1], torch.is_grad_enabled() and any(t.requires_grad for t in named.values())
    block = steps if keep else min(steps, _INFERENCE_BLOCK)
    loop = loop_type(state, options, max(1, math.isqrt(block)) if keep else block)
    real = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if mask is None else mask
    x, *tensors = [tensor.float().contiguous() for tensor in (inputs, *weights, *loop.carried(state))]
    blocks = [x] if block == steps else x.split(block, 1)
    carried, found = tensors[5:], []
    for part, marks in zip(blocks, real.to(torch.uint8).split(block, 1), strict=True):
        out, *rest = _Recurrence.apply(loop, marks.contiguous(), part, *tensors[:5], *carried)
        carried, seen = [out[:, -1], *rest[: len(carried) - 1]], rest[len(carried) - 1 :]
        found.append([out, *seen])
    outputs, *seen = found[0] if len(found) == 1 else [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
    after = loop.restored(state, outputs[:, -1].clone(), carried)  # a view would keep all outputs alive
    return loop.outputs(outputs if mask is None else outputs.masked_fill(~mask[..., None], 0.0), after, seen, mask)
