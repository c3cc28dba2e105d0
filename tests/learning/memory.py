"""The memory papers' tasks, learnt through Trainer: `python -m tests.learning.memory [--only NAME] [--data FOLDER] --json`.

Every run has a fixed seed and reports CPU seconds of training itself (process time between Trainer's begin and end).
FOLDER holds the bAbI tasks, `qa01_*/train.jsonl.gz` and so on; without it they are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hf_lnlm.data.algorithmic import (
    IGNORED,
    Copy,
    Curriculum,
    DynamicNGrams,
    Stream,
    Task,
    algorithmic_task,
    pad_rows,
    wrong_bits,
)
from hf_lnlm.data.babi import babi_vocabulary, pad_questions, read_babi
from hf_lnlm.models.memory.configuration_dnc import DNCConfig
from hf_lnlm.models.memory.configuration_ntm import NTMConfig
from hf_lnlm.models.memory.modeling_dnc import DNCForSequenceClassification, DNCForSequenceTransduction
from hf_lnlm.models.memory.modeling_ntm import NTMForSequenceTransduction
from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.trainer import LNLMTrainer

SEEDS = (1, 2, 3, 4, 5)


class LSTMTransducer(nn.Module):
    """The baseline: nn.LSTM of the controller's size and a linear layer."""

    def __init__(self, task: Task, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(task.input_size, size, batch_first=True)
        self.output = nn.Linear(size, task.output_size)

    def forward(self, inputs_embeds: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.output(self.lstm(inputs_embeds)[0])
        found = {"logits": logits}
        if labels is not None:
            asked = labels != IGNORED
            found = {"loss": nn.functional.binary_cross_entropy_with_logits(logits[asked], labels[asked]), **found}
        return found


class TaskTrainer(LNLMTrainer):
    """Trainer that tells a curriculum how well it goes."""

    curriculum: Curriculum | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.curriculum is not None:
            self.curriculum.observe(outputs["logits"].detach(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Stop(TrainerCallback):
    """Ends training when the curriculum is through and hardly a bit is wrong, or when time is up; measures."""

    def __init__(self, curriculum: Curriculum | None, seconds: float, target: float, least: int) -> None:
        self.curriculum, self.seconds, self.target, self.least = curriculum, seconds, target, least
        self.spent = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent = time.process_time() - self.begin
        known = self.curriculum is not None and self.curriculum.finished and self.curriculum.average is not None
        good = known and self.curriculum.average < self.target and state.global_step >= self.least
        control.should_training_stop = bool(good or self.spent > self.seconds)


def arguments(folder: str, steps: int, batch: int, rate: float, seed: int) -> LNLMTrainingArguments:
    return LNLMTrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        max_grad_norm=10.0,
        weight_decay=0.0,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def train(
    model: nn.Module,
    task: Task,
    seed: int,
    *,
    batch: int,
    rate: float,
    sequences: int,
    first: int | None,
    seconds: float,
    target: float = 5e-4,
) -> dict[str, Any]:
    """Train on a stream; `first` is the curriculum's first longest size, or None for all sizes from the start."""
    stream = Stream(task, batch, seed, first)
    curriculum = Curriculum(stream)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, sequences // batch, batch, rate, seed)
        trainer = TaskTrainer(model=model, args=args, train_dataset=stream, data_collator=pad_rows)
        trainer.curriculum = curriculum
        stop = Stop(curriculum, seconds, target, 200)
        trainer.add_callback(stop)
        trainer.train()
    steps = trainer.state.global_step
    return {
        "sequences": steps * batch,
        "cpu_seconds": round(stop.spent, 1),
        "ms_a_step": round(1e3 * stop.spent / steps, 2),
    }


@torch.no_grad()
def errors(model: nn.Module, task: Task, sizes: tuple[int, ...], count: int = 32) -> dict[str, float]:
    """Mean wrong bits a sequence at each size."""
    model.eval()
    found = {}
    for size in sizes:
        generator = torch.Generator().manual_seed(10_000 + size)
        batch = pad_rows([task.row(generator, size) for _ in range(count)])
        logits = model(inputs_embeds=batch["inputs_embeds"])["logits"]
        found[str(size)] = round(float(wrong_bits(logits, batch["labels"]).float().mean()), 3)
    model.train()
    return found


def ntm(task: Task, **fields: Any) -> NTMForSequenceTransduction:
    sizes = {"input_size": task.input_size, "output_size": task.output_size, "hidden_size": task.output_size}
    config = NTMConfig(**sizes, residual=False, controller_size=100, use_cache=False, **fields)
    return NTMForSequenceTransduction(config)


def dnc(task: Task, **fields: Any) -> DNCForSequenceTransduction:
    sizes = {"input_size": task.input_size, "output_size": task.output_size, "hidden_size": task.output_size}
    config = DNCConfig(**sizes, residual=False, controller_size=100, use_cache=False, **fields)
    return DNCForSequenceTransduction(config)


def ntm_copy(seed: int, more: int = 0) -> dict[str, Any]:
    """NTM copy, lengths up to 20, batches of 4 with a curriculum from length 3; then `more` sequences."""
    task = Copy()
    torch.manual_seed(seed)
    model = ntm(task)
    found = {
        "task": "ntm copy",
        "seed": seed,
        **train(model, task, seed, batch=4, rate=1e-3, sequences=40_000, first=3, seconds=120),
    }
    found["wrong_bits"] = errors(model, task, (10, 20, 30, 50, 100, 120))
    if more:
        found["more"] = train(
            model, task, seed + 100, batch=4, rate=3e-4, sequences=more, first=None, seconds=900, target=-1
        )
        found["wrong_bits_after_more"] = errors(model, task, (20, 30, 50, 100, 120))
    return found


def lstm_copy(seed: int) -> dict[str, Any]:
    """The controller alone on the NTM's task."""
    task = Copy()
    torch.manual_seed(seed)
    model = LSTMTransducer(task, 100)
    found = train(model, task, seed, batch=4, rate=1e-3, sequences=40_000, first=3, seconds=60)
    return {"task": "lstm copy", "seed": seed, **found, "wrong_bits": errors(model, task, (10, 20, 30))}


def dnc_copy(seed: int) -> dict[str, Any]:
    """DNC copy, lengths up to 10, 32 slots of width 20."""
    task = Copy(longest=10)
    torch.manual_seed(seed)
    model = dnc(task, memory_size=32)
    found = train(model, task, seed, batch=16, rate=1e-3, sequences=30_000, first=10, seconds=120, target=2e-4)
    return {"task": "dnc copy", "seed": seed, **found, "wrong_bits": errors(model, task, (5, 10, 20))}


def compare(name: str, seconds: float, build: Any, **recipe: Any) -> list[dict[str, Any]]:
    """A memory and an LSTM on one task for the same CPU time."""
    task, found = algorithmic_task(name), []
    for kind, make in (("memory", build), ("lstm", lambda t: LSTMTransducer(t, 100))):
        torch.manual_seed(1)
        model = make(task)
        spent = train(model, task, 1, sequences=10**7, seconds=seconds, **recipe)
        result = {"task": f"{name} {kind}", "seed": 1, **spent}
        if isinstance(task, DynamicNGrams):
            result["bits_above_optimum"] = ngram_excess(model, task)
        else:
            result["wrong_bits"] = errors(model, task, (task.shortest + 1, task.longest, 2 * task.longest))
        found.append(result)
    return found


@torch.no_grad()
def ngram_excess(model: nn.Module, task: DynamicNGrams, count: int = 200) -> float:
    """Cross-entropy above the Bayes-optimal predictor, in bits a symbol."""
    generator = torch.Generator().manual_seed(99)
    rows = [task.row(generator, task.longest) for _ in range(count)]
    labels = torch.stack([row["labels"][:, 0] for row in rows]).double()
    best = torch.stack([task.optimal_probabilities(row["inputs_embeds"][:, 0]) for row in rows])
    found = (
        model(inputs_embeds=torch.stack([row["inputs_embeds"] for row in rows]))["logits"][..., 0].double().sigmoid()
    )

    def bits(probability: torch.Tensor) -> float:
        return float(
            nn.functional.binary_cross_entropy(probability.clamp(1e-9, 1 - 1e-9), labels) / torch.log(torch.tensor(2.0))
        )

    return round(bits(found) - bits(best), 4)


def babi(folder: Path, task: int, seconds: float) -> dict[str, Any]:
    """DNC with masks and de-allocation, without links, on one bAbI task; test error in percent."""
    (home,) = folder.glob(f"qa{task:02d}_*")
    lines, test = read_babi(home / "train.jsonl.gz"), read_babi(home / "test.jsonl.gz")
    vocabulary = babi_vocabulary(lines)
    torch.manual_seed(1)
    config = DNCConfig(
        vocab_size=vocabulary.size,
        hidden_size=64,
        num_labels=len(vocabulary.answers),
        residual=False,
        controller_size=64,
        memory_size=32,
        memory_width=24,
        num_read_heads=2,
        use_temporal_links=False,
        use_masking=True,
        mask_min=0.1,
        use_deallocation=True,
        use_cache=False,
        pad_token_id=0,
    )
    model = DNCForSequenceClassification(config)
    rows = [vocabulary.encode(line) for line in lines]
    with tempfile.TemporaryDirectory() as work:
        args = arguments(work, 10**6, 32, 2e-3, 1)
        trainer = LNLMTrainer(model=model, args=args, train_dataset=rows, data_collator=pad_questions)
        stop = Stop(None, seconds, 0.0, 0)
        trainer.add_callback(stop)
        trainer.train()
    found = {"task": f"dnc babi {task}", "seed": 1, "cpu_seconds": round(stop.spent, 1)}
    found["epochs"] = round(trainer.state.global_step * 32 / len(rows), 1)
    found["test_error_percent"] = babi_error(model, [vocabulary.encode(line) for line in test])
    return found


@torch.no_grad()
def babi_error(model: nn.Module, rows: list[dict[str, Any]]) -> float:
    """Wrong answers in percent."""
    model.eval()
    wrong = 0
    for start in range(0, len(rows), 100):
        batch = pad_questions(rows[start : start + 100])
        labels = batch.pop("labels")
        wrong += int((model(**batch).logits.argmax(-1) != labels).sum())
    return round(100 * wrong / len(rows), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help="part of a run's name")
    parser.add_argument("--data", type=Path, help="folder of the bAbI tasks")
    parser.add_argument("--more", type=int, default=0, help="sequences to train on after NTM copy has converged")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Any] = {f"ntm_copy_{seed}": lambda seed=seed: ntm_copy(seed, options.more) for seed in SEEDS}
    runs |= {f"dnc_copy_{seed}": lambda seed=seed: dnc_copy(seed) for seed in SEEDS}
    runs["lstm_copy_1"] = lambda: lstm_copy(1)
    few = {"batch": 8, "rate": 1e-3}
    runs["associative_recall"] = lambda: compare(
        "associative_recall", 300, lambda t: dnc(t, memory_size=32), first=3, **few
    )
    runs["repeat_copy"] = lambda: compare("repeat_copy", 300, ntm, first=2, **few)
    runs["ngrams"] = lambda: compare("dynamic_ngrams", 300, ntm, first=200, **few)
    if options.data:
        runs |= {f"babi_{task}": lambda task=task: babi(options.data, task, 600) for task in (1, 4, 6, 15)}
    found: list[Any] = []
    for name, run in runs.items():
        if options.only is None or options.only in name:
            result = run()
            found += result if isinstance(result, list) else [result]
            if not options.json:
                print(found[-1], flush=True)
    if options.json:
        print(json.dumps({"date": datetime.date.today().isoformat(), "runs": found}, indent=1))


if __name__ == "__main__":
    main()
