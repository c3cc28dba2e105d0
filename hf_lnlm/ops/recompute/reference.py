"""A function that runs once, its intermediate values kept by autograd: what running it again must equal."""

from collections.abc import Callable, Sequence

import torch


def recomputed_reference(
    function: Callable[..., tuple[torch.Tensor, ...]],
    tensors: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    smooth: int,
) -> tuple[torch.Tensor, ...]:
    """Return `function(*tensors)`; arguments as in `recomputed`, those after the tensors without use here."""
    return function(*tensors)
