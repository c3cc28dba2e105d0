"""Quality against length, with attention and without: texts of 1 to 20 letters reversed or copied, tested up to 40.

    python -m tests.learning.seq2seq_lengths [--task reverse] [--seconds 60] [--json]

One thread; only training's CPU time counts. A letter is right if it stands where it must; an empty place is wrong.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from hf_lnlm import RNNSeq2SeqConfig, RNNSeq2SeqForConditionalGeneration

PAD, START, END, LETTERS = 0, 1, 2, 20
BATCH, LONGEST, RATE, TRIED = 64, 20, 3e-3, (5, 10, 20, 30, 40)
SIZES = {"vocab_size": 3 + LETTERS, "hidden_size": 128, "num_hidden_layers": 1}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
KINDS: dict[str, dict[str, Any]] = {
    "none": {"attention": "none"},
    "general": {"attention": "general", "input_feeding": True},
    "additive": {"attention": "additive"},
}


def rows(count: int, low: int, high: int, task: str, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources and labels, each with its end, padded by `PAD` and -100."""
    sources, labels = torch.full((count, high + 1), PAD), torch.full((count, high + 1), -100)
    for row in range(count):
        length = int(torch.randint(low, high + 1, (), generator=draw))
        text = torch.randint(3, 3 + LETTERS, (length,), generator=draw)
        sources[row, :length], sources[row, length] = text, END
        labels[row, :length], labels[row, length] = text.flip(0) if task == "reverse" else text, END
    return sources, labels


def train(task: str, seconds: float, fields: dict[str, Any]) -> tuple[Any, int]:
    """A model that has learnt for so many CPU seconds, and its steps; the learning rate falls to zero."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model = RNNSeq2SeqForConditionalGeneration(RNNSeq2SeqConfig(**SIZES, **SPECIAL, **fields)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    begin, steps = time.process_time(), 0
    while (share := (time.process_time() - begin) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps + 1) / 50) * (1.0 - share)
        sources, labels = rows(BATCH, 1, LONGEST, task, draw)
        loss = model(sources, (sources != PAD).long(), labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return model.eval(), steps


@torch.no_grad()
def right(model: Any, task: str, length: int) -> float:
    """Share of right letters of 200 texts of a length, written greedily."""
    sources, labels = rows(200, length, length, task, torch.Generator().manual_seed(length))
    written = model.generate(sources, do_sample=False, max_new_tokens=length + 1)[:, 1:]
    found = torch.full_like(labels, PAD)
    found[:, : written.shape[1]] = written
    return round(float((found == labels)[:, :length].float().mean()), 4)


def main() -> None:
    """Train each kind and print its curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["reverse", "copy"], default="reverse")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, Any] = {}
    for kind in given.kinds:
        model, steps = train(given.task, given.seconds, KINDS[kind])
        curves[kind] = {"steps": steps, "right": {str(n): right(model, given.task, n) for n in TRIED}}
    print(
        json.dumps(
            {"task": given.task, "seconds": given.seconds, **SIZES, "curves": curves}, indent=None if given.json else 1
        )
    )


if __name__ == "__main__":
    main()
