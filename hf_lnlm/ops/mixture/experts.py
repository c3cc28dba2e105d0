"""What the experts make of the tokens: choices sorted by expert, then one product a group.

The groups are multiplied by torch's `grouped_mm` where it takes their type and widths, else one after the other. While
torch.compile or torch.export traces, how many choices are kept is not known: then all are computed, under weights that
are zero for padding and for dropped ones, by `grouped_mm`, else by every expert for every token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.utils.import_utils import is_torchdynamo_compiling

from .routing import Routing

GROUPED = getattr(functional, "grouped_mm", None)
"""torch's product of groups of rows, each with a matrix of its own; None where torch is too old."""

_GROUPED_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
_GROUPED_ALIGNMENT = 16  # bytes of a row

Activation = Callable[[torch.Tensor], torch.Tensor]


class Groups(NamedTuple):
    """The choices that are computed, sorted by expert.

    Attributes:
        order: `(computed,)` which of the `tokens * k` choices each is.
        tokens: `(computed,)` the token of each.
        slots: `(tokens * k,)` where each choice stands in that order; `computed` if nowhere.
        sizes: how many each expert has; None while traced.
        ends: `(experts,)` where the group of each expert ends, int32.
    """

    order: torch.Tensor
    tokens: torch.Tensor
    slots: torch.Tensor
    sizes: list[int] | None
    ends: torch.Tensor


def sorted_choices(routing: Routing, experts: int) -> Groups:
    """Sort the choices that are computed by their expert, those of one expert in the order of their tokens.

    Args:
        routing: of the tokens.
        experts: how many there are.
    """
    k, flat, traced = routing.experts.shape[1], routing.experts.flatten(), is_torchdynamo_compiling()
    if routing.kept is not None and not traced:
        flat = flat.masked_fill(~routing.kept.flatten(), experts)  # beyond the last expert
    order = flat.argsort(stable=True)
    load = (flat.unsqueeze(1) == torch.arange(experts, device=flat.device)).sum(0)
    sizes = None if traced else load.tolist()
    computed = len(flat) if sizes is None else sum(sizes)
    slots = torch.full_like(flat, computed)
    slots = slots.scatter(0, order[:computed], torch.arange(computed, device=flat.device))
    order = order[:computed]
    return Groups(order, order // k, slots, sizes, load.cumsum(0).to(torch.int32))


class _Spread(torch.autograd.Function):
    """Rows of tokens → rows of their sorted choices."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.count = rows.shape[0]
        ctx.save_for_backward(tokens, slots)
        return rows.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Gather.apply(grad, *ctx.saved_tensors, ctx.count), None, None


class _Gather(torch.autograd.Function):
    """Rows of sorted choices → sums over the choices of each token; the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(tokens, slots)
        if rows.shape[0] < slots.shape[0]:  # some stand nowhere: they find a row of zeros
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        found = rows.index_select(0, slots).view(count, -1, rows.shape[1])
        return found[:, 0] if found.shape[1] == 1 else found.sum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None, None


def _spread(rows: torch.Tensor, groups: Groups) -> torch.Tensor:
    if groups.sizes is None:
        return rows.index_select(0, groups.tokens)
    return _Spread.apply(rows, groups.tokens, groups.slots)


def _gather(rows: torch.Tensor, groups: Groups, count: int) -> torch.Tensor:
    if groups.sizes is None:
        return rows.index_select(0, groups.slots).view(count, -1, rows.shape[1]).sum(1)
    return _Gather.apply(rows, groups.tokens, groups.slots, count)


def takes_grouped(rows: torch.Tensor, weights: torch.Tensor) -> bool:
    """Tell whether torch's `grouped_mm` multiplies rows and weights of these types and widths on their device."""
    if GROUPED is None or not rows.shape[0] or rows.dtype != weights.dtype:
        return False
    if is_torchdynamo_compiling() and rows.dtype != torch.bfloat16:  # the only type that its shapes are known for
        return False
    aligned = all(width * rows.element_size() % _GROUPED_ALIGNMENT == 0 for width in weights.shape[1:])
    return aligned and rows.dtype in _GROUPED_DTYPES.get(rows.device.type, ())


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Multiply the rows of each expert by its matrix.

    Args:
        rows: `(computed, width)`, sorted by expert.
        weights: `(experts, width, columns)`.
        groups: where each expert's rows are.

    Returns:
        `(computed, columns)`.
    """
    if takes_grouped(rows, weights):
        grouped: Any = GROUPED
        return grouped(rows, weights, offs=groups.ends)
    parts = rows.split(groups.sizes or [])
    return torch.cat([part @ weight for part, weight in zip(parts, weights.unbind(0), strict=True)])


def mix(
    x: torch.Tensor,
    routing: Routing,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    activation: Activation,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return the weighted sum of what its experts make of each token: y = Σ gate_i W_out,i f(W_in,i x).

    Args:
        x: `(tokens, width)`.
        routing: of the tokens.
        w_in: `(experts, width, inner)`.
        w_out: `(experts, inner, width)`.
        activation: between the two products.
        dropout: probability of dropping an inner unit (0 outside training).

    Returns:
        `(tokens, width)`; zero where no expert computes.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    if is_torchdynamo_compiling() and not (takes_grouped(x, w_in) and takes_grouped(x, w_out)):
        return _by_all(x, routing, w_in, w_out, activation, dropout)
    groups = sorted_choices(routing, w_in.shape[0])
    inner = activation(grouped_product(_spread(x, groups), w_in, groups))
    out = grouped_product(functional.dropout(inner, dropout, training=dropout > 0.0), w_out, groups)
    gates = routing.gates.flatten().index_select(0, groups.order).to(out.dtype)
    return _gather(out * gates.unsqueeze(1), groups, x.shape[0])


def _by_all(
    x: torch.Tensor, routing: Routing, w_in: torch.Tensor, w_out: torch.Tensor, activation: Activation, dropout: float
) -> torch.Tensor:
    """Let every expert compute every token, under weights that are zero where it was not chosen."""
    gates = routing.gates.new_zeros(x.shape[0], w_in.shape[0])
    gates = gates.scatter(1, routing.experts, routing.gates).to(x.dtype)
    inner = activation(torch.einsum("tw,ewi->tei", x, w_in))
    inner = functional.dropout(inner, dropout, training=dropout > 0.0) * gates.unsqueeze(-1)
    return torch.einsum("tei,eiw->tw", inner, w_out)
