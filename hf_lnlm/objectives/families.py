"""How a model reads, from its configuration alone, and which heads transformers knows for it."""

from __future__ import annotations

from typing import Any, Literal

Direction = Literal["forward", "both", "encoder-decoder"]

STOCK = {
    "gpt2": "GPT-2", "bert": "BERT", "roberta": "RoBERTa", "albert": "ALBERT", "electra": "ELECTRA", "xlnet": "XLNet",
    "t5": "T5",
}  # fmt: skip
"""The stock families that this package's recipes and tests cover, model type → name; every other model type works too."""


def has_head(config: Any, auto_class: str) -> bool:
    """Whether an Auto class of transformers has a model for this configuration, carried code included."""
    import transformers

    if auto_class in (getattr(config, "auto_map", None) or {}):
        return True
    return type(config) in getattr(transformers, auto_class)._model_mapping


def direction_of(config: Any) -> Direction:
    """How a model of this configuration reads.

    Order of the evidence: `is_encoder_decoder`; the model inside, of which an encoder alone is read; the fields that the
    registry names for a family of ours; a field `bidirectional` or `is_causal`; XLNet's `attn_type`; a
    masked-language-model head without `is_decoder` (BERT and its kin); otherwise left to right.
    """
    from ..registry import FAMILIES, is_composed

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if isinstance(parts := getattr(config, "parts", None), dict) and not is_composed(config.model_type):
        inner = direction_of(parts[config.main_part])
        return "both" if inner == "encoder-decoder" else inner
    family = next((family for family in FAMILIES if family.model_type == config.model_type), None)
    if family is not None and family.bidirectional:
        both = all(getattr(config, name, None) == value for name, value in family.bidirectional.items())
        return "both" if both else "forward"
    if isinstance(own := getattr(config, "bidirectional", None), bool):
        return "both" if own else "forward"
    if isinstance(own := getattr(config, "is_causal", None), bool):
        return "forward" if own else "both"
    if (attention := getattr(config, "attn_type", None)) in ("bi", "uni"):
        return "both" if attention == "bi" else "forward"
    if getattr(config, "predicts_both_ways", False):
        return "both"
    masked = has_head(config, "AutoModelForMaskedLM")
    return "both" if masked and not getattr(config, "is_decoder", False) else "forward"


def fitting_models(objective: Any) -> list[str]:
    """Model types of ours and of `STOCK` that learn an objective, for messages and tables.

    Args:
        objective: Its class.
    """
    from ..registry import FAMILIES

    own = [row.model_type for row in FAMILIES if any(objective.fits(config) for config in variants(row))]
    return own + [name for name in STOCK if objective.fits(stock_config(name))]


def reading(row: Any) -> dict[str, dict[str, Any]]:
    """The reading directions that a family of ours has: a name for it → the config fields that choose it.

    Args:
        row: Its row of the registry.
    """
    found: dict[str, dict[str, Any]] = {"": {}}
    if row.bidirectional:
        found[", both ways"] = row.bidirectional
    if hasattr(row.config_class, "is_decoder"):
        found[", decoder"] = {"is_decoder": True}
    return found


def variants(row: Any) -> list[Any]:
    """Configurations of a family of ours, one for each of its reading directions."""
    return [row.config_class(**{**row.sizes["tiny"], **fields}) for fields in reading(row).values()]


def stock_config(name: str) -> Any:
    """The default configuration of a stock family."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name)


def accepts(config: Any, auto_class: str, *arguments: str) -> bool:
    """Whether the model that an Auto class of transformers has for a configuration takes some arguments."""
    import inspect

    import transformers

    if type(config) not in (mapping := getattr(transformers, auto_class)._model_mapping):
        return False
    known = inspect.signature(mapping[type(config)].forward).parameters
    return all(name in known for name in arguments)
