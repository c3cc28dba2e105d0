"""State space duality as two `torch.library` operators, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..backend import pick_backend
from ..operator import define_operator, shared_sources, sibling, source_namespace, triton_sources, undispatched
from .eager import ssd_eager, ssd_eager_backward

_SHARED = ("backend", *(f"causal_conv.{name}" for name in ("compiled", "cpu", "flat", "lanes")))
_NAMESPACE = source_namespace(
    __file__,
    *(sibling(__file__, name) for name in ("eager", "cpu", "gpu")),
    *shared_sources(__file__, *_SHARED),
    *triton_sources(__file__),
)
BACKENDS = ("eager", "cpu", "gpu")
_INPUTS = ("x", "scale", "log_decay", "B", "C", "D", "initial_state", "diagonal", "reset")
_LEARNED = _INPUTS[:8]
_SCHEMA = (
    "Tensor x, Tensor scale, Tensor log_decay, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, Tensor? diagonal,"
    " Tensor? reset, int chunk_size, str backend"
)


def _chosen(call: dict[str, Any], backend: str) -> str:
    """The backend that runs."""
    return pick_backend(backend, call["x"].device, BACKENDS, call["x"].dtype)


def _forward(*values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call, (chunk_size, backend, save) = dict(zip(_INPUTS, values)), values[len(_INPUTS) :]
    chosen = _chosen(call, backend)
    if chosen == "cpu":
        from .cpu import ssd_cpu

        y, state, entries = ssd_cpu(call, chunk_size, save)
    elif chosen == "gpu":
        from .gpu import ssd_gpu

        y, state, entries = ssd_gpu(call, chunk_size, save)
    else:
        y, state, entries = ssd_eager(call, chunk_size, save)
    return y.to(call["x"].dtype), state, entries


def _forward_fake(*values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, b, (chunk_size, _backend, save) = values[0], values[3], values[len(_INPUTS) :]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.new_empty((x.shape[0], x.shape[2], x.shape[3], b.shape[3]), dtype=dtype)
    chunks = (x.shape[1] + chunk_size - 1) // chunk_size if save else 0
    return x.new_empty(x.shape), state, x.new_empty((chunks, *state.shape), dtype=dtype)


def _backward(grad_y: torch.Tensor, grad_state: torch.Tensor, entries: torch.Tensor, *values: Any) -> Any:
    call, (chunk_size, backend) = dict(zip(_INPUTS, values)), values[len(_INPUTS) :]
    chosen = _chosen(call, backend)
    if chosen == "cpu":
        from .cpu import ssd_cpu_backward

        grads = ssd_cpu_backward(grad_y, grad_state, call, entries, chunk_size)
    elif chosen == "gpu":
        from .gpu import ssd_gpu_backward

        grads = ssd_gpu_backward(grad_y, grad_state, call, entries, chunk_size)
    else:
        grads = ssd_eager_backward(grad_y, grad_state, call, entries, chunk_size)
    return tuple(
        grads[name].to(call[name].dtype) if call[name] is not None else grad_y.new_empty(0) for name in _LEARNED
    )


def _backward_fake(grad_y: torch.Tensor, grad_state: torch.Tensor, entries: torch.Tensor, *values: Any) -> Any:
    return tuple(grad_y.new_empty(0) if v is None else v.new_empty(v.shape) for v in values[: len(_LEARNED)])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], *inputs[: len(_INPUTS)])
    ctx.options = inputs[len(_INPUTS) : -1]
    ctx.mark_non_differentiable(output[2])


def _differentiate(
    ctx: Any, grad_y: torch.Tensor, grad_state: torch.Tensor, _: Any, backward: Any = None
) -> tuple[Any, ...]:
    entries, *values = ctx.saved_tensors
    grads = (backward or ssd_backward)(grad_y, grad_state, entries, *values, *ctx.options)
    wanted = [g if v is not None and need else None for g, v, need in zip(grads, values, ctx.needs_input_grad)]
    return (*wanted, None, None, None, None)


ssd_backward = define_operator(
    _NAMESPACE,
    "ssd_backward",
    f"(Tensor grad_y, Tensor grad_state, Tensor entries, {_SCHEMA}) -> ({', '.join(['Tensor'] * len(_LEARNED))})",
    _backward,
    _backward_fake,
)
ssd_forward = define_operator(
    _NAMESPACE,
    "ssd",
    f"({_SCHEMA}, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _keep,
    _differentiate,
)
run_ssd = undispatched(ssd_forward, _forward, _keep, partial(_differentiate, backward=_backward))
