"""The package as an older processor runs it: `python -m tests.processors [--core]`.

MKL and oneDNN are held to AVX2, torch's own loops to no vector instructions, numba's to any x86-64 processor; this must
be set before any of them loads, so the tests run in a process of their own. Everything runs: the operations, the
contract, resumed runs. `--core` runs what is marked so of the operations, reloading and resuming, and compares each
family's outputs with this processor's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .contract.cases import build, first_output, inputs_of, one_case_a_family

ROOT = Path(__file__).resolve().parent.parent
OLDER = {
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "default",
    "NUMBA_CPU_NAME": "generic",
}
FULL = ["-m", "slow or not slow", "tests/ops", "tests/contract", "tests/trainer"]
CORE = ["-m", "core", "tests/ops", "tests/contract/test_saving.py", "tests/contract/test_training.py"]
ROUNDING = 1e-6  # of the largest output
DEEP = {"vdcnn": 2e-6}  # ten convolutions, each with a batch normalisation


def older(*arguments: str) -> int:
    """Run Python with these arguments as on an older processor; return its exit status."""
    return subprocess.run([sys.executable, *arguments], env=os.environ | OLDER, cwd=ROOT).returncode


def save(folder: Path) -> None:
    """Save a head of every family and what it gives on this processor."""
    for case in one_case_a_family():
        model = build(case)
        model.save_pretrained(folder / str(case))
        torch.save(first_output(model, **inputs_of(case)), folder / f"{case}.pt")


def compare(folder: Path) -> int:
    """Compare what the saved heads give here; print and return how many differ by more than rounding."""
    faults = 0
    for case in one_case_a_family():
        wanted = torch.load(folder / f"{case}.pt")
        found = first_output(case.cls.from_pretrained(folder / str(case)).eval(), **inputs_of(case))
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if not difference <= DEEP.get(case.family.name, ROUNDING):
            faults += 1
            print(f"{case}: outputs differ by {difference:.1e} of the largest")
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Run the tests; the exit status is 0 if all passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.processors", description=__doc__.split("\n\n")[0])
    parser.add_argument("--core", action="store_true", help="minutes instead of an hour")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.compare is not None:
        return compare(chosen.compare)
    with tempfile.TemporaryDirectory(prefix="hf-lnlm-processors.") as folder:
        save(Path(folder))
        agree = older("-m", "tests.processors", "--compare", folder) == 0
    return 0 if older("-m", "pytest", *(CORE if chosen.core else FULL)) == 0 and agree else 1


if __name__ == "__main__":
    sys.exit(main())
