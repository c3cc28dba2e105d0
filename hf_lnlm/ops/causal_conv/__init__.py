"""Causal depthwise convolution with carried state, masks and packed documents.

`y_t = act(bias + Σ_j weight_{K-1-j} x_{t-j})`: the short convolution in front of a selective scan.

Backends: `reference` (float64 sum), `eager` (torch, any device), `cpu` (numba, fused with SiLU), `gpu`
(Triton, likewise).
"""

from __future__ import annotations

import torch

from ..backend import Operation, check_backend_name, own_precision
from ..operator import FusedOperator, Passes, check_shape
from .eager import causal_conv_eager, causal_conv_eager_backward
from .gather_index import conv_gather_index
from .inputs import INPUTS
from .reference import causal_conv_reference
from .step import causal_conv_step

__all__ = ["CAUSAL_CONV", "causal_conv", "conv_gather_index"]


def _cpu() -> Passes:
    from .cpu import causal_conv_cpu, causal_conv_cpu_backward, causal_conv_cpu_step

    return Passes(causal_conv_cpu, causal_conv_cpu_backward, causal_conv_cpu_step)


def _gpu() -> Passes:
    from .gpu import causal_conv_gpu, causal_conv_gpu_backward

    return Passes(causal_conv_gpu, causal_conv_gpu_backward, causal_conv_step)


CAUSAL_CONV = Operation(
    "causal_conv",
    reference=causal_conv_reference,
    eager=Passes(causal_conv_eager, causal_conv_eager_backward, causal_conv_step),
    cpu=_cpu,
    gpu=_gpu,
)


def _shapes(x: torch.Tensor, weight: torch.Tensor, *_rest: object) -> tuple[tuple[int, ...], ...]:
    return (x.shape[0], weight.shape[1] - 1, x.shape[2]), (0,)


_OPERATOR = FusedOperator(CAUSAL_CONV, __file__, INPUTS, "bool activation", _shapes)


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    gather_index: torch.Tensor | None = None,
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
        gather_index: `conv_gather_index` of mask and document starts, or None when every position is real and of one
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
    _check(x, weight, state, gather_index)
    check_shape("bias", bias, (x.shape[2],))
    check_backend_name(backend, CAUSAL_CONV.backends)
    x = x.flip(1) if reverse else x
    if backend == "reference":
        y, last = causal_conv_reference(x, weight, bias, state, gather_index, activation)
        last = last if x.dtype == torch.float64 else last.float()
    else:
        call = x, weight, bias, state, gather_index, activation
        run, save = _OPERATOR.prepare(backend, *call)
        with own_precision(x.device):
            y, last = run(*call, save)[:2]
    y = y.to(x.dtype)
    return (y.flip(1) if reverse else y), last


def _check(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor | None, gather_index: torch.Tensor | None
) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, length ≥ 1, channels), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"weight must be (channels = {x.shape[2]}, kernel ≥ 1), got {tuple(weight.shape)}")
    kernel = weight.shape[1]
    check_shape("state", state, (x.shape[0], kernel - 1, x.shape[2]))
    check_shape("gather_index", gather_index, (x.shape[0], x.shape[1] + 1, kernel - 1))
