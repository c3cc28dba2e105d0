"""Which source files a compiled piece consists of: followed from import to import, so that no list is kept by hand."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

_IMPORT = re.compile(r"^[ \t]*from (\.+)([\w.]*) import", re.MULTILINE)


def _imported(path: Path) -> set[Path]:
    """The files that a source file takes names from by relative imports, at its top or within a function."""
    found = set()
    for dots, module in _IMPORT.findall(path.read_text(encoding="utf-8")):
        place = path.parents[len(dots) - 1].joinpath(*module.split("."))
        found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found


@cache
def revision(file: str) -> str:
    """Hash of a source file and of all that it reaches, as package files or flattened into a checkpoint's folder.

    Args:
        file: `__file__` of the module; where there is no such file, the hash of nothing is returned.
    """
    reached, todo = set(), {path for path in [Path(file)] if path.is_file()}
    while todo:
        reached |= todo
        todo = set().union(*map(_imported, todo)) - reached
    digest = hashlib.sha256()
    for path in sorted(reached):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
