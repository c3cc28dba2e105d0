"""Transformer-XL: bits per byte of Python's own sources by the length of the memory, beside GPT-2; copying past a segment.

    python -m tests.learning.transfo_xl --json

Both language models have about 0.9 million parameters, read bytes and are trained for the same CPU seconds by AdamW with a
cosine over the time: Transformer-XL in segments of 128 of 16 streams with a memory of 128, GPT-2 in rows of 256. Of the
files, sorted by name, every tenth is for evaluation. `test` is bits per byte with a memory of 1024 at the same length, and
GPT-2's where every byte is seen with at least 128 before it; `by_memory` is the curve.
"""

import math
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lnlm import TransformerXLConfig
from hf_lnlm.models.hybrid.modeling_transfo_xl import TransformerXLForCausalLM
from hf_lnlm.nn.inputs import CACHE_FIELD

from .classification import Task, prove

SECONDS, SEGMENT, STREAMS, MEMORY = 60.0, 128, 16, 128
LENGTHS = (0, 64, 128, 256, 512, 1024)
TESTED = 8 * 4096
"""Bytes that are evaluated, in 8 streams."""
SYMBOLS, DELAY, SHORT = 16, 20, 16


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's modules: to learn from, and to be evaluated."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: dict[bool, bytearray] = {False: bytearray(), True: bytearray()}
    for number, file in enumerate(files):
        parts[number % 10 == 9] += file.read_bytes()
    train, test = (torch.frombuffer(parts[held], dtype=torch.uint8).long() for held in (False, True))
    return train, test[:TESTED]


def streams(text: torch.Tensor, rows: int) -> torch.Tensor:
    """A text as `(rows, length)` contiguous streams."""
    return text[: len(text) // rows * rows].view(rows, -1)


def spend(model: Any, learning_rate: float, step: Any) -> dict[str, Any]:
    """Train for SECONDS of CPU time; `step` gives a batch's loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01, fused=True)
    began, steps, spent = time.process_time(), 0, 0.0
    while spent < SECONDS:
        share = spent / SECONDS
        warm = min(1.0, share / 0.05 + 0.01)
        optimizer.param_groups[0]["lr"] = learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * share))
        step(steps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        steps, spent = steps + 1, time.process_time() - began
    model.eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"cpu_seconds": round(spent, 1), "steps": steps, "parameters": parameters}


def make(**fields: Any) -> TransformerXLForCausalLM:
    """Four layers of width 128 over bytes."""
    sizes = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return TransformerXLForCausalLM(TransformerXLConfig(**{**sizes, **fields}))


@torch.no_grad()
def bits_with_memory(model: Any, text: torch.Tensor, memory: int) -> float:
    """Bits per byte of 8 streams in segments, each after a memory; its reach is told apart as far as it was trained."""
    config = model.config
    config.mem_len, config.same_length, config.clamp_len = memory, memory > 0, SEGMENT + MEMORY
    rows, cache, total = streams(text, 8), None, 0.0
    for start in range(0, rows.shape[1] - 1, SEGMENT):
        piece = rows[:, start : start + SEGMENT + 1]
        out = model(piece[:, :-1], past_key_values=cache, use_cache=True)
        cache = out[CACHE_FIELD]
        total += cross_entropy(out.logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum").item()
    return total / (rows[:, 1:].numel() * math.log(2))


def with_memory(_folder: Path, seed: int) -> dict[str, Any]:
    """Train by streams, the memory carried from segment to segment, and evaluate with each length of memory."""
    train, test = corpus()
    torch.manual_seed(seed)
    model, rows, held = make(mem_len=MEMORY, same_length=False), streams(train, STREAMS), [None]

    def step(number: int) -> torch.Tensor:
        place = number * SEGMENT % (rows.shape[1] - SEGMENT - 1)
        place -= place % SEGMENT
        piece = rows[:, place : place + SEGMENT + 1]
        cache = held[0] if place else None
        out = model(piece[:, :-1], shift_labels=piece[:, 1:], past_key_values=cache, use_cache=True)
        held[0] = out[CACHE_FIELD]
        return out.loss

    found = spend(model, 2e-3, step)
    curve = {str(memory): round(bits_with_memory(model, test, memory), 4) for memory in LENGTHS}
    return {"test": curve[str(LENGTHS[-1])], "by_memory": curve, **found}


def gpt2(_folder: Path, seed: int) -> dict[str, Any]:
    """The stock model of the same size, in rows; evaluated so that every byte has at least 128 before it."""
    train, test = corpus()
    torch.manual_seed(seed)
    length = 2 * SEGMENT
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": length}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes, **drops))

    def step(_number: int) -> torch.Tensor:
        places = torch.randint(len(train) - length - 1, (STREAMS // 2,)).tolist()
        rows = torch.stack([train[place : place + length + 1] for place in places])
        return cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    found = spend(model, 2e-3, step)
    rows, total = streams(test, 8), 0.0
    with torch.no_grad():
        for start in range(0, rows.shape[1] - 1, SEGMENT):
            first = max(0, start - SEGMENT)
            piece = rows[:, first : start + SEGMENT + 1]
            logits = model(piece[:, :-1]).logits[:, start - first :]
            total += cross_entropy(
                logits.flatten(0, 1), piece[:, start - first + 1 :].flatten(), reduction="sum"
            ).item()
    return {"test": round(total / (rows[:, 1:].numel() * math.log(2)), 4), **found}


def copying(memory: int, _folder: Path, seed: int) -> dict[str, Any]:
    """Name the symbol of DELAY places ago in segments of SHORT: nothing of it is in the segment."""
    torch.manual_seed(seed)
    generator, began, steps = torch.Generator().manual_seed(seed), time.process_time(), 0
    model: Any = make(vocab_size=SYMBOLS, hidden_size=64, num_hidden_layers=2, mem_len=memory, same_length=False)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    past, cache, right = torch.randint(SYMBOLS, (32, DELAY), generator=generator), None, []
    for steps in range(1, 201):
        past = torch.cat([past, torch.randint(SYMBOLS, (32, SHORT), generator=generator)], 1)[:, -DELAY - SHORT :]
        piece, wanted = past[:, -SHORT:], past[:, -DELAY - SHORT : -DELAY]
        out = model(piece, shift_labels=wanted, past_key_values=cache, use_cache=True)
        cache = out[CACHE_FIELD]
        right.append((out.logits.argmax(-1) == wanted).float().mean().item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt = next((i + 1 for i, share in enumerate(right) if share >= 0.99), None)
    share = 100 * sum(right[-10:]) / 10
    spent = round(time.process_time() - began, 1)
    return {"test": round(share, 2), "cpu_seconds": spent, "steps": steps, "first_step_at_99": learnt}


TASKS = {
    "memory": Task("stdlib, Transformer-XL 4 x 128", with_memory, (0,), figure="bits per byte"),
    "gpt2": Task("stdlib, GPT-2 4 x 128", gpt2, (0,), figure="bits per byte"),
    "copy": Task("copy over 20, segment 16, memory 32", partial(copying, 32), (0, 1, 2), bar=99.0),
    "control": Task(
        "copy over 20, segment 16, no memory", partial(copying, 0), (0,), note="16 symbols: 6.25 is chance"
    ),
}

if __name__ == "__main__":
    prove(__doc__ or "", "python -m tests.learning.transfo_xl --json", TASKS, needs_data=False)
