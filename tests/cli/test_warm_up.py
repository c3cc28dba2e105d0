"""`hf-lnlm warm-up`: which kernels it compiles, what it refuses, and that nothing is left to compile after it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hf_lnlm.flows import warm_up

STEP = """
import sys, torch, hf_lnlm
from transformers import AutoConfig, AutoModelForCausalLM
fields = dict(vocab_size=40, hidden_size=24, num_hidden_layers=1)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lnlm_ntm", **fields))
ids = torch.ones(3, 7, dtype=torch.long)
model(ids, labels=ids).loss.backward()
"""


def test_every_variant_is_compiled_and_failures_are_told(monkeypatch):
    monkeypatch.setattr(warm_up, "_in_process", lambda name, fields: (0.5, "no room" if name == "lnlm_dnc" else None))
    lines: list[str] = []
    assert warm_up.warm_up((), lines.append) == 1
    for told in ("lnlm_ssm mamba1: 0.5 s", "lnlm_ssm mamba2: 0.5 s", "lnlm_ssm mamba3: 0.5 s", "lnlm_ntm: 0.5 s"):
        assert sum(line.endswith(told) for line in lines) == 1
    assert sum("lnlm_dnc: failed: no room" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("name", "said"), [("lnlm_rnn", "nothing of lnlm_rnn is compiled"), ("lnlm_x", "no family 'lnlm_x'")]
)
def test_what_has_no_loops_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        warm_up.warm_up([name])


@pytest.mark.slow
def test_nothing_is_left_to_compile(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "hf_lnlm.cli.main", "warm-up", "lnlm_ntm"]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")}
    assert kept and "1/1 lnlm_ntm: " in first.stdout
    step = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=True)
    assert "compiling" not in step.stderr
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")} == kept
