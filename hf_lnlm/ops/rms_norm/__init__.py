"""RMS norm, alone or of a gated input, in groups of channels: `x · silu(z) / rms(x · silu(z)) · weight`.

torch has no kernel for it on the CPU: its own is six operations forward and a dozen backward, each of which waits for
memory; for one decoded token it is their overhead that counts.

Backends: `reference` (float64), `eager` (torch; by rows that stay in the cache, recomputed backward pass), `cpu` (numba,
fused). Whatever is traced, not in float32 or not on the CPU takes torch's own operations, which compilers can fuse.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..backend import pick_backend
from ..operator import plain_tensors
from .eager import rms_norm_eager, rms_norm_eager_backward
from .reference import rms_norm_reference

BACKENDS = ("reference", "eager", "cpu")

__all__ = ["BACKENDS", "rms_norm"]


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    z: torch.Tensor | None = None,
    groups: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Normalise the last dimension.

    Args:
        x: `(..., size)`.
        weight: `(size,)`.
        eps: added to the mean square.
        z: `(..., size)`, a gate before SiLU, or None.
        groups: groups of channels that are normalised apart.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`.

    Returns:
        `(..., size)`, of `x`'s dtype. Without a gate, half precision is rounded before the weight is applied, as other
        implementations do.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    if weight.dim() != 1 or x.shape[-1] != weight.shape[0] or x.shape[-1] % groups:
        raise ValueError(f"x must be (..., {tuple(weight.shape)}) of {groups} groups, got {tuple(x.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}")
    if backend == "reference":
        return rms_norm_reference(x, weight, eps, z, groups).to(x.dtype)
    if backend == "gpu" or not _runs_here(x, weight, z):
        return _composite(x, weight, eps, z, groups)
    chosen = pick_backend(backend, x.device, BACKENDS, x.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, z)):
        return _RMSNorm.apply(x, weight, z, eps, groups, chosen)
    return _forward(x, weight, z, eps, groups, chosen)


def _runs_here(*tensors: torch.Tensor | None) -> bool:
    """Tell whether all are plain float32 tensors of the CPU and nobody traces."""
    return plain_tensors(*tensors) and all(t is None or (t.dtype is torch.float32 and t.is_cpu) for t in tensors)


def _composite(x: torch.Tensor, weight: torch.Tensor, eps: float, z: torch.Tensor | None, groups: int) -> torch.Tensor:
    """torch's own operations, in float32 at least."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if z is None and groups == 1 and x.dtype == weight.dtype == dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(dtype) if z is None else x.to(dtype) * F.silu(z.to(dtype))
    apart = wide.unflatten(-1, (groups, -1))
    return weight * F.rms_norm(apart, apart.shape[-1:], None, eps).flatten(-2).to(x.dtype)


def _forward(
    x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | None, eps: float, groups: int, backend: str
) -> torch.Tensor:
    if backend == "cpu":
        from .cpu import rms_norm_cpu

        return rms_norm_cpu(x, weight, z, eps, groups)
    return rms_norm_eager(x, weight, z, eps, groups)


class _RMSNorm(torch.autograd.Function):
    """Keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, z: Any, eps: float, groups: int, backend: str) -> torch.Tensor:
        ctx.save_for_backward(x, weight, z)
        ctx.options = eps, groups, backend
        return _forward(x, weight, z, eps, groups, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, z = ctx.saved_tensors
        eps, groups, backend = ctx.options
        if backend == "cpu":
            from .cpu import rms_norm_cpu_backward

            grads = rms_norm_cpu_backward(grad, x, weight, z, eps, groups)
        else:
            grads = rms_norm_eager_backward(grad, x, weight, z, eps, groups)
        return (*grads, None, None, None)
