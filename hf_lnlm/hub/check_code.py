"""Code that a checkpoint folder carries: parsed and compared, never run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

from .. import __version__
from ..registry import family, is_ours
from .code import compare
from .findings import Folder, Said, first_line, known_model_type, quiet
from .folder import Entry, read_text, shown

ACCELERATORS = {"numpy", "numba", "llvmlite", "triton", "mamba_ssm", "causal_conv1d"}  # carried code does without them
ALLOWED_IMPORTS = {"torch", "transformers", "huggingface_hub", *ACCELERATORS, *sys.stdlib_module_names}
_MAX_CODE_BYTES = 1 << 20


def examine_code(folder: Folder) -> Iterator[Said]:
    """Is every head's code there, importing nothing but what a stranger's machine has? Parsed, never run."""
    python_files = [entry for entry in folder.files if entry.path.endswith(".py")]
    model_type = (folder.config or {}).get("model_type")
    ours = is_ours(model_type) and not folder.is_adapter
    if ours:
        auto_map = (folder.config or {}).get("auto_map")
        absent = sorted(set(family(str(model_type)).auto_map()) - set(auto_map if isinstance(auto_map, dict) else {}))
        if absent:
            yield ("fail", f"not carried: auto_map lacks {', '.join(absent)}")
            return
    bad = [line for entry in python_files for line in _code_problems(folder, entry)]
    for line in bad:
        yield ("fail", line)
    if bad:
        return
    if ours and folder.config is not None:
        yield from _origin_findings(folder)
    elif python_files and known_model_type(str(model_type)):
        names = ", ".join(shown(entry.path) for entry in python_files[:3])
        yield ("fail", f"stray Python files, which {shown(model_type)} doesn't need: {names}")
    elif python_files:
        yield ("warn", f"carries {len(python_files)} Python files that `trust_remote_code` would run")
    else:
        yield ("ok", "none needed")


def _origin_findings(folder: Folder) -> Iterator[Said]:
    """Is the carried code the installed package's, a release's, or somebody else's?"""
    row = family(str((folder.config or {})["model_type"]))
    with quiet():
        config = row.config_class.from_pretrained(folder.path, local_files_only=True)
        code = compare(folder.path, config, folder.files)
    for name, line in code.differing.items():
        yield ("fail", f"differs from every hf_lnlm: {shown(name)}, line {line}")
    for name in code.stray:
        yield ("fail", f"stray Python file: {shown(name)} is not part of hf_lnlm")
    if code.is_current:
        yield ("ok", f"{len(code.same)} files carried, same as hf_lnlm {__version__}, every head reachable")
    elif code.is_released and code.older:
        versions = ", ".join(sorted(set(code.older.values())))
        yield (
            "warn",
            f"older: {len(code.older)} files of hf_lnlm {versions}, which know transformers up to its "
            f"time; due: hf-lnlm check FOLDER --refresh-code",
        )
    elif code.is_released:
        yield ("fail", f"not carried: {', '.join(code.missing[:3])} of hf_lnlm {__version__}")


def _code_problems(folder: Folder, entry: Entry) -> Iterator[str]:
    name = shown(entry.path)
    if entry.size > _MAX_CODE_BYTES:
        yield f"{name} has {entry.size} bytes"
        return
    try:
        with quiet():
            tree = ast.parse(read_text(folder.path / entry.path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield f"{name} is not Python: {first_line(error)}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from _relative_import_problem(folder, entry.path, node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            for module in modules:
                if module.split(".")[0] not in ALLOWED_IMPORTS:
                    yield f"{name} line {node.lineno} imports {shown(module)}, which a reader may not have"


def _relative_import_problem(folder: Folder, path: str, node: ast.ImportFrom) -> Iterator[str]:
    name, beside = shown(path), path.rpartition("/")  # a part of a composed model carries its code in its own folder
    if node.level > 1 or not node.module or "." in node.module:
        yield f"{name} line {node.lineno}: an import that transformers can't carry"
    elif not folder.has(f"{beside[0]}{beside[1]}{node.module}.py"):
        yield f"{name} line {node.lineno}: {node.module}.py is missing"
