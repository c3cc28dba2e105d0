"""Turing machine and neural computer against their best-known PyTorch versions.

    python -m tests.benchmarks.memory [--peers FOLDER] [--json]

FOLDER holds clones of loudinthecloud/pytorch-ntm (as `pytorch-ntm`) and ixaxaar/pytorch-dnc (as `pytorch-dnc`); they are
read from there and never copied. Without it, our eager backend is the peer and the bars are those of the compiled loop
against it. Copy task, length 20 (41 steps), 8 bits, memory 128 x 20, LSTM controller of 100; memory rows are peak
growth of one training step in a fresh process.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_lnlm.models.memory.configuration_dnc import DNCConfig
from hf_lnlm.models.memory.configuration_ntm import NTMConfig
from hf_lnlm.models.memory.modeling_dnc import DNCForSequenceTransduction
from hf_lnlm.models.memory.modeling_ntm import NTMForSequenceTransduction

from .harness import Row, at_most, cpu_times, faster, forget_peak, peak_growth, peak_memory, run

SLOTS, WIDTH, CONTROLLER, STEPS = 128, 20, 100, 41
# family, phase, batch size: bar and aim against the peer
SPEED = {
    ("ntm", "training", 1): (24, 40),
    ("ntm", "training", 16): (14, 25),
    ("ntm", "training", 64): (14, 25),
    ("ntm", "inference", 1): (18, 30),
    ("ntm", "inference", 16): (10, 20),
    ("ntm", "inference", 64): (9, 20),
    ("dnc", "training", 1): (15, 25),
    ("dnc", "training", 16): (5, 15),
    ("dnc", "training", 64): (3.5, 10),
    ("dnc", "inference", 1): (10, 20),
    ("dnc", "inference", 16): (2.5, 10),
    ("dnc", "inference", 64): (2.5, 10),
}
EAGER = {1: 1.7, 16: 2.5, 64: 3.5}  # training steps of the NTM without compiler, at least
OWN_BAR = 1.5  # the compiled loop against our own eager backend
LONG = {"ntm": (501, 1 / 6, 1 / 20), "dnc": (201, 1 / 3, 1 / 10)}


def ours(family: str, backend: str = "cpu", **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"input_size": 9, "output_size": 8, "hidden_size": 8, "controller_size": CONTROLLER, "residual": False}
    config_class, model_class = (
        (NTMConfig, NTMForSequenceTransduction) if family == "ntm" else (DNCConfig, DNCForSequenceTransduction)
    )
    return model_class(config_class(**sizes, backend=backend, use_cache=False, **fields)).train()


def our_step(model: Any, batch: int, steps: int, training: bool) -> Callable[[], None]:
    inputs, labels = torch.rand(batch, steps, 9), torch.randint(0, 2, (batch, steps, 8)).float()

    def step() -> None:
        with torch.set_grad_enabled(training):
            out = model(inputs_embeds=inputs, labels=labels if training else None)
        if training:
            model.zero_grad()
            out.loss.backward()

    return step


def ntm_peer(folder: Path) -> Any:
    sys.path.insert(0, str(folder / "pytorch-ntm"))
    from ntm.aio import EncapsulatedNTM

    torch.manual_seed(0)
    return EncapsulatedNTM(9, 8, CONTROLLER, 1, 1, SLOTS, WIDTH)


def dnc_peer(folder: Path) -> Any:
    sys.path.insert(0, str(folder / "pytorch-dnc"))
    sys.modules.setdefault("faiss", types.ModuleType("faiss"))  # imported for a variant that is not used here
    from dnc.dnc import DNC

    torch.manual_seed(0)
    sizes = {"nr_cells": SLOTS, "cell_size": WIDTH, "read_heads": 1, "num_hidden_layers": 1}
    return DNC(9, CONTROLLER, **sizes)


def ntm_peer_outputs(net: Any, inputs: torch.Tensor) -> torch.Tensor:
    net.init_sequence(inputs.shape[1])
    return torch.stack([net(row)[0] for row in inputs])


def dnc_peer_outputs(net: Any, inputs: torch.Tensor) -> torch.Tensor:
    return net(inputs.transpose(0, 1), None, reset_experience=True)[0]


def peer_step(family: str, folder: Path, batch: int, steps: int, training: bool) -> Callable[[], None]:
    net = ntm_peer(folder) if family == "ntm" else dnc_peer(folder)
    outputs_of = ntm_peer_outputs if family == "ntm" else dnc_peer_outputs
    inputs = torch.rand(steps, batch, 9)

    def step() -> None:
        with torch.set_grad_enabled(training):
            outputs = outputs_of(net, inputs)
        if training:
            net.zero_grad()
            binary_cross_entropy_with_logits(outputs, torch.zeros_like(outputs)).backward()

    return step


def speed_row(family: str, phase: str, batch: int, folder: Path | None) -> list[Row]:
    training, name = phase == "training", f"{family.upper()} {phase}, batch {batch}"
    contenders = {
        "ours": our_step(ours(family), batch, STEPS, training),
        "eager": our_step(ours(family, "eager"), batch, STEPS, training),
    }
    if folder is not None:
        contenders["peer"] = peer_step(family, folder, batch, STEPS, training)
    times = cpu_times(contenders, rounds=5, calls=8 if batch == 1 else 1)
    if folder is None:
        return [faster(f"{name}: compiled against eager", times, OWN_BAR, None, peer="eager")]
    rows = [faster(name, times, *SPEED[family, phase, batch])]
    if family == "ntm" and training:
        rows.append(faster(f"{name}: eager backend", times, EAGER[batch], None, ours="eager"))
    return rows


def grow(kind: str, family: str, steps: int, folder: str) -> float:
    """Peak growth in bytes of one training step, after a short one has loaded and compiled everything."""
    if kind == "peer":
        make = lambda length: peer_step(family, Path(folder), 4, length, True)  # noqa: E731
    else:
        model = ours(family, recompute_states=kind == "recompute")
        make = lambda length: our_step(model, 4, length, True)  # noqa: E731
    make(3)()
    step = make(steps)
    forget_peak()
    before = peak_memory()
    step()
    return peak_memory() - before


def growth(kind: str, family: str, steps: int, folder: Path | None = None) -> float:
    return peak_growth("tests.benchmarks.memory", "--grow", kind, family, str(steps), str(folder))


def memory_rows(folder: Path | None) -> list[Row]:
    rows = []
    for family, (steps, bar, aim) in LONG.items():
        if folder is not None:
            used, peer = growth("ours", family, steps), growth("peer", family, steps, folder)
            rows.append(at_most(f"{family.upper()} memory of a step, {steps} steps", used, peer, bar, aim, "bytes"))
        slopes = [growth(kind, family, 2000) - growth(kind, family, 500) for kind in ("recompute", "ours")]
        rows.append(at_most(f"{family.upper()} growth with length, recomputed states", *slopes, 1 / 5, None, "bytes"))
    return rows


def measure(options: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)
    rows = [row for key in SPEED for row in speed_row(*key, options.peers)]
    return rows + memory_rows(options.peers)


if __name__ == "__main__":
    if "--grow" in sys.argv:
        torch.set_num_threads(1)
        kind, family, steps, folder = sys.argv[sys.argv.index("--grow") + 1 :]
        print(grow(kind, family, int(steps), folder))
    else:
        run(__doc__ or "", measure, ("--peers", {"type": Path, "default": None, "help": "folder of the peers' clones"}))
