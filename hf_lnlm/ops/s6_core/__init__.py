"""Everything between the projections of a Mamba-1 mixer, as one step of the graph: convolution, step sizes, scan, gate.

The law is the composition of `causal_conv`, two linear maps and `selective_scan`. Composed by autograd, a training step
keeps the convolved input and the step sizes of every layer, adds two gradients of the convolved input, and joins those of
input and gate: half a dozen tensors as large as the activations, which cost more time than the scan. Here the backward
pass makes the former again and writes the latter where they belong. (Fresh memory is what is dear: the system hands it
out page by page.)

Reference: Gu, Dao 2023, "Mamba", arXiv:2312.00752, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..backend import pick_backend
from ..operator import plain_tensors
from .passes import passes

__all__ = ["s6_core", "s6_core_backend"]

Tensors = tuple[torch.Tensor | None, ...]


def s6_core_backend(backend: str, *tensors: torch.Tensor | None) -> str | None:
    """Choose the backend: `cpu`, `eager`, or None when only the composition can run.

    Args:
        backend: the config's field.
        tensors: everything that would be read, the input first; None for what is absent.

    Raises:
        ValueError: `cpu` is asked for and cannot run.
    """
    first: Any = tensors[0]
    if backend not in ("auto", "cpu", "eager") or not plain_tensors(*tensors):
        return None
    if not all(t is None or (t.is_cpu and t.dtype is torch.float32) for t in tensors):
        return None
    return (
        None if torch.is_autocast_enabled("cpu") else pick_backend(backend, first.device, ("eager", "cpu"), first.dtype)
    )


def s6_core(
    backend: str,
    projected: torch.Tensor,
    weights: Tensors,
    states: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    marks: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a mixer between its projections.

    Args:
        backend: what `s6_core_backend` chose.
        projected: `(batch, length, 2 · channels)`, input and gate.
        weights: of the convolution `(channels, 1, kernel)` and its bias `(channels,)` or None; of the projection to step
            sizes, B and C `(rank + 2 · states, channels)`; of the step projection `(channels, rank)` and its bias
            `(channels,)` or None; `A_log` `(channels, states)`, where A is `-exp(A_log)`; D `(channels,)`.
        states: `(batch, kernel - 1, channels)` and `(batch, states, channels)`, or None for zeros.
        marks: table of taps (see `causal_conv`), mask and starts `(batch, length)`, or None.

    Returns:
        `(batch, length, channels)` and the two states.
    """
    return _S6Core.apply(backend, marks, projected, *weights, *states)


class _S6Core(torch.autograd.Function):
    """Keeps the projections and the states at the blocks' entries."""

    @staticmethod
    def forward(ctx: Any, backend: str, marks: Any, projected: torch.Tensor, *rest: Any) -> Any:
        weights, states = rest[:7], rest[7:]
        run = passes(backend)
        conv_call = _conv_call(projected, weights, states, marks)
        x, conv_last = run.conv(conv_call, True)
        mixed = F.linear(x, weights[2])
        call = _scan_call(x, mixed, projected, weights, states, marks)
        y, last, entries = run.scan(call, True)
        # Making the convolved input again takes numba less time than the memory to keep it would.
        ctx.save_for_backward(projected, mixed, entries, None if backend == "cpu" else x, *rest)
        ctx.backend, ctx.marks = backend, marks
        return y, conv_last, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_conv: torch.Tensor, grad_last: torch.Tensor) -> Any:
        projected, mixed, entries, x, *rest = ctx.saved_tensors
        weights, states = rest[:7], rest[7:]
        run = passes(ctx.backend)
        conv_call = _conv_call(projected, weights, states, ctx.marks)
        x = run.conv(conv_call, True)[0] if x is None else x
        call = _scan_call(x, mixed, projected, weights, states, ctx.marks)
        out, inner = torch.empty_like(projected), x.shape[2]
        of_scan = run.scan_backward(grad_y, grad_last, call, entries, out[..., inner:])
        of_steps, of_mixed = _through_projections(of_scan, x, mixed, weights)
        of_conv = run.conv_backward(of_scan["u"], grad_conv, conv_call, True, out[..., :inner])
        of_decay = of_scan["A"] * call["A"]  # A is minus an exponential
        grads = (of_conv["weight"].unsqueeze(1), of_conv["bias"], of_mixed, of_steps, of_scan["dt_bias"], of_decay,
                 of_scan["D"], of_conv["state"], of_scan["initial_state"])  # fmt: skip
        return None, None, out, *[g if t is not None else None for g, t in zip(grads, rest)]


def _conv_call(projected: torch.Tensor, weights: Tensors, states: Tensors, marks: Tensors) -> dict[str, Any]:
    """Tensors of the convolution by name."""
    weight: Any = weights[0]
    x = projected[..., : weight.shape[0]]
    return {"x": x, "weight": weight.squeeze(1), "bias": weights[1], "state": states[0], "taps": marks[0]}


def _scan_call(
    x: torch.Tensor, mixed: torch.Tensor, projected: torch.Tensor, weights: Any, states: Tensors, marks: Tensors
) -> dict[str, Any]:
    """Tensors of the scan by name; makes the step sizes."""
    rank, count = weights[3].shape[1], weights[5].shape[1]
    steps, b, c = mixed.split([rank, count, count], dim=-1)
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "mask", "reset")
    values = (x, F.linear(steps, weights[3]), -torch.exp(weights[5]), b, c, weights[6], projected[..., x.shape[2] :],
              weights[4], states[1], marks[1], marks[2])  # fmt: skip
    return dict(zip(names, values))


def _through_projections(
    grads: dict[str, torch.Tensor], x: torch.Tensor, mixed: torch.Tensor, weights: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the two projections' weights; adds their part to that of the convolved input in place."""
    rank = weights[3].shape[1]
    of_steps = grads["dt"].flatten(0, 1)
    inner = torch.cat([of_steps @ weights[3], grads["B"].flatten(0, 1), grads["C"].flatten(0, 1)], 1)
    grads["u"].flatten(0, 1).addmm_(inner, weights[2])
    return of_steps.t() @ mixed.flatten(0, 1)[:, :rank], inner.t() @ x.flatten(0, 1)
