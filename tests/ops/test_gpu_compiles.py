"""Every Triton kernel compiles for a real graphics processor: no device is needed for that, only Triton's own compiler.

The interpreter computes with numpy and lets much pass that the compiler refuses, such as a variable that changes its
type in a branch.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch, warnings
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

class Device:
    '''Stands in for a driver: says what to compile for.'''
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Device())
launch, compiled = JITFunction.run, []

def compile_only(self, *arguments, **options):
    kernel = launch(self, *arguments, **(options | {"warmup": True}))
    assert len(kernel.asm["ptx"]) > 1000 and len(kernel.asm["cubin"]) > 1000
    compiled.append(f"{self.fn.__module__}.{self.fn.__name__}")

JITFunction.run = compile_only
torch.set_num_threads(1)
"""

MEMORY = """
from hf_lnlm.ops.memory.{op}.gpu import {op}_memory_gpu as run
from hf_lnlm.ops.memory.{op}.layout import {options} as Options
from tests.ops.memory.{op}.cases import layer

for options in [{variants}]:
    inputs, weights, state = layer(options, batch=1, steps=3, slots=32, width=8, dtype=torch.float32)
    run(inputs, weights, state, options).outputs.sum().backward()
"""

NTM = MEMORY.format(op="ntm", options="NTMOptions", variants="Options()")
DNC = MEMORY.format(
    op="dnc",
    options="DNCOptions",
    variants="Options(1, 2, masking=True, deallocation=True)",
)
SCAN = """
from hf_lnlm.ops.selective_scan.gpu import selective_scan_gpu as run, selective_scan_gpu_backward as back
from tests.ops.selective_scan.test_selective_scan import arguments, marks

full = arguments(1, 20, 40, 16) | marks(1, 20)
bare = full | dict.fromkeys(("D", "z", "dt_bias", "initial_state", "mask", "reset"))
bare |= {n: bare[n].bfloat16() for n in ("u", "dt", "B", "C")}
for call, softplus in ((full, True), (bare, False)):
    y, state, entries = run(*call.values(), softplus, True)
    back(torch.empty_like(y), state, entries, *call.values(), softplus)
"""
CONV = """
from hf_lnlm.ops.causal_conv.gpu import causal_conv_gpu as run, causal_conv_gpu_backward as back
from tests.ops.causal_conv.test_causal_conv import arguments, marks

full = arguments(1, 33, 20, 4) | {"gather_index": marks(1, 33, 4)[1]}
bare = full | dict.fromkeys(("bias", "state", "gather_index")) | {"x": full["x"].bfloat16()}
for call, activation in ((full, True), (bare, False)):
    y, state, kept = run(*call.values(), activation, True)
    back(torch.empty_like(y), state, kept, *call.values(), activation)
"""
SSD = """
from hf_lnlm.ops.ssd.gpu import ssd_gpu as run, ssd_gpu_backward as back
from tests.ops.ssd.test_ssd import arguments, marks

call = arguments(1, 70, 2, 16, 1, 16) | {"reset": marks(1, 70)["reset"], "diagonal": torch.rand(1, 70, 2)}
call |= {n: call[n].bfloat16() for n in ("x", "B", "C")}
y, state, entries = run(*call.values(), 32, True)
back(torch.empty_like(y), state, entries, *call.values(), 32)
"""
KERNELS = {"ntm_memory": (NTM, 2), "dnc_memory": (DNC, 2), "selective_scan": (SCAN, 4), "causal_conv": (CONV, 6)}
KERNELS["ssd"] = (SSD, 2)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton exists for Linux only")
@pytest.mark.parametrize("operation", KERNELS)
def test_kernels_compile_for_a_graphics_processor(operation, repository, tmp_path, monkeypatch):
    program, launches = KERNELS[operation]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = f"{PROGRAM}{program}\nprint(len(compiled))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(launches)]
