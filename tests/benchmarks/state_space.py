"""Selective state space models against stock transformers: `python -m tests.benchmarks.state_space [--json]`.

CPU seconds, one thread, contenders in turn. Models have 4 layers of width 256 and read one row. Stock runs without its
CUDA packages, as it does on every CPU; its training is quadratic in length, so 512 tokens are measured once a round only.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from hf_lnlm.convert.state_space import ssm_from_stock
from hf_lnlm.ops.selective_scan import selective_scan

from .harness import Row, at_most, below, cpu_times, faster, forget_peak, peak_growth, peak_memory, run

VOCABULARY, WIDTH, LAYERS = 256, 256, 4
BACKENDS = ("eager", "cpu")
TRAINING_BARS: dict[str, dict[int, tuple]] = {
    "eager": {128: (6, None), 256: (15, None), 512: (30, None)},
    "cpu": {128: (8, 12), 256: (20, 28), 512: (42, 60)},
}
SSD_BARS = {32: (4, 6), 128: (2.2, 4), 512: (1.6, 3)}


def stock_model(kind: str) -> Any:
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    torch.manual_seed(0)
    if kind == "mamba1":
        return MambaForCausalLM(MambaConfig(**common, state_size=16))
    heads = {"num_heads": 2 * WIDTH // 64, "head_dim": 64, "state_size": 128, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(**common, **heads))


def our_model(stock: Any, backend: str) -> Any:
    model = ssm_from_stock(stock)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model


def training_step(model: Any, length: int) -> Callable[[], None]:
    ids = torch.randint(VOCABULARY, (1, length))

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    return step


def forward(model: Any, length: int) -> Callable[[], None]:
    ids = torch.randint(VOCABULARY, (1, length))

    @torch.no_grad()
    def step() -> None:
        model(ids, use_cache=False)

    return step


def matrix_products(length: int) -> Callable[[], None]:
    """The matrix products of a Mamba-1 model's training step and nothing else: three of each size."""
    inner, rank = 2 * WIDTH, WIDTH // 16
    sizes = [(WIDTH, 2 * inner), (inner, rank + 32), (rank, inner), (inner, WIDTH)] * LAYERS + [(WIDTH, VOCABULARY)]
    operands = [(torch.randn(length, a), torch.randn(b, a), torch.randn(length, b)) for a, b in sizes]

    def step() -> None:
        for x, weight, grad in operands:
            x @ weight.t()
            grad @ weight
            grad.t() @ x

    return step


def scan_rows() -> list[Row]:
    length, channels, states = 2048, 2 * WIDTH, 16
    call = {
        "u": torch.randn(1, length, channels),
        "dt": torch.randn(1, length, channels) - 4,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(1, length, states),
        "C": torch.randn(1, length, states),
        "D": torch.randn(channels),
    }
    theirs = {name: call[name].mT.contiguous() for name in ("dt", "B", "C")}

    @torch.no_grad()
    def peer() -> None:
        mamba_selective_scan(call["u"].mT, A=call["A"], D=call["D"], delta_softplus=True, **theirs)

    times = cpu_times({"peer": peer} | {b: lambda b=b: selective_scan(**call, backend=b) for b in BACKENDS})
    bars = {"eager": 7, "cpu": 40}
    return [faster(f"scan alone, forward, L={length}, {b}", times, bars[b], None, b) for b in BACKENDS]


def mamba1_rows() -> list[Row]:
    stock = stock_model("mamba1")
    ours = {backend: our_model(stock, backend) for backend in BACKENDS}
    rows = []
    for length in (128, 256, 512):
        contenders = {"peer": training_step(stock, length)} | {b: training_step(m, length) for b, m in ours.items()}
        times = cpu_times(contenders, rounds=5)
        name = f"Mamba-1 forward and backward, L={length}"
        rows += [faster(f"{name}, {b}", times, *TRAINING_BARS[b][length], b) for b in BACKENDS]
    times = cpu_times({"peer": forward(stock, 512)} | {b: forward(m, 512) for b, m in ours.items()})
    bars = {"eager": (1.8, None), "cpu": (2.7, 4)}
    rows += [faster(f"Mamba-1 forward without gradients, L=512, {b}", times, *bars[b], b) for b in BACKENDS]
    return rows


def long_rows() -> list[Row]:
    """What 2,048 tokens cost, beside 256 and beside the matrix products alone."""
    stock, rows = stock_model("mamba1"), []
    for backend in BACKENDS:
        model = our_model(stock, backend)
        steps = {"short": training_step(model, 256), "long": training_step(model, 2048)}
        times = cpu_times(steps | {"products": matrix_products(2048)})
        slope = math.log(times["long"] / times["short"]) / math.log(8)
        rows.append(below(f"slope of forward and backward, L 256 to 2048, {backend}", slope, 1.1, unit="log-log slope"))
        bar, aim = {"eager": (3, None), "cpu": (1.9, 1.3)}[backend]
        rows.append(
            at_most(
                f"forward and backward over its matrix products, L=2048, {backend}",
                times["long"],
                times["products"],
                bar,
                aim,
            )
        )
    return rows


def mamba2_rows() -> list[Row]:
    stock = stock_model("mamba2")
    ours = {backend: our_model(stock, backend) for backend in BACKENDS}
    rows = []
    for length, (bar, aim) in SSD_BARS.items():
        contenders = {"peer": training_step(stock, length)} | {b: training_step(m, length) for b, m in ours.items()}
        times = cpu_times(contenders, rounds=5)
        name = f"Mamba-2 forward and backward, L={length}"
        rows += [faster(f"{name}, {b}", times, bar, aim if b == "cpu" else None, b) for b in BACKENDS]
    return rows


def generate(model: Any) -> Callable[[], None]:
    ids = torch.randint(VOCABULARY, (1, 16))
    model.eval()

    def run() -> None:
        model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)

    return run


def generation_rows() -> list[Row]:
    rows = []
    bars: dict[str, tuple] = {"eager": (1.4, None), "cpu": (1.6, 2.5)}
    for kind in ("mamba1", "mamba2"):
        stock = stock_model(kind)
        contenders = {"peer": generate(stock)} | {b: generate(our_model(stock, b)) for b in BACKENDS}
        times = cpu_times(contenders, rounds=7)
        rows += [faster(f"generate, 64 tokens, {kind}, {b}", times, *bars[b], b) for b in BACKENDS]
    return rows


def memory_rows() -> list[Row]:
    peer = peak_growth("tests.benchmarks.state_space", "--memory", "stock")
    rows = []
    for backend in BACKENDS:
        ours = peak_growth("tests.benchmarks.state_space", "--memory", backend)
        rows.append(
            at_most(f"training memory over stock's forward graph, L=512, {backend}", ours, peer, 0.25, None, "bytes")
        )
    return rows


def exactness_rows() -> list[Row]:
    """Outputs of the scan against the float64 recurrence."""
    torch.manual_seed(0)
    call = {
        "u": torch.randn(1, 257, 48), "dt": torch.randn(1, 257, 48) - 4, "A": -torch.arange(1.0, 17).repeat(48, 1),
        "B": torch.randn(1, 257, 16), "C": torch.randn(1, 257, 16),
    }  # fmt: skip
    exact = selective_scan(**{name: value.double() for name, value in call.items()}, backend="reference")[0]
    rows = []
    for backend in BACKENDS:
        error = (selective_scan(**call, backend=backend)[0] - exact).abs().max() / exact.abs().max()
        rows.append(below(f"scan against float64, {backend}", error.item(), 5e-7))
    return rows


def memory(contender: str) -> None:
    """Print the peak memory that one training step adds; of stock, its forward graph alone."""
    stock = stock_model("mamba1")
    model = stock if contender == "stock" else our_model(stock, contender)
    training_step(model, 16)() if contender != "stock" else None  # compilers and kernels load now
    ids = torch.randint(VOCABULARY, (1, 512))
    forget_peak()
    before = peak_memory()
    if contender == "stock":
        graph = model(ids, labels=ids, use_cache=False).loss
        assert graph.requires_grad
    else:
        training_step(model, 512)()
    print(peak_memory() - before)


def measure(arguments: argparse.Namespace) -> list[Row]:
    if arguments.memory:
        memory(arguments.memory)
        sys.exit(0)
    parts = (exactness_rows, scan_rows, mamba2_rows, generation_rows, memory_rows, long_rows, mamba1_rows)
    return [row for part in parts if arguments.only in part.__name__ for row in part()]


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        ("--memory", {"default": "", "help": "measure one contender's memory in this process"}),
        ("--only", {"default": "", "help": "only the parts whose name contains this"}),
    )
