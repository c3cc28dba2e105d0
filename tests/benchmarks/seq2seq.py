"""Recurrent decoders with attention against the usual loop: `python -m tests.benchmarks.seq2seq [--json]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from hf_lnlm import RNNSeq2SeqConfig, RNNSeq2SeqModel

from .harness import Row, below, cpu_times, faster, run

BATCH, SOURCE, TARGET, HIDDEN, VOCABULARY = 32, 14, 14, 256, 2000


def make(**fields: Any) -> RNNSeq2SeqModel:
    """A model of the size that is measured."""
    torch.manual_seed(0)
    config = RNNSeq2SeqConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, use_cache=False, bridge="copy", **fields
    )
    return RNNSeq2SeqModel(config).train()


def per_step(model: RNNSeq2SeqModel, encoded: Any, ids: torch.Tensor) -> torch.Tensor:
    """The peer: `nn.LSTMCell`'s function, attention and its vector, step by step, with the model's weights."""
    decoder, walk = model.decoder, model.decoder.walk
    cell = walk.layers[0].forwards
    weights = (cell.input_gates.weight, cell.recurrent_gates.weight, cell.input_gates.bias, cell.recurrent_gates.bias)
    attention: Any = walk.attention
    values, tokens = encoded.last_hidden_state, decoder.embed_tokens(ids)
    h, c = encoded.final_state[:, 0, 0], encoded.final_state[:, 0, 1]
    keys, fed, outputs = attention.key(values), torch.zeros_like(h), []
    for t in range(ids.shape[1]):
        inputs = torch.cat([tokens[:, t], fed], 1) if model.config.input_feeding else tokens[:, t]
        h, c = torch.lstm_cell(inputs, (h, c), *weights)
        alignment = torch.softmax(torch.bmm(keys, h.unsqueeze(2)).squeeze(2), 1)
        context = torch.bmm(alignment.unsqueeze(1), values).squeeze(1)
        fed = torch.tanh(walk.vector.combine(torch.cat([context, h], 1)))
        outputs.append(fed)
    return torch.stack(outputs, 1)


def training(name: str, bar: float, aim: float | None, rounds: int, **fields: Any) -> list[Row]:
    """Forward and backward pass of a decoder, the source read before."""
    model = make(**fields)
    ids, target = torch.randint(VOCABULARY, (BATCH, SOURCE)), torch.randint(VOCABULARY, (BATCH, TARGET))
    with torch.no_grad():
        encoded = model.encoder(ids)
    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: model.decoder(target, encoder_outputs=encoded).last_hidden_state,
        "peer": lambda: per_step(model, encoded, target),
    }
    apart = float((contenders["ours"]() - contenders["peer"]()).detach().abs().max())
    times = cpu_times({who: step(outputs) for who, outputs in contenders.items()}, rounds, calls=3)
    return [faster(f"{name}, training", times, bar, aim), below(f"{name}, greatest difference", apart, 1e-5)]


def step(outputs: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward pass."""
    return lambda: outputs().square().mean().backward()


def measure(given: argparse.Namespace) -> list[Row]:
    """All rows."""
    return [
        *training("no feeding / per-step loop", 2.5, 4.0, given.rounds),
        *training("input feeding / per-step loop", 1.5, None, given.rounds, input_feeding=True),
    ]


if __name__ == "__main__":
    run(__doc__ or "", measure, ("--rounds", {"type": int, "default": 7}))
