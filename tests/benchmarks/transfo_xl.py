"""Transformer-XL against the formulation of transformers 4.36: `python -m tests.benchmarks.transfo_xl [--json]`.

The peer (tests/models/hybrid/transfo_xl_peer.py) has the same weights, computes by einsum and projects the memory in every
call. Both are measured from word ids to the last hidden states; training is a forward and backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from hf_lnlm.convert.transfo_xl import transfo_xl_from_state
from hf_lnlm.nn.inputs import CACHE_FIELD
from tests.models.hybrid.transfo_xl_peer import Peer, Shape

from .harness import Row, below, cpu_times, faster, run

WORDS = 1000
LAYERS = {"d_model": 256, "d_embed": 256, "n_head": 8, "d_head": 32, "d_inner": 1024, "n_layer": 4}
DECODING = {160: (3.0, 5.0), 640: (6.0, 10.0), 1600: (9.0, 15.0)}
"""Length of the memory → bar and aim."""
EVALUATION = ((4, 128, 128), (2, 256, 256), (1, 128, 640), (1, 64, 1600))
TRAINING = ((4, 128, 128), (2, 256, 256), (1, 128, 640), (1, 64, 1600))
"""Rows, length of a segment, length of the memory."""


def pair(memory: int) -> tuple[Peer, Any]:
    """The peer and ours, with the same weights; both begin with a memory of zeros, as that version does."""
    peer = Peer(Shape(vocab_size=WORDS, cutoffs=[], mem_len=memory, **LAYERS), scale=0.03).eval()
    return peer, transfo_xl_from_state(peer.state_dict(), peer.config(), {}).eval()


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Words."""
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def carried(peer: Peer, ours: Any, rows: int, length: int) -> tuple[dict[str, Callable[[], Any]], list[Any]]:
    """Both on the same segment again and again, each with the memory of its last call; and what they gave last."""
    text, state = ids(rows, length), {"peer": None, "ours": None}
    last: list[Any] = [None, None]

    @torch.no_grad()
    def old() -> None:
        last[1], state["peer"] = peer.hidden(text, state["peer"])

    @torch.no_grad()
    def new() -> None:
        out = ours.model(text, past_key_values=state["ours"], use_cache=True)
        last[0], state["ours"] = out.last_hidden_state, out[CACHE_FIELD]

    return {"ours": new, "peer": old}, last


def apart(last: list[Any]) -> float:
    """Greatest difference of the last hidden states."""
    return float((last[0] - last[1].transpose(0, 1)).abs().max())


def decoding(memory: int, rounds: int) -> list[Row]:
    """One word at a time with a full memory; a round is 32 words."""
    contenders, last = carried(*pair(memory), 1, 1)
    bar, aim = DECODING[memory]
    times = cpu_times(contenders, rounds, calls=32)
    name = f"a word, M={memory}"
    return [faster(name, times, bar, aim), below(f"{name}, greatest difference", apart(last), 1e-4)]


def evaluating(rows: int, length: int, memory: int, rounds: int) -> list[Row]:
    """A segment with a full memory."""
    contenders, last = carried(*pair(memory), rows, length)
    times = cpu_times(contenders, rounds, calls=2)
    name = f"evaluation B={rows} L={length} M={memory}"
    return [faster(name, times, 1.3, None), below(f"{name}, greatest difference", apart(last), 1e-4)]


def training(rows: int, length: int, memory: int, rounds: int) -> list[Row]:
    """Forward and backward pass of a segment after a memory."""
    peer, ours = pair(memory)
    ours.train()
    text, before = ids(rows, length), ids(rows, memory, 1)
    with torch.no_grad():
        held = torch.stack(peer.hidden(before)[1])
    wanted = torch.randn(rows, length, LAYERS["d_model"], generator=torch.Generator().manual_seed(2))

    def old(dtype: torch.dtype = torch.float32) -> None:
        peer.zero_grad()
        (peer.hidden(text, list(held.to(dtype)))[0] * wanted.transpose(0, 1)).sum().backward()

    def new(dtype: torch.dtype = torch.float32) -> None:
        ours.zero_grad()
        cache = DynamicCache(config=ours.config)
        for layer, past in zip(cache.layers, held.to(dtype), strict=True):
            kept = {"hidden": past.transpose(0, 1), "lengths": torch.full((rows,), memory)}
            layer.write(ours.model.state_kind, kept, memory)
        (ours.model(text, past_key_values=cache, use_cache=True).last_hidden_state * wanted).sum().backward()

    times = cpu_times({"ours": new, "peer": old}, rounds)
    peer.double(), ours.double()  # in float32 a ReLU that is nearly 0 may fall on either side
    new(torch.float64), old(torch.float64)
    weights = ours.model.layers[0].attention.kv_net.weight.grad
    theirs = peer.transformer.layers[0].dec_attn.qkv_net.weight.grad[-len(weights) :]
    apart = float((weights - theirs).norm() / theirs.norm())
    name = f"training B={rows} L={length} M={memory}"
    return [faster(name, times, 1.3, None), below(f"{name}, gradients in float64", apart, 1e-10)]


def against_a_window(memory: int, rounds: int) -> list[Row]:
    """A word's share of evaluation with memory, segments of 64, against a window of as many words made anew for each."""
    peer, ours = pair(memory)
    ours.config.mem_init = "empty"
    contenders, _ = carried(peer, ours, 1, 64)
    window = ids(1, memory)

    @torch.no_grad()
    def again() -> None:
        ours.model(window, use_cache=False)

    times = cpu_times({"ours": contenders["ours"], "peer": again}, rounds)
    return [faster(f"a word, memory / sliding window, M={memory}", times | {"ours": times["ours"] / 64}, 100.0, None)]


def measure(given: argparse.Namespace) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    for memory in DECODING:
        rows += decoding(memory, given.rounds)
    for shape in EVALUATION:
        rows += evaluating(*shape, given.rounds)
    for shape in TRAINING:
        rows += training(*shape, given.rounds)
    return rows + against_a_window(640, given.rounds)


if __name__ == "__main__":
    run(__doc__ or "", measure, ("--rounds", {"type": int, "default": 5}))
