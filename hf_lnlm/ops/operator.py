"""Registration of fused operations with `torch.library`, so that `torch.compile` and `torch.export` see one node each.

Operator names are global to the process and a second registration silently replaces the first. Checkpoints carry their
own code, so two revisions of one operation can live side by side: the namespace of every operator therefore carries a
hash of the sources that implement it, and a name that exists already belongs to identical code and is reused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def source_namespace(*files: str | Path) -> str:
    """Namespace `lnlm_<hash>` of the operators implemented by some source files.

    Args:
        files: paths of the implementing files; those that do not exist are left out.

    Returns:
        A valid `torch.library` namespace, equal for equal sources.
    """
    digest = hashlib.sha256()
    for path in map(Path, files):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return f"lnlm_{digest.hexdigest()[:16]}"


def sibling(file: str, name: str) -> Path:
    """Path of the module `name` of the same operation, as a package file or flattened into a checkpoint's folder.

    Args:
        file: `__file__` of a module called `operator.py` or `ops_<operation>_operator.py`.
        name: the sibling's name, for example `"cpu"`.
    """
    path = Path(file)
    return path.with_name(path.name.replace("operator", name))


def triton_sources(file: str) -> list[Path]:
    """Where the formulas that Triton kernels share may lie, as a package file or flattened into a checkpoint's folder.

    Args:
        file: `__file__` of an operation's `operator.py`.
    """
    return [Path(file).parent.parent / "triton_math.py", Path(file).with_name("ops_triton_math.py")]


def shared_sources(file: str, *modules: str) -> list[Path]:
    """Where modules outside an operation may lie, as package files or flattened into a checkpoint's folder.

    Args:
        file: `__file__` of an operation's `operator.py`.
        modules: names below `ops`, for example `"causal_conv.lanes"`.
    """
    path = Path(file)
    package = [path.parent.parent / f"{name.replace('.', '/')}.py" for name in modules]
    return package + [path.with_name(f"ops_{name.replace('.', '_')}.py") for name in modules]


def check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Check an argument that may be absent.

    Raises:
        ValueError: another shape.
    """
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


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


def undispatched(
    operator: Callable[..., Any],
    implementation: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Make a function that does what an operator does, and goes around `torch.library` where nobody traces.

    A dispatch costs a hundred microseconds forward and backward, which is half the time of a short sequence.

    Args:
        operator: what `define_operator` returned.
        implementation, setup_context: what it was given.
        backward: as what it was given, but on real tensors only and without operators.

    Returns:
        A function of the operator's arguments.
    """

    class Undispatched(torch.autograd.Function):
        """The operator as a plain step of the graph."""

    steps = {"forward": implementation, "setup_context": setup_context, "backward": once_differentiable(backward)}
    for name, step in steps.items():
        setattr(Undispatched, name, staticmethod(step))

    def call(*values: Any) -> Any:
        if not plain_tensors(*(value for value in values if not isinstance(value, (bool, int, float, str)))):
            return operator(*values)
        return Undispatched.apply(*values) if torch.is_grad_enabled() else implementation(*values)

    return call


def runs_directly(*tensors: torch.Tensor | None) -> bool:
    """Tell whether a call may skip the operator: no gradients, nobody tracing, only plain tensors.

    A dispatch through `torch.library` costs some fifty microseconds, which a decoding step of one token feels.
    """
    return not torch.is_grad_enabled() and plain_tensors(*tensors)


def plain_tensors(*tensors: torch.Tensor | None) -> bool:
    """Tell whether nobody traces and all tensors that are not None are of no subclass but a parameter."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return _PLAIN.issuperset(map(type, tensors))
