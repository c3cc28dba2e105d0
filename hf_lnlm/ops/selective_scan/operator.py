"""The selective scan as two `torch.library` operators, forward and backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..backend import pick_backend
from ..operator import define_operator, shared_sources, sibling, source_namespace, triton_sources, undispatched
from .eager import BLOCK, selective_scan_eager, selective_scan_eager_backward

_SOURCES = ("eager", "cpu", "gpu")
_SHARED = ("backend", *(f"causal_conv.{name}" for name in ("compiled", "cpu", "flat", "lanes")))
_NAMESPACE = source_namespace(
    __file__,
    *(sibling(__file__, name) for name in _SOURCES),
    *shared_sources(__file__, *_SHARED),
    *triton_sources(__file__),
)
BACKENDS = ("eager", "cpu", "gpu")

_INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "mask", "reset")
_LEARNED = _INPUTS[:9]
_SCHEMA = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? mask, Tensor? reset, bool softplus, str backend"
)


def _chosen(call: dict[str, Any], softplus: bool, backend: str) -> str:
    """The backend that runs. The numba kernels take decays of at most 1, so growth falls to the eager path."""
    chosen = pick_backend(backend, call["u"].device, BACKENDS, call["u"].dtype)
    grows = chosen == "cpu" and not (softplus and not bool((call["A"] > 0).any()))
    return "eager" if grows else chosen


def _forward(*values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call, (softplus, backend, save) = dict(zip(_INPUTS, values)), values[len(_INPUTS) :]
    chosen = _chosen(call, softplus, backend)
    if chosen == "cpu":
        from .cpu import selective_scan_cpu

        y, state, entries = selective_scan_cpu(call, save)
    elif chosen == "gpu":
        from .gpu import selective_scan_gpu

        y, state, entries = selective_scan_gpu(call, softplus, save)
    else:
        y, state, entries = selective_scan_eager(call, softplus, save)
    return y.to(call["u"].dtype), state, entries


def _forward_fake(*values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, a, save = values[0], values[2], values[-1]
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    state = u.new_empty((u.shape[0], a.shape[1], u.shape[2]), dtype=dtype)
    blocks = (u.shape[1] + BLOCK - 1) // BLOCK if save else 0
    return u.new_empty(u.shape), state, u.new_empty((blocks, *state.shape), dtype=dtype)


def _backward(grad_y: torch.Tensor, grad_state: torch.Tensor, entries: torch.Tensor, *values: Any) -> Any:
    call, (softplus, backend) = dict(zip(_INPUTS, values)), values[len(_INPUTS) :]
    chosen = _chosen(call, softplus, backend)
    if chosen == "cpu":
        from .cpu import selective_scan_cpu_backward

        grads = selective_scan_cpu_backward(grad_y, grad_state, call, entries)
    elif chosen == "gpu":
        from .gpu import selective_scan_gpu_backward

        grads = selective_scan_gpu_backward(grad_y, grad_state, call, entries, softplus)
    else:
        grads = selective_scan_eager_backward(grad_y, grad_state, call, entries, softplus)
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
    grads = (backward or selective_scan_backward)(grad_y, grad_state, entries, *values, *ctx.options)
    wanted = [g if v is not None and need else None for g, v, need in zip(grads, values, ctx.needs_input_grad)]
    return (*wanted, None, None, None, None, None)


selective_scan_backward = define_operator(
    _NAMESPACE,
    "selective_scan_backward",
    f"(Tensor grad_y, Tensor grad_state, Tensor entries, {_SCHEMA}) -> ({', '.join(['Tensor'] * len(_LEARNED))})",
    _backward,
    _backward_fake,
)
selective_scan_forward = define_operator(
    _NAMESPACE,
    "selective_scan",
    f"({_SCHEMA}, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _keep,
    _differentiate,
)
run_selective_scan = undispatched(selective_scan_forward, _forward, _keep, partial(_differentiate, backward=_backward))
