"""Checkpoints of other projects, to and from ours, and our attention in the models of transformers."""

import importlib
from typing import Any

from ..errors import did_you_mean

_ROOMS = (
    "elmo",
    "memory",
    "recurrent",
    "sparse_attention",
    "state_space",
    "stock_attention",
    "transfo_xl",
    "word_vectors",
)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, _ROOMS)}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
