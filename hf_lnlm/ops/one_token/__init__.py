"""One decoded token of a whole Mamba-1 or Mamba-2 layer, in three calls: into the mixer, between its projections, out.

While decoding, a layer is two dozen operations on a few thousand numbers each, and their overhead is most of the time. The
law is the composition of norm, projections, `causal_conv`, `selective_scan` and `ssd`; here it runs without their checks,
as kernels of the `cpu` backend (numba) or as few calls of torch (`eager`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..backend import pick_backend
from ..operator import plain_tensors
from .eager import enter_eager, leave_eager, s6_token_eager, ssd_token_eager

__all__ = ["s6_token", "ssd_token", "token_backend", "token_ends"]

# Rows up to which the kernels' own matrix products keep up with the library's.
MOST_ROWS = 8

Token = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def token_backend(backend: str, *tensors: torch.Tensor | None) -> str | None:
    """Choose the backend of one token: `cpu`, `eager`, or None when only the composition can run.

    Args:
        backend: the config's field.
        tensors: everything that would be read; None for what is absent. All must be of one dtype, float32 or float64.

    Raises:
        ValueError: `cpu` is asked for and cannot run.
    """
    first: Any = tensors[0]
    dtype = first.dtype
    if backend not in ("auto", "cpu", "eager") or dtype not in (torch.float32, torch.float64):
        return None
    if torch.is_grad_enabled() or not plain_tensors(*tensors):
        return None
    if len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
        return None
    return pick_backend(backend, first.device, ("eager", "cpu"), dtype) if dtype == torch.float32 else "eager"


def token_ends(backend: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Return the functions for one token's way into and out of a mixer; see `enter_cpu` and `leave_cpu`."""
    if backend == "eager":
        return enter_eager, leave_eager
    from .cpu import enter_cpu, leave_cpu

    return enter_cpu, leave_cpu


def s6_token(backend: str) -> Token:
    """Return the function for one token of Mamba-1; see `s6_token_cpu` for its arguments."""
    if backend == "eager":
        return s6_token_eager
    from .cpu import s6_token_cpu

    return s6_token_cpu


def ssd_token(backend: str) -> Token:
    """Return the function for one token of Mamba-2; see `ssd_token_cpu` for its arguments."""
    if backend == "eager":
        return ssd_token_eager
    from .cpu import ssd_token_cpu

    return ssd_token_cpu
