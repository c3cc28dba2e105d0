"""Convolutions over time that padding cannot touch, with kernels that adapters can reach.

A kernel is kept as an `nn.Linear` from `kernel_size` neighbouring frames to one output frame, so that LoRA, quantisation
and offloading, which know `nn.Linear` only, apply to convolutions as they do to projections. The fast path reads the
weight through `effective_weight` and runs the fused convolution of torch.

Masked frames are zeros before every convolution, exactly what lies beyond the ends of a sequence. With left-justified
rows (`left_justify`) that makes every real output frame independent of how a batch was padded.

Glossary: C channels in, F features out, k kernel size, T frames. Feature maps are `(batch, C, T)` (`(batch, T, C)` where
they are causal), masks `(batch, T)`.
Complexity: O(batch · T · k · C · F) multiplications; a masked frame costs as much as a real one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.time_conv import normalised_weight, time_conv
from .assign import assign, plain_like
from .effective_weight import effective_weight


class Justified(NamedTuple):
    """A batch with every row's real tokens moved to the front, in their order.

    Attributes:
        order: `(batch, T)` source position of each justified position; masked ones follow the real ones. None if every
            row is justified as it is (right padding).
        mask: `(batch, T)` true at the real tokens of the justified rows.
        lengths: `(batch,)` number of real tokens.
    """

    order: torch.Tensor | None
    mask: torch.Tensor
    lengths: torch.Tensor


def left_justify(mask: torch.Tensor) -> Justified:
    """Plan the move of real tokens to the front of their rows, whatever the padding: left, right or inside.

    Args:
        mask: `(batch, T)` true at real tokens.
    """
    lengths = mask.sum(1)
    if not torch.compiler.is_compiling() and bool((mask[:, :-1] >= mask[:, 1:]).all()):
        return Justified(None, mask, lengths)
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    positions = torch.arange(mask.shape[1], device=mask.device)
    return Justified(order, positions < lengths[:, None], lengths)


def justify(tensor: torch.Tensor, plan: Justified) -> torch.Tensor:
    """Move the real positions of `(batch, T, width)` to the front; zeros follow them."""
    if plan.order is not None:
        tensor = tensor.gather(1, plan.order[:, :, None].expand(-1, -1, tensor.shape[2]))
    return tensor.masked_fill(~plan.mask[:, :, None], 0.0)


def restore(tensor: torch.Tensor, plan: Justified) -> torch.Tensor:
    """Undo `justify` on `(batch, T, width)`; masked positions become zero."""
    tensor = tensor.masked_fill(~plan.mask[:, :, None], 0.0)
    if plan.order is None:
        return tensor
    return torch.zeros_like(tensor).scatter(1, plan.order[:, :, None].expand_as(tensor), tensor)


def mask_frames(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zero the masked frames of `(batch, C, T)`."""
    return features if mask is None else features.masked_fill(~mask[:, None, :], 0.0)


def strided_mask(mask: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """Mask of the frames that a stride keeps, `(batch, ceil(T / stride))`, for left-justified rows."""
    return mask if mask is None or stride == 1 else mask[:, ::stride]


def window_mask(mask: torch.Tensor, kernel_size: int, padding: int) -> torch.Tensor:
    """Tell which windows see at least one real token.

    Args:
        mask: `(batch, T)` true at real tokens.
        kernel_size: frames a window sees.
        padding: zeros put before the first and after the last frame.

    Returns:
        `(batch, T + 2 padding - kernel_size + 1)` booleans.
    """
    padded = F.pad(mask, (padding, padding))
    return padded.unfold(1, kernel_size, 1).any(2)


@torch.no_grad()
def init_centred(weight: torch.Tensor, std: float) -> None:
    """Draw a weight from N(0, std^2) and take each row's mean away: what all inputs have in common moves no output.

    After a ReLU all features are positive, and most of what a row of plain normal weights gives is their common part, the
    same for every text: each layer passes on less of the difference between texts (Qiao et al. 2019, "Weight
    Standardization", keep the mean at zero all through training).

    Args:
        weight: `(rows, inputs)`; left alone if it was loaded from a checkpoint. A single input has no mean to take away.
        std: standard deviation of the result.
    """
    if getattr(weight, "_is_hf_initialized", False):
        return
    draw, inputs = plain_like(weight).normal_(), weight.shape[1]
    if inputs > 1:
        draw = (draw - draw.mean(1, keepdim=True)) * (inputs / (inputs - 1)) ** 0.5
    assign(weight, draw * std)


def convolve(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1, padding: int = 0
) -> torch.Tensor:
    """`F.conv1d` that does not copy an input which lies in memory frame by frame, as a transposed text does.

    On a CPU the two-dimensional convolution of an image of height 1 takes that order as it is, and is a third faster.

    Args:
        features: `(batch, C, T)`.
        weight, bias, stride, padding: as in `F.conv1d`.

    Returns:
        `(batch, F, T')`.
    """
    if features.device.type != "cpu" or features.is_contiguous():
        return F.conv1d(features, weight, bias, stride, padding)
    image = F.conv2d(features.unsqueeze(2), weight.unsqueeze(2), bias, (1, stride), (0, padding))
    return image.squeeze(2)


class TimeConvolution(nn.Module):
    """Convolution over time, `(batch, C, T)` → `(batch, F, T')`.

    Args:
        in_features: channels of a frame, C.
        out_features: feature maps, F.
        kernel_size: frames a window sees, k.
        padding: zeros before the first and after the last frame.
        stride: frames from one window to the next.
        weight_norm: learn each map's length (`gain`) and direction apart.
        bias: whether every map has an offset.

    Attributes:
        projection: the kernel, `nn.Linear(C * k, F)`; its input holds a window channel by channel.
        gain: `(F,)` lengths of the maps' weights, or None without `weight_norm`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        padding: tuple[int, int] = (0, 0),
        stride: int = 1,
        weight_norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kernel_size = in_features, out_features, kernel_size
        self.padding, self.stride = padding, stride
        self.projection = nn.Linear(in_features * kernel_size, out_features, bias=bias)
        self.gain = nn.Parameter(torch.ones(out_features)) if weight_norm else None

    def kernel(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight `(F, C * k)` and bias `(F,)` in effect, for an input of `like`'s dtype and device."""
        weight, bias = effective_weight(self.projection, self.in_features * self.kernel_size, like.dtype, like.device)
        return normalised_weight(weight, self.gain), bias

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve.

        Args:
            features: `(batch, C, T)`.
            mask: `(batch, T)` true at real frames; others count as zeros.

        Returns:
            `(batch, F, (T + padding - k) // stride + 1)`.

        Raises:
            ValueError: padding included, the input is shorter than one window.
        """
        features = mask_frames(features, mask)
        left, right = self.padding
        if features.shape[2] + left + right < self.kernel_size:
            raise ValueError(
                f"a window has {self.kernel_size} frames, got {features.shape[2]} and padding {self.padding}"
            )
        weight, bias = self.kernel(features)
        weight = weight.view(self.out_features, self.in_features, self.kernel_size)
        if left == right:
            return convolve(features, weight, bias, self.stride, left)
        return convolve(F.pad(features, (left, right)), weight, bias, self.stride)

    def extra_repr(self) -> str:
        """Describe the module in `print(model)`."""
        return f"kernel_size={self.kernel_size}, padding={self.padding}, stride={self.stride}"


class CausalConvolution(TimeConvolution):
    """Convolution over `(batch, T, C)` whose output at a frame sees that frame and the k - 1 before it, never a later one.

    It runs over a sequence in pieces of any length: the last k - 1 real frames (`window`) are all that a piece needs of
    those before it. Here the kernel holds a window frame by frame, so that the convolution is one matrix product.

    Args:
        in_features, out_features, kernel_size, weight_norm: as in `TimeConvolution`.
        gated: let the first half of the features through by the sigmoid of the second, which halves them.
        backend: of `time_conv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        weight_norm: bool = False,
        gated: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, kernel_size, weight_norm=weight_norm)
        self.gated, self.backend = gated, backend

    @property
    def window_size(self) -> int:
        """Frames of the past that one output needs, k - 1."""
        return self.kernel_size - 1

    @property
    def output_size(self) -> int:
        """Width of the output."""
        return self.out_features // 2 if self.gated else self.out_features

    def forward(  # type: ignore[override]
        self,
        frames: torch.Tensor,
        window: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve a piece, given the frames before it.

        Args:
            frames: `(batch, T, C)`, rows left-justified.
            window: `(batch, k - 1, C)` the last real frames before the piece; None at the beginning, for zeros.
            lengths: `(batch,)` real frames in each row; None if all T are real.
            documents: `(batch, T)` ascending numbers of the documents that a row holds, 0 being that of `window`; no
                frame then sees another document. The sum is taken tap by tap, which a tracer can follow. Needs `lengths`.

        Returns:
            output `(batch, T, output_size)` and the next window `(batch, k - 1, C)`, unchanged for a row without a real
            frame.
        """
        if self.window_size == 0:
            joined = frames
        elif window is None:
            joined = F.pad(frames, (0, 0, self.window_size, 0))
        else:
            joined = torch.cat([window.to(frames.dtype), frames], dim=1)
        if documents is None or lengths is None:
            return self._convolve(joined, None), self._next_window(joined, lengths)
        numbers = F.pad(documents, (self.window_size, 0))
        last = numbers.gather(1, (lengths + self.window_size - 1).clamp(min=0)[:, None])
        kept = joined * (numbers == last)[:, :, None]
        return self._convolve(joined, numbers), self._next_window(kept, lengths)

    def _convolve(self, joined: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        size = self.in_features * self.kernel_size
        weight, bias = effective_weight(self.projection, size, joined.dtype, joined.device)
        return time_conv(joined, weight, self.gain, bias, self.kernel_size, self.gated, documents, self.backend)

    def _next_window(self, joined: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        if lengths is None:
            return joined[:, joined.shape[1] - self.window_size :].contiguous()
        places = lengths[:, None] + torch.arange(self.window_size, device=joined.device)
        return joined.gather(1, places[:, :, None].expand(-1, -1, joined.shape[2]))
