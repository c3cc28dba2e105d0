"""RMS norm, alone or of a gated input, in groups of channels: `x · silu(z) / rms(x · silu(z)) · weight`.

torch has no kernel for it on the CPU: its own is six operations forward and a dozen backward, each of which waits for
memory; for one decoded token it is their overhead that counts.

Backends: `reference` (float64), `eager` (torch; by rows that stay in the cache, recomputed backward pass), `cpu` (numba,
fused). Whatever is traced, not in float32 or not on the CPU takes torch's own operations, which compilers can fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..backend import Operation, check_backend_name
from ..operator import FLOATS, check_tensor, graph_step, plain_tensors
from .eager import rms_norm_eager, rms_norm_eager_backward
from .reference import rms_norm_reference

__all__ = ["RMS_NORM", "rms_norm"]


def _keep(ctx: Any, inputs: Any, _output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _step(forward: Callable[..., torch.Tensor], backward: Callable[..., Any]) -> Any:
    """Step of the graph of one backend, which keeps its inputs only."""

    def differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return *backward(grad, *ctx.saved_tensors, *ctx.options), None, None

    return graph_step(forward, _keep, differentiate)


def _cpu() -> Any:
    from .cpu import rms_norm_cpu, rms_norm_cpu_backward

    return _step(rms_norm_cpu, rms_norm_cpu_backward)


RMS_NORM = Operation(
    "rms_norm",
    reference=rms_norm_reference,
    eager=_step(rms_norm_eager, rms_norm_eager_backward),
    cpu=_cpu,
    limits="on a CPU in float32; torch's own operations elsewhere, in half precision and where it is traced",
)


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
        backend: `auto`, `reference`, `eager` or `cpu`.

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
    for name, tensor in (("x", x), ("weight", weight), ("z", z)):
        check_tensor(name, tensor, x, FLOATS)
    check_backend_name(backend, RMS_NORM.backends)
    if backend == "reference":
        return rms_norm_reference(x, weight, eps, z, groups).to(x.dtype)
    if not plain_tensors(x, weight, z):
        return _composite(x, weight, eps, z, groups)
    chosen = RMS_NORM.pick(backend, x.device, x.dtype)
    if not (x.is_cpu and all(t is None or t.dtype is torch.float32 for t in (x, weight, z))):
        return _composite(x, weight, eps, z, groups)
    step = RMS_NORM.load(chosen)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, z))
    return (step.apply if wanted else step.forward)(x, weight, z, eps, groups)


def _composite(x: torch.Tensor, weight: torch.Tensor, eps: float, z: torch.Tensor | None, groups: int) -> torch.Tensor:
    """torch's own operations, in float32 at least."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if z is None and groups == 1 and x.dtype == weight.dtype == dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(dtype) if z is None else x.to(dtype) * F.silu(z.to(dtype))
    apart = wide.unflatten(-1, (groups, -1))
    return (weight * F.rms_norm(apart, apart.shape[-1:], None, eps).flatten(-2).to(x.dtype)).to(x.dtype)
