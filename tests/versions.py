"""The contract on the other ends of the declared range: `python -m tests.versions [--core] [FOLDER ...]`.

Runs generation, saving, padding, carried code and training on the oldest and the newest transformers that pyproject
declares, besides the pinned one that every other test runs on. Each is installed by itself, without what it depends on,
into a folder that is first on the path; a folder that holds one already (from `pip install --no-deps --target FOLDER
transformers==VERSION`) can be given instead. Only pip uses the network. `--core` runs one head of each family.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERSIONS = ("5.21.0", "5.24.0")
ROOT = Path(__file__).resolve().parent.parent
CONTRACT = [
    f"tests/contract/test_{kind}.py" for kind in ("generation", "saving", "padding", "carried_code", "training")
]
TRAINER = ["tests/trainer"]


def install(version: str, folder: Path) -> Path:
    """Install one version of transformers, and nothing that it depends on, into a folder of its own."""
    target = folder / version
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(target), f"transformers=={version}"], check=True)
    return target


def environment(folder: Path) -> dict[str, str]:
    """The variables of a process that imports this checkout and the transformers of a folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.resolve()), str(ROOT)])}


def version_in(folder: Path) -> str:
    """Which transformers a process with the folder first on its path imports; fails if that is not the folder's."""
    code = "import transformers; print(transformers.__version__, transformers.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(folder), cwd=ROOT, check=True, capture_output=True, text=True
    )
    version, path = done.stdout.split(maxsplit=1)
    if not Path(path.strip()).is_relative_to(folder.resolve()):
        raise SystemExit(f"{folder} holds no transformers")
    return version


def run(folder: Path, core: bool) -> bool:
    """Run the tests on the transformers of a folder; return whether they passed."""
    version, begun = version_in(folder), time.monotonic()
    chosen = ["-m", "core", *CONTRACT, *TRAINER] if core else ["-m", "slow or not slow", *CONTRACT, *TRAINER]
    print(f"== transformers {version}", flush=True)
    passed = (
        subprocess.run([sys.executable, "-m", "pytest", *chosen], env=environment(folder), cwd=ROOT).returncode == 0
    )
    print(
        f"== transformers {version}: {'passed' if passed else 'FAILED'}, {time.monotonic() - begun:.0f} s", flush=True
    )
    return passed


def main(arguments: list[str] | None = None) -> int:
    """Run every version; the exit status is 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--core", action="store_true", help="one head of each family, on the default backend")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="holds a transformers already")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hf-lnlm-versions.") as made:
        folders = chosen.folders or [install(version, Path(made)) for version in VERSIONS]
        passed = [run(folder, chosen.core) for folder in folders]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
