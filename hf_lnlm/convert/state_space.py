"""Stock Mamba, Mamba-2 and Falcon Mamba, and the original state-spaces files, to and from ours.

Weights keep names, shapes and bytes inside a mixer; only the modules around them are called otherwise. So a conversion is
a renaming and a rewritten config, both ways.

* `ssm_from_stock`, `ssm_to_stock`: transformers models.
* `ssm_from_original`, `ssm_to_original`: `(state dict, config.json)` of state-spaces/mamba.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..models.state_space.configuration_ssm import SelectiveSSMConfig
from ..models.state_space.modeling_ssm import SelectiveSSMForCausalLM, SelectiveSSMModel

StateDict = dict[str, torch.Tensor]

_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "expand",
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "layer_norm_epsilon",
    "residual_in_fp32",
    "rescale_prenorm_residual",
    "initializer_range",
    "time_step_rank",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_cache",
)
_S6 = ("time_step_scale", "time_step_init_scheme")
_SSD = ("head_dim", "n_groups", "chunk_size")
FIELDS = {"mamba": _COMMON + _S6, "mamba2": _COMMON + _SSD, "falcon_mamba": (*_COMMON, *_S6, "mixer_rms_eps")}
_ANY_STEP = (0.0, math.inf)

# ours, theirs in transformers, theirs in the original files
_NAMES = (
    ("embed_tokens.", "embeddings.", "embedding."),
    ("layers.", "layers.", "layers."),
    ("norm.", "norm_f.", "norm_f."),
)


def _renamed(name: str, source: int, target: int, prefixes: tuple[str, str]) -> str:
    """Rename a weight of the base model; others, such as `lm_head.weight`, keep their names."""
    if not name.startswith(prefixes[0]):
        return name
    inner = name.removeprefix(prefixes[0])
    for names in _NAMES:
        if inner.startswith(names[source]):
            return prefixes[1] + names[target] + inner.removeprefix(names[source])
    raise ValueError(f"{name!r} is not a weight of a selective state space model")


def _rename(state: StateDict, source: int, target: int, prefixes: tuple[str, str]) -> StateDict:
    return {_renamed(name, source, target, prefixes): tensor for name, tensor in state.items()}


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


@torch.no_grad()
def _load(model: Any, state: StateDict, dtype: torch.dtype) -> Any:
    """Fill a model with a converted state dict; tied weights are filled once."""
    model = model.to(dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys or {})
    lacking = sorted(set(missing) - tied)
    if lacking or unexpected:
        raise ValueError(f"weights do not fit the config: missing {lacking}, unexpected {sorted(unexpected)}")
    model.tie_weights()
    return model.eval()


def ssm_from_stock(model: PreTrainedModel) -> SelectiveSSMForCausalLM | SelectiveSSMModel:
    """Convert a stock model: with its LM head if it has one.

    Args:
        model: a Mamba, Mamba-2 or Falcon Mamba model of transformers.

    Returns:
        Ours, in evaluation mode, with the same weights, bit by bit.

    Raises:
        ValueError: another model.
    """
    config = ssm_config_from_stock(model.config)
    ours = SelectiveSSMForCausalLM(config) if _is_head(model) else SelectiveSSMModel(config)
    prefixes = ("backbone.", "model.") if _is_head(model) else ("", "")
    return _load(ours, _rename(model.state_dict(), 1, 0, prefixes), model.dtype)


def ssm_to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Convert one of ours, language model or base model, to a stock model.

    Raises:
        ValueError: stock has no such model.
    """
    config = ssm_config_to_stock(model.config)
    head = _is_head(model)
    stock = AutoModelForCausalLM.from_config(config) if head else AutoModel.from_config(config)
    prefixes = ("model.", "backbone.") if head else ("", "")
    return _load(stock, _rename(model.state_dict(), 0, 1, prefixes), model.dtype)


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
    renamed = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "bias": "use_bias",
               "conv_bias": "use_conv_bias", "dt_rank": "time_step_rank", "headdim": "head_dim", "ngroups": "n_groups",
               "dt_min": "time_step_min", "dt_max": "time_step_max", "chunk_size": "chunk_size"}  # fmt: skip
    fields |= {ours: inner[theirs] for theirs, ours in renamed.items() if theirs in inner}
    dtype = state["backbone.embedding.weight"].dtype
    model = SelectiveSSMForCausalLM(SelectiveSSMConfig(**fields))
    return _load(model, _rename(state, 2, 0, ("backbone.", "model.")), dtype)


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
    inner: dict[str, Any] = {"d_state": config.state_size, "d_conv": config.conv_kernel, "expand": config.expand,
             "bias": config.use_bias, "conv_bias": config.use_conv_bias}  # fmt: skip
    if config.mixer == "mamba2":
        inner |= {"layer": "Mamba2", "headdim": config.head_dim, "ngroups": config.n_groups}
    else:
        inner |= {"layer": "Mamba1", "dt_rank": config.time_step_rank}
    theirs = {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": inner,
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_embeddings": config.tie_word_embeddings,
        "pad_vocab_size_multiple": 1,
    }
    return _rename(model.state_dict(), 0, 2, ("model.", "backbone.")), theirs
