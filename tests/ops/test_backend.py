"""Picking a backend: `auto` takes what can run, a demand that cannot be met is an error that says why."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_lnlm
from hf_lnlm.ops import backend
from hf_lnlm.ops.backend import Operation, check_backend, family_backends
from hf_lnlm.ops.report import OPERATIONS

ALL = ("reference", "eager", "cpu", "gpu")


def operation(*names: str, **facts) -> Operation:
    """An operation whose implementations are their names."""
    loaders = {name: (lambda name=name: name) if name in ("cpu", "gpu") else name for name in names}
    return Operation("test", **loaders, **facts)


WHOLE = operation(*ALL)


@pytest.fixture
def machine(monkeypatch):
    """Pretend that numba and Triton can or cannot run."""

    def have(numba: str | None, triton: str | None) -> None:
        monkeypatch.setattr(backend, "numba_reason", lambda: numba)
        monkeypatch.setattr(backend, "triton_reason", lambda: triton)
        monkeypatch.setattr(WHOLE, "_able", {})

    return have


@pytest.mark.parametrize(
    ("device", "numba", "triton", "dtype", "picked"),
    [
        ("cpu", None, None, torch.float32, "cpu"),
        ("cpu", None, None, torch.float64, "eager"),
        ("cpu", "missing", None, torch.float32, "eager"),
        ("cuda", None, None, torch.bfloat16, "eager"),
        ("cuda", None, "missing", torch.float32, "eager"),
        ("cuda", None, None, torch.float64, "eager"),
        ("mps", None, None, torch.float32, "eager"),
    ],
)
def test_auto_takes_the_fastest_that_can_run(machine, device, numba, triton, dtype, picked):
    machine(numba, triton)
    assert WHOLE.pick("auto", device, dtype) == picked
    assert operation("reference", "eager").pick("auto", device, dtype) == "eager"
    assert operation("reference").pick("auto", device, dtype) == "reference"
    assert WHOLE.load(picked) == picked


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
        WHOLE.pick(requested, device)


def test_a_missing_compiler_is_named_with_its_extra(machine):
    machine(
        "numba is not installed (pip install 'hf_lnlm[cpu]')", "triton is not installed (pip install 'hf_lnlm[gpu]')"
    )
    with pytest.raises(ValueError, match=r"'cpu' cannot run: numba is not installed \(pip install 'hf_lnlm\[cpu\]'\)"):
        WHOLE.pick("cpu", "cpu")
    with pytest.raises(ValueError, match=r"hf_lnlm\[gpu\]"):
        WHOLE.pick("gpu", "cuda")


def test_a_missing_compiler_that_matters_is_told(machine, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(backend.logger, "warning_once", lambda text, *values: said.append(text % values))
    loops = operation(*ALL, needs_compiler=True)
    machine("numba is not installed (pip install 'hf_lnlm[cpu]')", None)
    assert (
        WHOLE.pick("auto", "cpu") == loops.pick("auto", "cuda") == loops.pick("auto", "cpu", torch.float64) == "eager"
    )
    assert not said
    assert loops.pick("auto", "cpu") == "eager" and "pip install 'hf_lnlm[cpu]'" in said[0] and len(said) == 1
    machine(None, None)
    assert operation(*ALL, needs_compiler=True).pick("auto", "cpu") == "cpu" and len(said) == 1


def test_a_named_backend_that_can_run_is_taken(machine):
    machine(None, None)
    for name in ("reference", "eager", "cpu"):
        assert WHOLE.pick(name, "cpu") == name
    assert WHOLE.pick("gpu", "cuda") == "gpu"


def test_a_compiled_backend_refuses_float64(machine):
    machine(None, None)
    for name, device in (("cpu", "cpu"), ("gpu", "cuda")):
        with pytest.raises(ValueError, match="computes in float32"):
            WHOLE.pick(name, device, torch.float64)
    assert WHOLE.pick("eager", "cpu", torch.float64) == "eager"


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


def test_facts_of_a_call_say_what_cannot_run_and_what_auto_leaves_out(machine):
    machine(None, None)
    picky = operation(
        "eager",
        "cpu",
        unfit=lambda backend, size: "it is too large" if backend == "cpu" and size > 9 else None,
        wasteful=lambda backend, size: "it is too small" if backend == "cpu" and size < 3 else None,
    )
    assert [picky.pick("auto", "cpu", None, size) for size in (2, 5, 10)] == ["eager", "cpu", "eager"]
    assert picky.pick("cpu", "cpu", None, 2) == "cpu"
    with pytest.raises(ValueError, match="test: backend 'cpu' cannot run: it is too large"):
        picky.pick("cpu", "cpu", None, 10)
    with pytest.raises(ValueError, match="'cpu' cannot run: it is too large"):
        check_backend("cpu", [operation("eager"), picky], 10)


def test_a_family_has_the_backends_of_its_operations(machine):
    machine(None, "no CUDA device")
    parts = operation("reference", "eager"), operation("eager", "gpu")
    assert family_backends(parts) == ("reference", "eager", "gpu")
    assert family_backends(()) == ("eager",)
    assert [part.own("gpu") for part in parts] == ["auto", "gpu"]
    check_backend("auto", parts)
    check_backend("reference", parts)
    with pytest.raises(ValueError, match="backend 'gpu' cannot run: no CUDA device"):
        check_backend("gpu", parts)


def test_the_user_can_ask_which_one_is_in_use():
    report = hf_lnlm.backends("cpu")
    root = Path(backend.__file__).parent
    folders = {"_".join(reversed(path.parent.relative_to(root).parts)) for path in root.glob("**/reference.py")}
    assert folders == set(report) == {operation.name for operation in OPERATIONS}
    for row in report.values():
        assert row[row["in use"]] == "can run"
        assert set(row) - {"in use", "limits"} <= set(ALL)
        assert row.get("gpu", "experimental").startswith("experimental")
    assert report["recurrence"] == {"in use": "eager", "reference": "can run", "eager": "can run"}
    assert "below 16 slots" in report["ntm_memory"]["limits"]
    for name, row in hf_lnlm.backends("cuda").items():
        assert row["in use"] == ("none" if name == "mamba_inner" else "eager")
        assert row.get("cpu", "the tensors are on cuda") != "can run"


@pytest.mark.parametrize(
    "name", ["RNN", "GPT3", "SparseTransformer", "Linformer", "GatedCNN", "SelectiveSSM", "NTM", "DNC"]
)
def test_no_family_builds_a_model_whose_backend_cannot_run(name):
    if torch.cuda.is_available() or backend.triton_interpreted():
        pytest.skip("Triton can run here")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"backend must be auto or one of|backend 'gpu' cannot run"):
        getattr(hf_lnlm, f"{name}ForCausalLM")(getattr(hf_lnlm, f"{name}Config")(**sizes, backend="gpu"))
