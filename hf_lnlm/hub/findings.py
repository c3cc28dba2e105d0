"""What an examination of a checkpoint folder knows and says."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .folder import Entry, TensorEntry, shown

Level = Literal["ok", "warn", "fail"]
Said = tuple[Level, str]
"""A level and what was found."""

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        level: `ok`, `warn` (worth knowing) or `fail` (the folder is not fit).
        topic: what was examined, one word.
        message: what was found.
    """

    level: Level
    topic: str
    message: str


@dataclass
class Folder:
    """What the examination of one folder has found out so far."""

    path: Path
    run_code: bool = False
    published: Callable[[str], bool] = lambda path: True
    files: list[Entry] = field(default_factory=list)
    config: dict[str, Any] | None = None
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    weight_files: list[str] = field(default_factory=list)
    weights_whole: bool = True

    def has(self, name: str) -> bool:
        """Whether the folder holds the regular file `name`."""
        return any(entry.path == name for entry in self.files)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a peft adapter instead of a whole model."""
        return self.has(ADAPTER_CONFIG)


def architectures(config: dict[str, Any]) -> list[str]:
    """Names of the model classes that a config was saved by."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def auto_map_values(auto_map: Any) -> Iterator[str]:
    """All references of an `auto_map`, whose values may be lists."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                yield str(item)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own reports; `check` says it in its own lines."""
    from huggingface_hub import constants
    from transformers.utils import logging as reports

    previous, bars = logging.root.manager.disable, reports.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    online, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # nothing a config names is fetched
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        constants.HF_HUB_OFFLINE = online
        if bars:
            reports.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, printable, cut at 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown((lines or [type(error).__name__])[0][:300])


def known_model_type(model_type: str) -> bool:
    """Whether transformers has a config class for it, a registered one included."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING
