"""Recurrent decoders with attention against the usual loop: `python -m tests.benchmarks.seq2seq [--json]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from hf_lnlm import RNNSeq2SeqConfig, RNNSeq2SeqModel
from hf_lnlm.nn.masks import segment_info

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


def decoding(rounds: int) -> list[Row]:
    """A decoded token: the decoder's step for 4 beams, with the state carried, beside `nn.LSTM` and attention."""
    model = make().eval()
    walk, rows, calls = model.decoder.walk, 4, 50
    attention, combine = walk.attention, walk.vector.combine
    lstm = torch.nn.LSTM(HIDDEN, HIDDEN, batch_first=True).eval()
    cell = walk.layers[0].forwards
    with torch.no_grad():
        for kind, gates in (("ih", cell.input_gates), ("hh", cell.recurrent_gates)):
            getattr(lstm, f"weight_{kind}_l0").copy_(gates.weight)
            getattr(lstm, f"bias_{kind}_l0").copy_(gates.bias)
        encoded = model.encoder(torch.randint(VOCABULARY, (rows, SOURCE)))
        source = attention.read(encoded.last_hidden_state, None)
    first = (encoded.final_state[:, 0, 0].contiguous(), encoded.final_state[:, 0, 1].contiguous())
    token = model.decoder.embed_tokens(torch.randint(VOCABULARY, (rows, 1))).detach()
    segments = segment_info(token, None)

    def ours() -> torch.Tensor:
        states = [first]
        for _ in range(calls):
            outputs, ended = walk(token, states, None, source, segments, True)
            states = ended["states"]
        return outputs[-1]

    def peer() -> torch.Tensor:
        states = tuple(state[None] for state in first)
        for _ in range(calls):
            hidden, states = lstm(token, states)
            alignment = torch.softmax(hidden @ source.keys.mT, -1)
            vector = torch.tanh(combine(torch.cat([alignment @ source.values, hidden], -1)))
        return vector

    with torch.no_grad():
        apart = float((ours() - peer()).abs().max())
        times = {who: spent / calls for who, spent in cpu_times({"ours": ours, "peer": peer}, rounds).items()}
    return [
        faster("decoded token, 4 beams / nn.LSTM + attention", times, 2.0, None),
        below("decoded token, greatest difference", apart, 1e-5),
    ]


def measure(given: argparse.Namespace) -> list[Row]:
    """All rows."""
    return [
        *training("no feeding / per-step loop", 2.5, 4.0, given.rounds),
        *training("input feeding / per-step loop", 1.5, None, given.rounds, input_feeding=True),
        *decoding(given.rounds),
    ]


if __name__ == "__main__":
    run(__doc__ or "", measure, ("--rounds", {"type": int, "default": 7}))
