"""LoRA: which weights of which family an adapter reaches, and the peft config that says so."""

from __future__ import annotations

from typing import Any

from ..registry import family, is_ours
from .errors import UsageProblem
from .output import quiet_libraries
from .recipe import LoraSection


def default_targets(model: Any) -> tuple[list[str] | str, list[str]]:
    """The modules and raw parameters that an adapter of `model` reaches unless told otherwise.

    Ours are in the registry; a stock family's in peft's own table; any other gets all its linear layers.

    Returns:
        (names of modules, or peft's `all-linear`; names of parameters).
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as STOCK

    model_type = model.config.model_type
    if is_ours(model_type):
        row = family(model_type)
        return list(row.lora_targets), list(row.lora_parameters)
    targets = STOCK.get(model_type, "all-linear")
    return (targets if isinstance(targets, str) else list(targets)), recurrent_parameters(model)


def recurrent_parameters(model: Any) -> list[str]:
    """Names of the weight matrices of every nn.LSTM, nn.GRU and nn.RNN; peft reaches them as raw parameters only."""
    from torch import nn

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
    return [
        f"{name}.{key}" for name, module in layers for key, weight in module.named_parameters() if weight.dim() == 2
    ]


def _trained_in_full(model: Any) -> list[str] | None:
    """Modules that a family trains in full beside its adapters, as far as this model has them."""
    if not is_ours(model.config.model_type):
        return None
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in family(model.config.model_type).lora_trained if name in present] or None


def add_adapter(model: Any, section: LoraSection, task_type: str) -> Any:
    """`model` wrapped so that only low-rank adapters (and a fresh head) are trained.

    Args:
        model: a transformers model.
        section: the recipe's; its targets are filled in.
        task_type: peft's name of the task, e.g. `CAUSAL_LM`.

    Raises:
        UsageProblem: a target is not in the model, or can't be adapted; one line.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    modules, parameters = default_targets(model)
    if section.targets is None and section.target_parameters is None:
        section.targets, section.target_parameters = modules or None, parameters or None
    if section.target_parameters and section.dropout:
        raise UsageProblem(f"lora.dropout must be 0 with target_parameters (raw weights), got {section.dropout}")
    settings = LoraConfig(
        task_type=task_type,
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.targets if section.targets is not None else [],
        target_parameters=section.target_parameters,
        modules_to_save=section.modules_to_save or _trained_in_full(model),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's linear layers
    )
    try:
        with quiet_libraries():
            return get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        line = " ".join(str(error).split())[:300]
        raise UsageProblem(f"lora: {line} (lora.targets is {section.targets})") from None
