"""Pooling over time that ignores masked frames.

The published codes of several convolutional classifiers let padding take part in the maximum, so that a text's scores
depend on the longest text of its batch. Here a masked frame never wins, a row without any real frame gives zeros, and no
gradient is ever NaN.

Glossary: C channels, T frames, k frames kept. Feature maps are `(batch, C, T)`, masks `(batch, T)`, true at real frames.
Complexity: O(batch · C · T); `k_max_over_time` adds a factor of log T for its selection.
"""

import torch
import torch.nn.functional as F
from torch import nn


def lowest(dtype: torch.dtype) -> float:
    """Return the most negative finite number of a dtype: what a masked frame is given before a maximum."""
    return torch.finfo(dtype).min


def max_over_time(features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return each channel's greatest value over the real frames, `(batch, C)`; zeros for a row without any.

    Args:
        features: `(batch, C, T)`.
        mask: `(batch, T)`; None if every frame is real.
    """
    if mask is None:
        return features.amax(2)
    pooled = features.masked_fill(~mask[:, None, :], lowest(features.dtype)).amax(2)
    return pooled.masked_fill(~mask.any(1, keepdim=True), 0.0)


def mean_over_time(features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return each channel's mean over the real frames, `(batch, C)`; zeros for a row without any.

    Args:
        features: `(batch, C, T)`.
        mask: `(batch, T)`; None if every frame is real.
    """
    if mask is None:
        return features.mean(2)
    total = features.masked_fill(~mask[:, None, :], 0.0).sum(2)
    return total / mask.sum(1, keepdim=True).clamp(min=1).to(features.dtype)


def k_max_over_time(
    features: torch.Tensor, mask: torch.Tensor | None, k: int, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each channel's k greatest values in the order of time (Kalchbrenner et al. 2014, §3.2).

    Args:
        features: `(batch, C, T)`.
        mask: `(batch, T)`; None if every frame is real.
        k: frames of the output.
        keep: `(batch,)` values to keep of each row, at most k; None keeps k of every row.

    Returns:
        `(batch, C, k)`; a row with fewer real frames than it may keep ends in zeros.
    """
    length = features.shape[2]
    taken = min(k, length)
    ranked = features if mask is None else features.masked_fill(~mask[:, None, :], lowest(features.dtype))
    order = torch.sort(ranked, dim=2, descending=True, stable=True).indices  # of equal values, the earlier first
    places = order[:, :, :taken]
    quota = _quota(features, mask, taken, keep)
    beyond = torch.arange(taken, device=features.device) >= quota[:, None]
    places = places.masked_fill(beyond[:, None, :], length).sort(2).values
    kept = F.pad(features, (0, 1)).gather(2, places)  # the added frame is zero, and stands for "nothing kept"
    return F.pad(kept, (0, k - taken))


def _quota(features: torch.Tensor, mask: torch.Tensor | None, taken: int, keep: torch.Tensor | None) -> torch.Tensor:
    """Number of values each row really keeps, `(batch,)`."""
    quota = torch.full((features.shape[0],), taken, device=features.device)
    if mask is not None:
        quota = torch.minimum(quota, mask.sum(1))
    return quota if keep is None else torch.minimum(quota, keep)


def local_max(
    features: torch.Tensor, mask: torch.Tensor | None, kernel_size: int, stride: int, padding: int = 0
) -> torch.Tensor:
    """Return the greatest value of each window, `(batch, C, T')`; zeros where a window sees no real frame.

    Args:
        features: `(batch, C, T)`.
        mask: `(batch, T)`; None if every frame is real.
        kernel_size, stride, padding: in frames; padding never wins.
    """
    if mask is None:
        return F.max_pool1d(features, kernel_size, stride, padding)
    low = lowest(features.dtype)
    pooled = F.max_pool1d(features.masked_fill(~mask[:, None, :], low), kernel_size, stride, padding)
    return pooled.masked_fill(pooled == low, 0.0)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation (Ioffe & Szegedy 2015) of `(batch, C, T)` whose statistics leave masked frames out."""

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise.

        Args:
            features: `(batch, C, T)`; masked frames must be zero.
            mask: `(batch, T)`; None if every frame is real.
        """
        if mask is None or not self.training:
            return super().forward(features)
        weights = mask[:, None, :].to(features.dtype)
        count = weights.sum().clamp(min=1.0)
        mean = (features * weights).sum((0, 2)) / count
        centred = (features - mean[:, None]) * weights
        variance = centred.square().sum((0, 2)) / count
        self._remember(mean.detach(), variance.detach(), count.detach())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None] + self.bias[:, None]

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """Move the running statistics towards a batch's, as `nn.BatchNorm1d` does (its variance is the unbiased one)."""
        momentum = 0.1 if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1.0).clamp(min=1.0)
        buffers = dict(self.named_buffers())
        buffers["running_mean"].lerp_(mean.to(buffers["running_mean"].dtype), momentum)
        buffers["running_var"].lerp_(unbiased.to(buffers["running_var"].dtype), momentum)
        buffers["num_batches_tracked"].add_(1)


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) of `(batch, C, T)` whose statistics leave masked frames out."""

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise each row's groups of channels.

        Args:
            features: `(batch, C, T)`; masked frames must be zero.
            mask: `(batch, T)`; None if every frame is real.
        """
        if mask is None:
            return super().forward(features)
        grouped = features.unflatten(1, (self.num_groups, -1))
        weights = mask[:, None, None, :].to(features.dtype)
        count = (mask.sum(1) * grouped.shape[2]).clamp(min=1).to(features.dtype)[:, None, None, None]
        mean = (grouped * weights).sum((2, 3), keepdim=True) / count
        centred = (grouped - mean) * weights
        variance = centred.square().sum((2, 3), keepdim=True) / count
        normal = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return normal * self.weight[:, None] + self.bias[:, None]
