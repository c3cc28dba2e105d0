"""A function whose intermediate values are not kept for the backward pass: it runs again there.

References:
    [1] Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174

`torch.utils.checkpoint` runs the function with gradients enabled the first time too, only to throw away what it saves; a
recurrence then allocates its whole history twice, between values that stay, and leaves holes in memory. Here the first
run has no gradients at all. Random numbers and autocast are the second time as they were the first time.

Complexity: the function's time once more, and the memory of its arguments and results.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

Tensors = tuple[torch.Tensor, ...]


class _Surroundings(NamedTuple):
    """What a function's result depends on beside its arguments."""

    device: torch.device
    autocast: bool
    dtype: torch.dtype
    random: torch.Tensor
    random_on_device: torch.Tensor | None


def _surroundings(device: torch.device) -> _Surroundings:
    kind = device.type
    on_device = torch.cuda.get_rng_state(device) if kind == "cuda" else None
    return _Surroundings(
        device, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.get_rng_state(), on_device
    )


@contextmanager
def _as_before(before: _Surroundings) -> Iterator[None]:
    """Random numbers and autocast as they were, and afterwards as they are now."""
    device, autocast, dtype, random, on_device = before
    with (
        torch.random.fork_rng([device] if on_device is not None else []),
        torch.autocast(device.type, dtype=dtype, enabled=autocast),
    ):
        torch.set_rng_state(random)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        yield


class _Recomputed(torch.autograd.Function):
    """Arguments: the function, its parameters, how many results have gradients; then tensors and parameters again."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensors], parameters: Tensors, smooth: int, *tensors: torch.Tensor
    ) -> Tensors:
        given = tensors[: len(tensors) - len(parameters)]
        ctx.function, ctx.parameters, ctx.before = function, parameters, _surroundings(given[0].device)
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        results = function(*given)
        ctx.mark_non_differentiable(*results[smooth:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        needed = ctx.needs_input_grad[3:]
        given = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=False)]
        with torch.enable_grad(), _as_before(ctx.before):
            results = ctx.function(*given)
        pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and r.requires_grad]
        sources = [s for s, need in zip((*given, *ctx.parameters), needed, strict=True) if need]
        found: Any = (None,) * len(sources)
        if pairs:
            found = torch.autograd.grad([r for r, _ in pairs], sources, [g for _, g in pairs], allow_unused=True)
        rest = iter(found)
        return None, None, None, *[next(rest) if need else None for need in needed]


def recomputed(
    function: Callable[..., Tensors], tensors: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], smooth: int
) -> Tensors:
    """Return `function(*tensors)`, remembering the tensors only.

    Args:
        function: of tensors, the first of which says the device; returns tensors. It must give the same results twice.
        tensors: its arguments.
        parameters: other tensors it uses that may need gradients, such as the parameters of its modules.
        smooth: how many of its results have gradients; those after them have none.
    """
    results: Tensors = _Recomputed.apply(function, tuple(parameters), smooth, *tensors, *parameters)
    return results
