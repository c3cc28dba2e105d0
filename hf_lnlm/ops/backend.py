"""Which implementation of an operation runs, and why.

`reference` is the paper's equations, `eager` fast pure torch on any device, `cpu` numba, `gpu` Triton. A config's
`backend="auto"` takes the fastest that can run; a named one that cannot run is an error, never a silent fallback.
"""

import importlib
import importlib.util
import os
from functools import cache

import torch

_OLDEST_NUMBA = (0, 61)


def _missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # an import hook forbids it
        return True


@cache
def numba_reason() -> str | None:
    """Return why numba kernels cannot run here, or None when they can."""
    try:
        numba = importlib.import_module("numba")
    except ModuleNotFoundError as error:
        if error.name in (None, "numba"):
            return "numba is not installed (pip install 'hf_lnlm[cpu]')"
        return f"numba cannot be imported: {error}"
    except Exception as error:  # whatever a broken installation raises
        return f"numba cannot be imported: {error}"
    if numba.version_info.short < _OLDEST_NUMBA:
        return f"numba must be at least 0.61, got {numba.__version__} (pip install -U 'hf_lnlm[cpu]')"
    return None


@cache
def triton_interpreted() -> bool:
    """Tell whether `TRITON_INTERPRET` makes Triton's kernels run by its interpreter: very slowly, on any device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def triton_reason() -> str | None:
    """Return why Triton kernels cannot run here, or None when they can."""
    if _missing("triton"):
        return "triton is not installed (pip install 'hf_lnlm[gpu]')"
    if not torch.cuda.is_available() and not triton_interpreted():
        return "no CUDA device"
    return None


def pick_backend(
    requested: str, device: torch.device | str, available: tuple[str, ...], dtype: torch.dtype | None = None
) -> str:
    """Choose the backend of one call.

    Args:
        requested: `auto` or the name of a backend.
        device: where the tensors are.
        available: backends that the operation has, such as `("reference", "eager", "cpu")`.
        dtype: the tensors' type; compiled kernels take float32 and narrower, so float64 falls to eager, and is
            an error with a compiled backend asked for by name.

    Returns:
        One of `available`.

    Raises:
        ValueError: the operation has no such backend, or it cannot run on this machine or device.
    """
    kind = torch.device(device).type
    if requested != "auto":
        return _demand(requested, kind, available, dtype)
    narrow = dtype != torch.float64
    if kind == "cuda" and "gpu" in available and narrow and triton_reason() is None:
        return "gpu"
    if kind == "cpu" and "cpu" in available and narrow and numba_reason() is None:
        return "cpu"
    return "eager" if "eager" in available else "reference"


def _demand(requested: str, kind: str, available: tuple[str, ...], dtype: torch.dtype | None) -> str:
    if requested not in available:
        raise ValueError(f"backend must be auto or one of {', '.join(available)}, got {requested!r}")
    reason = numba_reason() if requested == "cpu" else triton_reason() if requested == "gpu" else None
    if requested == "cpu" and kind != "cpu":
        reason = reason or f"the tensors are on {kind}"
    if requested == "gpu" and kind != "cuda" and not triton_interpreted():
        reason = reason or f"the tensors are on {kind}"
    if requested in ("cpu", "gpu") and dtype == torch.float64:
        reason = reason or "it computes in float32, and the tensors are float64"
    if reason:
        raise ValueError(f"backend {requested!r} cannot run: {reason}")
    return requested
