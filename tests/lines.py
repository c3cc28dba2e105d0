"""How large the package is, how long its functions are and how deep its own calls go: `python -m tests.lines`.

Counted after `ruff format` with this repository's settings: lines of `hf_lnlm/` that are not blank, comment or
docstring. Two trees are comparable: `--tree PATH` measures another checkout by this one's rules, and prints both.
`--chains` runs one training step of an SSM and of a DNC under `sys.setprofile` (minutes, if kernels must be compiled).
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hf_lnlm"
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

CHAINS = """
import json, sys
import torch
import hf_lnlm

def deepest(model):
    ids = torch.randint(3, 40, (2, 24))
    step = lambda: model(input_ids=ids, labels=ids).loss.backward()
    step()  # compiles and imports what is only imported when needed
    found = []
    def profile(frame, event, argument):
        if event != "call":
            return
        chain = []
        while frame is not None:
            if "/hf_lnlm/" in frame.f_code.co_filename.replace("\\\\", "/"):
                chain.append(frame.f_code.co_qualname)
            frame = frame.f_back
        if len(chain) > len(found):
            found[:] = chain[::-1]
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found

sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
ssm = hf_lnlm.SelectiveSSMForCausalLM(hf_lnlm.SelectiveSSMConfig(**sizes))
dnc = hf_lnlm.DNCForCausalLM(hf_lnlm.DNCConfig(**sizes))
print(json.dumps({"ssm": deepest(ssm.train()), "dnc": deepest(dnc.train())}))
"""


def formatted(tree: Path, into: Path) -> Path:
    """A copy of a tree's package, formatted by this repository's settings."""
    copy = into / PACKAGE
    shutil.copytree(tree / PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    config = str(ROOT / "pyproject.toml")
    subprocess.run([ruff, "format", "-q", "--no-cache", "--config", config, str(copy)], check=True)
    return copy


def docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of strings that stand alone as statements: docstrings, those of attributes too."""
    alone = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    strings = [node for node in alone if isinstance(node.value.value, str)]
    return {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}


def code_lines(source: str) -> int:
    """Lines with code on them."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - docstring_lines(ast.parse(source)))


def function_lengths(source: str) -> Iterator[int]:
    """Lines of code of every function's body."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield sum(bool(lines[i].strip()) for i in range(body[0].lineno - 1, node.end_lineno)) if body else 0


def chains(tree: Path) -> dict[str, list[str]]:
    """The package's own frames in the deepest call of one training step, by family; frames of torch don't count."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHAINS], env=environment, cwd=tree, check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def measured(tree: Path) -> dict[str, float]:
    """All figures that the source of one tree gives."""
    rooms: Counter[str] = Counter()
    lengths: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = formatted(tree, Path(folder))
        for path in sorted(copy.rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            parts = path.relative_to(copy).parts
            rooms[parts[0] if len(parts) > 1 else "(top)"] += code_lines(source)
            lengths += function_lengths(source)
    lengths.sort()
    return {
        "lines": rooms.total(),
        **dict(sorted(rooms.items())),
        "functions": len(lengths),
        "median length": statistics.median(lengths),
        "90th percentile": lengths[len(lengths) * 9 // 10],
        "longest": lengths[-1],
    }


def main() -> None:
    """Print the figures of this tree, and beside them those of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="another checkout to compare with")
    parser.add_argument("--chains", action="store_true", help="also run a training step and name its deepest calls")
    options = parser.parse_args()
    trees = [tree.resolve() for tree in ([options.tree] if options.tree else []) + [ROOT]]
    found = [measured(tree) for tree in trees]
    deep = [chains(tree) for tree in trees if options.chains]
    for figures, frames in zip(found, deep):
        figures.update({f"{name} chain": len(names) for name, names in frames.items()})
    for name in {name: None for figures in reversed(found) for name in figures}:
        values = [figures.get(name, 0) for figures in found]
        change = f"{values[-1] / values[0] - 1:+9.1%}" if len(values) > 1 and values[0] else ""
        print(f"{name:20}" + "".join(f"{value:>10}" for value in values) + change)
    for name, frames in deep[-1].items() if deep else ():
        print(f"\n{name}: " + " > ".join(frames))


if __name__ == "__main__":
    main()
