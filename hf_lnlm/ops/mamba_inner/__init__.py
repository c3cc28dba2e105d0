"""Everything between the projections of a Mamba-1 mixer, as one step of the graph: convolution, step sizes, scan, gate.

It computes `causal_conv`, two linear maps and `selective_scan`, one after the other. Composed by autograd, a training step
keeps the convolved input and the step sizes of every layer, adds two gradients of the convolved input, and joins those of
input and gate: half a dozen tensors as large as the activations, which cost more time than the scan. Here the backward
pass makes the former again and writes the latter where they belong. (Fresh memory is what costs most: the system
hands it out page by page.)

Reference: Gu, Dao 2023, "Mamba", arXiv:2312.00752, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..backend import Operation, own_precision
from ..causal_conv import CAUSAL_CONV
from ..operator import Passes, plain_tensors
from ..selective_scan import SELECTIVE_SCAN
from ..selective_scan.eager import BLOCK
from ..selective_scan.inputs import INPUTS as SCAN_INPUTS
from .reference import MambaWeights, Tensors, mamba_inner_reference

__all__ = ["MAMBA_INNER", "MambaWeights", "mamba_inner", "mamba_inner_reference"]

# Tokens that run together when a single row holds many. What lies between the operations is then made in the memory of the
# piece before; much smaller pieces would save more of it, and spend the gain on calls.
PIECE = 64 * BLOCK


class _MambaInner(torch.autograd.Function):
    """Keeps the projections and the states at the blocks' entries."""

    @staticmethod
    def forward(ctx: Any, conv: Passes, scan: Passes, marks: Any, projected: torch.Tensor, *rest: Any) -> Any:
        weights, (conv_last, last) = MambaWeights(*rest[:7]), rest[7:]
        y, mixed, entries = _results(projected, weights)
        for piece in _pieces(projected, weights, rest[7], marks):
            x, conv_last, _ = conv.forward(*piece.conv.values(), True, True)
            window = slice(piece.first, piece.last)
            mixed[:, window] = F.linear(x, weights.x_weight)
            into = y[:, window], entries[piece.first // BLOCK : -(-piece.last // BLOCK)]
            _, last, _ = scan.forward(*piece.scan(x, mixed, last).values(), True, True, *into)
        ctx.save_for_backward(projected, mixed, entries, *rest)
        ctx.conv, ctx.scan, ctx.marks = conv, scan, marks
        return y, conv_last, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        with own_precision(gradients[0].device):
            return _backward(ctx, *gradients)


def _by(backend: str) -> Any:
    """The core that runs a backend's convolution and scan."""
    return partial(_MambaInner.apply, CAUSAL_CONV.load(backend), SELECTIVE_SCAN.load(backend))


MAMBA_INNER = Operation(
    "mamba_inner",
    reference=mamba_inner_reference,
    eager=_by("eager"),
    cpu=partial(_by, "cpu"),
    only_on="cpu",
    limits="training, all tensors plain float32; else causal_conv and selective_scan, one after the other",
)


def mamba_inner(backend: str, *tensors: torch.Tensor | None) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """Return what runs a mixer between its projections, or None when only the composition can.

    Args:
        backend: the config's field.
        tensors: everything that would be read, the input first; None for what is absent.

    Returns:
        a function of `marks`, `projected`, the weights (see `MambaWeights`), `conv_state` and `state`, whose results are
        `(batch, length, channels)` and the two states. `marks`: gather index (see `causal_conv`), mask and starts
        `(batch, length)`, or None; `projected`: `(batch, length, 2 · channels)`, input and gate; states:
        `(batch, kernel - 1, channels)` and `(batch, states, channels)`, or None for zeros.

    Raises:
        ValueError: `cpu` is asked for and cannot run.
    """
    first: Any = tensors[0]
    if backend not in ("auto", "cpu", "eager") or torch.is_autocast_enabled("cpu") or not plain_tensors(*tensors):
        return None
    if not all(t is None or (t.is_cpu and t.dtype is torch.float32) for t in tensors):
        return None
    return MAMBA_INNER.load(MAMBA_INNER.pick(backend, first.device, first.dtype))


def _backward(ctx: Any, grad_y: torch.Tensor, grad_conv: torch.Tensor, grad_last: torch.Tensor) -> tuple[Any, ...]:
    """Gradients of all arguments of `_MambaInner`, pieces from last to first."""
    projected, mixed, entries, *rest = ctx.saved_tensors
    weights = MambaWeights(*rest[:7])
    out, inner = projected.new_empty(projected.shape), weights.conv_weight.shape[0]
    sums: list[torch.Tensor] = []
    for piece in reversed(_pieces(projected, weights, rest[7], ctx.marks)):
        part, inputs = slice(piece.first, piece.last), piece.conv.values()
        x = ctx.conv.forward(*inputs, True, True)[0]  # takes less time than the memory to keep it would
        call = piece.scan(x, mixed, None)
        kept = entries[piece.first // BLOCK : -(-piece.last // BLOCK)]
        of_gate, of_input = out[:, part, inner:], out[:, part, :inner]
        of_scan = ctx.scan.backward(grad_y[:, part], grad_last, kept, *call.values(), True, into=of_gate)
        of_steps, of_mixed = _through_projections(of_scan, x, mixed[:, part], weights)
        of_conv = ctx.conv.backward(of_scan["u"], grad_conv, None, *inputs, True, into=of_input)
        grad_conv, grad_last = of_conv["state"], of_scan["initial_state"]
        of_decay = of_scan["A"] * call["A"]  # A is minus an exponential
        grads = [of_conv["weight"].unsqueeze(1), of_conv["bias"], of_mixed, of_steps, of_scan["dt_bias"], of_decay]
        grads.append(of_scan["D"])
        sums = [total.add_(grad) for total, grad in zip(sums, grads)] if sums else grads
    found = [g if t is not None else None for g, t in zip((*sums, grad_conv, grad_last), rest)]
    return None, None, None, out, *found


def _results(projected: torch.Tensor, weights: MambaWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for outputs, projections and entry states."""
    batch, length = projected.shape[:2]
    inner, states = weights.a_log.shape
    shapes = (
        (batch, length, inner),
        (batch, length, weights.x_weight.shape[0]),
        (-(-length // BLOCK), batch, states, inner),
    )
    y, mixed, entries = (projected.new_empty(shape) for shape in shapes)
    return y, mixed, entries


class Piece(NamedTuple):
    """Tokens that run together.

    Attributes:
        first, last: its tokens are `first ≤ t < last`.
        projected: their input and gate.
        conv: tensors of the convolution by name.
        weights, marks: as given, the marks of these tokens.
    """

    first: int
    last: int
    projected: torch.Tensor
    conv: dict[str, Any]
    weights: MambaWeights
    marks: Any

    def scan(self, x: torch.Tensor, mixed: torch.Tensor, state: torch.Tensor | None) -> dict[str, Any]:
        """Tensors of the scan by name, given the convolved input, all projections and the state before; makes Δ."""
        rank, count = self.weights.step_weight.shape[1], self.weights.a_log.shape[1]
        steps, b, c = mixed[:, self.first : self.last].split([rank, count, count], dim=-1)
        dt, decay = F.linear(steps, self.weights.step_weight), -torch.exp(self.weights.a_log)
        z, weights = self.projected[..., x.shape[2] :], self.weights
        values = (x, dt, decay, b, c, weights.skip, z, weights.step_bias, state, *self.marks)
        return dict(zip(SCAN_INPUTS.names, values))


def _pieces(
    projected: torch.Tensor, weights: MambaWeights, conv_state: torch.Tensor | None, marks: Tensors
) -> list[Piece]:
    """Cut a single long row without a gather index; anything else is one piece."""
    inner, _, kernel = weights.conv_weight.shape
    batch, length = projected.shape[:2]
    size = PIECE if batch == 1 and marks[0] is None and kernel <= PIECE else length
    pieces = []
    for first in range(0, length, size):
        last = min(length, first + size)
        part = projected[:, first:last]
        # What lies before a piece is its convolution's state, whose gradient is that of the piece before's next state.
        state = conv_state if first == 0 else projected[:, first - kernel + 1 : first, :inner]
        call = {"x": part[..., :inner], "weight": weights.conv_weight.squeeze(1), "bias": weights.conv_bias, "state": state,
                "gather_index": marks[0]}  # fmt: skip
        here = tuple(None if mark is None else mark[:, first:last] for mark in marks[1:])
        pieces.append(Piece(first, last, part, call, weights, here))
    return pieces


def _through_projections(
    grads: dict[str, torch.Tensor], x: torch.Tensor, mixed: torch.Tensor, weights: MambaWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the two projections' weights; adds their part to that of the convolved input in place."""
    rank = weights.step_weight.shape[1]
    of_steps = grads["dt"].flatten(0, 1)
    inner = torch.cat([of_steps @ weights.step_weight, grads["B"].flatten(0, 1), grads["C"].flatten(0, 1)], 1)
    grads["u"].flatten(0, 1).addmm_(inner, weights.x_weight)
    return of_steps.t() @ mixed.flatten(0, 1)[:, :rank], inner.t() @ x.flatten(0, 1)
