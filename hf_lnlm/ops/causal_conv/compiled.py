"""How the numba kernels of this package are compiled."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

try:
    from numba import njit
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

# Modules whose kernels others compile into theirs.
_SHARED = ("compiled", "cpu", "flat", "lanes")

# Every lane rounds alike, whether it runs in a vector loop or in its scalar remainder: results do not depend on where
# tensors lie in memory.
STRICT = {"contract", "nsz"}


def _revision() -> str:
    """Hash of the shared sources, as package files or flattened into a checkpoint's folder.

    numba's cache on disk notices edits of a kernel's own file only.
    """
    here, digest = Path(__file__), hashlib.sha256()
    for name in _SHARED:
        path = here.with_name(here.name.replace("compiled", name))
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:12]


_REVISION = _revision()


def compiled(flags: set[str], forceinline: bool = False) -> Any:
    """Decorator: compile with numba, cached on disk where some folder for the cache can be written.

    Args:
        flags: LLVM fast-math flags.
        forceinline: always inline into the caller; without it a loop that calls the function may stay scalar.
    """

    def decorate(function: Any) -> Any:
        function.__qualname__ += f"_{_REVISION}"  # names the function's file in the cache
        options: dict[str, Any] = {"fastmath": flags, "error_model": "numpy", "nogil": True, "forceinline": forceinline}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no writable place for the cache: compile again in every process
            return njit(**options)(function)

    return decorate
