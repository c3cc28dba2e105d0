"""Registration of fused operations with `torch.library`, so that `torch.compile` and `torch.export` see one node each.

Operator names are global to the process and a second registration silently replaces the first. Checkpoints carry their
own code, so two revisions of one operation can live side by side: the namespace of every operator therefore carries a
hash of the sources that implement it, and a name that exists already belongs to identical code and is reused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .backend import Operation, own_precision
from .inputs import Inputs
from .kernels.sources import revision

_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def source_namespace(file: str) -> str:
    """Namespace `lnlm_<hash>` of the operators that a module defines, equal for equal sources.

    Args:
        file: `__file__` of the module; it and all that it imports of this package are hashed.
    """
    return f"lnlm_{revision(file)}"


def check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Check an argument that may be absent.

    Raises:
        ValueError: another shape.
    """
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def check_tensor(name: str, tensor: torch.Tensor | None, like: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check the type, layout and place of an argument that may be absent, before anybody takes its address.

    Args:
        name: the argument.
        tensor: its value.
        like: an argument on whose device all must be.
        dtypes: what types it may have.

    Raises:
        ValueError: naming the argument, what it must be and what it is.
    """
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the rest is, got {tensor.device}")


def define_operator(
    namespace: str,
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `namespace::name`, or return the operator of that name when identical code defined it before.

    Args:
        namespace: what `source_namespace` returned.
        name: the operator's name.
        schema: its signature, for example `"(Tensor x) -> Tensor"`.
        implementation: runs on real tensors of any device.
        fake: gives outputs of the right shape and dtype for fake tensors.
        setup_context: stores on `ctx` what the backward pass needs.
        backward: takes `ctx` and the outputs' gradients and returns the inputs' gradients.

    Returns:
        The callable operator.
    """
    if hasattr(getattr(torch.ops, namespace), name):
        return getattr(getattr(torch.ops, namespace), name).default
    operator = torch.library.custom_op(f"{namespace}::{name}", implementation, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup_context)
    return getattr(getattr(torch.ops, namespace), name).default


def plain_tensors(*tensors: torch.Tensor | None) -> bool:
    """Tell whether nothing is being traced and all tensors that are not None are of no subclass but a parameter."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return _PLAIN.issuperset(map(type, tensors))


def graph_step(forward: Callable[..., Any], keep: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """Make a step of autograd's graph, once differentiable.

    Args:
        forward: of tensors and other values.
        keep: `(ctx, inputs, output)`, stores what the backward pass needs.
        backward: `(ctx, *gradients)` → gradients of all arguments of `forward`.

    Returns:
        A subclass of `torch.autograd.Function`.
    """

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        with own_precision(gradients[0].device):
            return backward(ctx, *gradients)

    steps = {"forward": forward, "setup_context": keep, "backward": once_differentiable(differentiate)}
    static = {name: staticmethod(step) for name, step in steps.items()}
    return type("GraphStep", (torch.autograd.Function,), static)


class Passes(NamedTuple):
    """One backend of an operation with a hand-written gradient.

    Attributes:
        forward: `(*tensors, *options, save)` → outputs, final state, and what to keep for the backward pass if `save`.
        backward: `(gradient of outputs, of the state, kept, *tensors, *options)` → gradients by the tensors' names.
        step: `forward` for a single position without marks, `save` false; keeps nothing.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., dict[str, torch.Tensor]]
    step: Callable[..., tuple[torch.Tensor, ...]]


class FusedOperator:
    """A differentiable operation whose backends are `Passes`: as `torch.library` operators, forward and backward, for
    whatever traces, and as a plain step of the graph elsewhere.

    A dispatch costs a hundred microseconds forward and backward, which is half the time of a short sequence.

    Args:
        operation: the operation; its `unfit` is told the tensors and options.
        file: `__file__` of the module that makes this.
        inputs: its tensors.
        options: schema of the other arguments, such as `"bool activation"`.
        shapes: takes all of these and `save` and returns the shapes of the final state and of what is kept.
    """

    def __init__(
        self, operation: Operation, file: str, inputs: Inputs, options: str, shapes: Callable[..., Any]
    ) -> None:
        self.operation, self.inputs, self._shapes = operation, inputs, shapes
        self._steps: dict[str, Any] = {}
        schema, namespace = f"{inputs.schema}, {options}, str backend", source_namespace(file)
        self._backward_operator = define_operator(
            namespace,
            f"{operation.name}_backward",
            f"(Tensor grad_y, Tensor grad_state, Tensor kept, {schema}) -> ({', '.join(['Tensor'] * len(inputs.learned))})",
            self._backward,
            self._backward_fake,
        )
        self._operator = define_operator(
            namespace,
            operation.name,
            f"({schema}, bool save) -> (Tensor, Tensor, Tensor)",
            self._forward,
            self._forward_fake,
            self._keep,
            self._differentiate,
        )

    def prepare(self, backend: str, *values: Any) -> tuple[Callable[..., tuple[torch.Tensor, ...]], bool]:
        """Check a call's arguments and choose what runs it.

        Args:
            backend: `auto` or a name, but not `reference`.
            values: tensors and options.

        Returns:
            a function of `(*values, save)`, to be called without autocast, and `save`. Of its results, the first may be
            wider than the first tensor, the second is the final state.

        Raises:
            ValueError: type, layout or device of a tensor does not fit, or the backend cannot run.
        """
        tensors, like, learned = values[: len(self.inputs.names)], values[0], len(self.inputs.learned)
        for i, (name, tensor) in enumerate(zip(self.inputs.names, tensors)):
            check_tensor(name, tensor, like, FLOATS if i < learned else (self.inputs.marks,))
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if not plain_tensors(*tensors):
            return partial(self._trace, backend), save
        chosen = self.operation.pick(backend, like.device, like.dtype, *values)
        if save:
            return self._step(chosen).apply, True
        passes = self.operation.load(chosen)
        alone = like.shape[1] == 1 and all(mark is None for mark in tensors[learned:])
        return (passes.step if alone else passes.forward), False

    def _trace(self, backend: str, *values: Any) -> tuple[torch.Tensor, ...]:
        return self._operator(*values[:-1], backend, values[-1])

    def _step(self, backend: str) -> Any:
        """The backend as a plain step of the graph."""
        if backend not in self._steps:
            passes = self.operation.load(backend)

            def backward(ctx: Any, grad_y: torch.Tensor, grad_state: torch.Tensor, _: Any) -> tuple[Any, ...]:
                kept, *tensors = ctx.saved_tensors
                grads = passes.backward(grad_y, grad_state, kept, *tensors, *ctx.options)
                return self._wanted(ctx, [grads.get(name) for name in self.inputs.learned], tensors)

            self._steps[backend] = graph_step(passes.forward, self._keep, backward)
        return self._steps[backend]

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        count = len(self.inputs.names)
        ctx.save_for_backward(output[2], *inputs[:count])
        ctx.options = inputs[count:-1]
        ctx.mark_non_differentiable(output[2])

    def _wanted(self, ctx: Any, grads: Any, tensors: Any) -> tuple[Any, ...]:
        """Gradients of all arguments, in the tensors' types."""
        needs = ctx.needs_input_grad
        found = [g.to(t.dtype) if t is not None and need else None for g, t, need in zip(grads, tensors, needs)]
        return (*found, *[None] * (len(needs) - len(found)))

    def _forward(self, *values: Any) -> tuple[torch.Tensor, ...]:
        *given, backend, save = values
        chosen = self.operation.pick(backend, given[0].device, given[0].dtype, *given)
        with own_precision(given[0].device):
            y, state, kept = self.operation.load(chosen).forward(*given, save)
        return y.to(given[0].dtype), state, kept

    def _forward_fake(self, *values: Any) -> tuple[torch.Tensor, ...]:
        *given, _backend, save = values
        x = given[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty(x.shape), *(x.new_empty(shape, dtype=dtype) for shape in self._shapes(*given, save))

    def _backward(self, grad_y: torch.Tensor, grad_state: torch.Tensor, kept: torch.Tensor, *values: Any) -> Any:
        *given, backend = values
        chosen = self.operation.pick(backend, given[0].device, given[0].dtype, *given)
        with own_precision(grad_y.device):
            grads = self.operation.load(chosen).backward(grad_y, grad_state, kept, *given)
        learned = zip(self.inputs.learned, given)
        return tuple(grad_y.new_empty(0) if t is None else grads[name].to(t.dtype) for name, t in learned)

    def _backward_fake(self, grad_y: torch.Tensor, grad_state: torch.Tensor, kept: torch.Tensor, *values: Any) -> Any:
        return tuple(
            grad_y.new_empty(0) if t is None else t.new_empty(t.shape) for t in values[: len(self.inputs.learned)]
        )

    def _differentiate(self, ctx: Any, grad_y: torch.Tensor, grad_state: torch.Tensor, _: Any) -> tuple[Any, ...]:
        kept, *tensors = ctx.saved_tensors
        grads = self._backward_operator(grad_y, grad_state, kept, *tensors, *ctx.options)
        return self._wanted(ctx, grads, tensors)
