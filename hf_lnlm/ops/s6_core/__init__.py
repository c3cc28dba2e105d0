"""Everything between the projections of a Mamba-1 mixer, as one step of the graph: convolution, step sizes, scan, gate.

The law is the composition of `causal_conv`, two linear maps and `selective_scan`. Composed by autograd, a training step
keeps the convolved input and the step sizes of every layer, adds two gradients of the convolved input, and joins those of
input and gate: half a dozen tensors as large as the activations, which cost more time than the scan. Here the backward
pass makes the former again and writes the latter where they belong. (Fresh memory is what is dear: the system hands it
out page by page.)

Reference: Gu, Dao 2023, "Mamba", arXiv:2312.00752, algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..backend import pick_backend
from ..operator import plain_tensors
from ..selective_scan.eager import BLOCK
from .passes import passes

__all__ = ["s6_core", "s6_core_backend"]

# Tokens that run together when a single row holds many. What lies between the operations is then made in the memory of the
# piece before; much smaller pieces would save more of it, and spend the gain on calls.
PIECE = 64 * BLOCK

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
        weights, (conv_last, last), run = rest[:7], rest[7:], passes(backend)
        y, mixed, entries = _results(projected, weights)
        for piece in _pieces(projected, weights, rest[7], marks):
            x, conv_last = run.conv(piece.conv, True)
            window = slice(piece.first, piece.last)
            mixed[:, window] = F.linear(x, weights[2])
            into = y[:, window], entries[piece.first // BLOCK : -(-piece.last // BLOCK)]
            _, last, _ = run.scan(piece.scan(x, mixed, last), True, into)
        ctx.save_for_backward(projected, mixed, entries, *rest)
        ctx.backend, ctx.marks = backend, marks
        return y, conv_last, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_conv: torch.Tensor, grad_last: torch.Tensor) -> Any:
        projected, mixed, entries, *rest = ctx.saved_tensors
        weights, run = rest[:7], passes(ctx.backend)
        out, inner = projected.new_empty(projected.shape), weights[0].shape[0]
        sums: list[torch.Tensor] = []
        for piece in reversed(_pieces(projected, weights, rest[7], ctx.marks)):
            window = slice(piece.first, piece.last)
            x = run.conv(piece.conv, True)[0]  # takes less time than the memory to keep it would
            call = piece.scan(x, mixed, None)
            part = entries[piece.first // BLOCK : -(-piece.last // BLOCK)]
            of_scan = run.scan_backward(grad_y[:, window], grad_last, call, part, out[:, window, inner:])
            of_steps, of_mixed = _through_projections(of_scan, x, mixed[:, window], weights)
            of_conv = run.conv_backward(of_scan["u"], grad_conv, piece.conv, True, out[:, window, :inner])
            grad_conv, grad_last = of_conv["state"], of_scan["initial_state"]
            of_decay = of_scan["A"] * call["A"]  # A is minus an exponential
            grads = [of_conv["weight"].unsqueeze(1), of_conv["bias"], of_mixed, of_steps, of_scan["dt_bias"], of_decay,
                     of_scan["D"]]  # fmt: skip
            sums = [total.add_(grad) for total, grad in zip(sums, grads)] if sums else grads
        return None, None, out, *[g if t is not None else None for g, t in zip((*sums, grad_conv, grad_last), rest)]


def _results(projected: torch.Tensor, weights: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for outputs, projections and entry states."""
    batch, length = projected.shape[:2]
    inner, states = weights[5].shape
    shapes = (batch, length, inner), (batch, length, weights[2].shape[0]), (-(-length // BLOCK), batch, states, inner)
    y, mixed, entries = (projected.new_empty(shape) for shape in shapes)
    return y, mixed, entries


class Piece(NamedTuple):
    """Tokens that run together.

    Attributes:
        first, last: its tokens are `first ≤ t < last`.
        projected: their input and gate.
        conv: tensors of the convolution by name.
        weights, marks: as given to `s6_core`, the marks of these tokens.
    """

    first: int
    last: int
    projected: torch.Tensor
    conv: dict[str, Any]
    weights: Any
    marks: Any

    def scan(self, x: torch.Tensor, mixed: torch.Tensor, state: torch.Tensor | None) -> dict[str, Any]:
        """Tensors of the scan by name, given the convolved input, all projections and the state before; makes Δ."""
        rank, count = self.weights[3].shape[1], self.weights[5].shape[1]
        steps, b, c = mixed[:, self.first : self.last].split([rank, count, count], dim=-1)
        dt, decay = F.linear(steps, self.weights[3]), -torch.exp(self.weights[5])
        names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "mask", "reset")
        values = (x, dt, decay, b, c, self.weights[6], self.projected[..., x.shape[2] :], self.weights[4], state,
                  *self.marks)  # fmt: skip
        return dict(zip(names, values))


def _pieces(projected: torch.Tensor, weights: Any, conv_state: torch.Tensor | None, marks: Tensors) -> list[Piece]:
    """Cut a single long row without a table of taps; anything else is one piece."""
    inner, _, kernel = weights[0].shape
    batch, length = projected.shape[:2]
    size = PIECE if batch == 1 and marks[0] is None and kernel <= PIECE else length
    pieces = []
    for first in range(0, length, size):
        last = min(length, first + size)
        part = projected[:, first:last]
        # What lies before a piece is its convolution's state, whose gradient is that of the piece before's next state.
        state = conv_state if first == 0 else projected[:, first - kernel + 1 : first, :inner]
        call = {"x": part[..., :inner], "weight": weights[0].squeeze(1), "bias": weights[1], "state": state,
                "taps": marks[0]}  # fmt: skip
        here = tuple(None if mark is None else mark[:, first:last] for mark in marks[1:])
        pieces.append(Piece(first, last, part, call, weights, here))
    return pieces


def _through_projections(
    grads: dict[str, torch.Tensor], x: torch.Tensor, mixed: torch.Tensor, weights: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the two projections' weights; adds their part to that of the convolved input in place."""
    rank = weights[3].shape[1]
    of_steps = grads["dt"].flatten(0, 1)
    inner = torch.cat([of_steps @ weights[3], grads["B"].flatten(0, 1), grads["C"].flatten(0, 1)], 1)
    grads["u"].flatten(0, 1).addmm_(inner, weights[2])
    return of_steps.t() @ mixed.flatten(0, 1)[:, :rank], inner.t() @ x.flatten(0, 1)
