"""How the numba kernels of this package are compiled.

A kernel that Python calls is compiled together with its parts, the functions that only compiled code calls: parts are
turned into LLVM's instructions, and the whole is optimised and made machine code once. What numba does by itself,
optimising every function alone, again within each caller, and making machine code of it each time, takes three times as
long. Parts are private to their whole, so that a loop's numbers depend on nothing else that a process has loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .kept import KernelCache, compiling, content_of

try:
    from numba import njit
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

# Every lane rounds alike, whether it runs in a vector loop or in its scalar remainder: results do not depend on where
# tensors lie in memory.
STRICT = {"contract", "nsz"}
# Sums may be reordered and quotients become products; NaN and infinity are left alone.
RELAXED = STRICT | {"arcp", "reassoc"}


class _PartLibrary(JITCodeLibrary):
    """A part's instructions, as they were written."""

    _shared_module: Any

    def add_llvm_module(self, ll_module: Any) -> None:
        """Take instructions without optimising them; see the base class."""
        self._final_module.link_in(ll_module)

    def finalize(self) -> None:
        """Make no machine code; see the base class."""
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """No address, since there is no machine code; see the base class."""
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        """Whom numba asks to `set_env`."""
        return self

    def set_env(self, env_name: str, env: Any) -> None:
        """Nothing to set without machine code: parts handle no Python objects."""

    def _get_module_for_linking(self) -> Any:
        """The part with all that it reaches, for a function compiled by numba's own means."""
        if self._shared_module is None:
            module = self._final_module.clone()
            for library in _reached(self._linking_libraries):
                module.link_in(_instructions(library), preserve=True)
            for function in module.functions:
                if not function.is_declaration:
                    function.linkage = "linkonce_odr"
            self._shared_module = module
        return self._shared_module


def _instructions(library: Any) -> Any:
    return library._final_module if isinstance(library, _PartLibrary) else library._get_module_for_linking()


def _reached(libraries: list[Any]) -> list[Any]:
    """Libraries and all that their parts call, each once."""
    found: dict[Any, None] = {}
    todo = list(libraries)
    while todo:
        library = todo.pop(0)
        if library not in found:
            found[library] = None
            todo += library._linking_libraries if isinstance(library, _PartLibrary) else []
    return list(found)


class _WholeLibrary(JITCodeLibrary):
    """A kernel with its parts, optimised together."""

    _linking_libraries: list[Any]

    def finalize(self) -> None:
        """Link, make parts private, optimise, and make machine code; see the base class."""
        own = {function.name for function in self._final_module.functions if not function.is_declaration}
        reached, self._linking_libraries = _reached(self._linking_libraries), []
        for library in reached:
            self._final_module.link_in(_instructions(library), preserve=True)
        for function in self._final_module.functions:
            if not (function.is_declaration or function.name in own):
                function.linkage = "internal"
        super().finalize()


class _WholeCompiler(Compiler):
    """numba's compiler of kernels that Python calls."""

    library: type[JITCodeLibrary] = _WholeLibrary

    def define_pipelines(self) -> Any:
        """Name the kernel by its content, and choose where its code goes; see the base class.

        Symbols are global to a process, and checkpoints may carry another revision of a kernel under the same name.
        """
        identity, codegen = self.state.func_id, self.state.targetctx.codegen()
        if self.library is _WholeLibrary:
            identity.func_qualname = f"{identity.func_name}_{content_of(identity.func)[:16]}"
        self.state.library = self.library(codegen, identity.func_qualname)
        self.state.library.enable_object_caching()
        return super().define_pipelines()


class _PartCompiler(_WholeCompiler):
    """numba's compiler of parts, told that arrays don't overlap: it would check at run time, eight of them at most."""

    library = _PartLibrary

    def define_pipelines(self) -> Any:
        """Set the flag that numba's own parallel loops set; see the base class."""
        self.state.flags.noalias = True
        return super().define_pipelines()


def _options(flags: set[str], **more: Any) -> dict[str, Any]:
    return {"fastmath": flags, "error_model": "numpy", **more}


class _Attended:
    """A dispatcher's compiler, within `compiling`."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self._compiler = kernel, kernel._compiler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiler, name)

    def compile(self, arguments: Any, result: Any) -> Any:
        """Compile one signature; see numba's."""
        with compiling(self._kernel):
            return self._compiler.compile(arguments, result)


def compiled(flags: set[str]) -> Any:
    """Decorator of kernels that Python calls: compiled by numba at the first call, then kept by `KernelCache`.

    Args:
        flags: LLVM fast-math flags.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        kernel = njit(pipeline_class=_WholeCompiler, nogil=True, no_cfunc_wrapper=True, **_options(flags))(function)
        kernel._cache = KernelCache(kernel)
        kernel._compiler = _Attended(kernel)
        return kernel

    return decorate


def part(flags: set[str], forceinline: bool = False) -> Any:
    """Decorator of functions that only compiled code calls, and that write no array which overlaps another argument.

    Args:
        flags: LLVM fast-math flags.
        forceinline: always inline into the caller; without it LLVM decides.
    """
    own = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _PartCompiler}
    return njit(**_options(flags, forceinline=forceinline), **own)


inner = part(RELAXED)
loop = compiled(RELAXED)
formula = njit(**_options(RELAXED, inline="always"))  # becomes part of the caller before numba sees types
