"""LoRA in a recipe: the model wrapped by peft, with errors in one line."""

from __future__ import annotations

from typing import Any

from ..errors import UsageProblem
from ..lora.plan import lora_config
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
    options: dict[str, Any] = {"alpha": section.alpha, "dropout": section.dropout, "embeddings": section.embeddings}
    return lora_config(model, section.r, **options, **named, **more)


def add_adapter(model: Any, section: LoraSection, **named: Any) -> Any:
    """`model` wrapped so that only low-rank adapters (and a fresh head) are trained.

    Args:
        model: a transformers model.
        section: the recipe's; where it names no targets, all weight matrices are adapted.
        named: fields of peft's config, e.g. `task_type`.

    Raises:
        UsageProblem: a target is not in the model, or can't be adapted; one line.
    """
    from peft import get_peft_model

    try:
        with quiet_libraries():
            return get_peft_model(model, adapter_settings_of(model, section, **named))
    except (ValueError, TypeError, NotImplementedError) as error:
        line = " ".join(str(error).split())[:300]
        raise UsageProblem(f"lora: {line} (lora.targets is {section.targets})") from None
