"""Which backend each operation would use on this machine, and why: `hf_lnlm.backends()`."""

from __future__ import annotations

from pathlib import Path

import torch

from .backend import numba_reason, pick_backend, triton_interpreted, triton_reason

FILES = {"reference": "reference.py", "eager": "eager.py", "cpu": "cpu.py", "gpu": "gpu.py"}


def backends(device: str | torch.device | None = None) -> dict[str, dict[str, str]]:
    """Tell, for every operation, which backend `backend="auto"` picks and what keeps the others from running.

    Args:
        device: where the tensors would be; the default is CUDA where there is one, else the CPU.

    Returns:
        operation → {"in use": backend, each backend it has: "can run" or the reason why it cannot}.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    table = {}
    for folder in sorted(Path(__file__).parent.iterdir()):
        available = tuple(name for name, file in FILES.items() if (folder / file).is_file())
        if available:
            states = {name: _state(name, device.type) for name in available}
            table[folder.name] = {"in use": pick_backend("auto", device, available), **states}
    return table


def _state(backend: str, device: str) -> str:
    if backend == "cpu":
        return numba_reason() or ("can run" if device == "cpu" else f"the tensors are on {device}")
    if backend == "gpu":
        fits = device == "cuda" or triton_interpreted()
        return triton_reason() or ("can run" if fits else f"the tensors are on {device}")
    return "can run"
