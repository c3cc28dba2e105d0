"""Small modules of the state-space mixers: norms, and the filter of a convolution whatever wraps it."""

import torch
import torch.nn.functional as F
from torch import nn


class SSMRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32.

    Args:
        size: width.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        if hidden.dtype == self.weight.dtype and hidden.dtype in (torch.float32, torch.float64):
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        normal = F.rms_norm(
            hidden.float() if hidden.dtype != torch.float64 else hidden, hidden.shape[-1:], None, self.eps
        )
        return self.weight * normal.to(hidden.dtype)


class GatedRMSNorm(nn.Module):
    """RMS norm of `y · silu(z)` in groups of channels: the gate comes before the norm (arXiv 2405.21060, section 7).

    Args:
        size: width.
        groups: groups that are normalised apart.
        eps: added to the mean square.
    """

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Gate and normalise `(batch, length, size)`."""
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        gated = (y.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (self.groups, -1))
        normal = F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2)
        return self.weight * normal.to(y.dtype)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a module is of this very class and nothing wraps or watches it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooked and "forward" not in vars(module) and not hasattr(module, "_hf_hook")


def is_plain_conv(module: nn.Module) -> bool:
    """Tell whether filter and bias are all there is to a convolution: an `nn.Conv1d` that nothing wraps or watches."""
    return _is_plain(module, nn.Conv1d)


def is_plain_norm(module: nn.Module) -> bool:
    """Tell whether the weight is all there is to a gated norm that nothing wraps or watches."""
    return _is_plain(module, GatedRMSNorm)


def conv_filter(module: nn.Module, channels: int, kernel: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return filter `(channels, kernel)` and bias `(channels,)` of a depthwise convolution.

    Args:
        module: an `nn.Conv1d(channels, channels, kernel, groups=channels, padding=kernel - 1)`, or what peft, accelerate
            or a parametrisation made of one: an affine map is known by its response to an impulse and to nothing.
        channels: number of channels.
        kernel: width of the filter.
    """
    if is_plain_conv(module):
        return module.weight.squeeze(1), module.bias  # type: ignore[operator, return-value]
    like = next(module.parameters())
    probe = torch.zeros(2, channels, 1, dtype=like.dtype, device=like.device if like.device.type != "meta" else None)
    probe[0] = 1.0
    impulse, silence = module(probe)
    return (impulse - silence).flip(1), silence[:, 0]
