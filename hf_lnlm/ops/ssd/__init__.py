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

import torch

from ..backend import pick_backend
from ..operator import check_shape, runs_directly
from .operator import run_ssd
from .reference import ssd_reference
from .step import ssd_step

BACKENDS = ("reference", "eager", "cpu", "gpu")
CHUNK_SIZE = 64

__all__ = ["BACKENDS", "CHUNK_SIZE", "ssd"]


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
    alone = x.shape[1] == 1 and mask is None and reset is None and backend != "reference"
    if alone and runs_directly(x, scale, log_decay, B, C, D, initial_state, diagonal):
        if backend != "auto":
            pick_backend(backend, x.device, BACKENDS, x.dtype)
        return ssd_step(x, scale, log_decay, B, C, D, initial_state, diagonal)
    if mask is not None:
        real = mask != 0
        scale, log_decay = (t.masked_fill(~real.unsqueeze(-1), 0.0) for t in (scale, log_decay))
        reset = None if reset is None else reset & real
    if reverse:
        x, scale, log_decay, B, C = (t.flip(1) for t in (x, scale, log_decay, B, C))
        reset, diagonal = (None if t is None else t.flip(1) for t in (reset, diagonal))
    if backend == "reference":
        y, state = ssd_reference(x, scale, log_decay, B, C, D, initial_state, reset, diagonal)
        y, state = y.to(x.dtype), state if x.dtype == torch.float64 else state.float()
    else:
        chunk_size = min(chunk_size, CHUNK_SIZE) if x.device.type == "cpu" else chunk_size
        tensors = (x, scale, log_decay, B, C, D, initial_state, diagonal, reset)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, state, _ = run_ssd(*tensors, chunk_size, backend, save)
    return (y.flip(1) if reverse else y), state


def _check(
    x: torch.Tensor, scale: torch.Tensor, log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    optional: tuple[torch.Tensor | None, ...], chunk_size: int, backend: str,
) -> None:  # fmt: skip
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
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
