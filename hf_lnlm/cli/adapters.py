"""LoRA in a recipe: the model wrapped by peft, with errors in one line."""

from __future__ import annotations

from typing import Any

from ..trainer.adapters import lora_config
from .errors import UsageProblem
from .output import quiet_libraries
from .recipe import LoraSection


def adapter_settings_of(model: Any, section: LoraSection, **more: Any) -> Any:
    """peft's settings as the recipe's section has them.

    Args:
        model: a transformers model.
        section: the recipe's; where it names no targets, all weight matrices are adapted.
        more: fields of peft's config.
    """
    named: dict[str, Any] = {"modules_to_save": section.modules_to_save} if section.modules_to_save else {}
    if section.targets is not None or section.target_parameters is not None:
        named |= {"target_modules": section.targets if section.targets is not None else []}
        named |= {"target_parameters": section.target_parameters, "rank_pattern": {}, "alpha_pattern": {}}
    return lora_config(model, section.r, alpha=section.alpha, dropout=section.dropout, **named, **more)


def add_adapter(model: Any, section: LoraSection, task_type: str) -> Any:
    """`model` wrapped so that only low-rank adapters (and a fresh head) are trained.

    Args:
        model: a transformers model.
        section: the recipe's; where it names no targets, all weight matrices are adapted.
        task_type: peft's name of the task, e.g. `CAUSAL_LM`.

    Raises:
        UsageProblem: a target is not in the model, or can't be adapted; one line.
    """
    from peft import get_peft_model

    try:
        with quiet_libraries():
            return get_peft_model(model, adapter_settings_of(model, section, task_type=task_type))
    except (ValueError, TypeError, NotImplementedError) as error:
        line = " ".join(str(error).split())[:300]
        raise UsageProblem(f"lora: {line} (lora.targets is {section.targets})") from None
