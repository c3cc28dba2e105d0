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

from ..backend import pick_backend
from ..operator import check_shape, runs_directly
from .operator import run_selective_scan
from .reference import selective_scan_reference
from .step import selective_scan_step

BACKENDS = ("reference", "eager", "cpu", "gpu")

__all__ = ["BACKENDS", "selective_scan"]


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
    alone = u.shape[1] == 1 and mask is None and reset is None and backend != "reference"
    if alone and runs_directly(u, dt, A, B, C, D, z, dt_bias, initial_state):
        if pick_backend(backend, u.device, BACKENDS, u.dtype) == "cpu" and softplus:
            from .cpu import selective_scan_cpu_step

            return selective_scan_cpu_step(u, dt, A, B, C, D, z, dt_bias, initial_state)
        return selective_scan_step(u, dt, A, B, C, D, z, dt_bias, initial_state, softplus)
    if reverse:
        u, dt, B, C = (t.flip(1) for t in (u, dt, B, C))
        z, mask, reset = (None if t is None else t.flip(1) for t in (z, mask, reset))
    if backend == "reference":
        y, state = selective_scan_reference(u, dt, A, B, C, D, z, dt_bias, initial_state, mask, reset, softplus)
        y, state = y.to(u.dtype), state if u.dtype == torch.float64 else state.float()
    else:
        tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, mask, reset)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, state, _ = run_selective_scan(*tensors, softplus, backend, save)
    return (y.flip(1) if reverse else y), state


def _check_optional(u: torch.Tensor, A: torch.Tensor, vectors: Any, z: Any, state: Any, marks: Any) -> None:
    for name, tensor in zip(("D", "dt_bias"), vectors):
        check_shape(name, tensor, (u.shape[2],))
    check_shape("z", z, tuple(u.shape))
    check_shape("initial_state", state, (u.shape[0], A.shape[1], u.shape[2]))
    for name, tensor in zip(("mask", "reset"), marks):
        check_shape(name, tensor, tuple(u.shape[:2]))


def _check(u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
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
