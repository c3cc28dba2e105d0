"""Views of tensors that numba kernels read: flat float32 arrays, so that slices of a projection need no copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

EMPTY = np.empty(0, np.float32)
_NO_BYTES = np.empty(0, np.uint8)


def flat_rows(tensor: torch.Tensor | None) -> tuple[Any, int]:
    """View `(..., width)` as one flat array in which row `i` begins at `i · stride`.

    Args:
        tensor: any float tensor whose last dimension is the row, or None.

    Returns:
        The array and the row stride in elements; an empty array and 0 for None. Other dtypes than float32, and layouts
        whose rows are not evenly spaced, are copied.
    """
    if tensor is None:
        return EMPTY, 0
    tensor = tensor.detach().float()
    if tensor.numel() == 0:
        return EMPTY, 0
    if not _evenly_spaced(tensor):
        tensor = tensor.contiguous()
    width = tensor.shape[-1]
    rows = tensor.numel() // width
    stride = tensor.stride(-2) if tensor.dim() > 1 and rows > 1 else width
    return tensor.as_strided(((rows - 1) * stride + width,), (1,)).numpy(), stride


def _evenly_spaced(tensor: torch.Tensor) -> bool:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return False
    step = tensor.stride(-2) if tensor.dim() > 1 else 0
    for dim in range(tensor.dim() - 3, -1, -1):
        if tensor.shape[dim] > 1 and tensor.stride(dim) != step * tensor.shape[dim + 1]:
            return False
        step = step * tensor.shape[dim + 1]
    return True


def flat_vector(tensor: torch.Tensor | None, size: int) -> Any:
    """A contiguous float32 array of a vector; zeros of `size` for None."""
    return np.zeros(size, np.float32) if tensor is None else tensor.detach().float().contiguous().view(-1).numpy()


def bytes_of(tensor: torch.Tensor | None) -> Any:
    """A flat uint8 array of a boolean tensor; empty for None."""
    return _NO_BYTES if tensor is None else tensor.detach().to(torch.uint8).contiguous().view(-1).numpy()
