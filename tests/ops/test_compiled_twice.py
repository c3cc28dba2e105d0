"""Loops that a process compiles and loops that the next one loads from disk give the same bits, forward and backward.

A run that is resumed after a kill, and a checkpoint that is loaded elsewhere, rest on it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, sys, torch, hf_lnlm
torch.set_num_threads(1)
torch.manual_seed(0)
ids, sizes = torch.randint(5, 60, (5, 24)), {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "backend": "cpu"}
memory = {"controller_size": 40, "memory_size": 32, "memory_width": 12, "num_read_heads": 2}
name = sys.argv[1]
if name == "causal_conv":
    from hf_lnlm.ops.causal_conv import causal_conv
    given = [torch.randn(shape).requires_grad_() for shape in ((2, 37, 40), (40, 4), (40,), (2, 3, 40))]
    y, last = causal_conv(*given, backend="cpu")
    found = [y.detach(), last.detach(), *torch.autograd.grad(y.sin().sum() + last.sin().sum(), given)]
    print(hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in found)).hexdigest())
    sys.exit()
if name in ("mamba1", "mamba2"):
    fields = {"mixer": name, "head_dim": 16, "state_size": 16}
    model = hf_lnlm.SelectiveSSMForCausalLM(hf_lnlm.SelectiveSSMConfig(**sizes, **fields))
elif name == "ntm":
    model = hf_lnlm.NTMForCausalLM(hf_lnlm.NTMConfig(**sizes, **memory))
else:
    model = hf_lnlm.DNCForCausalLM(hf_lnlm.DNCConfig(**sizes, **memory))
trained = model(ids, labels=ids)
trained.loss.backward()
with torch.no_grad():
    read = model.eval()(ids).logits
found = [trained.logits.detach(), read, *[p.grad for p in model.parameters() if p.grad is not None]]
print(hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in found)).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ntm", "dnc", "mamba1", "mamba2", "causal_conv"])
def test_compiled_and_loaded_loops_are_bit_identical(name, tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, name]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    compiled, loaded = (run.stdout.split()[-1] for run in runs)
    assert list(tmp_path.rglob("*.kernel")), "nothing was kept on disk"
    assert compiled == loaded
