"""Our families in peft's own table of LoRA targets, so that a plain `LoraConfig()` fits them.

peft is not imported for it: the rows are added when peft's table is, or at once if it already is there.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .registry import FAMILIES

TABLE_MODULE = "peft.utils.constants"
TABLE = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"


class _TableFinder(MetaPathFinder):
    """Adds our rows right after the one module that holds the table has run; otherwise stays out of the way."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The ordinary spec of peft's table, with our rows added at the end of its execution; None for the rest."""
        if name != TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                add_rows(module)

            spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec


def add_rows(module: ModuleType) -> None:
    """Add our families to peft's table; an entry that is there already stays as it is."""
    table = getattr(module, TABLE, None)
    if isinstance(table, dict):
        for row in FAMILIES:
            table.setdefault(row.model_type, list(row.lora_targets))


def register_targets() -> None:
    """Make our model types known to peft, now or when it is imported. Safe to call twice; imports nothing."""
    if TABLE_MODULE in sys.modules:
        add_rows(sys.modules[TABLE_MODULE])
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())
