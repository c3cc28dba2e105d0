"""Our families in peft's own tables, so that a plain `LoraConfig()`, `IA3Config()` or `LNTuningConfig()` fits them.

peft is not imported for it: rows are added when the module that holds the tables is, or at once if it already is there.
Tuners that put vectors before a text, or keys and values before a cache, have no table of what they fit, so the function
by which peft reads a model's sizes for them is told ours, or refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from ..registry import FAMILIES, ROWS, family, is_composed, is_ours

TABLES = "peft.utils.constants"
PROMPTS = "peft.utils.other"
NORMS = "peft.tuners.ln_tuning.model"
_TARGETS = "TARGET_MODULES_MAPPING"
_NORM_TABLE = "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING"
_FEEDFORWARD = "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"
_PREFIX = "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"
_SIZES = "_prepare_prompt_learning_config"
_WITH_KEYS = ("PREFIX_TUNING", "CARTRIDGE")


class _Finder(MetaPathFinder):
    """Runs a function of ours right after one of peft's modules has run; otherwise stays out of the way."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The ordinary spec of the module, with our function at the end of its execution; None for the rest."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_then(module: ModuleType) -> None:
                run(module)
                self.then(module)

            spec.loader.exec_module = run_and_then  # type: ignore[method-assign]
        return spec


def add_rows(module: ModuleType) -> None:
    """Add our families to peft's tables; an entry that is there already stays as it is.

    Tuners that change linear layers get LoRA's targets, IA3 without feedforward ones: all are scaled at their output.
    """
    tables = {name: table for name, table in vars(module).items() if isinstance(table, dict)}
    for row in ROWS:
        for name, table in tables.items():
            if name.endswith(_TARGETS):
                table.setdefault(row.model_type, list(row.norm_layers if name == _NORM_TABLE else row.lora_targets))
        tables.get(_FEEDFORWARD, {}).setdefault(row.model_type, [])
        if row.takes_prefix:
            tables.get(_PREFIX, {}).setdefault(row.model_type, prefix_cache)


def prefix_cache(past: tuple[torch.Tensor, ...]) -> Any:
    """Return learnt keys and values as a cache of sparse attention.

    Args:
        past: for each layer keys and values, `(2, batch, heads, length, head_dim)`.
    """
    from transformers import DynamicCache

    from ..models.sparse_attention.cache import SparseAttentionCacheLayer

    cache = DynamicCache()
    for keys, values in past:
        layer = SparseAttentionCacheLayer()
        layer.extend(keys, values, None)
        cache.layers.append(layer)
    return cache


def check_prompt(method: str, config: Any) -> None:
    """Refuse soft prompts and prefixes for models that they don't fit.

    Args:
        method: peft's name, such as "PREFIX_TUNING".
        config: a model's, one of ours.

    Raises:
        ValueError: the model has no attention, or no cache that a prefix could stand in.
    """
    name = f"{method.lower().replace('_', ' ')} does not fit {config.model_type}"
    if is_composed(config.model_type) or not _attends(config.get_text_config()):
        raise ValueError(f"{name}, which has no attention of its own: LoRA and IA3 fit it")
    fits = any(row.model_type == config.model_type and row.takes_prefix for row in FAMILIES)
    if method in _WITH_KEYS and (not fits or config.reads_both_ways):
        raise ValueError(
            f"{name} as built, whose cache no learnt keys and values can stand in: prompt tuning and LoRA fit it"
        )


def _attends(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any("attention" in kind for kind in kinds)
    return bool(getattr(config, "num_attention_heads", None))


def _sizes(method: str, config: Any) -> dict[str, Any]:
    """What peft reads of a model's config for a prompt (width of the embeddings) or a prefix (keys and values)."""
    inner = config.get_text_config()
    found = {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.input_width,
        "num_attention_heads": inner.num_attention_heads,
    }
    if method in _WITH_KEYS and getattr(inner, "num_key_value_heads", None):
        found["num_key_value_heads"] = inner.num_key_value_heads
    return found


def guard_prompts(module: ModuleType) -> None:
    """Let peft read the sizes of our models from us, in every module of it that has the function already."""
    original = getattr(module, _SIZES, None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def sizes_of_ours(peft_config: Any, model_config: Any) -> Any:
        if is_ours(getattr(model_config, "model_type", None)):
            method = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
            check_prompt(method, model_config)
            model_config = _sizes(method, model_config)
        return original(peft_config, model_config)

    for holder in [held for name, held in sys.modules.items() if name.split(".")[0] == "peft"]:
        if vars(holder).get(_SIZES) is original:
            setattr(holder, _SIZES, sizes_of_ours)


def guard_norms(module: ModuleType) -> None:
    """Let LN-tuning say what is missing in a family without normalisation layers."""
    tuner: Any = getattr(module, "LNTuningModel", None)
    original = getattr(tuner, "_prepare_adapter_config", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def prepare(self: Any, peft_config: Any, model_config: dict[str, Any]) -> Any:
        model_type = model_config.get("model_type")
        if peft_config.target_modules is None and is_ours(model_type) and not family(str(model_type)).norm_layers:
            raise ValueError(
                f"ln tuning does not fit {model_type}, which has no normalisation layers: LoRA and IA3 fit it"
            )
        return original(self, peft_config, model_config)

    tuner._prepare_adapter_config = prepare


def register_targets() -> None:
    """Make our model types known to peft, now or when it is imported. Safe to call twice; imports nothing."""
    for name, then in ((TABLES, add_rows), (PROMPTS, guard_prompts), (NORMS, guard_norms)):
        if name in sys.modules:
            then(sys.modules[name])
        elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name, then))
