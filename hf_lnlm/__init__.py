"""hf_lnlm: recurrent, memory, state-space, sparse-attention and convolutional language models for transformers.

Importing the package registers every family of `registry.FAMILIES` with transformers' Auto classes, the attention
implementation `lnlm_sparse`, and the families' LoRA targets with peft once that is imported, and does nothing else.
Config and model classes, and the few functions below, are importable from here and loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import registry

__version__ = "0.1.0"

_FUNCTIONS = {
    "LNLMTrainer": "hf_lnlm.trainer.trainer",
    "LNLMTrainingArguments": "hf_lnlm.trainer.arguments",
    "backends": "hf_lnlm.ops.report",
    "build_tokenizer": "hf_lnlm.data.tokenizers",
    "disable_sparse_attention": "hf_lnlm.models.sparse_attention.stock",
    "enable_sparse_attention": "hf_lnlm.models.sparse_attention.stock",
    "load_documents": "hf_lnlm.data.sources",
    "lora_config": "hf_lnlm.trainer.adapters",
    "lora_plan": "hf_lnlm.trainer.adapters",
    "objective": "hf_lnlm.objectives",
}
_PUBLIC = {**_FUNCTIONS, **dict(registry.public_names())}

__all__ = ["__version__", "registry", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


registry.register()
importlib.import_module("hf_lnlm.models.sparse_attention.stock").register_attention()
importlib.import_module("hf_lnlm.peft_table").register_targets()
