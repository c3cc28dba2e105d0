"""Filling a model with converted weights, exactly."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

StateDict = dict[str, torch.Tensor]
"""Name → tensor."""

Model = TypeVar("Model", bound=PreTrainedModel)


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A name after all substitutions, one after the other.

    Args:
        name: of a weight.
        rules: regular expressions, and what replaces each.
    """
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def filled(model: Model, state: StateDict, dtype: torch.dtype, fresh: Collection[str] = ()) -> Model:
    """Load converted weights into a new model; tied ones are filled once.

    Args:
        model: with fresh weights.
        state: name → tensor, of the shapes that the model has.
        dtype: that the model gets.
        fresh: parts of the names of weights that may stay fresh.

    Raises:
        ValueError: a weight is missing or unexpected; names them.
    """
    missing, unexpected = nn.Module.to(model, dtype).load_state_dict(state, strict=False)
    tied = model.all_tied_weights_keys or {}
    lacking = sorted(name for name in missing if name not in tied and not any(part in name for part in fresh))
    if lacking or unexpected:
        raise ValueError(
            f"weights do not fit {type(model).__name__}: missing {lacking}, unexpected {sorted(unexpected)}"
        )
    model.tie_weights()
    return model
