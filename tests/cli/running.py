"""Running commands in the test's own process, on a standard library of a few modules."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hf_lnlm.cli.main import main

MODULES = ("bisect.py", "heapq.py", "textwrap.py", "contextlib.py", "json", "email", "logging", "unittest", "asyncio")
QUICK = ["training.max_steps=2", "training.warmup_steps=0", "training.eval_steps=2", "training.save_steps=2"]


class Result(NamedTuple):
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


def run(*words: object) -> Result:
    """Run `hf-lnlm` with `words`."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(word) for word in words])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return Result(status, out.getvalue(), err.getvalue())


def succeed(*words: object) -> Result:
    """Run `hf-lnlm` with `words`; it must exit with status 0."""
    result = run(*words)
    assert result.status == 0, result.out + result.err
    return result


def settings(*values: str) -> list[str]:
    """`--set` options."""
    return [word for value in values for word in ("--set", value)]


def copy_library(folder: Path) -> Path:
    """Copy a few modules of the standard library into `folder`."""
    source = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        if (source / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "test*")
            shutil.copytree(source / name, folder / name, ignore=ignored)
        else:
            shutil.copy(source / name, folder / name)
    return folder


@contextmanager
def small_library(folder: Path):
    """Make `stdlib` mean the modules in `folder`, as long as the block lasts: other tests share the process."""
    paths = {**sysconfig.get_paths(), "stdlib": str(folder)}
    with mock.patch.object(sys.modules["sysconfig"], "get_paths", lambda *arguments, **options: paths):
        yield folder
