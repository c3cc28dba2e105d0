"""LSTM with projection and clipping in plain torch, any device: no copies in the loop, gradients written out.

Autograd of the loop would add a gradient of each weight's full size at every step, which at ELMo's size (33 MB a matrix)
costs more than the products themselves. Here the backward loop only finds the gradients of the gates and of what is
projected, and each weight's gradient is one product over all steps afterwards.

Complexity: as the reference; training keeps the four gates and the cell of each token.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..backend import own_precision

States = tuple[torch.Tensor, torch.Tensor]
Clips = tuple[float | None, float | None]


def projected_lstm_eager(
    tokens: torch.Tensor,
    batch_sizes: list[int],
    states: States,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    clips: Clips,
) -> tuple[torch.Tensor, States]:
    """Run a layer; see `projected_lstm` for arguments and returns."""
    w_input, bias, recurrent, projection = weights
    gates = linear(tokens, w_input, bias)
    h, c = (state.to(gates.dtype) for state in states)
    arguments = (gates, h, c, recurrent.to(gates.dtype), projection.to(gates.dtype))
    with own_precision(tokens.device):
        if torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments):
            outputs, h, c = _ProjectedLSTM.apply(*arguments, batch_sizes, clips)
        else:
            gates = gates if gates.is_contiguous() else gates.contiguous()
            outputs, h, c = _run(gates, h, c, *arguments[3:], batch_sizes, clips, None)
    return outputs, (h, c)


def _run(
    gates: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    recurrent: torch.Tensor,
    projection: torch.Tensor,
    batch_sizes: list[int],
    clips: Clips,
    cells: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loop: overwrites `gates` `(total, 4 * cells)` with the gates' values, and `cells` `(total, cells)` if given."""
    width = c.shape[1]
    outputs = gates.new_empty(len(gates), projection.shape[0])
    h, c, w_h, w_p = h.clone(), c.clone(), recurrent.t(), projection.t()
    first = 0
    for rows in batch_sizes:
        step = gates[first : first + rows]
        step.addmm_(h[:rows], w_h)
        step[:, : 2 * width].sigmoid_()
        step[:, 2 * width : 3 * width].tanh_()
        step[:, 3 * width :].sigmoid_()
        i, f, g, o = step.split(width, 1)
        cell = c[:rows].mul_(f).addcmul_(i, g)
        if clips[0] is not None:
            cell.clamp_(-clips[0], clips[0])
        if cells is not None:
            cells[first : first + rows] = cell
        out = outputs[first : first + rows]
        torch.mm(cell.tanh().mul_(o), w_p, out=out)
        if clips[1] is not None:
            out.clamp_(-clips[1], clips[1])
        h[:rows] = out
        first += rows
    return outputs, h, c


class _ProjectedLSTM(torch.autograd.Function):
    """The loop with its gradient; what is clipped passes none, as with `clamp`."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        h: torch.Tensor,
        c: torch.Tensor,
        recurrent: torch.Tensor,
        projection: torch.Tensor,
        batch_sizes: list[int],
        clips: Clips,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = gates.clone()
        cells = gates.new_empty(len(gates), c.shape[1])
        outputs, last_h, last_c = _run(values, h, c, recurrent, projection, batch_sizes, clips, cells)
        ctx.batch_sizes, ctx.clips = batch_sizes, clips
        ctx.save_for_backward(values, cells, outputs, h, c, recurrent, projection)
        return outputs, last_h, last_c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, cells, outputs, h, c, recurrent, projection = ctx.saved_tensors
        before_c, before_h = _before(cells, c, ctx.batch_sizes), _before(outputs, h, ctx.batch_sizes)
        d_outputs, d_h, d_c = given[0].clone(), given[1].clone(), given[2].clone()
        slopes = _slopes(values, cells, before_c, ctx.clips[0])
        d_gates, limit = slopes.gates, ctx.clips[1]
        last = len(cells)
        for rows in reversed(ctx.batch_sizes):
            here = slice(last - rows, last)
            out = d_outputs[here].add_(d_h[:rows])
            if limit is not None:
                out.masked_fill_(outputs[here].abs() >= limit, 0.0)
            d_projected = out @ projection
            cell = d_c[:rows].addcmul_(d_projected, slopes.cell[here]).mul_(slopes.kept[here])
            step = d_gates[here]
            step[:, : 3 * cell.shape[1]].unflatten(1, (3, -1)).mul_(cell[:, None])
            step[:, 3 * cell.shape[1] :].mul_(d_projected)
            torch.mm(step, recurrent, out=d_h[:rows])
            cell.mul_(values[here, cell.shape[1] : 2 * cell.shape[1]])
            last -= rows
        projected = cells.tanh().mul_(values[:, 3 * cells.shape[1] :])
        return d_gates, d_h, d_c, d_gates.t() @ before_h, d_outputs.t() @ projected, None, None


class _Slopes:
    """Derivatives that the backward loop needs of all steps at once.

    Attributes:
        gates: `(total, 4 * cells)`: of the cell by the inputs of i, f and g; of what is projected by that of o.
        cell: `(total, cells)`: of what is projected by the cell.
        kept: `(total, cells)`: 0 where the cell was clipped, else 1.
    """

    def __init__(self, gates: torch.Tensor, cell: torch.Tensor, kept: torch.Tensor) -> None:
        self.gates, self.cell, self.kept = gates, cell, kept


def _slopes(values: torch.Tensor, cells: torch.Tensor, before: torch.Tensor, limit: float | None) -> _Slopes:
    width = cells.shape[1]
    i, f, g, o = values.split(width, 1)
    tanh = cells.tanh()
    gates = torch.empty_like(values)
    torch.mul(i * (1 - i), g, out=gates[:, :width])
    torch.mul(f * (1 - f), before, out=gates[:, width : 2 * width])
    torch.mul(1 - g * g, i, out=gates[:, 2 * width : 3 * width])
    torch.mul(o * (1 - o), tanh, out=gates[:, 3 * width :])
    kept = torch.ones_like(cells) if limit is None else (cells.abs() < limit).to(cells.dtype)
    return _Slopes(gates, (1 - tanh * tanh) * o, kept)


def _before(values: torch.Tensor, initial: torch.Tensor, batch_sizes: list[int]) -> torch.Tensor:
    """What each token finds: the values of the step before it, and the initial ones at the first step."""
    parts, first = [initial[: batch_sizes[0]]], 0
    for rows, following in pairwise(batch_sizes):
        parts.append(values[first : first + following])
        first += rows
    return torch.cat(parts)
