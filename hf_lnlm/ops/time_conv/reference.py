"""A causal convolution over time as its defining sum over taps, in plain steps that a tracer can follow.

References:
    [1] Dauphin, Fan, Auli, Grangier 2017, "Language Modeling with Gated Convolutional Networks", equation (1).
    [2] Salimans, Kingma 2016, "Weight Normalization", equation (2).
"""

import torch
import torch.nn.functional as F


def row_lengths(weight: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean lengths of a weight's rows, `(F,)`; a row of zeros counts as very short, not as nothing."""
    return torch.linalg.vector_norm(weight, dim=1).clamp(min=max(torch.finfo(weight.dtype).tiny, 1e-12))


def normalised_weight(weight: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of `(F, size)` in the lengths `gain` `(F,)` [2], or as they are without it."""
    return weight if gain is None else weight * (gain.to(weight) / row_lengths(weight))[:, None]


def time_conv_reference(
    frames: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel_size: int,
    gated: bool = False,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add up the taps that stay within a frame's document; arguments and result as in `time_conv`."""
    taps = normalised_weight(weight, gain).unflatten(1, (kernel_size, -1))
    length = frames.shape[1] - kernel_size + 1
    output = frames.new_zeros(frames.shape[0], length, weight.shape[0])
    for tap in range(kernel_size):
        reached = slice(tap, tap + length)
        seen = frames[:, reached]
        if documents is not None:
            seen = seen * (documents[:, reached] == documents[:, kernel_size - 1 :])[:, :, None]
        output = output + F.linear(seen, taps[:, tap])
    output = output if bias is None else output + bias
    return F.glu(output, dim=2) if gated else output
