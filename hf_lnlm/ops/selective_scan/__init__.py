"""Selective scan, the recurrence of Mamba-1 (S6), with carried state, masks, packed documents and a reverse direction.

    Δ_t = softplus(dt_t + dt_bias)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t
    y_t = (h_t C_t + D u_t) · silu(z_t)

Reference: Gu, Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.

Backends: `reference` (float64, one token at a time), `eager` (torch, any device), `cpu` (numba, fused), `gpu`
(Triton, fused). All computation is in float32 (float64 for float64 input) whatever the dtype of the arguments.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backend import Operation, check_backend_name, own_precision
from ..operator import FusedOperator, Passes, check_shape
from .eager import BLOCK, selective_scan_eager, selective_scan_eager_backward
from .inputs import INPUTS
from .reference import selective_scan_reference
from .step import selective_scan_step

__all__ = ["SELECTIVE_SCAN", "selective_scan"]


def _cpu() -> Passes:
    from .cpu import selective_scan_cpu, selective_scan_cpu_backward, selective_scan_cpu_step

    return Passes(selective_scan_cpu, selective_scan_cpu_backward, selective_scan_cpu_step)


def _gpu() -> Passes:
    from .gpu import selective_scan_gpu, selective_scan_gpu_backward

    return Passes(selective_scan_gpu, selective_scan_gpu_backward, selective_scan_step)


def _unfit(backend: str, *values: Any) -> str | None:
    """Why a call's tensors and options do not suit a backend."""
    grows = backend == "cpu" and (not values[-1] or bool((values[2] > 0).any()))
    return "its states must not grow: it needs softplus and A ≤ 0" if grows else None


SELECTIVE_SCAN = Operation(
    "selective_scan",
    reference=selective_scan_reference,
    eager=Passes(selective_scan_eager, selective_scan_eager_backward, selective_scan_step),
    cpu=_cpu,
    gpu=_gpu,
    unfit=_unfit,
    limits="cpu needs softplus and A ≤ 0",
)


def _shapes(u: torch.Tensor, _dt: torch.Tensor, A: torch.Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    state = (u.shape[0], A.shape[1], u.shape[2])
    return state, (-(-u.shape[1] // BLOCK) if rest[-1] else 0, *state)


_OPERATOR = FusedOperator(SELECTIVE_SCAN, __file__, INPUTS, "bool softplus", _shapes)


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the selective state space recurrence over a batch of sequences.

    Args:
        u: `(batch, length, channels)`, the input.
        dt: `(batch, length, channels)`, the step sizes before `softplus`.
        A: `(channels, states)`, negative.
        B, C: `(batch, length, states)`.
        D: `(channels,)`, the skip connection's weight, or None.
        z: `(batch, length, channels)`, the gate before SiLU, or None.
        dt_bias: `(channels,)` or None.
        initial_state: `(batch, states, channels)` or None for zeros. Gradients flow into it.
        mask: `(batch, length)`, 0 at positions that leave the state unchanged, or None.
        reset: `(batch, length)` booleans, true at a real position that begins a document, or None.
        softplus: whether the step size is `softplus(dt + dt_bias)` or `dt + dt_bias` itself.
        reverse: run from the last position to the first; `reset` then marks where documents end.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`.

    Returns:
        `y` like `u`, and the final state `(batch, states, channels)` in the computation's dtype. Outputs at masked
        positions are finite and meaningless.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    _check(u, dt, A, B, C, backend)
    _check_optional(u, A, (D, dt_bias), z, initial_state, (mask, reset))
    mask = None if mask is None else mask != 0
    if reverse:
        u, dt, B, C = (t.flip(1) for t in (u, dt, B, C))
        z, mask, reset = (None if t is None else t.flip(1) for t in (z, mask, reset))
    if backend == "reference":
        y, state = selective_scan_reference(u, dt, A, B, C, D, z, dt_bias, initial_state, mask, reset, softplus)
        state = state if u.dtype == torch.float64 else state.float()
    else:
        call = u, dt, A, B, C, D, z, dt_bias, initial_state, mask, reset, softplus
        run, save = _OPERATOR.prepare(backend, *call)
        with own_precision(u.device):
            y, state = run(*call, save)[:2]
    y = y.to(u.dtype)
    return (y.flip(1) if reverse else y), state


def _check_optional(u: torch.Tensor, A: torch.Tensor, vectors: Any, z: Any, state: Any, marks: Any) -> None:
    for name, tensor in zip(("D", "dt_bias"), vectors):
        check_shape(name, tensor, (u.shape[2],))
    check_shape("z", z, tuple(u.shape))
    check_shape("initial_state", state, (u.shape[0], A.shape[1], u.shape[2]))
    for name, tensor in zip(("mask", "reset"), marks):
        check_shape(name, tensor, tuple(u.shape[:2]))


def _check(u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backend: str) -> None:
    check_backend_name(backend, SELECTIVE_SCAN.backends)
    if u.dim() != 3 or u.shape[1] == 0:
        raise ValueError(f"u must be (batch, length ≥ 1, channels), got {tuple(u.shape)}")
    if dt.shape != u.shape:
        raise ValueError(f"dt must have the shape of u, {tuple(u.shape)}, got {tuple(dt.shape)}")
    if A.dim() != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(f"A must be (channels = {u.shape[2]}, states), got {tuple(A.shape)}")
    rows = (u.shape[0], u.shape[1], A.shape[1])
    for name, tensor in (("B", B), ("C", C)):
        if tuple(tensor.shape) != rows:
            raise ValueError(f"{name} must be (batch, length, states) = {rows}, got {tuple(tensor.shape)}")
