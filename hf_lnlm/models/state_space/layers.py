"""Small modules of the state-space mixers: norms, and the filter of a convolution whatever wraps it."""

import torch
from torch import nn

from ...nn.effective_weight import has_hooks, has_plain_weights
from ...ops.rms_norm import RMS_NORM, rms_norm


class SSMRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32.

    Args:
        size: width.
        eps: added to the mean square.
        backend: the config's field.
    """

    def __init__(self, size: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.backend = eps, RMS_NORM.own(backend)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return rms_norm(hidden, self.weight, self.eps, backend=self.backend)


class GatedRMSNorm(nn.Module):
    """RMS norm of `y · silu(z)` in groups of channels: the gate comes before the norm (arXiv 2405.21060, section 7).

    Args:
        size: width.
        groups: groups that are normalised apart.
        eps: added to the mean square.
        backend: the config's field.
    """

    def __init__(self, size: int, groups: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps, self.backend = groups, eps, RMS_NORM.own(backend)

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Gate and normalise `(batch, length, size)`."""
        return rms_norm(y, self.weight, self.eps, z, self.groups, self.backend)


_PLAIN = {nn.Conv1d, nn.Linear, SSMRMSNorm, GatedRMSNorm}


def is_unwrapped(*modules: nn.Module) -> bool:
    """Tell whether the weights are all there is to convolutions, linear layers and norms: nothing wraps or watches them."""
    for module in modules:  # noqa: SIM110 (a generator would be a frame more in every step)
        if type(module) not in _PLAIN or has_hooks(module) or not has_plain_weights(module):
            return False
    return True


def conv_filter(module: nn.Module, channels: int, kernel: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return filter `(channels, kernel)` and bias `(channels,)` of a depthwise convolution.

    Args:
        module: an `nn.Conv1d(channels, channels, kernel, groups=channels, padding=kernel - 1)`, or what peft, accelerate
            or a parametrisation made of one: an affine map is known by its response to an impulse and to nothing.
        channels: number of channels.
        kernel: width of the filter.
    """
    if is_unwrapped(module):
        return module.weight.squeeze(1), module.bias  # type: ignore[operator, return-value]
    like = next(module.parameters())
    probe = torch.zeros(2, channels, 1, dtype=like.dtype, device=like.device if like.device.type != "meta" else None)
    probe[0] = 1.0
    impulse, silence = module(probe)
    return (impulse - silence).flip(1), silence[:, 0]
