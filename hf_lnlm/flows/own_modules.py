"""A user's own modules (objectives, tasks, families): taken by `--import` alone, by no recipe, checkpoint or entry point.

Importing one must enter what it brings: `hf_lnlm.objectives.OBJECTIVES["mine"] = Mine`, the same in `tasks.TASKS`,
or `AutoConfig.register` and the Auto classes' `register` for a family.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ..errors import UsageProblem


def import_own(name: str) -> ModuleType:
    """Import a module by its name or its file.

    Args:
        name: `package.module`, looked for on `sys.path` without the working directory, or `./file.py`, a path.

    Returns:
        The module.

    Raises:
        UsageProblem: there is none, or it fails; says where it was looked for.
    """
    if name.endswith(".py") or os.sep in name:
        return _from_file(name)
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageProblem(f"--import wants a module's name or a path such as ./file.py, got {name!r}")
    with _without_working_directory():
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise UsageProblem(
                f"--import {name}: no module of that name on sys.path, where the working directory doesn't count: a file "
                f"in it is --import ./{name.replace('.', '/')}.py"
            )
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise _failed(name, error) from error


def _from_file(name: str) -> ModuleType:
    path = Path(name)
    if os.sep not in name:
        raise UsageProblem(f"--import {name}: a file is given by a path, as in --import ./{name}")
    if path.suffix != ".py" or not path.is_file():
        raise UsageProblem(f"--import {name}: no such Python file")
    if not path.stem.isidentifier() or path.stem in sys.modules:
        raise UsageProblem(f"--import {name}: {path.stem} is the name of another module or no name; rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageProblem(f"--import {name}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # a class of it is found again by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise _failed(name, error) from error
    return module


def _failed(name: str, error: Exception) -> UsageProblem:
    said = " ".join(str(error).split())
    return UsageProblem(f"--import {name} failed: {type(error).__name__}: {said}  [--debug shows where]")


@contextmanager
def _without_working_directory() -> Iterator[None]:
    """`sys.path` as it is, but for the working directory."""
    before, here = list(sys.path), Path.cwd()
    sys.path[:] = [entry for entry in before if entry and Path(entry).resolve() != here]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
