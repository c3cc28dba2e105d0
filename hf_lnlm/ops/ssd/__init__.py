"""State space duality (SSD): the recurrence of Mamba-2 and Mamba-3, with carried state, masks and packed documents.

    h_t = exp(log_decay_t) h_{t-1} + scale_t x_t ⊗ B_t        one matrix (P, N) a head
    y_t = h_t C_t + D x_t

For Mamba-2 `scale = Δ` and `log_decay = Δ A`; Mamba-3 chooses both freely.

References:
    [1] Dao, Gu: "Transformers are SSMs", arXiv:2405.21060.

Backends: `reference` (float64, one token at a time), `eager` (torch's matrix products, any device), `cpu` (the same
products, numba between them), `gpu` (Triton, fused). All computation is in float32 (float64 for float64 input) whatever
the dtype of the arguments.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backend import Operation, check_backend_name, own_precision
from ..operator import FusedOperator, Passes, check_shape
from .eager import ssd_eager, ssd_eager_backward
from .inputs import INPUTS
from .reference import ssd_reference
from .step import ssd_step

CHUNK_SIZE = 64

__all__ = ["CHUNK_SIZE", "SSD", "ssd"]


def _cpu() -> Passes:
    from .cpu import ssd_cpu, ssd_cpu_backward

    return Passes(ssd_cpu, ssd_cpu_backward, ssd_step)


def _gpu() -> Passes:
    from .gpu import ssd_gpu, ssd_gpu_backward

    return Passes(ssd_gpu, ssd_gpu_backward, ssd_step)


SSD = Operation(
    "ssd",
    reference=ssd_reference,
    eager=Passes(ssd_eager, ssd_eager_backward, ssd_step),
    cpu=_cpu,
    gpu=_gpu,
)


def _shapes(x: torch.Tensor, *rest: Any) -> tuple[tuple[int, ...], ...]:
    (chunk_size, save), states = rest[-2:], rest[2].shape[3]
    state = (x.shape[0], *x.shape[2:], states)
    return state, (-(-x.shape[1] // chunk_size) if save else 0, *state)


_OPERATOR = FusedOperator(SSD, __file__, INPUTS, "int chunk_size", _shapes)


def ssd(
    x: torch.Tensor,
    scale: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    diagonal: torch.Tensor | None = None,
    reverse: bool = False,
    chunk_size: int = CHUNK_SIZE,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over a batch of sequences.

    Args:
        x: `(batch, length, heads, width)`, the input.
        scale: `(batch, length, heads)`, weight of each input.
        log_decay: `(batch, length, heads)`, at most 0.
        B, C: `(batch, length, groups, states)`; `groups` divides `heads`, and consecutive heads share a group.
        D: `(heads,)`, the skip connection's weight, or None.
        initial_state: `(batch, heads, width, states)` or None for zeros. Gradients flow into it.
        mask: `(batch, length)`, 0 at positions that leave the state unchanged, or None.
        reset: `(batch, length)` booleans, true at a real position that begins a document, or None.
        diagonal: `(batch, length, heads)`, factor of a token's own part in its own output (not in the state), or None.
        reverse: run from the last position to the first; `reset` then marks where documents end.
        chunk_size: tokens that are computed by matrix products at once; on the CPU at most `CHUNK_SIZE`.
        backend: `auto`, `reference`, `eager`, `cpu` or `gpu`.

    Returns:
        `y` like `x`, and the final state `(batch, heads, width, states)` in the computation's dtype. Outputs at masked
        positions are finite and meaningless.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    _check(x, scale, log_decay, B, C, (D, initial_state, diagonal, mask, reset), chunk_size, backend)
    if mask is not None:
        real = mask != 0
        scale, log_decay = (t.masked_fill(~real.unsqueeze(-1), 0.0) for t in (scale, log_decay))
        reset = None if reset is None else reset & real
    if reverse:
        x, scale, log_decay, B, C = (t.flip(1) for t in (x, scale, log_decay, B, C))
        reset, diagonal = (None if t is None else t.flip(1) for t in (reset, diagonal))
    if backend == "reference":
        y, state = ssd_reference(x, scale, log_decay, B, C, D, initial_state, reset, diagonal)
        state = state if x.dtype == torch.float64 else state.float()
    else:
        chunk_size = min(chunk_size, CHUNK_SIZE) if x.device.type == "cpu" else chunk_size
        call = x, scale, log_decay, B, C, D, initial_state, diagonal, reset, chunk_size
        run, save = _OPERATOR.prepare(backend, *call)
        with own_precision(x.device):
            y, state = run(*call, save)[:2]
    y = y.to(x.dtype)
    return (y.flip(1) if reverse else y), state


def _check(
    x: torch.Tensor, scale: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    optional: tuple[torch.Tensor | None, ...], chunk_size: int, backend: str,
) -> None:  # fmt: skip
    check_backend_name(backend, SSD.backends)
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, length ≥ 1, heads, width), got {tuple(x.shape)}")
    for name, tensor in (("scale", scale), ("log_decay", log_decay)):
        if tuple(tensor.shape) != tuple(x.shape[:3]):
            raise ValueError(f"{name} must be {tuple(x.shape[:3])}, got {tuple(tensor.shape)}")
    fits = B.shape == C.shape and B.dim() == 4 and tuple(B.shape[:2]) == tuple(x.shape[:2])
    if not fits or B.shape[2] < 1 or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B and C must be (batch, length, groups, states) with groups dividing {x.shape[2]} heads, "
            f"got {tuple(B.shape)} and {tuple(C.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    rows, state = tuple(x.shape[:2]), (x.shape[0], *x.shape[2:], B.shape[3])
    shapes = {"D": (x.shape[2],), "initial_state": state, "diagonal": tuple(x.shape[:3]), "mask": rows, "reset": rows}
    for (name, shape), given in zip(shapes.items(), optional):
        check_shape(name, given, shape)
