"""A convolution over time as one matrix product, with weight normalisation and gate fused into it.

A window of k frames is a row of a matrix, the filters are the columns of another: that product is the convolution. Weight
normalisation (Salimans & Kingma 2016), w = g v / ‖v‖, scales the columns of the product instead of the filters, so that
the normalised weight is never built. `gated_windows` takes everything from the windows to the gated linear unit
(Dauphin et al. 2017, eq. 1) as one step of the graph, whose gradient is written out, and by `winograd_conv` where that
pays; elsewhere than in plain training on a CPU the same steps are left to autograd.

Glossary: C channels in, F features, k kernel size, T frames; v ↔ `weight`, g ↔ `gain`, z = v · window ↔ `product`.
Complexity: O(batch · T · k · C · F) multiplications; the windows take k times the memory of the frames while they are used,
and only the frames are kept for the gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .reference import row_lengths
from .winograd_conv import WinogradConv, winograd_pays


def windows_of(frames: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Return the windows of `(batch, T + k - 1, C)` as rows `(batch, T, k * C)`, frame by frame."""
    length = frames.shape[1] - kernel_size + 1
    if kernel_size == 1:
        return frames
    return torch.cat([frames[:, tap : tap + length] for tap in range(kernel_size)], dim=2)


def window_product(
    frames: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor | None, kernel_size: int
) -> torch.Tensor:
    """Convolve without a gate; arguments and result as in `time_conv`."""
    windows = windows_of(frames, kernel_size)
    if gain is None:
        return F.linear(windows, weight, bias)
    scaled = F.linear(windows, weight) * (gain.to(weight) / row_lengths(weight))
    return scaled if bias is None else scaled + bias


def time_conv_eager(
    frames: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel_size: int,
    gated: bool = False,
    _documents: None = None,
) -> torch.Tensor:
    """Convolve one document; arguments and result as in `time_conv`."""
    if gated and bias is not None:
        return gated_windows(frames, weight, gain, bias, kernel_size)
    output = window_product(frames, weight, gain, bias, kernel_size)
    return F.glu(output, dim=2) if gated else output


def gated_windows(
    frames: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor, kernel_size: int
) -> torch.Tensor:
    """Convolve with a gate; arguments and result as in `time_conv`."""
    given = [frames, weight, bias] + ([] if gain is None else [gain])
    if _is_plain(given) and (_is_training(given) or winograd_pays(frames, weight, kernel_size)):
        return _GatedWindows.apply(frames, weight, gain, bias, kernel_size)
    return F.glu(window_product(frames, weight, gain, bias, kernel_size), dim=-1)


def _is_training(given: list[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def _is_plain(given: list[torch.Tensor]) -> bool:
    """Whether all is on a CPU, in one precision, and nothing traces or transforms the graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    first = given[0]
    alike = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype == first.dtype for t in given)
    return alike and first.device.type == "cpu" and not torch._C._are_functorch_transforms_active()


class _GatedWindows(torch.autograd.Function):
    """Windows, product, normalisation and gate with their gradient; once differentiable."""

    @staticmethod
    def forward(ctx: Any, frames: Any, weight: Any, gain: Any, bias: Any, kernel_size: int) -> torch.Tensor:
        """Compute; see `gated_windows`."""
        ctx.four, ctx.kernel_size = winograd_pays(frames, weight, kernel_size), kernel_size
        lengths = None if gain is None else row_lengths(weight)
        product = WinogradConv(frames, weight).output() if ctx.four else _product(frames, weight, kernel_size)
        ctx.save_for_backward(frames, weight, gain, bias, lengths, product)
        output = F.glu(_scaled(product, gain, lengths, bias), dim=1)
        return output.view(frames.shape[0], -1, output.shape[1])[:, : frames.shape[1] - kernel_size + 1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of frames, weight, gain and bias."""
        frames, weight, gain, bias, lengths, product = ctx.saved_tensors
        features = _scaled(product, gain, lengths, bias)
        missing = product.shape[0] // frames.shape[0] - gradient.shape[1]
        gradient = F.pad(gradient, (0, 0, 0, missing)) if missing else gradient
        inner = torch.ops.aten.glu_backward(gradient.reshape(product.shape[0], -1), features, 1)
        bias_gradient = inner.sum(0)
        gain_gradient = correction = None
        if gain is not None:
            scale_gradient = torch.linalg.vecdot(inner, product, dim=0)
            gain_gradient = scale_gradient / lengths
            correction = -gain_gradient * gain / lengths.square()
            inner = inner.mul_(gain / lengths)
        wanted = ctx.needs_input_grad[0]
        if ctx.four:
            frames_gradient, weight_gradient = WinogradConv(frames, weight).gradients(inner, wanted)
        else:
            weight_gradient = inner.mT @ windows_of(frames, ctx.kernel_size).flatten(0, 1)
            frames_gradient = _folded(inner @ weight, frames.shape, ctx.kernel_size) if wanted else None
        if correction is not None:
            weight_gradient.addcmul_(weight, correction[:, None])
        return frames_gradient, weight_gradient, gain_gradient, bias_gradient, None


def _product(frames: torch.Tensor, weight: torch.Tensor, kernel_size: int) -> torch.Tensor:
    return windows_of(frames, kernel_size).flatten(0, 1) @ weight.mT


def _scaled(product: torch.Tensor, gain: Any, lengths: Any, bias: torch.Tensor) -> torch.Tensor:
    """`product` `(rows, F)` times gain / lengths, plus bias."""
    return product + bias if gain is None else torch.addcmul(bias, product, gain / lengths)


def _folded(windows: torch.Tensor, shape: torch.Size, kernel_size: int) -> torch.Tensor:
    """Add windows `(batch · T, k * C)` up at the frames they were cut from, `(batch, T + k - 1, C)`."""
    batch, total, width = shape
    if kernel_size == 1:
        return windows.view(shape)
    length = total - kernel_size + 1
    taps = windows.view(batch, length, kernel_size, width)
    frames = windows.new_zeros(shape)
    for tap in range(kernel_size):
        frames[:, tap : tap + length] += taps[:, :, tap]
    return frames
