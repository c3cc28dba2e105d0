"""The weight that a fused path may use in place of calling a module.

LoRA, quantisation, offloading and parametrisations wrap `nn.Linear` modules or their weights. A fused kernel that reads
`.weight` around them computes something else, silently. Whatever the wrapper, it still is an affine map, and an affine
map is known completely by its values on the unit vectors: `f(e_i) - f(0)` are the columns of its weight. So a module that
is anything but a plain `nn.Linear` is applied to the identity, which is differentiable and costs one product of
`in_features` rows. A bias that is added and subtracted again would round small weights; long unit vectors keep it below
their last digit.
"""

from typing import Any

import torch
from torch import nn

from ..ops.dense import Dense

Affine = tuple[torch.Tensor, torch.Tensor | None]

_PLAIN = {nn.Parameter, torch.Tensor, type(None)}
LINEAR = (nn.Linear, Dense)
_LONG = 2.0**32  # a power of two: multiplying and dividing by it changes no digit


def has_plain_weights(module: nn.Module) -> bool:
    """Tell whether a module's own parameters are plain tensors, not a quantiser's or a distributed one's."""
    if torch.compiler.is_compiling():  # a tracer's tensors stand for plain ones
        return True
    return _PLAIN.issuperset(map(type, module._parameters.values()))


def has_hooks(module: nn.Module) -> bool:
    """Tell whether hooks hang on a module or something has replaced its forward."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    own = vars(module)
    return bool(hooked) or "forward" in own or "_hf_hook" in own  # accelerate puts both there


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether weight and bias are all there is to a module: an `nn.Linear` without hooks or a forward of its own."""
    return type(module) in LINEAR and has_plain_weights(module) and not has_hooks(module)


def unwrapped(module: Any) -> Any:
    """Return the module inside peft's wrappers: they pass on `forward` and nothing else that a module can be asked."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _unit_length(module: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
    """Return how long the vectors may be: 1 wherever half precision may be at work inside, which would overflow."""
    ranges_wide = dtype is not torch.float16 and not torch.is_autocast_enabled(device.type)
    known = type(module) in LINEAR and has_plain_weights(module)  # a quantiser's own precision isn't
    return _LONG if known and ranges_wide else 1.0


def effective_weight(module: nn.Module, in_features: int, dtype: torch.dtype, device: torch.device) -> Affine:
    """Return weight `(out_features, in_features)` and bias `(out_features,)` of any affine module.

    Args:
        module: an `nn.Linear`, or what peft, accelerate, a quantiser or a parametrisation made of one.
        in_features: width of the module's input.
        dtype, device: of the input that the module would have been given.

    Returns:
        weight and bias (None when there is none), connected to the graph, so that adapters get their gradients.
    """
    if is_plain_linear(module):
        return module.weight, module.bias  # type: ignore[return-value]
    length = _unit_length(module, dtype, device)
    basis = torch.eye(in_features + 1, in_features, dtype=dtype, device=device)
    values = module(basis * length)
    bias = values[in_features]  # the last row is zero
    return ((values[:in_features] - bias) / length).mT.contiguous(), bias
