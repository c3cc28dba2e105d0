"""Initial values computed whole, given to a parameter that may be sharded, quantised or not there yet."""

import torch
from transformers import initialization as init


def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter its initial value, unless it was loaded from a checkpoint.

    Orthogonal matrices, gate-wise blocks and the like can't be drawn shard by shard. Under FSDP2 or tensor parallelism
    they are computed whole on the first rank and distributed as the parameter is.

    Args:
        parameter: any shape; a plain tensor or a `DTensor`.
        value: the same shape, any float type.
    """
    if hasattr(parameter, "device_mesh") and not getattr(parameter, "_is_hf_initialized", False):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(parameter, DTensor):
            raise ValueError(f"a sharded parameter must be a DTensor, got {type(parameter).__name__}")
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    init.copy_(parameter, value)


def plain_like(parameter: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an uninitialised tensor of a parameter's whole shape to compute on: a parameter may be sharded or quantised.

    Args:
        parameter: any shape; only its shape, type and device are looked at.
        dtype: of the result; the parameter's if None.
    """
    return torch.empty(tuple(parameter.shape), dtype=dtype or parameter.dtype, device=parameter.device)
