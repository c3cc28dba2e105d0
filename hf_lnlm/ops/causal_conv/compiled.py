"""How the numba kernels of this package are compiled."""

from __future__ import annotations

from typing import Any

from numba import njit

# Every lane rounds alike, whether it runs in a vector loop or in its scalar remainder: results do not depend on where
# tensors lie in memory.
STRICT = {"contract", "nsz"}


def compiled(flags: set[str], forceinline: bool = False) -> Any:
    """Decorator: compile with numba, cached on disk where some folder for the cache can be written.

    Args:
        flags: LLVM fast-math flags.
        forceinline: always inline into the caller; without it a loop that calls the function may stay scalar.
    """

    def decorate(function: Any) -> Any:
        options: dict[str, Any] = {"fastmath": flags, "error_model": "numpy", "nogil": True, "forceinline": forceinline}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no writable place for the cache: compile again in every process
            return njit(**options)(function)

    return decorate
