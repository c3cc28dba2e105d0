"""A causal convolution over time with all channels in and out, with weight normalisation and a gate.

    y_t = act(bias + Σ_j W_j x_{t-k+1+j})        W = gain · V / ‖V‖ by rows, act the gated linear unit or nothing

Backends: `reference` (the sum over taps), `eager` (one matrix product of windows, or nine where that is less).
"""

import torch

from ..backend import Operation
from .im2col_conv import time_conv_eager
from .reference import normalised_weight, time_conv_reference

__all__ = ["TIME_CONV", "normalised_weight", "time_conv"]

TIME_CONV = Operation("time_conv", reference=time_conv_reference, eager=time_conv_eager)


def time_conv(
    frames: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel_size: int,
    gated: bool = False,
    documents: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolve.

    Args:
        frames: `(batch, T + k - 1, C)`, the first k - 1 of them before the first output.
        weight: `(F, k * C)`, a window frame by frame.
        gain: `(F,)` length of each filter, whatever that of its row in `weight`; None takes the rows as they are.
        bias: `(F,)` or None.
        kernel_size: k.
        gated: let the first half of the features through by the sigmoid of the second.
        documents: `(batch, T + k - 1)` document of each frame: an output sees frames of its own only. None: all are
            one. Such sums are taken tap by tap.
        backend: `auto`, `reference` or `eager`.

    Returns:
        `(batch, T, F)`, or `(batch, T, F / 2)` if gated.
    """
    chosen = TIME_CONV.pick(backend, frames.device)
    run = TIME_CONV.load("reference" if documents is not None else chosen)
    output: torch.Tensor = run(frames, weight, gain, bias, kernel_size, gated, documents)
    return output
