"""A checkpoint as the encoder of a family that wraps one: `model.head` beside `model.checkpoint`."""

from __future__ import annotations

from typing import Any

from ..errors import UsageProblem, unknown_name
from ..registry import FAMILIES, Family, family, is_ours
from .models import load_config, load_model, load_problem
from .output import quiet_libraries, say
from .recipe import ModelSection

MAKER = "from_encoder_pretrained"


def wraps(row: Family) -> bool:
    """Whether the models of a family are built around an encoder."""
    return hasattr(row.model_class("AutoModel"), MAKER)


def wrapping_family(section: ModelSection) -> Family:
    """The family that `model.head` names.

    Raises:
        UsageProblem: it is none that wraps an encoder.
    """
    name = str(section.head)
    if not is_ours(name) or not wraps(family(name)):
        raise unknown_name("model.head", name, [row.model_type for row in FAMILIES if wraps(row)])
    return family(name)


def load_wrapped(section: ModelSection, auto_class: str, **options: Any) -> Any:
    """The checkpoint as the encoder of a new model of the family that `model.head` names.

    A checkpoint that is of this family already, because the recipe has been run on it before, goes on as it is.

    Args:
        section: names the checkpoint and the family.
        auto_class: e.g. `AutoModelForSequenceClassification`.
        options: fields of the family's config.

    Raises:
        UsageProblem: the checkpoint can't be loaded, or doesn't fit the family; one line.
    """
    name, row = str(section.checkpoint), wrapping_family(section)
    if load_config(section).model_type == row.model_type:
        return load_model(section, auto_class, **options)
    options.pop("ignore_mismatched_sizes", None)
    loading = {
        "encoder_revision": section.revision,
        "encoder_trust_remote_code": section.trust_remote_code,
        "encoder_use_safetensors": True,  # pickles are not even asked for, see SECURITY.md
    }
    try:
        with quiet_libraries():
            model = getattr(row.model_class(auto_class), MAKER)(name, **loading, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageProblem(load_problem(name, error)) from None
    say(f"new        {row.title}: its convolutions and classifier; the encoder is {name}")
    return model
