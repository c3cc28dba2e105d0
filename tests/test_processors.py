"""What holds on this processor holds on an older one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_core_holds_on_an_older_processor(repository: Path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.processors", "--core"], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
