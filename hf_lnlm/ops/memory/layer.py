"""What the two layers with a memory have in common: weights, their checks, the controller, and the walk through time.

Sizes: batch B, steps T, features D, controller H, slots N, numbers in a slot M, read heads R, interface vector I; G is
4·H (input, forget, candidate, output) for an LSTM controller and H for feed-forward.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from ..backend import Operation

CONTROLLERS = ("lstm", "feedforward")
LARGEST_ON_CHIP = 2**15  # numbers of a memory that one program of the graphics processor keeps in registers
SMALL_MEMORY = 16  # slots below which `auto` does not think the compiler's seconds worth while

State = TypeVar("State", bound=Any)


def _unfit(backend: str, slots: int, width: int, sharpened: bool) -> str | None:
    if sharpened and backend in ("cpu", "gpu"):
        return "use_sharpness runs on eager and reference only"
    large = backend == "gpu" and slots * width > LARGEST_ON_CHIP
    return f"a memory of more than {LARGEST_ON_CHIP} numbers does not fit on its chip" if large else None


def _wasteful(backend: str, slots: int, _width: int, _sharpened: bool) -> str | None:
    small = backend == "cpu" and slots < SMALL_MEMORY
    return f"fewer than {SMALL_MEMORY} slots are not worth the compiler's seconds" if small else None


def memory_operation(name: str, limits: str = "", **implementations: Any) -> Operation:
    """Make the operation of a layer with a memory; its calls have the facts slots, width and whether it sharpens.

    Args:
        name: of the operation.
        limits: more than both operations have.
        implementations: by backend, as `Operation` takes them.
    """
    known = f"auto takes eager below {SMALL_MEMORY} slots; gpu up to {LARGEST_ON_CHIP} numbers a memory{limits}"
    return Operation(name, unfit=_unfit, wasteful=_wasteful, limits=known, needs_compiler=True, **implementations)


class MemoryWeights(NamedTuple):
    """Effective weights of one memory layer."""

    inputs: torch.Tensor  # `(G, D)`
    inputs_bias: torch.Tensor  # `(G,)`
    recurrent: torch.Tensor  # `(G, H + R·M)` on [h_{t-1} ; r_{t-1}], or `(H, R·M)` on r_{t-1} for feed-forward
    interface: torch.Tensor  # `(I, H)`
    interface_bias: torch.Tensor  # `(I,)`


def check_layer(
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: Any,
    options: Any,
    mask: torch.Tensor | None,
    shapes: Mapping[str, tuple[int, ...]],
    interface: int,
) -> None:
    """Compare the shapes of all tensors with each other.

    Args:
        inputs: `(B, T, D)`.
        weights: see `MemoryWeights`.
        state: see the operation's state.
        options: see the operation's options.
        mask: `(B, T)` or None.
        shapes: of the state's parts beyond controller and reads, without the batch.
        interface: length of the interface vector.

    Raises:
        ValueError: a shape or option does not fit.
    """
    if inputs.dim() != 3 or inputs.shape[0] < 1 or inputs.shape[1] < 1:
        raise ValueError(f"inputs must be (batch, time, features) with at least one of each, got {tuple(inputs.shape)}")
    if options.controller not in CONTROLLERS:
        raise ValueError(f"controller must be one of {CONTROLLERS}, got {options.controller!r}")
    hidden, lstm = state.hidden.shape[-1], options.controller == "lstm"
    gates, reads = (4 * hidden if lstm else hidden), options.num_read_heads * state.memory.shape[-1]
    parts = {"hidden": (hidden,), "cells": (hidden if lstm else 0,), "reads": (reads,), **shapes}
    linear = {
        "inputs": (gates, inputs.shape[2]),
        "inputs_bias": (gates,),
        "recurrent": (gates, (hidden if lstm else 0) + reads),
        "interface": (interface, hidden),
        "interface_bias": (interface,),
    }
    expected = {f"state.{name}": (getattr(state, name), (inputs.shape[0], *shape)) for name, shape in parts.items()}
    expected |= {f"weights.{name}": (getattr(weights, name), shape) for name, shape in linear.items()}
    if mask is not None:
        expected["mask"] = (mask, tuple(inputs.shape[:2]))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def controller_step(
    projected: torch.Tensor, weights: MemoryWeights, state: Any, options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t and c_t.

    Args:
        projected: W_x x_t + b, `(B, G)`.
        weights: of the layer.
        state: of the step before.
        options: settings.
    """
    if options.controller == "feedforward":
        return (projected + state.reads @ weights.recurrent.T).tanh(), state.cells
    gates = projected + torch.cat([state.hidden, state.reads], -1) @ weights.recurrent.T
    gate_in, forget, candidate, gate_out = gates.chunk(4, -1)
    cells = forget.sigmoid() * state.cells + gate_in.sigmoid() * candidate.tanh()
    return gate_out.sigmoid() * cells.tanh(), cells


def fused_controller_step(
    projected: torch.Tensor, recurrent: torch.Tensor, state: Any, options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`controller_step` in fewer operations.

    Args:
        projected: W_x x_t + b, `(B, G)`.
        recurrent: the weight, transposed.
        state: of the step before.
        options: settings.
    """
    if options.controller == "feedforward":
        return torch.addmm(projected, state.reads, recurrent).tanh(), state.cells
    gates = torch.addmm(projected, torch.cat([state.hidden, state.reads], -1), recurrent)
    gate_in, forget, candidate, gate_out = gates.chunk(4, -1)
    cells = torch.addcmul(forget.sigmoid() * state.cells, gate_in.sigmoid(), candidate.tanh())
    return gate_out.sigmoid() * cells.tanh(), cells


def select(mask: torch.Tensor, after: State, before: State) -> State:
    """Row by row, the new state where `mask` `(B,)` is true, else the old one."""
    pairs = zip(after, before, strict=True)
    return type(after)(*[torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs])


class Walk(NamedTuple):
    """A sequence, walked through step by step."""

    outputs: torch.Tensor  # `(B, T, H + R·M)`: [h_t ; r_t], zero at masked steps
    state: Any  # after the last step
    seen: list[torch.Tensor]  # `(B, T, ...)`, parts of the state after every step and the interface, without gradient


def walk(
    step: Callable[[torch.Tensor, State], tuple[torch.Tensor, State]],
    rows: Iterable[torch.Tensor],
    state: State,
    mask: torch.Tensor | None,
    names: tuple[str, ...],
) -> Walk:
    """Run a layer over a sequence, step by step.

    Args:
        step: from W_x x_t + b `(B, G)` and the state to the raw interface `(B, I)` and the next state.
        rows: W_x x_t + b of every step.
        state: before the first step.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.
        names: of the state's parts that are seen.
    """
    outputs, seen = [], []
    for t, row in enumerate(rows):
        raw, after = step(row, state)
        state = after if mask is None else select(mask[:, t], after, state)
        outputs.append(torch.cat([state.hidden, state.reads], -1))
        seen.append([*[getattr(state, name).detach() for name in names], raw.detach()])
    stacked = torch.stack(outputs, 1)
    if mask is not None:
        stacked = stacked.masked_fill(~mask[..., None], 0.0)
    return Walk(stacked, state, [torch.stack(part, 1) for part in zip(*seen, strict=True)])
