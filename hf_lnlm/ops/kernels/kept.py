"""Where compiled kernels are kept: by the content of what was compiled, for all programs of one user.

A kernel's name is a hash of its code and of all that it calls, of the constants in it, numba's options, the argument
types, the versions of Python, numpy, numba and llvmlite and the processor's features. So the package and every
checkpoint that carries the same kernel share one file, whatever their modules are called, and nothing is ever out of
date. Files hold machine code and are as trustworthy as who can write them: a folder that others could have written is
not used.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

try:
    import llvmlite
    import numba
    import numpy
    from numba.core import config, types
    from numba.core.compiler import CompileResult
    from numba.core.dispatcher import Dispatcher
    from numba.core.environment import Environment
    from numba.core.funcdesc import PythonFunctionDescriptor
    from numba.extending import _Intrinsic
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

_PATIENCE = 2.0  # seconds of compiling before something is said
_VERSION = 2  # of the files' form


def _say(line: str) -> None:
    sys.stderr.write(f"hf_lnlm: {line}\n")
    sys.stderr.flush()


def _user_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hf_lnlm"


def _distrust(path: Path) -> str | None:
    """Why what lies there is not taken for the user's own, or None."""
    state = path.lstat()
    if not stat.S_ISDIR(state.st_mode):
        return "it is no folder"
    if not hasattr(os, "geteuid"):
        return None
    if state.st_uid != os.geteuid():
        return f"it belongs to user {state.st_uid}"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write it (mode {stat.S_IMODE(state.st_mode):o})"
    return None if os.access(path, os.W_OK) else "it cannot be written"


@cache
def folder() -> Path:
    """The folder that compiled kernels are kept in: `$XDG_CACHE_HOME/hf_lnlm`, by default `~/.cache/hf_lnlm`.

    Where it cannot be made, or others than this user own or can write it, a private one of this process is taken, and
    the reason is said on stderr.
    """
    place = None
    try:
        place = _user_folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _distrust(place)
    except (OSError, RuntimeError) as error:
        reason = str(error)
    if place is not None and reason is None:
        return place
    private = Path(tempfile.mkdtemp(prefix="hf_lnlm-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    _say(f"compiled kernels are not kept in {place}: {reason}; this process compiles its own")
    return private


def _code(code: CodeType) -> Iterator[str]:
    yield f"code {code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts[1:]:  # the first is the docstring, or None
        yield from _code(constant) if isinstance(constant, CodeType) else [f"{type(constant).__name__} {constant!r}"]
    yield f"{code.co_consts[:1]!r}"


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _reached(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function's names mean: module-level values and those of enclosing functions."""
    for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
        yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, cell.cell_contents


def _is_foreign(value: Any, root: str) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] != root


def _content(value: Any, root: str, seen: dict[int, int]) -> Iterator[str]:
    """Lines that tell a value from others, whatever the module is called that it comes from."""
    if id(value) in seen:
        yield f"again {seen[id(value)]}"
        return
    seen[id(value)] = len(seen)
    if isinstance(value, Dispatcher):
        options = {name: entry for name, entry in value.targetoptions.items() if name != "pipeline_class"}
        options["pipeline_class"] = getattr(value.targetoptions.get("pipeline_class"), "__name__", None)
        yield repr(sorted((name, sorted(x) if isinstance(x, set) else x) for name, x in options.items()))
        value = value.py_func
    elif isinstance(value, _Intrinsic):
        value = value._defn
    value = getattr(value, "__wrapped__", value) if not isinstance(value, type) else value
    if isinstance(value, FunctionType) and not _is_foreign(value, root):
        yield from _code(value.__code__)
        yield f"{value.__defaults__!r} {value.__kwdefaults__!r}"
        for name, entry in _reached(value):
            yield f"name {name}"
            yield from _content(entry, root, seen)
    elif isinstance(value, ModuleType):
        yield f"module {value.__name__}"
    elif isinstance(value, type) or callable(value):
        yield f"{getattr(value, '__qualname__', type(value).__qualname__)} {getattr(value, '_fields', '')}"
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _content(entry, root, seen)
    elif isinstance(value, bool | int | float | str | bytes | numpy.generic | None):
        yield f"{type(value).__name__} {value!r}"
    else:
        yield f"{type(value).__qualname__} {value}"


@cache
def _surroundings() -> str:
    settings = config.OPT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE, config.BOUNDSCHECK, config.DEBUGINFO_DEFAULT
    versions = sys.implementation.cache_tag, sys.version, numpy.__version__, numba.__version__, llvmlite.__version__
    return repr((_VERSION, *map(str, settings), *versions, platform.machine(), sys.platform))


@cache
def content_of(function: FunctionType) -> str:
    """Hash of a kernel's code and of all that it reaches.

    Args:
        function: a Python function; what is defined in the package that it comes from is followed, the rest is named.
    """
    root, digest = function.__module__.partition(".")[0], hashlib.sha256()
    for line in _content(function, root, {}):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _fields(kind: Any) -> str:
    return f"{kind} {getattr(getattr(kind, 'instance_class', None), '_fields', '')}"


class _Patience:
    """Says once a process what is compiled and where it is kept, if compiling takes more than two seconds in all."""

    def __init__(self) -> None:
        self.said, self.spent = False, 0.0

    def speak(self, name: str) -> None:
        """Say it."""
        self.said = True
        _say(f"compiling {name} for this processor, once; kept in {folder()} (`hf-lnlm warm-up` does so ahead)")


_patience = _Patience()


@contextmanager
def compiling(kernel: Any) -> Iterator[None]:
    """Context of a compilation: tells the user if it takes long, and keeps the garbage collector away.

    A compilation makes a million objects and keeps them, so that looking for garbage is a tenth of its time.

    Args:
        kernel: the dispatcher.
    """
    began, enabled = time.monotonic(), gc.isenabled()
    timer = threading.Timer(max(0.0, _PATIENCE - _patience.spent), _patience.speak, [_place_in_package(kernel)])
    timer.daemon = True
    gc.disable()
    if not _patience.said:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if enabled:
            gc.enable()
        _patience.spent += time.monotonic() - began


def _place_in_package(kernel: Any) -> str:
    """Such as `memory.ntm.cpu_kernels.forward_loop`, in carried code with underscores."""
    return f"{kernel.__module__.rpartition('ops')[2].strip('._')}.{kernel.__name__.strip('_')}"


class KernelCache:
    """What numba's dispatcher asks for compiled code, and gives it to, in place of numba's own cache.

    Args:
        kernel: the dispatcher.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    @property
    def cache_path(self) -> str:
        """The folder."""
        return str(folder())

    def enable(self) -> None:
        """There is nothing to turn on."""

    def disable(self) -> None:
        """There is nothing to turn off."""

    def flush(self) -> None:
        """There is nothing to forget: a file's name says what is in it."""

    def _path(self, arguments: Any, codegen: Any) -> Path:
        options = _content(self._kernel, self._kernel.__module__.partition(".")[0], {})
        parts = [_surroundings(), repr(codegen.magic_tuple()), *map(_fields, arguments), *options]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return folder() / f"{self._kernel.__name__.strip('_')}-{digest[:40]}.kernel"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the kept result for these argument types, or None, after which the dispatcher compiles.

        Args:
            signature: argument types, or a signature.
            target_context: numba's.
        """
        target_context.refresh()
        arguments = tuple(getattr(signature, "args", signature))
        path = self._path(arguments, target_context.codegen())
        found = _read(path)
        return None if found is None else _rebuilt(self._kernel, arguments, target_context, *found)

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep a result.

        Args:
            signature: argument types, or a signature.
            result: numba's compile result.
        """
        if result.library.has_dynamic_globals:
            return
        name, _kind, (machine_code, instructions) = result.library.serialize_using_object_code()
        described = {
            "library": name,
            "function": result.fndesc.mangled_name,
            "environment": result.fndesc.env_name,
            "result": str(result.signature.return_type),
            "machine_code": len(machine_code),
        }
        path = self._path(tuple(result.signature.args), result.target_context.codegen())
        try:
            _write(path, described, machine_code + instructions)
        except OSError as error:
            _say(f"{path.name} is not kept: {error}")


_RESULTS = {str(kind): kind for kind in (types.none, types.int64, types.float32, types.float64, types.boolean)}


def _write(path: Path, described: dict[str, Any], body: bytes) -> None:
    """A line of JSON that describes the file, and its body; whole or not at all, for this user only."""
    described["sha256"] = _digest(path, described, body)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with open(handle, "wb") as file:
            file.write(json.dumps(described).encode() + b"\n" + body)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _digest(path: Path, described: dict[str, Any], body: bytes) -> str:
    """Of all that machine code is run by: what it is called and where it begins, too, and which kernel's it is."""
    head = json.dumps([path.name, {name: value for name, value in described.items() if name != "sha256"}])
    return hashlib.sha256(head.encode() + b"\n" + body).hexdigest()


def _content_of_file(path: Path) -> bytes:
    """A regular file of this user's that nobody else can write.

    Raises:
        OSError: there is no such file.
    """
    flags = [getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK")]
    with open(os.open(path, os.O_RDONLY | sum(flags)), "rb") as file:
        state = os.fstat(file.fileno())
        others = hasattr(os, "geteuid") and (
            state.st_uid != os.geteuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )
        if others or not stat.S_ISREG(state.st_mode):
            raise PermissionError(f"{path} is no file of this user's alone")
        return file.read()


def _read(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """A kept file, or None if there is none, it is damaged, or others could have written it."""
    try:
        head, _, body = _content_of_file(path).partition(b"\n")
        described = json.loads(head)
        whole = described["sha256"] == _digest(path, described, body) and described["result"] in _RESULTS
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (described, body) if whole else None


def _rebuilt(kernel: Any, arguments: Any, target_context: Any, described: dict[str, Any], body: bytes) -> Any:
    """numba's compile result for machine code that was kept."""
    count, result = described["machine_code"], _RESULTS[described["result"]]
    function: FunctionType = kernel.py_func
    described_function = PythonFunctionDescriptor(
        native=True, modname=function.__module__, qualname=kernel.__name__, unique_name=described["library"],
        doc="", typemap={}, restype=result, calltypes={}, args=list(kernel._compiler.pysig.parameters), kws=(),
        mangler=lambda *_names, **_tags: described["function"], argtypes=arguments, env_name=described["environment"],
    )  # fmt: skip
    environment = Environment.from_fndesc(described_function)
    library = described["library"], "object", (body[:count], body[count:])
    return CompileResult._rebuild(
        target_context, library, described_function, environment, result(*arguments), False, (), "", (), ()
    )
