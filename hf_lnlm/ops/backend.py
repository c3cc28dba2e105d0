"""Which implementation of an operation runs, and why: the one dispatch of the package.

`reference` is the paper's equations, `eager` fast pure torch on any device, `cpu` numba, `gpu` Triton. `"auto"` takes the
fastest that can run and is no experiment; a named one that cannot run is an error, never a silent fallback. What a config
accepts, what runs and what `hf_lnlm.backends()` says all come from `Operation`.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKENDS = ("reference", "eager", "cpu", "gpu")
"""All names of backends, beside `auto`."""
EXPERIMENTAL = ("gpu",)
"""Backends that have been checked by an interpreter only, never on the device they are for: `auto` leaves them out."""
_BY_SPEED = ("gpu", "cpu", "eager", "reference")
_OLDEST_NUMBA = (0, 61)


def _missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # an import hook forbids it
        return True


@cache
def numba_reason() -> str | None:
    """Return why numba kernels cannot run here, or None when they can."""
    try:
        numba = importlib.import_module("numba")
    except ModuleNotFoundError as error:
        if error.name in (None, "numba"):
            return "numba is not installed (pip install 'hf_lnlm[cpu]')"
        return f"numba cannot be imported: {error}"
    except Exception as error:  # whatever a broken installation raises
        return f"numba cannot be imported: {error}"
    if numba.version_info.short < _OLDEST_NUMBA:
        return f"numba must be at least 0.61, got {numba.__version__} (pip install -U 'hf_lnlm[cpu]')"
    return None


@cache
def triton_interpreted() -> bool:
    """Tell whether `TRITON_INTERPRET` makes Triton's kernels run by its interpreter: very slowly, on any device."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def triton_reason() -> str | None:
    """Return why Triton kernels cannot run here, or None when they can."""
    if _missing("triton"):
        return "triton is not installed (pip install 'hf_lnlm[gpu]')"
    if not torch.cuda.is_available() and not triton_interpreted():
        return "no CUDA device"
    return None


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which autocast changes no type: operations say themselves what they compute in.

    Entering `torch.autocast` costs more than asking whether it is needed.

    Args:
        device: where the tensors are.
    """
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class Operation:
    """One operation: its backends, what each of them needs, and which one runs.

    Attributes:
        name, limits, only_on: see `Args`.
        backends: names of those there are.

    Args:
        name: as `hf_lnlm.backends()` lists it.
        reference, eager: the implementations; None where there is none.
        cpu, gpu: return the implementation, importing what only that one needs.
        unfit: takes a backend's name and the facts of a call and returns why that backend cannot run it, or None.
        wasteful: the same for what `auto` leaves out although it could run.
        limits: what those two say, in words.
        only_on: kind of device that it is for at all; elsewhere its parts run one after the other.
        needs_compiler: whether plain torch takes more than three times as long on the processor: where the compiler is
            missing, one line says so.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Any = None,
        eager: Any = None,
        cpu: Callable[[], Any] | None = None,
        gpu: Callable[[], Any] | None = None,
        unfit: Callable[..., str | None] | None = None,
        wasteful: Callable[..., str | None] | None = None,
        limits: str = "",
        only_on: str | None = None,
        needs_compiler: bool = False,
    ) -> None:
        self._found = {name: it for name, it in (("reference", reference), ("eager", eager)) if it is not None}
        self._loaders = {name: load for name, load in (("cpu", cpu), ("gpu", gpu)) if load is not None}
        self.backends = (*self._found, *self._loaders)
        self.name, self.limits, self.only_on, self.needs_compiler = name, limits, only_on, needs_compiler
        self._unfit, self._wasteful = unfit, wasteful
        self._able: dict[tuple[str, str, bool], tuple[str, ...]] = {}

    def load(self, backend: str) -> Any:
        """Return a backend's implementation."""
        if backend not in self._found:
            self._found[backend] = self._loaders[backend]()
        return self._found[backend]

    def own(self, requested: str) -> str:
        """Return what a model's `backend` means here: the same, or `auto` where only others of its operations have it."""
        return requested if requested in self.backends else "auto"

    def pick(self, requested: str, device: torch.device | str, dtype: torch.dtype | None = None, *facts: Any) -> str:
        """Choose the backend of one call.

        Args:
            requested: `auto` or the name of a backend.
            device: where the tensors are.
            dtype: the tensors' type; compiled kernels take float32 and narrower.
            facts: what `unfit` and `wasteful` look at, if it is known.

        Raises:
            ValueError: there is no such backend, or it cannot run here.
        """
        if requested in ("reference", "eager") and requested in self.backends:
            return requested  # these run anywhere; a traced call must not ask what is installed
        kind, wide = torch.device(device).type, dtype == torch.float64
        able = self._able.get((requested, kind, wide))
        if able is None:
            able = self._able[requested, kind, wide] = self._look(requested, kind, dtype)
        for backend in able:
            reason = self._unfit(backend, *facts) if facts and self._unfit is not None else None
            if reason is not None and requested != "auto":
                raise ValueError(f"{self.name}: backend {requested!r} cannot run: {reason}")
            if reason is None and requested == "auto" and facts and self._wasteful is not None:
                reason = self._wasteful(backend, *facts)
            if reason is None:
                return backend
        raise ValueError(f"{self.name}: no backend can run on {kind}")

    def _look(self, requested: str, kind: str, dtype: torch.dtype | None) -> tuple[str, ...]:
        """What can run on this machine, the fastest first, whatever the facts of a call."""
        if requested == "auto":
            if self.needs_compiler and kind == "cpu" and dtype != torch.float64:
                _advise(missing_requirement("cpu"))
            steady = (backend for backend in _BY_SPEED if backend in self.backends and backend not in EXPERIMENTAL)
            return tuple(backend for backend in steady if self.obstacle(backend, kind, dtype) is None)
        check_backend_name(requested, self.backends)
        reason = self.obstacle(requested, kind, dtype)
        if reason is not None:
            raise ValueError(f"{self.name}: backend {requested!r} cannot run: {reason}")
        return (requested,)

    def obstacle(self, backend: str, kind: str, dtype: torch.dtype | None = None) -> str | None:
        """Return why a backend cannot run tensors of a type on a kind of device, such as `"cpu"`, or None if it can."""
        if self.only_on not in (None, kind):
            return f"it is for {self.only_on} tensors"
        reason = _missing_device(backend, kind) or missing_requirement(backend)
        if reason is None and dtype == torch.float64 and backend in ("cpu", "gpu"):
            reason = "it computes in float32, and the tensors are float64"
        return reason

    def unfit(self, backend: str, *facts: Any) -> str | None:
        """Return why a backend cannot run calls with these facts, or None if it can or there are none."""
        return self._unfit(backend, *facts) if facts and self._unfit is not None else None

    def row(self, kind: str) -> dict[str, str]:
        """Return this operation's row of `hf_lnlm.backends()` for a kind of device."""
        states = {}
        for backend in self.backends:
            reason = self.obstacle(backend, kind)
            states[backend] = reason or "can run"
            if backend in EXPERIMENTAL:
                states[backend] = f"experimental: {reason or 'can run, when asked for by name'}"
        used = self.pick("auto", kind) if self.only_on in (None, kind) else "none"
        return {"in use": used, **states} | ({"limits": self.limits} if self.limits else {})


def _advise(reason: str | None) -> None:
    """Say once a process that a compiler is missing where it matters."""
    if reason is not None:
        logger.warning_once("hf_lnlm runs in plain torch, more than three times as slow as compiled: %s", reason)


def missing_requirement(backend: str) -> str | None:
    """Return why a backend can run nowhere on this machine, or None if it can."""
    return numba_reason() if backend == "cpu" else triton_reason() if backend == "gpu" else None


def _missing_device(backend: str, kind: str) -> str | None:
    wanted = {"cpu": "cpu", "gpu": "cuda"}.get(backend, kind)
    fits = kind == wanted or (backend == "gpu" and triton_interpreted())
    return None if fits else f"the tensors are on {kind}"


def check_backend_name(requested: str, available: Iterable[str]) -> None:
    """Refuse the name of a backend that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if requested not in ("auto", *available):
        raise ValueError(f"backend must be auto or one of {', '.join(available)}, got {requested!r}")


def family_backends(operations: Iterable[Operation]) -> tuple[str, ...]:
    """Return the backends that a model made of these operations can be told to use; `eager` is torch itself."""
    available = {backend for operation in operations for backend in operation.backends} or {"eager"}
    return tuple(backend for backend in BACKENDS if backend in available)


def check_backend(requested: str, operations: Iterable[Operation], *facts: Any) -> None:
    """Refuse a model's `backend` that cannot run, before anything is allocated.

    Args:
        requested: the config's field, `auto` or one of `family_backends`.
        operations: those that the model is made of.
        facts: what they look at, as far as the config knows it.

    Raises:
        ValueError: naming the field, what is missing, and how to get it.
    """
    if requested == "auto":
        return
    able = (operation for operation in operations if requested in operation.backends)
    reasons = [missing_requirement(requested), *(operation.unfit(requested, *facts) for operation in able)]
    for reason in filter(None, reasons):
        raise ValueError(f"backend {requested!r} cannot run: {reason}")
