"""RMS norm in plain torch, by chunks of rows that stay in the cache; the backward pass recomputes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 2**15  # numbers


def _chunks(groups: int, *tensors: torch.Tensor | None) -> Iterator[Any]:
    """Tensors `(..., size)` cut into equal chunks `(rows, groups, size / groups)`; None for absent ones."""
    first: Any = tensors[0]
    rows = max(1, CHUNK // first.shape[-1])
    cut = [None if t is None else t.reshape(-1, groups, t.shape[-1] // groups).split(rows) for t in tensors]
    for k in range(len(cut[0] or ())):
        yield [None if pieces is None else pieces[k] for pieces in cut]


def _gated(x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    return x if z is None else F.silu(z).mul_(x)


def _factor(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`1 / rms(x)`, `(..., 1)`."""
    return (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()


def rms_norm_eager(
    x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, eps: float, groups: int
) -> torch.Tensor:
    """Forward pass; arguments as in `rms_norm`, all float32."""
    if x.numel() <= CHUNK and groups == 1:
        gated = _gated(x, z)
        return (gated * _factor(gated, eps)).mul_(weight)
    out, scale = x.new_empty(x.shape), weight.view(groups, -1)
    for part, gate, into in _chunks(groups, x, z, out):
        gated = _gated(part, gate)
        torch.mul(gated, _factor(gated, eps), out=into).mul_(scale)
    return out


def rms_norm_eager_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, eps: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Backward pass: gradients of `x`, `weight` and `z` (None without a gate)."""
    dx, dz = x.new_empty(x.shape), None if z is None else x.new_empty(x.shape)
    scale = weight.view(groups, -1)
    # The sum over the whole batch is kept in float64: its terms are sums over a chunk.
    total = torch.zeros(scale.shape, dtype=torch.float64, device=x.device)
    for part, gate, g, into, gate_into in _chunks(groups, x, z, grad, dx, dz):
        gated = _gated(part, gate)
        factor = _factor(gated, eps)
        normal = gated * factor
        total += (g * normal).sum(0)
        g = g * scale
        inner = g.addcmul_(normal, (g * normal).mean(-1, keepdim=True), value=-1.0).mul_(factor)
        if gate is None:
            into.copy_(inner)
        else:
            torch.ops.aten.silu_backward.grad_input(inner * part, gate, grad_input=gate_into)
            torch.mul(inner, F.silu(gate), out=into)
    return dx, total.flatten().to(weight.dtype), dz
