"""`hf-lnlm warm-up`."""

from __future__ import annotations

from ..flows.warm_up import warm_up as compile_ahead


def _tell(line: str) -> None:
    print(line, flush=True)


def warm_up(families: list[str] | None) -> int:
    """Compile families' kernels, with a line for each that is ready. Returns the exit status."""
    return 1 if compile_ahead(families or (), _tell) else 0
