"""A checkpoint carries its code: the modules of a family, flattened into the folder of its weights.

transformers copies a modeling file and, recursively, what it imports as `from .sibling import name`. Nothing else: parent
packages crash it, `from . import x` is left out silently. The package keeps `models/`, `nn/` and `ops/` as real packages,
so this module gathers every module of `hf_lnlm` that a family needs and writes them side by side, changing only their
import lines (`from ...ops.recurrence.eager import f` becomes `from .ops_recurrence_eager import f`). The result loads with
`trust_remote_code=True` where hf_lnlm is missing, through every head of the family, and can be saved again by transformers'
own mechanism, because it is flat.

Imports are followed in the source, not at run time, so lazy ones inside functions and optional ones inside `try` are found.
What can't be flattened is refused, with file and line.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .. import registry

PACKAGE = "hf_lnlm"
PARTS = f"{PACKAGE}.models.own_parts"
"""The module that says which families are carried for models inside a model."""
_LOOKS_LIKE_IMPORT = re.compile(r"^(\s*)((?:from\s+\.\S+\s+import|import\s+\.\S+\s*$))", re.MULTILINE)


class _Module(NamedTuple):
    name: str
    path: Path

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


@cache
def carried_files(model_type: str) -> dict[str, bytes]:
    """Return the files that a checkpoint of a family carries: file name → content, sorted by name.

    Args:
        model_type: of a row of the registry.

    Raises:
        ValueError: no such family, or a module it reaches can't be flattened; the message names file and line.
    """
    family = registry.family(model_type)
    return flatten((family.config_module, family.modeling_module), PACKAGE)


def code_files(config: Any) -> dict[str, bytes]:
    """Return what a checkpoint carries: the code of its config's family, and of our families inside it.

    Args:
        config: of one of our families.

    Returns:
        file name → content.
    """
    files = dict(carried_files(config.model_type))
    inner = sorted({part.model_type for part in _parts_of(config) if registry.is_ours(part.model_type)})
    for model_type in inner:
        files |= carried_files(model_type)
    if inner:  # in place of the module that says that nothing is carried
        files[flat_name(PARTS) + ".py"] = carried_parts(inner)
    return files


def write_code(config: Any, folder: str | Path) -> list[str]:
    """Write the files that a checkpoint carries into its folder and return their names."""
    files = code_files(config)
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
    return sorted(files)


def _parts_of(config: Any) -> Iterator[Any]:
    """Yield the configs inside a config, at any depth."""
    for name in config.sub_configs:
        yield getattr(config, name)
        yield from _parts_of(getattr(config, name))


def carried_parts(model_types: Iterable[str]) -> bytes:
    """Return the module that imports the classes of families which are parts of a model."""
    lines, entries = ['"""The families of the models inside, which this checkpoint carries."""\n'], []
    for row in map(registry.family, model_types):
        heads = ", ".join(f'"{auto}": {cls}' for auto, cls in row.models.items())
        lines.append(f"from .configuration_{row.name} import {row.config}")
        lines.append(f"from .modeling_{row.name} import {', '.join(row.models.values())}")
        entries.append(f'    "{row.model_type}": ({row.config}, {{{heads}}}),')
    return "\n".join([*lines, "\nCARRIED = {", *entries, "}\n"]).encode()


def auto_map(config: Any) -> dict[str, str]:
    """Return the `auto_map` for a config of ours: every head of its family, and what the user registered himself."""
    return {**registry.family(config.model_type).auto_map(), **(getattr(config, "auto_map", None) or {})}


def flatten(modules: tuple[str, ...], package: str) -> dict[str, bytes]:
    """Flatten modules, and all modules of the same package that they import, into files of one folder.

    Args:
        modules: dotted names to begin with.
        package: top-level package; imports from it are followed, all others are left as they are.

    Returns:
        file name → content, sorted by name.

    Raises:
        ValueError: an import can't be flattened, or two modules would get the same file name.
    """
    todo, sources = list(modules), {}
    while todo:
        name = todo.pop()
        if name in sources:
            continue
        sources[name], needed = _rewrite(_find(name), package)
        todo.extend(needed)
    files: dict[str, bytes] = {}
    owners: dict[str, str] = {}
    for name in sorted(sources):
        file = flat_name(name) + ".py"
        if file in files:
            raise ValueError(f"{owners[file]} and {name} would both be carried as {file}: rename one")
        files[file], owners[file] = sources[name].encode(), name
    return dict(sorted(files.items()))


def flat_name(module: str) -> str:
    """Return the module name that a dotted name gets in a flat folder.

    `hf_lnlm.ops.recurrence.eager` becomes `ops_recurrence_eager`; configuration and modeling files keep their own names.
    """
    parts = module.split(".")[1:]
    return parts[-1] if parts[-1].startswith(("modeling_", "configuration_")) else "_".join(parts)


def _find(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ValueError(f"module {name} has no Python source to carry")
    return _Module(name, Path(spec.origin))


def _rewrite(module: _Module, package: str) -> tuple[str, list[str]]:
    """Return a module's source with flat imports, and the names of the modules of `package` that it imports."""
    source = module.path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = io.StringIO(source).readlines()  # as Python counts lines: form feeds and the like end none
    needed = []
    _quote_docstrings(tree, lines, module)
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(nodes, key=lambda node: -node.lineno):
        target = _target(node, module, package)
        if target is None:
            continue
        needed.append(target)
        names = ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names)
        lines[node.lineno - 1 : node.end_lineno] = [
            f"{' ' * node.col_offset}from .{flat_name(target)} import {names}\n"
        ]
    return "".join(lines), needed


def _target(node: ast.Import | ast.ImportFrom, module: _Module, package: str) -> str | None:
    """Return the module of `package` that an import statement takes names from; None for imports from elsewhere."""
    where = f"{module.path.name}, line {node.lineno}"
    if isinstance(node, ast.Import):
        inside = [alias.name for alias in node.names if alias.name.split(".")[0] == package]
        if inside:
            raise ValueError(f"{where}: 'import {inside[0]}' can't be carried: write 'from ... import name'")
        return None
    target = _absolute(node, module)
    if target.split(".")[0] != package:
        return None
    _check_statement(node, module, where)
    found = _find(target)
    for alias in node.names:
        if alias.name == "*":
            raise ValueError(f"{where}: a star import can't be carried: name what is imported from {target}")
        if found.is_package and (target == package or not _defines(found, alias.name)):
            raise ValueError(
                f"{where}: imports {alias.name} of {target}: import names from the module that defines them"
            )
    return target


def _absolute(node: ast.ImportFrom, module: _Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    base = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join(base + ([node.module] if node.module else []))


def _check_statement(node: ast.ImportFrom, module: _Module, where: str) -> None:
    """Refuse an import that shares its lines with other code, which rewriting would drop."""
    lines = module.path.read_bytes().splitlines()
    before = lines[node.lineno - 1][: node.col_offset]
    after = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :].strip()
    if before.strip() or (after and not after.startswith(b"#")):
        raise ValueError(f"{where}: an import of the package must stand alone on its lines to be carried")


@cache
def _names_of(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


def _defines(module: _Module, name: str) -> bool:
    return name in _names_of(module.path)


def _quote_docstrings(tree: ast.Module, lines: list[str], module: _Module) -> None:
    """Mark docstring lines that look like relative imports, which transformers' line-wise search would follow.

    Such a line in any other string is refused: it can't be changed without changing what the code does.
    """
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        for number in range(node.lineno, node.end_lineno or node.lineno):  # first line excluded: it opens the string
            if not _LOOKS_LIKE_IMPORT.match(lines[number]):
                continue
            if id(node) not in docstrings:
                raise ValueError(
                    f"{module.path.name}, line {number + 1}: a string that looks like an import can't be carried"
                )
            lines[number] = _LOOKS_LIKE_IMPORT.sub(r"\1> \2", lines[number])
