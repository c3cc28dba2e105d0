"""The one dial: what `--size tiny|small|base` sets, for our families and for transformers' own.

Our families bring their sizes in the registry; a stock family is scaled through the field names that its config class
has, so any model type of transformers can be built without a row of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import UsageProblem, did_you_mean
from ..objectives.families import STOCK


@dataclass(frozen=True)
class Size:
    """What a size means where nothing else says so.

    Attributes:
        width, layers, heads, inner: of a stock transformer: hidden size, layers, attention heads, feed-forward size.
        vocab_size: upper bound of a vocabulary learnt from text.
        block_size: tokens of a training row.
        training: TrainingArguments.
    """

    width: int
    layers: int
    heads: int
    inner: int
    vocab_size: int
    block_size: int
    training: dict[str, Any]


SIZES = {
    "tiny": Size(
        128, 2, 4, 512, 2048, 128, {"max_steps": 300, "learning_rate": 2e-3, "per_device_train_batch_size": 16}
    ),
    "small": Size(
        384, 6, 6, 1536, 8192, 256, {"max_steps": 5000, "learning_rate": 1e-3, "per_device_train_batch_size": 32}
    ),
    "base": Size(
        768, 12, 12, 3072, 32000, 512, {"max_steps": 100000, "learning_rate": 6e-4, "per_device_train_batch_size": 64}
    ),
}

SHARED_TRAINING: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "logging_steps": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_steps": 0.25,
    "save_total_limit": 2,
    "per_device_eval_batch_size": 32,
    "seed": 0,
}
"""TrainingArguments of every run from scratch, whatever its size; fractions are shares of all steps."""

_FIELDS = {
    "width": ("hidden_size", "d_model", "n_embd", "dim"),
    "layers": (
        "num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers", "encoder_layers",
        "decoder_layers",
    ),
    "heads": (
        "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads", "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    "inner": ("intermediate_size", "d_ff", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    "head_width": ("d_kv", "head_dim", "d_head"),
    "embedding": ("embedding_size",),
}  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions")


def stock_config_class(model_type: str) -> type:
    """The config class that transformers has for `model_type`.

    Raises:
        UsageProblem: there is none; names the closest.
    """
    from transformers import CONFIG_MAPPING

    from ..registry import FAMILIES

    if model_type not in CONFIG_MAPPING:
        ours = [row.model_type for row in FAMILIES]
        named = [row.model_type for row in FAMILIES if model_type.lower() in f"{row.model_type} {row.title}".lower()]
        close = did_you_mean(model_type, [*ours, *STOCK, *CONFIG_MAPPING.keys()])
        hint = f" (did you mean {named[0]!r}?)" if named and model_type else close
        raise UsageProblem(
            f"no family {model_type!r}{hint}; hf_lnlm has {', '.join(ours)}; "
            f"of transformers' own {', '.join(STOCK)} are the usual ones"
        )
    return CONFIG_MAPPING[model_type]


def stock_fields(config_class: type, size: str, block_size: int) -> dict[str, Any]:
    """Config fields that scale a stock family.

    Args:
        config_class: its config class.
        size: a key of SIZES.
        block_size: tokens of a training row, which the position table must hold.
    """
    numbers = SIZES[size]
    wanted = {"width": numbers.width, "layers": numbers.layers, "heads": numbers.heads, "inner": numbers.inner}
    wanted |= {"head_width": numbers.width // numbers.heads, "embedding": numbers.width}
    defaults = {item.name: item.default for item in dataclasses.fields(config_class)}
    fields = {
        name: value
        for notion, value in wanted.items()
        for name in _FIELDS[notion]
        if isinstance(defaults.get(name), int) or (name == "num_decoder_layers" and name in defaults)
    }
    for name in _POSITIONS:
        held = defaults.get(name)
        # RoBERTa and its kin number positions from the pad id + 1
        if isinstance(held, int) and held < block_size + 8:
            fields[name] = block_size + 8
    return fields
