"""The demo's race: several models, one Trainer each, trained in turns until each has had the same CPU time.

Every contender runs `LNLMTrainer.train` in a thread of its own, but only one thread runs at a time: a callback at the
end of each step hands the processor back once the turn is used up. So the race is the package's real Trainer, checkpoints
and all, and yet one table can show all contenders moving together. CPU time is the thread's own (`time.thread_time`),
evaluation and saving excluded.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

STATE_FILE = "race.json"
WARM_UP = 0.04
"""Share of the CPU time over which the learning rate rises; then it falls as a cosine to a tenth."""


@dataclass
class Progress:
    """What a contender has done so far.

    Attributes:
        seconds: CPU seconds of training.
        steps: optimiser steps.
        curve: (CPU seconds, bits per byte on the validation text) at each measurement.
    """

    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it into a contender's folder, whole or not at all."""
        draft = folder / f".{STATE_FILE}"
        draft.write_text(json.dumps({"seconds": self.seconds, "steps": self.steps, "curve": self.curve}))
        os.replace(draft, folder / STATE_FILE)

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Read what `save` wrote; a fresh start if there is nothing."""
        path = folder / STATE_FILE
        if not path.is_file():
            return cls()
        found = json.loads(path.read_text())
        return cls(found["seconds"], found["steps"], [tuple(point) for point in found["curve"]])


class Contender:
    """One model in the race.

    Args:
        label: its name in the table.
        model, tokenizer: what is trained, and what reads the text.
        data: training rows.
        learning_rate: highest learning rate.
        folder: where its checkpoints and the finished model go.
        budget: CPU seconds of training it gets.
        batch_size: rows a step.
    """

    def __init__(
        self,
        label: str,
        model: Any,
        tokenizer: Any,
        data: Any,
        learning_rate: float,
        folder: Path,
        budget: float,
        batch_size: int,
    ) -> None:
        self.label, self.model, self.tokenizer, self.data = label, model, tokenizer, data
        self.learning_rate, self.folder, self.budget = learning_rate, folder, budget
        self.batch_size = batch_size
        self.progress = Progress.load(folder)
        self.stopping = False
        self.error: BaseException | None = None
        self._go, self._handed_back = threading.Event(), threading.Event()
        self._turn = 0.0
        self._thread: threading.Thread | None = None

    @property
    def parameters(self) -> int:
        """Number of its parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def finished(self) -> bool:
        """Whether it has had its CPU time."""
        return self.progress.seconds >= self.budget

    def start(self, make_trainer: Callable[[Contender, TrainerCallback], Any], resume: bool) -> None:
        """Make its Trainer and let it run up to the first step, where it waits for its turn.

        Args:
            make_trainer: builds the Trainer, given the contender and the callback that takes turns.
            resume: whether to go on from its newest checkpoint.
        """
        trainer = make_trainer(self, _Turns(self))

        def run() -> None:
            try:
                trainer.train(resume_from_checkpoint=resume or None)
            except BaseException as error:
                self.error = error
            finally:
                self._handed_back.set()

        self._thread = threading.Thread(target=run, name=self.label, daemon=True)
        self._thread.start()
        self._wait()

    def run_turn(self, seconds: float) -> None:
        """Let it train for about `seconds` of CPU time."""
        self._turn = seconds
        self._handed_back.clear()
        self._go.set()
        self._wait()

    def stop(self) -> None:
        """Make it write a checkpoint at the end of its step and return from training."""
        self.stopping = True
        while self._thread is not None and self._thread.is_alive():
            self._handed_back.clear()
            self._go.set()
            self._thread.join(0.05)
        if self._thread is not None:
            self.progress.save(self.folder)

    def _wait(self) -> None:
        while not self._handed_back.wait(0.2):
            pass
        if self.error is not None:
            raise self.error

    def hand_back(self) -> None:
        """Called in its own thread: let the others run until the next turn."""
        self._go.clear()
        self._handed_back.set()
        self._go.wait()


class _Turns(TrainerCallback):
    """Counts a contender's CPU time, sets the learning rate by it, and takes turns."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._begun = 0.0
        self._used = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first turn; what came before, loading included, is not training time."""
        self.contender.hand_back()
        self._begun = time.thread_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Set the learning rate by the share of CPU time used."""
        done = min(1.0, self.contender.progress.seconds / self.contender.budget)
        share = min(1.0, done / WARM_UP + 0.02) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = self.contender.learning_rate * share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Count the step; hand the processor back at the end of the turn, stop at the end of the budget."""
        now = time.thread_time()
        progress, spent = self.contender.progress, now - self._begun
        progress.seconds += spent
        progress.steps = state.global_step
        self._used += spent
        if self._used >= self.contender._turn or self.contender.finished:
            self._used = 0.0
            if not self.contender.finished:
                self.contender.hand_back()
        if self.contender.stopping or self.contender.finished:
            control.should_save = control.should_training_stop = True
        self._begun = time.thread_time()
        return control


def return_memory() -> None:
    """Give memory that is free back to the system: the C library keeps a heap for each thread, and each contender is one.

    Nothing is done where the C library has no means for it.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def bits_per_byte(model: Any, blocks: list[dict[str, Any]], batch_size: int = 8) -> float:
    """Mean bits that a causal model spends on a byte of text.

    Args:
        model: a causal language model.
        blocks: rows with `input_ids` `(length,)` and `num_bytes`, the bytes of the tokens after the first.
        batch_size: rows a forward pass.
    """
    was_training = model.training
    model.eval()
    nats, seen = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        rows = blocks[start : start + batch_size]
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        targets = ids[:, 1:]
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        seen += sum(int(row["num_bytes"]) for row in rows)
    model.train(was_training)
    return nats / math.log(2) / seen


def quiet_trainer(model: Any, folder: str | Path, rows: int, rate: float, more: Mapping[str, Any], **parts: Any) -> Any:
    """The package's Trainer for as long as a callback lets it run, without a word: the table shows what it would print.

    Args:
        model: to train.
        folder: of its checkpoints.
        rows: of a batch.
        rate: of learning, constant unless a callback changes it.
        more: further TrainingArguments.
        parts: further arguments of the Trainer.
    """
    from transformers import PrinterCallback

    from ...trainer.arguments import LNLMTrainingArguments
    from ...trainer.trainer import LNLMTrainer

    arguments: Any = LNLMTrainingArguments(
        output_dir=str(folder), max_steps=1_000_000, per_device_train_batch_size=rows, learning_rate=rate,
        lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, remove_unused_columns=False, enable_jit_checkpoint=False, **more,
    )  # fmt: skip
    trainer = LNLMTrainer(model=model, args=arguments, **parts)
    trainer.remove_callback(PrinterCallback)
    return trainer
