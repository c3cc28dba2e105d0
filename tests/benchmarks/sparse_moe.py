"""A sparse layer against stock Switch's and against the dense layer with the same active parameters, on one CPU thread.

`python -m tests.benchmarks.sparse_moe [--json]`. Eight experts, 8 x 512 tokens, width 256: Switch's layer sends each to
one expert of inner width 1,024, as ours does; the dense layer is one such expert. Ours with two experts of width 512 each
is beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hf_lnlm import SparseMoEConfig
from hf_lnlm.models.mixture.router import SparseMLP
from hf_lnlm.models.sparse_attention.gpt2_parts import GPT3MLP

from .harness import Row, at_most, cpu_times, faster, run

BATCH, LENGTH, WIDTH, INNER, EXPERTS = 8, 512, 256, 1024, 8
Layer = Callable[[torch.Tensor], torch.Tensor]


def sparse(k: int) -> Layer:
    """Our layer, without dropping."""
    config = SparseMoEConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=k,
        activation_function="relu",
    )
    layer = filled(SparseMLP(config))
    return lambda x: layer(x, None)[0]


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    """The same small weights for every layer, so that no router sends all tokens to one expert."""
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return layer


def switch() -> Layer:
    """Stock Switch's feed-forward layer, with room for every token."""
    config = SwitchTransformersConfig(
        d_model=WIDTH,
        d_ff=INNER,
        num_experts=EXPERTS,
        expert_capacity=BATCH * LENGTH,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    layer = filled(SwitchTransformersSparseMLP(config))
    return lambda x: first(layer(x))


def first(output: Any) -> torch.Tensor:
    """A layer's hidden states: Switch's gives its router's scores too in some versions."""
    return output[0] if isinstance(output, tuple) else output


def dense() -> Layer:
    """A feed-forward layer with one expert's weights."""
    return filled(GPT3MLP(SparseMoEConfig(hidden_size=WIDTH, intermediate_size=INNER, activation_function="relu")))


def timed(training: bool) -> dict[str, float]:
    """CPU seconds of a pass of each layer."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    weight = torch.randn_like(x)

    def call(layer: Layer) -> Callable[[], object]:
        def forward() -> None:
            with torch.no_grad():
                layer(x)

        return (lambda: layer(x).backward(weight)) if training else forward

    layers = {"switch": switch(), "one": sparse(1), "two": sparse(2), "dense": dense()}
    return cpu_times({name: call(layer) for name, layer in layers.items()})


def measure(given: argparse.Namespace) -> list[Row]:
    """Forward and training, against both."""
    rows = []
    for training in (False, True):
        times, mode = timed(training), "training" if training else "forward"
        rows.append(faster(f"{mode} / stock Switch's layer, top-1", times, 3.0, None, "one", "switch"))
        rows.append(at_most(f"{mode} / dense layer, top-1", times["one"], times["dense"], 1.25, None))
        rows.append(at_most(f"{mode} / dense layer, top-2", times["two"], times["dense"], 1.25, None))
    return rows


if __name__ == "__main__":
    run("Sparse mixtures against stock Switch and a dense layer.", measure)
