"""The causal convolution as two `torch.library` operators, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..backend import pick_backend
from ..operator import define_operator, shared_sources, sibling, source_namespace, triton_sources, undispatched
from .eager import causal_conv_eager, causal_conv_eager_backward

_SOURCES = ("eager", "cpu", "compiled", "flat", "gpu", "lanes")
_NAMESPACE = source_namespace(
    __file__,
    *(sibling(__file__, name) for name in _SOURCES),
    *shared_sources(__file__, "backend"),
    *triton_sources(__file__),
)
BACKENDS = ("eager", "cpu", "gpu")

_INPUTS = ("x", "weight", "bias", "state", "taps")
_SCHEMA = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? taps, bool activation, str backend"


def _forward(*values: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call, (activation, backend) = dict(zip(_INPUTS, values)), values[len(_INPUTS) :]
    chosen = pick_backend(backend, call["x"].device, BACKENDS, call["x"].dtype)
    if chosen == "cpu":
        from .cpu import causal_conv_cpu

        y, state = causal_conv_cpu(call, activation)
    elif chosen == "gpu":
        from .gpu import causal_conv_gpu

        y, state = causal_conv_gpu(call, activation)
    else:
        y, state = causal_conv_eager(call, activation)
    return y.to(call["x"].dtype), state


def _forward_fake(*values: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = values[:2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=dtype)


def _backward(grad_y: torch.Tensor, grad_state: torch.Tensor, *values: Any) -> tuple[torch.Tensor, ...]:
    call, (activation, backend) = dict(zip(_INPUTS, values)), values[len(_INPUTS) :]
    chosen = pick_backend(backend, call["x"].device, BACKENDS, call["x"].dtype)
    if chosen == "cpu":
        from .cpu import causal_conv_cpu_backward

        grads = causal_conv_cpu_backward(grad_y, grad_state, call, activation)
    elif chosen == "gpu":
        from .gpu import causal_conv_gpu_backward

        grads = causal_conv_gpu_backward(grad_y, grad_state, call, activation)
    else:
        grads = causal_conv_eager_backward(grad_y, grad_state, call, activation)
    return tuple(
        grads[name].to(call[name].dtype) if call[name] is not None else grad_y.new_empty(0) for name in _INPUTS[:4]
    )


def _backward_fake(grad_y: torch.Tensor, grad_state: torch.Tensor, *values: Any) -> tuple[torch.Tensor, ...]:
    return tuple(grad_y.new_empty(0) if v is None else v.new_empty(v.shape) for v in values[:4])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[: len(_INPUTS)])
    ctx.options = inputs[len(_INPUTS) :]


def _differentiate(ctx: Any, grad_y: torch.Tensor, grad_state: torch.Tensor, backward: Any = None) -> tuple[Any, ...]:
    values = ctx.saved_tensors
    grads = (backward or causal_conv_backward)(grad_y, grad_state, *values, *ctx.options)
    wanted = [g if v is not None and need else None for g, v, need in zip(grads, values, ctx.needs_input_grad)]
    return (*wanted, None, None, None)


causal_conv_backward = define_operator(
    _NAMESPACE,
    "causal_conv_backward",
    f"(Tensor grad_y, Tensor grad_state, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
causal_conv_forward = define_operator(
    _NAMESPACE, "causal_conv", f"({_SCHEMA}) -> (Tensor, Tensor)", _forward, _forward_fake, _keep, _differentiate
)
run_causal_conv = undispatched(causal_conv_forward, _forward, _keep, partial(_differentiate, backward=_backward))
