"""Causal depthwise convolution with carried state, masks and packed documents.

`y_t = act(bias + Σ_j weight_{K-1-j} x_{t-j})`: the short convolution in front of a selective scan.

Backends: `reference` (float64 sum), `eager` (torch, any device), `cpu` (numba, fused with SiLU), `gpu`
(Triton, likewise).
"""

from __future__ import annotations

import torch

from ..backend import pick_backend
from ..operator import check_shape, runs_directly
from .operator import run_causal_conv
from .reference import causal_conv_reference
from .step import causal_conv_step
from .taps import tap_table

BACKENDS = ("reference", "eager", "cpu", "gpu")

__all__ = ["BACKENDS", "causal_conv", "tap_table"]


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    taps: torch.Tensor | None = None,
    activation: bool = True,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve every channel with its own causal filter.

    Args:
        x: `(batch, length, channels)`.
        weight: `(channels, kernel)`, the current position's tap last.
        bias: `(channels,)` or None.
        state: `(batch, kernel - 1, channels)`, the inputs before `x`, oldest first; None for zeros.
        taps: what `tap_table` made of mask and document starts, or None when every position is real and of one
            document. With `reverse`, made of the flipped mask.
        activation: whether SiLU follows.
        reverse: run from the last position to the first; the state then stands for the inputs after `x`.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`.

    Returns:
        `y` like `x`, and the next state `(batch, kernel - 1, channels)` in the computation's dtype (float32, or float64
        for float64 input). Outputs at masked positions are finite and meaningless.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    _check(x, weight, state, taps)
    check_shape("bias", bias, (x.shape[2],))
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    if x.shape[1] == 1 and taps is None and backend != "reference" and runs_directly(x, weight, bias, state):
        if pick_backend(backend, x.device, BACKENDS, x.dtype) == "cpu":
            from .cpu import causal_conv_cpu_step

            return causal_conv_cpu_step(x, weight, bias, state, activation)
        return causal_conv_step(x, weight, bias, state, activation)
    if reverse:
        x = x.flip(1)
    if backend == "reference":
        y, last = causal_conv_reference(x, weight, bias, state, taps, activation)
        y, last = y.to(x.dtype), last if x.dtype == torch.float64 else last.float()
    else:
        y, last = run_causal_conv(x, weight, bias, state, taps, activation, backend)
    return (y.flip(1) if reverse else y), last


def _check(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor | None, taps: torch.Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, length ≥ 1, channels), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"weight must be (channels = {x.shape[2]}, kernel ≥ 1), got {tuple(weight.shape)}")
    kernel = weight.shape[1]
    if state is not None and tuple(state.shape) != (x.shape[0], kernel - 1, x.shape[2]):
        raise ValueError(f"state must be {(x.shape[0], kernel - 1, x.shape[2])}, got {tuple(state.shape)}")
    if taps is not None and tuple(taps.shape) != (x.shape[0], x.shape[1] + 1, kernel - 1):
        raise ValueError(f"taps must be {(x.shape[0], x.shape[1] + 1, kernel - 1)}, got {tuple(taps.shape)}")
