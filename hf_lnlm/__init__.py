"""hf_lnlm: recurrent, memory, state-space, sparse-attention and convolutional language models for transformers.

Importing the package registers every family of `registry.FAMILIES` with transformers' Auto classes, the attention
implementation `lnlm_sparse`, and the families' LoRA targets with peft once that is imported, and does nothing else.
Config and model classes, and the few functions below, are importable from here and loaded when first used.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

from . import moved, registry
from .errors import did_you_mean

__version__ = "0.2.0.dev0"

_FUNCTIONS = {
    "LNLMTrainer": "hf_lnlm.trainer.trainer",
    "LNLMTrainingArguments": "hf_lnlm.trainer.arguments",
    "align": "hf_lnlm.flows.align",
    "backends": "hf_lnlm.ops.report",
    "build_tokenizer": "hf_lnlm.data.tokenizers",
    "disable_sparse_attention": "hf_lnlm.convert.stock_attention",
    "enable_sparse_attention": "hf_lnlm.convert.stock_attention",
    "evaluate": "hf_lnlm.flows.evaluate",
    "finetune": "hf_lnlm.flows.finetune",
    "generate": "hf_lnlm.flows.generate",
    "load_documents": "hf_lnlm.data.sources",
    "lora_config": "hf_lnlm.lora.plan",
    "lora_plan": "hf_lnlm.lora.plan",
    "objective": "hf_lnlm.objectives",
    "predict": "hf_lnlm.flows.predict",
    "translate": "hf_lnlm.flows.translate",
    "pretrain": "hf_lnlm.flows.pretrain",
    "task": "hf_lnlm.tasks",
}
_ROOMS = ("convert", "data", "flows", "objectives", "tasks")
_PUBLIC = {**_FUNCTIONS, **dict(registry.public_names())}

__all__ = ["__version__", "registry", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        hint = did_you_mean(name, [*__all__, *_ROOMS])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])


@functools.cache
def register() -> None:
    """Register families, attention implementation and LoRA targets; importing the package does it."""
    registry.register()
    importlib.import_module("hf_lnlm.convert.stock_attention").register_attention()
    importlib.import_module("hf_lnlm.lora.peft_table").register_targets()


def _is_command() -> bool:
    """Whether this process is `hf-lnlm` itself (and no worker of it), which registers when a command runs.

    Its help and what it says of wrong usage need neither torch nor transformers.
    """
    program = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    return program.removesuffix(".exe") == "hf-lnlm" and "multiprocessing.spawn" not in sys.modules


moved.register_moved()
if not _is_command():
    register()
