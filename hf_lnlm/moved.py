"""Where modules have moved to: the old places stay importable until the next minor version, with a warning.

An old module is found only when nothing is left in its place; it reads every name from the new one.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "hf_lnlm.models.sparse_attention.stock": "hf_lnlm.convert.stock_attention",
    "hf_lnlm.objectives.bidirectional_model": "hf_lnlm.models.composed.modeling_bidirectional",
    "hf_lnlm.objectives.composed": "hf_lnlm.models.composed.modeling_composed",
    "hf_lnlm.objectives.replaced_token_model": "hf_lnlm.models.composed.modeling_replaced_token",
    "hf_lnlm.objectives.sentence_pair_model": "hf_lnlm.models.composed.modeling_sentence_pair",
    "hf_lnlm.peft_table": "hf_lnlm.lora.peft_table",
    "hf_lnlm.trainer.adapters": "hf_lnlm.lora.plan",
}
"""Old module → new module."""


class _MovedFinder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` at their old places; stands last, so that it hides nothing."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of an old module, None for the rest."""
        above = any(old.startswith(f"{name}.") for old in MOVED)
        return ModuleSpec(name, self, is_package=above) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Let the old module read its names from the new one."""
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} has moved to {new}; the old name goes with the next minor version", FutureWarning, 2)

        def read(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(import_module(new), name)

        vars(module)["__getattr__"] = read


def register_moved() -> None:
    """Make old places importable. Safe to call twice; imports nothing."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
