"""One decoded token of a whole Mamba-1 or Mamba-2 layer, in three calls: into the mixer, between its projections, out.

While decoding, a layer is two dozen operations on a few thousand numbers each, and their overhead is most of the time.
Here it runs without the checks of norm, projections, `causal_conv`, `selective_scan` and `ssd`, as kernels of the `cpu`
backend (numba) or as few calls of torch (`eager`); `reference` is the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..backend import Operation
from ..operator import plain_tensors
from .eager import enter_eager, leave_eager, s6_token_eager, ssd_token_eager
from .reference import enter_reference, leave_reference, s6_token_reference, ssd_token_reference

__all__ = ["DECODE_STEP", "MOST_ROWS", "DecodeStep", "decode_step"]

# Rows up to which the kernels' own matrix products keep up with the library's.
MOST_ROWS = 8

Token = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class DecodeStep(NamedTuple):
    """The parts of a decoded token in one backend.

    Attributes:
        enter, leave: its way into and out of a mixer; see `enter_cpu` and `leave_cpu`.
        mamba1, mamba2: between the projections, see `s6_token_cpu` and `ssd_token_cpu`.
    """

    enter: Callable[..., torch.Tensor]
    leave: Callable[..., torch.Tensor]
    mamba1: Token
    mamba2: Token


def _cpu() -> DecodeStep:
    from .cpu import enter_cpu, leave_cpu, s6_token_cpu, ssd_token_cpu

    return DecodeStep(enter_cpu, leave_cpu, s6_token_cpu, ssd_token_cpu)


DECODE_STEP = Operation(
    "decode_step",
    reference=DecodeStep(enter_reference, leave_reference, s6_token_reference, ssd_token_reference),
    eager=DecodeStep(enter_eager, leave_eager, s6_token_eager, ssd_token_eager),
    cpu=_cpu,
    limits=f"up to {MOST_ROWS} rows without gradients, plain tensors of float32 (eager: or float64); else the parts",
)


def decode_step(backend: str, *tensors: torch.Tensor | None) -> DecodeStep | None:
    """Return what runs one token, or None when only the composition can.

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
    if torch.is_grad_enabled() or torch.is_autocast_enabled(first.device.type) or not plain_tensors(*tensors):
        return None
    if len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
        return None
    return DECODE_STEP.load(DECODE_STEP.pick(backend, first.device, dtype))
