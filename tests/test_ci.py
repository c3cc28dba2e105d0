"""`.ci/run` runs every check, goes on after a failure, and fails if any of them failed. The tools are stubs here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
COMMANDS = ["pip install", "python -", "pytest ", "pytest -m slow", "ruff check .", "ruff format --check .", "mypy "]


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


@pytest.mark.parametrize("fails", ["pytest -m", "pytest ", "ruff check", "ruff format", "mypy "])
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
