from ..cli.conftest import _small_stdlib, library

__all__ = ["_small_stdlib", "library"]
