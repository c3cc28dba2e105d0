"""ELMo against the published formulation: `python -m tests.benchmarks.elmo [--data ROWS.jsonl.gz] [--json]`.

The peer's LSTM is AllenNLP's: two products a step of the input and the state, as autograd records them, in float32. Its
character CNN reads all 50 places of every word, padding too. `--data` takes JSON Lines with a list `tokens` a
row for the sentences; made-up ones have words of Zipf's frequencies. `--fixture FOLDER`
compares AllenNLP's miniature checkpoint with the output that it comes with, and does nothing else.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

import hf_lnlm
from hf_lnlm import ElmoConfig, ElmoModel
from hf_lnlm.convert import elmo
from hf_lnlm.ops.projected_lstm import projected_lstm

from .harness import Row, at_most, below, cpu_times, faster, run

ROWS, STEPS, CELLS, WIDTH = 16, 22, 4096, 512


def peer_lstm(inputs: torch.Tensor, weights: Any) -> torch.Tensor:
    """`(rows, steps, width)`: `LstmCellWithProjection`, step by step."""
    w_input, bias, recurrent, projection = weights
    h, c = inputs.new_zeros(len(inputs), projection.shape[0]), inputs.new_zeros(len(inputs), projection.shape[1])
    outputs = []
    for step in range(inputs.shape[1]):
        gates = linear(inputs[:, step], w_input) + linear(h, recurrent, bias)
        i, f, g, o = gates.chunk(4, -1)
        c = (i.sigmoid() * g.tanh() + f.sigmoid() * c).clamp(-3, 3)
        h = linear(o.sigmoid() * c.tanh(), projection).clamp(-3, 3)
        outputs.append(h)
    return torch.stack(outputs, 1)


def own_lstm(inputs: torch.Tensor, weights: Any) -> torch.Tensor:
    """The same by the package."""
    rows, steps, _ = inputs.shape
    zeros = (inputs.new_zeros(rows, WIDTH), inputs.new_zeros(rows, CELLS))
    tokens = inputs.transpose(0, 1).reshape(rows * steps, -1)
    outputs, _ = projected_lstm(tokens, [rows] * steps, zeros, weights, (3.0, 3.0))
    return outputs.view(steps, rows, -1).transpose(0, 1)


def lstm_rows(rounds: int) -> list[Row]:
    """One layer of the published size, one direction."""
    torch.manual_seed(0)
    shapes = ((4 * CELLS, WIDTH), (4 * CELLS,), (4 * CELLS, WIDTH), (WIDTH, CELLS))
    weights = [torch.empty(shape).uniform_(-0.05, 0.05).requires_grad_() for shape in shapes]
    half = [weight.detach().bfloat16().requires_grad_() for weight in weights]
    inputs = torch.randn(ROWS, STEPS, WIDTH)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "peer": lambda: peer_lstm(inputs, weights),
        "ours": lambda: own_lstm(inputs, weights),
        "bfloat16": lambda: own_lstm(inputs.bfloat16(), half),
    }
    apart = float((calls["ours"]() - calls["peer"]()).detach().abs().max())
    found = [below("LSTM, greatest difference", apart, 1e-5)]
    for kind, wrapped in (("training", trained), ("inference", read)):
        times = cpu_times({name: wrapped(call) for name, call in calls.items()}, rounds)
        found.append(faster(f"LSTM with projection, float32, {kind}", times, 1.25, None))
        found.append(faster(f"LSTM with projection, bfloat16, {kind}", times, 3.5, None, ours="bfloat16"))
    return found


def trained(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward pass."""
    return lambda: call().square().mean().backward()


def read(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The forward pass without gradients."""

    def without() -> torch.Tensor:
        with torch.no_grad():
            return call()

    return without


def sentences(path: Path | None, count: int) -> list[str]:
    """Sentences of a file of rows with `tokens`, or made-up ones."""
    if path is not None:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [" ".join(json.loads(next(file))["tokens"]) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 35, (count,), generator=generator).tolist()
    zipf = 1 / torch.arange(1, 5000.0)
    return [
        " ".join(f"w{int(word)}" for word in torch.multinomial(zipf, length, True, generator=generator))
        for length in lengths
    ]


def word_rows(model: ElmoModel, texts: list[str], rounds: int) -> list[Row]:
    """The character CNN: each different word once, and its used places, against 50 places of every word."""
    tokenizer = hf_lnlm.build_tokenizer("elmo", template="causal")
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    words = model.spelled(batch.input_ids, batch.attention_mask, None)
    ids: Any = words.ids
    whole = torch.nn.functional.pad(ids, (0, 50 - ids.shape[2]), value=model.config.filler_token_id)

    def plain() -> torch.Tensor:
        vectors = model.characters._encoded(model.embed(whole.flatten(0, 1)))
        return vectors.view(*words.mask.shape, -1) * words.mask[..., None]

    calls = {"peer": read(plain), "ours": read(lambda: model.word_vectors(words))}
    apart = float((calls["ours"]() - calls["peer"]()).abs().max())
    times = cpu_times(calls, rounds)
    found = faster(f"character CNN, {len(texts)} sentences, {int(words.mask.sum())} words", times, 4.0, None)
    return [found, below("character CNN, greatest difference", apart, 1e-6)]


def text_row(model: ElmoModel, texts: list[str], rounds: int) -> Row:
    """A text of 1,000 words as sentences, against its matrix products alone."""
    words = " ".join(texts).split()[:1000]
    tokenizer = hf_lnlm.build_tokenizer("elmo", template="causal")
    lines = [" ".join(words[first : first + 25]) for first in range(0, len(words), 25)]
    batch = tokenizer(lines, return_tensors="pt", padding=True)
    spelled = model.spelled(batch.input_ids, batch.attention_mask, None)
    rows, steps = spelled.mask.shape
    different = len({tuple(word) for word in spelled.ids[spelled.mask].tolist()})
    features = torch.randn(different, sum(maps for _, maps in model.config.filters))
    layer = model.layers[0].forwards
    h, cell, every = torch.randn(rows, WIDTH), torch.randn(rows, CELLS), torch.randn(rows * steps, WIDTH)

    def products() -> None:
        for module in [*model.characters.highways[0].children(), *model.characters.highways[1].children()]:
            module(features)
        model.characters.projection(features)
        for convolution in model.characters.convolutions:
            places = spelled.ids.shape[2] - convolution.kernel_size + 1
            linear(torch.zeros(different * places, convolution.projection.in_features), convolution.projection.weight)
        for _ in range(2 * len(model.layers)):
            linear(every, layer.input_gates.weight)
            for _ in range(steps):
                linear(h, layer.recurrent_gates.weight)
                linear(cell, layer.projection.weight)

    def unrecorded() -> None:
        with torch.no_grad():
            products()

    times = cpu_times({"peer": unrecorded, "ours": read(lambda: model(**batch).last_hidden_state)}, rounds)
    return at_most("93.6 M weights, 1,000 words / its matrix products", times["ours"], times["peer"], 2.0, None)


def fixture_row(folder: Path) -> Row:
    """AllenNLP's miniature checkpoint: its sentences, three at a time, the state carried on, against what it expects."""
    import h5py

    model = elmo.read(folder, {})
    lists = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
    wanted = [h5py.File(folder / f"lm_embeddings_{number}.hdf5", "r") for number in range(len(lists))]
    tokenizer = hf_lnlm.build_tokenizer("elmo", template="causal")
    state, apart = None, 0.0
    for index, texts in enumerate(zip(*lists, strict=True)):
        with torch.no_grad():
            found = model(**tokenizer(list(texts), return_tensors="pt", padding=True), state=state, output_state=True)
        state = found.final_state
        for row, text in enumerate(texts):
            both = torch.from_numpy(wanted[row][str(index)][...])
            got = found.layers[-1][row, 1 : 1 + len(text.split())]
            apart = max(apart, float((got - torch.cat([both[0], both[1]], -1)).abs().max()))
    return below(f"fixture, {sum(map(len, lists))} sentences with carried state", apart, 5e-6, unit="absolute error")


def measure(given: argparse.Namespace) -> list[Row]:
    """All rows."""
    torch.set_num_threads(1)
    if given.fixture is not None:
        return [fixture_row(given.fixture)]
    found = lstm_rows(given.rounds)
    torch.manual_seed(0)
    model = ElmoModel(ElmoConfig()).eval()
    texts = sentences(given.data, 80)
    found += word_rows(model, texts[:32], given.rounds)
    return [*found, text_row(model, texts, given.rounds)]


if __name__ == "__main__":
    paths = [(flag, {"type": Path, "default": None}) for flag in ("--data", "--fixture")]
    run(__doc__ or "", measure, ("--rounds", {"type": int, "default": 5}), *paths)
