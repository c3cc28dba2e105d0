"""The demo's first act: a Turing machine and a neural computer learn to copy, beside an LSTM.

All see sequences of up to 10 random bytes and are tested at 10, 20 and 40. Each is trained by the package's Trainer until
its CPU seconds are spent or it makes no mistake at any tested length. Nothing is read or downloaded: rows are drawn as
they are needed.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401, section 4.1
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ...data.algorithmic import Copy, Curriculum, Stream, pad_rows, wrong_bits
from ...nn.loss_heads import IGNORED
from .race import quiet_trainer
from .report import Claim

LONGEST, SIZES = 10, (10, 20, 40)
SECONDS = 10.0
"""CPU seconds of training of each contender, unless told otherwise; compiling is not counted."""
_ROWS, _POINTS = 16, 10  # rows measured at each length, measurements of a contender
HEADER = ["copy, trained on 1 to 10 bytes", "parameters", "CPU s", *(f"wrong bits at {size}" for size in SIZES)]


class LSTMTransducer(nn.Module):
    """What everybody would try first: `nn.LSTM` and a linear layer.

    Args:
        input_size, hidden_size, output_size: widths.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, inputs_embeds: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return `logits` `(batch, length, output_size)` and, given labels (-100 is ignored), `loss` in nats a bit."""
        logits = self.output(self.lstm(inputs_embeds)[0])
        if labels is None:
            return {"logits": logits}
        asked = labels != IGNORED
        loss = nn.functional.binary_cross_entropy_with_logits(logits[asked], labels[asked])
        return {"loss": loss, "logits": logits}


@dataclass
class CopyRow:
    """One contender.

    Attributes:
        label: its name.
        model: being trained.
        batch_size, learning_rate: of its recipe.
        first: longest sequences at first; they grow as it gets them right.
        seconds: CPU seconds of training so far.
        sequences: seen so far.
        wrong: length → wrong bits of a sequence, on the average.
    """

    label: str
    model: Any
    batch_size: int = 16
    learning_rate: float = 1e-3
    first: int = LONGEST
    seconds: float = 0.0
    sequences: int = 0
    wrong: dict[int, float] = field(default_factory=dict)

    @property
    def model_type(self) -> str | None:
        """Of its family; None for the LSTM, which is of none."""
        return getattr(getattr(self.model, "config", None), "model_type", None)

    @property
    def parameters(self) -> int:
        """How many it has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def measure(self) -> None:
        """Count wrong bits at each tested length, on rows that are always the same."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for size in SIZES:
                generator = torch.Generator().manual_seed(size)
                batch = pad_rows([Copy().row(generator, size) for _ in range(_ROWS)])
                logits = self.model(inputs_embeds=batch["inputs_embeds"])["logits"]
                self.wrong[size] = float(wrong_bits(logits, batch["labels"]).float().mean())
        self.model.train(training)


class _Watch(TrainerCallback):
    """Counts its thread's CPU seconds without measuring's, shows progress, and ends training when it is time."""

    def __init__(self, row: CopyRow, seconds: float, show: Callable[[], None]) -> None:
        self.row, self.seconds, self.show, self.shown = row, seconds, show, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = self.row
        row.seconds += time.thread_time() - self.begin
        row.sequences += row.batch_size
        if row.seconds >= self.seconds * (self.shown + 1) / _POINTS:
            self.shown += 1
            row.measure()
            self.show()
        if row.seconds >= self.seconds or sum(row.wrong.values()) == 0:
            control.should_training_stop = True


def copy_rows(seed: int = 0) -> list[CopyRow]:
    """Return the contenders, untrained: the papers' bare networks, and an LSTM of the controllers' size.

    Args:
        seed: of their weights.
    """
    import hf_lnlm

    task = Copy()
    widths: dict[str, Any] = {
        "input_size": task.input_size, "output_size": task.output_size, "hidden_size": task.output_size,
        "controller_size": 100, "residual": False, "use_cache": False,
    }  # fmt: skip
    widths["controller_type"] = "feedforward"  # nothing but the memory can remember
    tape = {"initial_weighting": "peaked", "initial_addressing": "tape"}
    torch.manual_seed(seed)
    turing = hf_lnlm.NTMForSequenceTransduction(hf_lnlm.NTMConfig(**widths, **tape))
    torch.manual_seed(seed)
    neural = hf_lnlm.DNCForSequenceTransduction(hf_lnlm.DNCConfig(**widths, memory_size=48))
    torch.manual_seed(seed)
    recurrent = LSTMTransducer(task.input_size, 100, task.output_size)
    return [
        CopyRow("Neural Turing Machine", turing, batch_size=4, first=3),
        CopyRow("Differentiable Neural Computer", neural, learning_rate=3e-3, first=3),
        CopyRow("LSTM", recurrent, learning_rate=3e-3),
    ]


def memories() -> tuple[str, ...]:
    """Model types of the contenders that compile, in the order in which they are trained."""
    import hf_lnlm

    return hf_lnlm.NTMConfig.model_type, hf_lnlm.DNCConfig.model_type


def copy_race(
    seconds: float = SECONDS,
    seed: int = 0,
    show: Callable[[Sequence[CopyRow]], None] | None = None,
    wait: Callable[[str], None] | None = None,
) -> list[CopyRow]:
    """Train the contenders one after the other; on one thread, if that is to be fair. The LSTM, which compiles nothing,
    comes first.

    Args:
        seconds: CPU seconds of training of each.
        seed: of weights and rows.
        show: called with all rows before training and after every measurement.
        wait: called with the model type before a memory runs, and returns when its loops are compiled.
    """
    rows = copy_rows(seed)
    shown: Callable[[], None] = (lambda: None) if show is None else (lambda: show(rows))
    for row in (rows[-1], *rows[:-1]):
        if wait is not None and row.model_type:
            wait(row.model_type)
        row.measure()
        shown()
        _warm_up(row)
        _train(row, seconds, seed, shown)
        row.measure()
        shown()
    return rows


def _warm_up(row: CopyRow) -> None:
    """Compile what a training step needs, outside its seconds."""
    batch = pad_rows([Copy().row(torch.Generator().manual_seed(0), 2)])
    row.model(**batch)["loss"].backward()
    row.model.zero_grad()


def _train(row: CopyRow, seconds: float, seed: int, show: Callable[[], None]) -> None:
    from ...trainer.curriculum import CurriculumCallback

    stream = Stream(Copy(longest=LONGEST), row.batch_size, seed, row.first)
    callbacks = [_Watch(row, seconds, show), CurriculumCallback(Curriculum(stream))]
    more = {"adam_beta2": 0.99, "max_grad_norm": 10.0, "weight_decay": 0.0, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        quiet_trainer(
            row.model, folder, row.batch_size, row.learning_rate, more, train_dataset=stream, data_collator=pad_rows,
            callbacks=callbacks,
        ).train()  # fmt: skip


def copy_table(rows: Sequence[CopyRow]) -> list[list[str]]:
    """Rows of the table, in the order of `HEADER`.

    Args:
        rows: the contenders.
    """
    return [
        [row.label, f"{row.parameters:,}", f"{row.seconds:.1f}",
         *(f"{row.wrong[size]:.1f} of {8 * size}" if size in row.wrong else "" for size in SIZES)]
        for row in rows
    ]  # fmt: skip


def copy_claims(rows: Sequence[CopyRow]) -> list[Claim]:
    """What must hold after the race: the Turing machine goes beyond its training, the neural computer learns.

    Args:
        rows: the contenders, trained.
    """
    turing, neural, recurrent = rows
    twice = f"{turing.wrong[20]:.1f} wrong bits of 160 at twice the length, the LSTM {recurrent.wrong[20]:.1f}"
    return [
        Claim(f"the {turing.label} copies beyond its training: {twice}", turing.wrong[20] < recurrent.wrong[20] / 4),
        Claim(
            f"the {neural.label} learns to copy: {neural.wrong[10]:.1f} wrong bits of 80 at length 10 (chance: 40)",
            neural.wrong[10] < 4,
        ),
    ]


def draw_copy(row: CopyRow, path: Path, size: int = 20) -> bool:
    """Draw where a contender writes and reads while it copies.

    Args:
        row: a memory, trained.
        path: image file.
        size: bytes to copy.

    Returns:
        Whether matplotlib (extra `plot`) was there to do it.
    """
    from ..plot import addressing_panels, draw, task_panels

    batch = pad_rows([Copy().row(torch.Generator().manual_seed(1), size)])
    with torch.no_grad():
        outputs = row.model.eval()(inputs_embeds=batch["inputs_embeds"], output_addressing=True)
    try:
        draw(
            task_panels(batch, outputs.logits) + addressing_panels(outputs), path, f"{row.label}: copying {size} bytes"
        )
    except ImportError:
        return False
    return True
