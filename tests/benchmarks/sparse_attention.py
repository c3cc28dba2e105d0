"""Sparse attention, Linformer and GPT-3 against what a user could pick today, on one CPU thread.

`python -m tests.benchmarks.sparse_attention [--json] [--peers FOLDER] [--only SECTION]`. `--peers` names a folder that
holds the package of lucidrains/linformer, whose rows are left out otherwise. Peers in the library: scaled-dot-product
attention, Longformer, BigBird, Nystromformer, GPT-Neo.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_lnlm import LinformerConfig, LinformerModel
from hf_lnlm.convert.sparse_attention import gpt3_from_gpt_neo
from hf_lnlm.ops.sparse_attention.attention import sparse_attention
from hf_lnlm.ops.sparse_attention.pattern import SparsePattern

from .harness import Row, at_most, below, cpu_times, faster, forget_peak, peak_growth, peak_memory, run

HEADS, WIDTH, STRIDE = 4, 64, 128
LONGEST, LAYER = 16384, 8192
PATTERNS = {"local": (12.0, 17.0), "strided": (9.0, 12.0), "fixed": (4.5, 5.5)}
"""Pattern → how many times faster than dense causal attention it must be at `LONGEST`, and ought to be."""

Call = Callable[[], Any]


def qkv(length: int, rows: int = 1) -> list[torch.Tensor]:
    """Queries, keys and values of `HEADS` heads."""
    torch.manual_seed(0)
    return [torch.randn(rows, HEADS, length, WIDTH, requires_grad=True) for _ in range(3)]


def wrap(function: Callable[[], torch.Tensor], inputs: list[torch.Tensor], training: bool) -> Call:
    """A forward pass without a graph, or forward and backward."""
    weight = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            function()

    def both() -> None:
        torch.autograd.grad(function(), inputs, weight)

    return both if training else forward


def attention_calls(length: int, training: bool, stride: int = STRIDE, rows: int = 1) -> dict[str, Call]:
    """Every pattern and dense causal attention on the same inputs."""
    inputs = qkv(length, rows)
    calls = {"dense": wrap(lambda: F.scaled_dot_product_attention(*inputs, is_causal=True), inputs, training)}
    for kind in PATTERNS:
        pattern = SparsePattern(kind, stride, stride // 8)
        calls[kind] = wrap(lambda pattern=pattern: sparse_attention(*inputs, pattern), inputs, training)
    return calls


def exponent(times: dict[str, float], kind: str, short: dict[str, float], factor: int) -> float:
    """Slope of time over length in a log-log plot."""
    return math.log(times[kind] / short[kind]) / math.log(factor)


def mode(training: bool) -> str:
    """The word in a row's name."""
    return "training" if training else "forward"


def long_patterns(given: argparse.Namespace) -> list[Row]:
    """Patterns against dense causal attention, and how their time grows."""
    rows = []
    for training in (False, True):
        times = cpu_times(attention_calls(LONGEST, training), 5)
        for kind, (bar, aim) in PATTERNS.items():
            rows.append(faster(f"{kind} / dense, n={LONGEST}, {mode(training)}", times, bar, aim, kind, "dense"))
        short = cpu_times(attention_calls(LONGEST // 4, training), 5)
        for kind in ("local", "strided"):
            name = f"{kind}: exponent of time, n={LONGEST // 4} to {LONGEST}, {mode(training)}"
            rows.append(below(name, exponent(times, kind, short, 4), 1.3, 1.15, "exponent"))
    return rows


def masked_patterns(given: argparse.Namespace) -> list[Row]:
    """Patterns against what a 4-D mask costs a stock model, at n = 4096."""
    length, bars = 4096, {"local": 9.0, "strided": 7.0, "fixed": 6.5}
    inputs, at = qkv(length), torch.arange(length)
    rows = []
    for training in (False, True):
        calls = attention_calls(length, training)
        seen = SparsePattern("strided", STRIDE).visible(at, at)
        calls["masked"] = wrap(
            lambda: F.scaled_dot_product_attention(*inputs, attn_mask=seen), inputs, training
        )  # fmt: skip
        times = cpu_times(calls, 5)
        rows += [
            faster(f"{kind} / masked SDPA, n={length}, {mode(training)}", times, bar, None, kind, "masked")
            for kind, bar in bars.items()
        ]
    return rows


def short_lengths(given: argparse.Namespace) -> list[Row]:
    """The slowest pattern at each length that could be too short for sparsity."""
    rows = []
    cases = [(n, STRIDE, 1) for n in (64, 129, 200, 256, 300, 350, 400, 512, 600, 700, 900, 1024, 1400)]
    cases += [(n, 32, 1) for n in (33, 48, 64, 100, 200, 256, 400)] + [(n, STRIDE, 4) for n in (160, 300, 512, 900)]
    for length, stride, batch in cases:
        for training in (False, True):
            calls = max(1, 8000 // length // batch)  # a single short call would be timed with cold caches
            times = cpu_times(attention_calls(length, training, stride, batch), 7, calls=calls)
            slowest = max(PATTERNS, key=lambda kind: times[kind])
            name = f"slowest ({slowest}) / dense, n={length}, l={stride}, batch {batch}, {mode(training)}"
            rows.append(at_most(name, times[slowest], times["dense"], 1.1, 1.0))
    return rows


def linformer_layer(length: int, sharing: str = "key_value") -> nn.Module:
    """One Linformer layer of width 256 with k = 128, in evaluation mode (no dropout)."""
    fields = {"vocab_size": 100, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    config = LinformerConfig(**fields, max_position_embeddings=length, projected_size=128, sharing=sharing)
    return LinformerModel(config).eval()


def stock_layer(kind: str, length: int, **fields: Any) -> nn.Module:
    """One layer of a stock encoder of the same width."""
    shape = {"vocab_size": 100, "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    shape |= {"intermediate_size": 1024, "max_position_embeddings": length + 8}
    implementation = "sdpa" if kind == "bert" else None
    config = AutoConfig.for_model(kind, **shape, **fields)
    return AutoModel.from_config(config, attn_implementation=implementation).eval()


def layer_calls(models: dict[str, nn.Module], length: int, training: bool) -> dict[str, Call]:
    """Run each encoder over the same embeddings `(1, length, 256)`."""
    states = torch.randn(1, length, 256)

    def call_of(model: nn.Module) -> Call:
        def call() -> None:
            with torch.set_grad_enabled(training):
                out = model(inputs_embeds=states).last_hidden_state
            if training:
                model.zero_grad()
                out.sum().backward()

        return call

    return {name: call_of(model) for name, model in models.items()}


def linformer(given: argparse.Namespace) -> list[Row]:
    """A Linformer layer against a stock layer on fused attention, and how its time grows."""
    rows = []
    for training, bar, aim in ((False, 5.0, 6.5), (True, 6.0, 7.8)):
        for length in (LAYER, 512):
            models = {"ours": linformer_layer(length), "peer": stock_layer("bert", length)}
            times = cpu_times(layer_calls(models, length, training), 5, calls=1 if length == LAYER else 5)
            name = f"Linformer layer / BERT layer (SDPA), n={length}, {mode(training)}"
            if length == LAYER:
                rows.append(faster(name, times, bar, aim))
            else:
                rows.append(at_most(name, times["ours"], times["peer"], 1.1, 1.0))
    small = layer_calls({"ours": linformer_layer(1024)}, 1024, False)
    short = cpu_times(small, 5, calls=4)
    long = cpu_times(layer_calls({"ours": linformer_layer(LAYER)}, LAYER, False), 5)
    rows.append(below("Linformer layer: exponent, n=1024 to 8192", exponent(long, "ours", short, 8), 1.1, 1.0, ""))
    return rows


def long_encoders(given: argparse.Namespace) -> list[Row]:
    """Stock encoders for long texts."""
    bars = {"longformer": (2.5, 3.3), "big_bird": (4.5, 6.1), "nystromformer": (1.3, 1.6)}
    models = {
        "ours": linformer_layer(LAYER),
        "longformer": stock_layer("longformer", LAYER, attention_window=256),
        "big_bird": stock_layer("big_bird", LAYER, block_size=64, num_random_blocks=3),
        "nystromformer": stock_layer("nystromformer", LAYER, num_landmarks=64, segment_means_seq_len=LAYER),
    }
    times = cpu_times(layer_calls(models, LAYER, False), 5)
    return [
        faster(f"Linformer layer / {kind} layer, n={LAYER}, forward", times, bar, aim, peer=kind)
        for kind, (bar, aim) in bars.items()
    ]


class PublishedLinformer(nn.Module):
    """lucidrains/linformer with the interface of our models."""

    def __init__(self, length: int) -> None:
        super().__init__()
        from linformer import Linformer  # type: ignore[import-not-found]

        self.model = Linformer(dim=256, seq_len=length, depth=1, heads=HEADS, k=128)

    def forward(self, inputs_embeds: torch.Tensor) -> SimpleNamespace:
        """Run it over `(batch, length, 256)`."""
        return SimpleNamespace(last_hidden_state=self.model(inputs_embeds))


def published(given: argparse.Namespace) -> list[Row]:
    """lucidrains/linformer, which has an E and an F in each layer, against our layers with the same and with E = F."""
    if given.peers is None:
        return []
    sys.path.insert(0, given.peers)
    rows = []
    for training, bar, aim in ((False, 1.1, 1.17), (True, 1.15, 1.25)):
        models = {sharing: linformer_layer(LAYER, sharing) for sharing in ("headwise", "key_value")}
        models["peer"] = PublishedLinformer(LAYER).eval()
        times = cpu_times(layer_calls(models, LAYER, training), 7)
        for sharing in ("headwise", "key_value"):
            name = f"Linformer layer ({sharing}) / lucidrains/linformer, n={LAYER}, {mode(training)}"
            rows.append(faster(name, times, bar, aim, sharing))
    return rows


def gpt3(given: argparse.Namespace) -> list[Row]:
    """A whole language model against stock GPT-Neo with the same weights."""
    length = 2048
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=512, hidden_size=256, num_layers=4, num_heads=4, window_size=256,
        max_position_embeddings=length, attention_types=[[["global", "local"], 2]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))
    models, rows = {"ours": gpt3_from_gpt_neo(stock), "peer": stock}, []
    for training, bar, aim in ((False, 2.5, 3.5), (True, 1.8, 2.4)):

        def call_of(model: nn.Module, training: bool = training) -> Call:
            def call() -> None:
                with torch.set_grad_enabled(training):
                    loss = model(ids, labels=ids, use_cache=False).loss
                if training:
                    model.zero_grad()
                    loss.backward()

            return call

        times = cpu_times({name: call_of(model) for name, model in models.items()}, 5)
        rows.append(faster(f"GPT-3 / GPT-Neo, same weights, n={length}, {mode(training)}", times, bar, aim))
    return rows


def masked_step(length: int) -> Call:
    """Forward and backward of fused attention under a mask `(length, length)`, made row by row."""
    inputs, at = qkv(length), torch.arange(length)

    def step() -> None:
        seen = torch.empty(length, length, dtype=torch.bool)
        pattern = SparsePattern("strided", STRIDE)
        for start in range(0, length, STRIDE):
            rows = slice(start, start + STRIDE)
            seen[rows] = pattern.visible(at[rows], at)
        F.scaled_dot_product_attention(*inputs, attn_mask=seen).sum().backward()

    return step


def memory_growth(which: str, length: int) -> float:
    """Peak growth in bytes of one forward and backward pass in this process."""
    torch.set_num_threads(1)
    if which == "masked":
        step = masked_step(length)
    elif which == "strided":
        inputs = qkv(length)
        step = lambda: sparse_attention(*inputs, SparsePattern("strided", STRIDE)).sum().backward()  # noqa: E731
    else:
        model = linformer_layer(length) if which == "linformer" else stock_layer("bert", length)
        if which == "eager":
            model.set_attn_implementation("eager")  # type: ignore[operator]
        step = layer_calls({"one": model}, length, True)["one"]
    forget_peak()
    before = peak_memory()
    step()
    return peak_memory() - before


def memory(given: argparse.Namespace) -> list[Row]:
    """Peak memory of a training pass, each in a process of its own."""

    def grown(which: str, length: int) -> float:
        return peak_growth("tests.benchmarks.sparse_attention", "--memory", which, str(length))

    strided, masked = grown("strided", 8192), grown("masked", 8192)
    layer, eager, fused = (grown(which, 4096) for which in ("linformer", "eager", "sdpa"))
    return [
        at_most("strided / masked SDPA, n=8192, peak growth in training", strided, masked, 0.2, 0.15, "bytes"),
        at_most("Linformer / eager BERT layer, n=4096, peak growth", layer, eager, 0.2, 0.125, "bytes"),
        at_most("Linformer / SDPA BERT layer, n=4096, peak growth", layer, fused, 1.2, 1.0, "bytes"),
    ]


SECTIONS = (
    long_patterns, masked_patterns, short_lengths, linformer, long_encoders, published, gpt3, memory
)  # fmt: skip


def measure(given: argparse.Namespace) -> list[Row]:
    """All sections, or those whose name contains `--only`."""
    gc.freeze()  # what was imported need not be looked through before every call
    return [row for section in SECTIONS if given.only in section.__name__ for row in section(given)]


if __name__ == "__main__":
    if "--memory" in sys.argv:
        at = sys.argv.index("--memory")
        print(memory_growth(sys.argv[at + 1], int(sys.argv[at + 2])))
    else:
        run(
            "Sparse attention, Linformer and GPT-3 against stock models",
            measure,
            ("--peers", {"help": "folder with the package of lucidrains/linformer"}),
            ("--only", {"default": "", "help": "run the sections whose name contains this"}),
        )
