"""Picking a backend: `auto` takes what can run, a demand that cannot be met is an error that says why."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_lnlm
from hf_lnlm.ops import backend
from hf_lnlm.ops.backend import pick_backend

ALL = ("reference", "eager", "cpu", "gpu")


@pytest.fixture
def machine(monkeypatch):
    """Pretend that numba and Triton can or cannot run."""

    def have(numba: str | None, triton: str | None) -> None:
        monkeypatch.setattr(backend, "numba_reason", lambda: numba)
        monkeypatch.setattr(backend, "triton_reason", lambda: triton)

    return have


@pytest.mark.parametrize(
    ("device", "numba", "triton", "dtype", "picked"),
    [
        ("cpu", None, None, torch.float32, "cpu"),
        ("cpu", None, None, torch.float64, "eager"),
        ("cpu", "missing", None, torch.float32, "eager"),
        ("cuda", None, None, torch.bfloat16, "gpu"),
        ("cuda", None, "missing", torch.float32, "eager"),
        ("cuda", None, None, torch.float64, "eager"),
        ("mps", None, None, torch.float32, "eager"),
    ],
)
def test_auto_takes_the_fastest_that_can_run(machine, device, numba, triton, dtype, picked):
    machine(numba, triton)
    assert pick_backend("auto", device, ALL, dtype) == picked
    assert pick_backend("auto", device, ("reference", "eager"), dtype) == "eager"
    assert pick_backend("auto", device, ("reference",), dtype) == "reference"


@pytest.mark.parametrize(
    ("requested", "device", "said"),
    [
        ("cpu", "cuda", "the tensors are on cuda"),
        ("gpu", "cpu", "the tensors are on cpu|no CUDA|triton is not installed"),
        ("turbo", "cpu", "must be auto or one of reference, eager, cpu, gpu, got 'turbo'"),
    ],
)
def test_a_demand_that_cannot_be_met_is_an_error(requested, device, said):
    with pytest.raises(ValueError, match=said):
        pick_backend(requested, device, ALL)


def test_a_missing_compiler_is_named_with_its_extra(machine):
    machine(
        "numba is not installed (pip install 'hf_lnlm[cpu]')", "triton is not installed (pip install 'hf_lnlm[gpu]')"
    )
    with pytest.raises(ValueError, match=r"'cpu' cannot run: numba is not installed \(pip install 'hf_lnlm\[cpu\]'\)"):
        pick_backend("cpu", "cpu", ALL)
    with pytest.raises(ValueError, match=r"hf_lnlm\[gpu\]"):
        pick_backend("gpu", "cuda", ALL)


def test_a_named_backend_that_can_run_is_taken(machine):
    machine(None, None)
    for name in ("reference", "eager", "cpu"):
        assert pick_backend(name, "cpu", ALL) == name
    assert pick_backend("gpu", "cuda", ALL) == "gpu"


def test_a_compiled_backend_refuses_float64(machine):
    machine(None, None)
    for name, device in (("cpu", "cpu"), ("gpu", "cuda")):
        with pytest.raises(ValueError, match="computes in float32"):
            pick_backend(name, device, ALL, torch.float64)
    assert pick_backend("eager", "cpu", ALL, torch.float64) == "eager"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (None, "numba is not installed"),
        (SimpleNamespace(version_info=SimpleNamespace(short=(0, 60)), __version__="0.60.1"), "got 0.60.1"),
    ],
)
def test_numba_is_really_imported(monkeypatch, module, said):
    monkeypatch.setitem(sys.modules, "numba", module)
    assert said in backend.numba_reason.__wrapped__()


def test_the_user_can_ask_which_one_is_in_use():
    report = hf_lnlm.backends("cpu")
    folders = {path.parent.name for path in Path(backend.__file__).parent.glob("*/reference.py")}
    assert folders <= set(report)
    for operation, row in report.items():
        assert row[row["in use"]] == "can run", operation
        assert set(row) - {"in use"} <= set(ALL)
    assert report["recurrence"] == {"in use": "eager", "reference": "can run", "eager": "can run"}
    for row in hf_lnlm.backends("cuda").values():
        assert row.get("cpu", "the tensors are on cuda") != "can run"
