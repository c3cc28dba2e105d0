"""Gated convolutions against an LSTM as character models of Shakespeare, each trained for the same CPU seconds, 2 seeds.

    python -m tests.learning.gated_cnn --data FOLDER --json

FOLDER holds `tiny_shakespeare/{train,validation,test}.txt.gz`. Both have about 0.8 million parameters, read rows of 128
characters and are trained by Adam with a cosine over the time; the figure is bits per character of the test text, of which
every prediction sees the 128 characters before it at most.
"""

import gzip
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lnlm.models.convolutional.configuration_gated_cnn import GatedCNNConfig
from hf_lnlm.models.convolutional.modeling_gated_cnn import GatedCNNForCausalLM
from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.recurrent.modeling_rnn import RNNForCausalLM

from .classification import Task, prove

SECONDS, LENGTH, BATCH = 60.0, 128, 16


def corpus(folder: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Character ids of the training and the test text, and their number."""
    texts = [
        gzip.decompress((folder / f"tiny_shakespeare/{part}.txt.gz").read_bytes()).decode()
        for part in ("train", "test")
    ]
    ids = {character: index for index, character in enumerate(sorted(set("".join(texts))))}
    train, test = (torch.tensor([ids[character] for character in text]) for text in texts)
    return train, test, len(ids)


def gated(size: int) -> nn.Module:
    """Six layers of width 4: a prediction sees 19 characters."""
    return GatedCNNForCausalLM(
        GatedCNNConfig(vocab_size=size, hidden_size=128, num_hidden_layers=6, kernel_width=4, pad_token_id=None)
    )


def lstm(size: int) -> nn.Module:
    """Two layers."""
    return RNNForCausalLM(
        RNNConfig(vocab_size=size, hidden_size=224, num_hidden_layers=2, cell_type="lstm", pad_token_id=None)
    )


@torch.no_grad()
def bits(model: Any, text: torch.Tensor) -> float:
    """Bits per character of `(n,)` ids, read in rows of LENGTH + 1."""
    model.eval()
    rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    losses = [model(part, labels=part).loss.item() * len(part) for part in rows.split(64)]
    return sum(losses) / len(rows) / math.log(2)


def run(build: Callable[[int], nn.Module], learning_rate: float, folder: Path, seed: int) -> dict:
    """Train for SECONDS of CPU time; `test` is bits per character."""
    train, test, size = corpus(folder)
    torch.manual_seed(seed)
    model: Any = build(size).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01, fused=True)
    began, steps, spent = time.process_time(), 0, 0.0
    while spent < SECONDS:
        share = spent / SECONDS
        warm = min(1.0, share / 0.04 + 0.01)
        optimizer.param_groups[0]["lr"] = learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * share))
        places = torch.randint(len(train) - LENGTH - 1, (BATCH,)).tolist()
        rows = torch.stack([train[place : place + LENGTH + 1] for place in places])
        model(rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, spent = steps + 1, time.process_time() - began
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {"test": round(bits(model, test), 4), "cpu_seconds": round(spent, 1), "steps": steps}
    return {**found, "parameters": parameters}


TASKS = {
    "gated": Task(
        "Shakespeare, gated CNN 6 x 128, k 4", partial(run, gated, 4e-3), (0, 1), figure="bits per character"
    ),
    "lstm": Task("Shakespeare, LSTM 2 x 224", partial(run, lstm, 4e-3), (0, 1), figure="bits per character"),
}

if __name__ == "__main__":
    prove(__doc__ or "", "python -m tests.learning.gated_cnn --data FOLDER --json", TASKS)
