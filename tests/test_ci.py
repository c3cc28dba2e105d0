"""`.ci/run` runs every check, goes on after a failure, and fails if any of them failed. The tools are stubs here."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hf_lnlm.models.base import TESTED_TRANSFORMERS

from . import versions
from .versions import VERSIONS

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "run"
PYTHON = """#!/usr/bin/env bash
bin="$3/bin"
mkdir -p "$bin"
for tool in pip python pytest ruff mypy; do
  cat > "$bin/$tool" <<STUB
#!/usr/bin/env bash
echo "$tool \\$*" >> "\\$LOG"
echo "$tool says so"
[ "$tool \\$1" != "\\$FAILS" ]
STUB
  chmod +x "$bin/$tool"
done
"""
COMMANDS = [
    "pip install",
    "python -",
    "pytest ",
    "pytest -m slow",
    "python -m tests.versions --core",
    "ruff check .",
    "ruff format --check .",
    "mypy ",
]


def run(tmp_path: Path, fails: str) -> tuple[int, str, list[str]]:
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    log = tmp_path / "log"
    variables = {
        "PATH": f"{stub.parent}:{os.environ['PATH']}",
        "LOG": str(log),
        "FAILS": fails,
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run([str(SCRIPT)], env={**os.environ, **variables}, capture_output=True, text=True)
    return done.returncode, done.stdout, log.read_text().splitlines()


def test_everything_is_run_and_cleaned_up(tmp_path):
    status, printed, commands = run(tmp_path, "")
    assert status == 0, printed
    assert "all passed" in printed
    assert [c for c, wanted in zip(commands, COMMANDS, strict=True) if not c.startswith(wanted)] == []
    assert printed.count("pytest says so") == 2, "pytest's closing lines are shown"
    assert not list(tmp_path.glob("hf-lnlm-ci.*"))


@pytest.mark.parametrize("fails", ["pytest -m", "pytest ", "python -m", "ruff check", "ruff format", "mypy "])
def test_a_failure_does_not_hide_what_comes_after_and_is_told(tmp_path, fails):
    status, printed, commands = run(tmp_path, fails)
    assert status == 1
    assert "FAILED" in printed
    assert len(commands) == len(COMMANDS)


@pytest.mark.parametrize("fails", ["pip install", "python -"])
def test_without_an_environment_nothing_is_run(tmp_path, fails):
    status, _, commands = run(tmp_path, fails)
    assert status == 1
    assert not [command for command in commands if command.startswith(("pytest", "mypy"))]


def test_the_versions_run_are_the_ends_of_the_declared_range():
    declared = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    (range_,) = [Requirement(line).specifier for line in declared if line.startswith("transformers")]
    oldest, newest = map(Version, VERSIONS)
    assert oldest in range_ and newest in range_
    assert tuple(f"{end.major}.{end.minor}" for end in (oldest, newest)) == TESTED_TRANSFORMERS
    before, after = (Version(f"{v.major}.{v.minor + step}.{v.micro}") for v, step in ((oldest, -1), (newest, 1)))
    assert before not in range_ and after not in range_


def test_a_folder_without_transformers_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no transformers"):
        versions.main([str(tmp_path)])
