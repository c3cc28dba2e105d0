"""How a model reads, from its configuration alone, and which heads transformers knows for it."""

from __future__ import annotations

from typing import Any, Literal

Direction = Literal["forward", "both", "encoder-decoder"]

STOCK = ("gpt2", "bert", "roberta", "albert", "electra", "xlnet", "t5")
"""The stock families that this package's recipes and tests cover; named in messages beside our own."""


def has_head(config: Any, auto_class: str) -> bool:
    """Whether an Auto class of transformers has a model for this configuration, carried code included."""
    import transformers

    if auto_class in (getattr(config, "auto_map", None) or {}):
        return True
    return type(config) in getattr(transformers, auto_class)._model_mapping


def direction_of(config: Any) -> Direction:
    """How a model of this configuration reads.

    Order of the evidence: `is_encoder_decoder`; the fields that the registry names for a family of ours; a field
    `bidirectional` or `is_causal`; XLNet's `attn_type`; a masked-language-model head without `is_decoder` (BERT and its
    kin); otherwise left to right.
    """
    from ..registry import FAMILIES

    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
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
    masked = has_head(config, "AutoModelForMaskedLM")
    return "both" if masked and not getattr(config, "is_decoder", False) else "forward"


def fitting_models(auto_class: str, direction: Direction) -> list[str]:
    """Model types of ours and of `STOCK` that fit, for messages.

    Ours count by their Auto class; whether a particular configuration of one reads the right way is for `direction_of`.
    """
    import transformers
    from transformers import AutoConfig

    from ..registry import FAMILIES

    own = [family.model_type for family in FAMILIES if auto_class in family.models]
    known = getattr(transformers, auto_class)._model_mapping
    stock = [AutoConfig.for_model(name) for name in STOCK]
    return own + [c.model_type for c in stock if type(c) in known and direction_of(c) == direction]
