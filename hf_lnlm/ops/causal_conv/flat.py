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


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph, if the processor can read it."""
    if not tensor.is_cpu:
        raise ValueError(f"tensors of the cpu backend must be on the CPU, got one on {tensor.device}")
    return tensor.detach()


def flat_rows(tensor: torch.Tensor | None) -> Flat:
    """View `(..., width)` as float32 rows of which row `i` begins at element `i · stride`.

    Args:
        tensor: any float tensor whose last dimension is the row, or None. Other dtypes than float32, and layouts whose
            rows are not evenly spaced, are copied.
    """
    if tensor is None:
        return _ABSENT
    tensor = _local(tensor).float()
    stride = _row_stride(tensor)
    if stride is None:
        tensor, stride = tensor.contiguous(), tensor.shape[-1]
    return Flat(tensor, tensor.data_ptr(), stride)


def _row_stride(tensor: torch.Tensor) -> int | None:
    """Elements from one row to the next; None if rows are not evenly spaced."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    first = following = 0
    for dim in range(tensor.dim() - 2, -1, -1):
        if tensor.shape[dim] == 1:
            continue
        stride = tensor.stride(dim)
        if stride == 0 or (following and stride != following):
            return None
        first = first or stride
        following = stride * tensor.shape[dim]
    return first or tensor.shape[-1]


def flat_vector(tensor: torch.Tensor | None) -> Flat:
    """Contiguous float32 memory of a tensor."""
    if tensor is None:
        return _ABSENT
    if not (tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()):
        tensor = _local(tensor).float().contiguous()
    return Flat(tensor, tensor.data_ptr(), tensor.shape[-1])


def flat_bytes(tensor: torch.Tensor | None) -> Flat:
    """Contiguous memory of a boolean tensor, one byte each."""
    if tensor is None:
        return _ABSENT
    tensor = _local(tensor).to(torch.uint8).contiguous()
    return Flat(tensor, tensor.data_ptr(), tensor.shape[-1])


def flat_integers(tensor: torch.Tensor | None) -> Flat:
    """Contiguous memory of a tensor of 64-bit integers."""
    if tensor is None:
        return _ABSENT
    tensor = _local(tensor).long().contiguous()
    return Flat(tensor, tensor.data_ptr(), tensor.shape[-1])
