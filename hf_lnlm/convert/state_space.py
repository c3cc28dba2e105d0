"""Stock Mamba, Mamba-2 and Falcon Mamba, and the original state-spaces files, to and from ours.

Weights keep names, shapes and bytes inside a mixer; only the modules around them are called otherwise. So a conversion is
a renaming and a rewritten config, both ways.

* `ssm_from_stock`, `ssm_to_stock`: transformers models.
* `ssm_from_original`, `ssm_to_original`: `(state dict, config.json)` of state-spaces/mamba.
"""

from __future__ import annotations

import math
import re
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..models.state_space.configuration_ssm import SelectiveSSMConfig
from ..models.state_space.modeling_ssm import SelectiveSSMForCausalLM, SelectiveSSMModel
from .weights import StateDict, filled, renamed

_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel", "use_bias", "use_conv_bias",
    "layer_norm_epsilon", "residual_in_fp32", "rescale_prenorm_residual", "initializer_range", "time_step_rank",
    "time_step_min", "time_step_max", "time_step_floor", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "use_cache",
)  # fmt: skip
_S6 = ("time_step_scale", "time_step_init_scheme")
_SSD = ("head_dim", "n_groups", "chunk_size")
FIELDS = {"mamba": _COMMON + _S6, "mamba2": _COMMON + _SSD, "falcon_mamba": (*_COMMON, *_S6, "mixer_rms_eps")}
_ANY_STEP = (0.0, math.inf)

_OURS, _STOCK, _ORIGINAL = 0, 1, 2
_NAMES = (
    ("embed_tokens.", "embeddings.", "embedding."),
    ("layers.", "layers.", "layers."),
    ("norm.", "norm_f.", "norm_f."),
)
"""Beginnings of names in the base model: ours, theirs in transformers, theirs in the original files."""
_PREFIXES = ("model.", "backbone.", "backbone.")
_INNER = {
    "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "bias": "use_bias", "conv_bias": "use_conv_bias",
}  # fmt: skip
_INNER_S6 = {"dt_rank": "time_step_rank"}
_INNER_SSD = {"headdim": "head_dim", "ngroups": "n_groups"}
_ONLY_READ = {"dt_min": "time_step_min", "dt_max": "time_step_max", "chunk_size": "chunk_size"}
"""Fields of the original's `ssm_cfg` → ours."""


def _rename(state: StateDict, source: int, target: int, head: bool = True) -> StateDict:
    """Weights of the base model under the target's names; others, such as `lm_head.weight`, keep theirs."""
    old, new = (_PREFIXES[source], _PREFIXES[target]) if head else ("", "")
    rules = [(f"^{re.escape(old + names[source])}", new + names[target]) for names in _NAMES]
    return {renamed(name, rules): tensor for name, tensor in state.items()}


def ssm_config_from_stock(config: PreTrainedConfig) -> SelectiveSSMConfig:
    """Return our config of a stock one.

    Args:
        config: of model type `mamba`, `mamba2` or `falcon_mamba`.

    Raises:
        ValueError: another model type, or an activation that is not SiLU.
    """
    kind = config.model_type
    if kind not in FIELDS:
        raise ValueError(f"config.model_type must be one of {', '.join(FIELDS)}, got {kind!r}")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', got {config.hidden_act!r}")
    fields = {name: getattr(config, name) for name in FIELDS[kind]}
    if kind == "mamba2":
        limit = tuple(config.time_step_limit)
        fields |= {"mixer": "mamba2", "time_step_limit": None if limit == _ANY_STEP else limit}
    return SelectiveSSMConfig(**fields, mixer_rms_norm=kind == "falcon_mamba", bidirectional="none")


def ssm_config_to_stock(config: SelectiveSSMConfig) -> PreTrainedConfig:
    """Return the stock config of ours.

    Raises:
        ValueError: stock has no such model: mamba3, two directions, attention layers.
    """
    if config.mixer == "mamba3" or config.reads_both_ways or config.attn_layer_indices:
        raise ValueError(
            "stock has unidirectional mamba1 and mamba2 without attention layers, "
            f"got mixer={config.mixer!r}, bidirectional={config.bidirectional!r}, "
            f"attn_layer_indices={config.attn_layer_indices}"
        )
    kind = "mamba2" if config.mixer == "mamba2" else "falcon_mamba" if config.mixer_rms_norm else "mamba"
    fields = {name: getattr(config, name) for name in FIELDS[kind]}
    if kind == "mamba2":
        fields |= {"num_heads": config.heads, "time_step_limit": tuple(config.time_step_limit or _ANY_STEP)}
    return AutoConfig.for_model(kind, **fields)


def _is_head(model: PreTrainedModel) -> bool:
    return hasattr(model, "lm_head")


def ssm_from_stock(model: PreTrainedModel) -> SelectiveSSMForCausalLM | SelectiveSSMModel:
    """Convert a stock model: with its LM head if it has one.

    Args:
        model: a Mamba, Mamba-2 or Falcon Mamba model of transformers.

    Returns:
        Ours, in evaluation mode, with the same weights, bit by bit.

    Raises:
        ValueError: another model.
    """
    config, head = ssm_config_from_stock(model.config), _is_head(model)
    ours = SelectiveSSMForCausalLM(config) if head else SelectiveSSMModel(config)
    return filled(ours, _rename(model.state_dict(), _STOCK, _OURS, head), model.dtype).eval()


def ssm_to_stock(model: SelectiveSSMForCausalLM | SelectiveSSMModel) -> PreTrainedModel:
    """Convert one of ours, language model or base model, to a stock model in evaluation mode.

    Raises:
        ValueError: stock has no such model.
    """
    config, head = ssm_config_to_stock(model.config), _is_head(model)
    stock = (AutoModelForCausalLM if head else AutoModel).from_config(config)
    return filled(stock, _rename(model.state_dict(), _OURS, _STOCK, head), model.dtype).eval()


def ssm_from_original(state: StateDict, config: dict[str, Any]) -> SelectiveSSMForCausalLM:
    """Convert a checkpoint of state-spaces/mamba.

    Args:
        state: contents of `pytorch_model.bin`.
        config: contents of `config.json`: `d_model`, `n_layer`, `vocab_size`, `ssm_cfg`, ...

    Returns:
        Our language model. Its vocabulary is padded as the original's weights are.

    Raises:
        ValueError: attention or MLP layers, LayerNorm, or weights that do not fit.
    """
    if config.get("attn_layer_idx") or config.get("d_intermediate") or not config.get("rms_norm", True):
        raise ValueError(
            "attention layers, MLP layers and LayerNorm of the original have no counterpart, got one of them"
        )
    inner = dict(config.get("ssm_cfg") or {})
    second = inner.get("layer", "Mamba1") == "Mamba2"
    fields: dict[str, Any] = {
        "mixer": "mamba2" if second else "mamba1",
        "vocab_size": state["backbone.embedding.weight"].shape[0],
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "bidirectional": "none",
    }
    known = _INNER | _INNER_S6 | _INNER_SSD | _ONLY_READ
    fields |= {ours: inner[theirs] for theirs, ours in known.items() if theirs in inner}
    dtype = state["backbone.embedding.weight"].dtype
    model = SelectiveSSMForCausalLM(SelectiveSSMConfig(**fields))
    return filled(model, _rename(state, _ORIGINAL, _OURS), dtype).eval()


def ssm_to_original(model: SelectiveSSMForCausalLM) -> tuple[StateDict, dict[str, Any]]:
    """Convert one of our language models to the original's state dict and `config.json`.

    Raises:
        ValueError: the original has no such model.
    """
    config = model.config
    ssm_config_to_stock(config)  # refuses what has no counterpart
    if config.mixer_rms_norm:
        raise ValueError(
            "the original does not normalise B, C and the step (Falcon Mamba does), got mixer_rms_norm=True"
        )
    second = config.mixer == "mamba2"
    known = _INNER | (_INNER_SSD if second else _INNER_S6)
    inner = {theirs: getattr(config, ours) for theirs, ours in known.items()}
    theirs = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {**inner, "layer": "Mamba2" if second else "Mamba1"},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_embeddings": config.tie_word_embeddings,
        "pad_vocab_size_multiple": 1,
    }
    return _rename(model.state_dict(), _OURS, _ORIGINAL), theirs
