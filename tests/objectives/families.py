"""One tiny model of every family for every objective that fits it, from the registry and the stock families."""

from __future__ import annotations

import dataclasses
from typing import Any

from datasets import Dataset

import hf_lnlm  # noqa: F401 (registers the families)
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.objectives import OBJECTIVES
from hf_lnlm.objectives.families import STOCK, reading, stock_config
from hf_lnlm.registry import FAMILIES
from tests.data.subwords import texts

LENGTH = 24
TOKENIZER = build_tokenizer("byte", sentinels=20, template="bert")
DOCUMENTS = Dataset.from_dict({"text": [text[:400] for text in texts(6)]})
_SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "embedding_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64,
    "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_inner": 32, "dropout": 0.0, "mem_len": LENGTH,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "memory_size": 8, "word_size": 4, "num_read_heads": 1,
    "initializer_range": 0.1, "dropout_rate": 0.0, "embedding_dropout": 0.0, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
_NOT_FOR_OURS = ("num_heads", "embedding_size", "dropout", "num_layers", "initializer_range", "decoder_start_token_id")
_OWN = {
    "lnlm_elmo": {
        "vocab_size": 262, "bos_token_id": 257, "eos_token_id": 258, "cell_size": 32, "filter_sizes": [1, 2, 3],
        "num_filters": 16, "target_vocab_size": 100, "hidden_size": 32,
    },
}  # fmt: skip
_SPECIAL = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _shrunk(config_class: type, fixed: dict[str, Any], left_out: tuple[str, ...] = ()) -> Any:
    """A configuration with the small values of the fields that its class has."""
    known = {item.name for item in dataclasses.fields(config_class)} - set(left_out)
    small = {name: value for name, value in (_SMALL | _SPECIAL).items() if name in known}
    return config_class(**small | fixed)


def configs() -> dict[str, Any]:
    """Name → tiny configuration: ours in every reading direction they have, and the stock families."""
    found = {}
    for row in FAMILIES:
        for suffix, fields in reading(row).items():
            found[row.model_type + suffix] = _shrunk(
                row.config_class, fields | _OWN.get(row.model_type, {}), _NOT_FOR_OURS
            )
    found |= {name: _shrunk(type(stock_config(name)), {}) for name in STOCK}
    found["t5"].decoder_start_token_id = 0
    return found


def tokenizer_of(name: str) -> Any:
    """What a family reads: its own kind of tokenizer, or bytes."""
    own = next((row.tokenizer for row in FAMILIES if row.model_type == name), None)
    return TOKENIZER if own is None else build_tokenizer(own, template="causal")


CONFIGS = configs()
CELLS = [(goal, name) for goal, kind in OBJECTIVES.items() for name, config in CONFIGS.items() if kind.fits(config)]
