"""Stop at the first loss or gradient norm that isn't finite, and say where it began.

Gradient clipping with a norm that isn't finite turns *every* gradient into NaN, so the search comes before it.
"""

from collections.abc import Iterable

import torch
from torch import nn


class NonFiniteError(ArithmeticError):
    """A loss or a gradient norm was NaN or infinite. The last checkpoint is from before it happened."""


def _first(tensors: Iterable[tuple[str, torch.Tensor | None]]) -> str | None:
    for name, tensor in tensors:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def first_bad_parameter(model: nn.Module) -> str:
    """Return in words the first parameter that isn't finite, or else the first whose gradient isn't."""
    with torch.no_grad():
        weight = _first(model.named_parameters())
        if weight is not None:
            return f"parameter {weight} isn't finite itself"
        gradient = _first((name, parameter.grad) for name, parameter in model.named_parameters())
    return f"the gradient of {gradient} is the first that isn't finite" if gradient else "all parameters are finite"


def stop(what: str, value: float, step: int, model: nn.Module) -> None:
    """Stop the run.

    Args:
        what: "loss" or "gradient norm".
        value: Its value.
        step: The optimizer step that was being computed, from 1.
        model: The unwrapped model.

    Raises:
        NonFiniteError: Always; names step, value and parameter.
    """
    raise NonFiniteError(f"{what} is {value} at step {step}: {first_bad_parameter(model)}")
