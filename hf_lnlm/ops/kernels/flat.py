"""How numba kernels see tensors: by address and row stride, so that slices of a projection need no copy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# What kernels write: neither torch's default dtype nor its default device may change it.
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
DOUBLES: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


class Flat(NamedTuple):
    """Memory of a tensor that a kernel reads.

    Attributes:
        tensor: keeps the memory alive; None for an absent argument.
        address: of the first element; 0 for None.
        stride: elements from one row to the next.
    """

    tensor: torch.Tensor | None
    address: int
    stride: int


_ABSENT = Flat(None, 0, 0)


def _elsewhere(tensor: torch.Tensor) -> ValueError:
    return ValueError(f"tensors of the cpu backend must be on the CPU, got one on {tensor.device}")


def flat_rows(tensor: torch.Tensor | None) -> Flat:
    """View `(..., width)` as float32 rows of which row `i` begins at element `i · stride`.

    Args:
        tensor: any float tensor whose last dimension is the row, or None. Other dtypes than float32, and layouts whose
            rows are not evenly spaced, are copied.
    """
    if tensor is None:
        return _ABSENT
    if not tensor.is_cpu:
        raise _elsewhere(tensor)
    width = tensor.shape[-1]
    rows = tensor.detach().float().reshape(-1, width)
    if width > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return Flat(rows, rows.data_ptr(), rows.stride(0) if rows.shape[0] > 1 else width)


def flat_vector(tensor: torch.Tensor | None) -> Flat:
    """Contiguous float32 memory of a tensor."""
    if tensor is None:
        return _ABSENT
    if not tensor.is_cpu:
        raise _elsewhere(tensor)
    if not (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        tensor = tensor.detach().float().contiguous()
    return Flat(tensor, tensor.data_ptr(), tensor.shape[-1])


def flat_bytes(tensor: torch.Tensor | None) -> Flat:
    """Contiguous memory of a boolean tensor, one byte each."""
    if tensor is None:
        return _ABSENT
    if not tensor.is_cpu:
        raise _elsewhere(tensor)
    tensor = tensor.to(torch.uint8).contiguous()
    return Flat(tensor, tensor.data_ptr(), tensor.shape[-1])


def flat_integers(tensor: torch.Tensor | None) -> Flat:
    """Contiguous memory of a tensor of 64-bit integers."""
    if tensor is None:
        return _ABSENT
    if not tensor.is_cpu:
        raise _elsewhere(tensor)
    tensor = tensor.long().contiguous()
    return Flat(tensor, tensor.data_ptr(), tensor.shape[-1])
