"""The house rules in numbers, checked on the source itself."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_lnlm.hub.bundle import PACKAGE, flatten
from hf_lnlm.registry import FAMILIES

from .lines import code_lines

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
PYTHON_FILES = sorted([*PACKAGE_FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "training").rglob("*.py")])
LONGEST_FUNCTION, MEDIAN_FUNCTION, LONGEST_FILE = 60, 12, 600
OPTIONAL = {"numba", "triton", "numpy", "llvmlite", "mamba_ssm", "causal_conv1d"}
ALLOWED = {"torch", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(node: Function) -> int:
    """Lines of a function's code: its docstring is not what makes it long."""
    body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
    return (node.end_lineno or node.lineno) - body[0].lineno + 1


def tracked_text_files() -> list[Path]:
    """Files of the repository: git's list, or the whole folder where git is missing."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\0") if listed.returncode == 0 else [relative(p) for p in ROOT.rglob("*")]
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg", ".sh", ""}
    return [ROOT / name for name in names if name and (ROOT / name).is_file() and (ROOT / name).suffix in suffixes]


def test_functions_are_short():
    lengths = {
        f"{relative(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in PYTHON_FILES
        for node in functions(parsed(path))
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    bodies = [body_lines(node) for path in PACKAGE_FILES for node in functions(parsed(path))]
    assert statistics.median(bodies) <= MEDIAN_FUNCTION


def test_lines_of_code_are_counted():
    source = '"""What it is."""\n\nx = 1  # why\n\n# a remark\nz = """a\nb"""\n"""Of z."""\n'
    assert code_lines(source) == 3


def test_files_are_short():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON_FILES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def undocumented(body: list[ast.stmt], where: str) -> Iterator[str]:
    """Public classes, functions and methods without a docstring; what is inside functions is nobody's business."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{where} {node.name}"
            yield from undocumented(node.body, f"{where} {node.name}")
        elif isinstance(node, Function) and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield f"{where} {node.name}"


def test_everything_public_has_a_docstring():
    missing = [relative(path) for path in PACKAGE_FILES if ast.get_docstring(parsed(path)) is None]
    for path in PACKAGE_FILES:
        missing += undocumented(parsed(path).body, relative(path))
    assert not missing


def is_overload_of_numba(node: Function) -> bool:
    """Compiled kernels are typed by numba or Triton; their annotations would be read as something else."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return any(word in decorators for word in ("njit", "jit", "intrinsic", "triton"))


def unannotated(path: Path) -> Iterator[str]:
    for node in functions(parsed(path)):
        if is_overload_of_numba(node):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        if bare or node.returns is None:
            yield f"{relative(path)}:{node.lineno} {node.name} {bare or 'return'}"


def test_everything_is_annotated():
    assert not [line for path in PACKAGE_FILES for line in unannotated(path)]


def test_no_assert_in_the_package():
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in PACKAGE_FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Assert)
    ]
    assert not found, "assert disappears with python -O: raise an error that says what was got"


def test_no_vague_names():
    files = [
        relative(path) for path in PYTHON_FILES if path.stem in ("utils", "util", "helpers", "helper", "misc", "common")
    ]
    classes = [
        f"{relative(path)} {node.name}"
        for path in PYTHON_FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Helper|Util|Utils)$", node.name)
    ]
    assert not files + classes


def test_no_notes_to_self():
    found = []
    for path in PYTHON_FILES:
        with path.open("rb") as file:
            comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
        words = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))
        found += [
            f"{relative(path)}:{t.start[0]} {t.string}" for t in comments if re.search(rf"\b({words})\b", t.string)
        ]
    assert not found


def test_nothing_names_a_path_of_one_machine():
    # written in pieces, so that this file does not find itself
    places = ["\\.\\./sha" + "red", "(?<![\\w.])/wo" + "rk/", "(?<![\\w.])/ho" + "me/\\w", "(?<![\\w.])/Us" + "ers/\\w"]
    pattern = re.compile("|".join(places))
    found = []
    for path in tracked_text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{relative(path)}:{number} {line.strip()[:80]}")
    assert not found


def carried_modules() -> list[Path]:
    """Source files that some family's modeling file reaches."""
    names: set[str] = set()
    for row in FAMILIES:
        names |= set(flatten((row.config_module, row.modeling_module), PACKAGE))
    found = []
    for path in PACKAGE_FILES:
        parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        flat = parts[-1] if parts and parts[-1].startswith(("modeling_", "configuration_")) else "_".join(parts)
        if f"{flat}.py" in names:
            found.append(path)
    return found


def imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement and whether it is inside a `try` or a function, where it may fail or comes late."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, guarded
        yield from imports(node, guarded or isinstance(node, (ast.Try, *(Function.__args__))))


def imported_module(path: Path, node: ast.ImportFrom) -> Path:
    """The file that a relative import takes its names from."""
    place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def always_imported() -> set[Path]:
    """Carried modules that a family's import reaches without passing through a `try` or a function."""
    todo = [path for path in carried_modules() if path.stem.startswith(("modeling_", "configuration_"))]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        relatives = [n for n, late in imports(parsed(path)) if not late and isinstance(n, ast.ImportFrom) and n.level]
        todo += [imported_module(path, node) for node in relatives]
    return found


def forbidden_imports(path: Path, always: bool) -> Iterator[str]:
    """Imports that a carried module may not have; compiled kernels, imported in a `try`, may need their compilers."""
    for node, guarded in imports(parsed(path)):
        where = f"{relative(path)}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.level:
            continue  # inside the package: the bundler's own tests
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for top in {module.split(".")[0] for module in modules}:
            if top == PACKAGE:
                yield f"{where} imports {top} absolutely"
            elif top in OPTIONAL and always and not guarded:
                yield f"{where} needs {top} outside a try"
            elif top not in ALLOWED | OPTIONAL:
                yield f"{where} imports {top}"


def test_import_rule_of_carried_modules():
    carried, always = carried_modules(), always_imported()
    assert len(carried) >= 8
    assert always <= set(carried)
    assert not [line for path in carried for line in forbidden_imports(path, path in always)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)
def test_data_flows_one_way(family):
    rooms = ("cli", "flows", "trainer", "lora", "objectives", "tasks", "data", "convert", "hub")
    for name in flatten((family.config_module, family.modeling_module), PACKAGE):
        assert not name.startswith(tuple(f"{room}_" for room in rooms)), f"{family.name} reaches {name}"


def test_rooms_point_down_only():
    below = {"models": ("nn", "ops", "models"), "nn": ("nn", "ops"), "ops": ("ops",)}
    rooms = {path.name for path in (ROOT / PACKAGE).iterdir()} | {path.stem for path in (ROOT / PACKAGE).iterdir()}
    below["flows"] = tuple(rooms - {"cli"})
    for room in ("trainer", "lora", "objectives", "tasks", "data", "convert", "hub"):
        below[room] = tuple(rooms - {"cli", "flows"})
    wrong = []
    for path in PACKAGE_FILES:
        room = path.relative_to(ROOT / PACKAGE).parts[0]
        for node, _ in imports(parsed(path)):
            if room not in below or not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            depth = len(path.relative_to(ROOT / PACKAGE).parts) - node.level
            base = path.relative_to(ROOT / PACKAGE).parts[:depth]
            target = [*base, *(node.module or "").split(".")][0]
            if target and target not in below[room]:
                wrong.append(f"{relative(path)}:{node.lineno} takes from {target}")
    assert not wrong
