"""The memory papers' tasks, learnt through Trainer: `python -m tests.learning.memory [--only NAME] [--data FOLDER] --json`.

* Copy (arXiv 1410.5401, section 4.1): the Turing machine at lengths up to 20, growing from 3 or all at once; the neural
  computer up to 10; an LSTM with as many units as the controllers; `ntm copy, long` goes on to 200,000 sequences.
* Associative recall, repeat copy and dynamic 6-grams (sections 4.2 to 4.4): curves against an LSTM in equal CPU time.
* bAbI tasks (arXiv 1502.05698), one at a time: FOLDER holds `qa01_*/train.jsonl.gz` and so on; left out without it.

Every run has a fixed seed. CPU seconds are process time of training on one thread, from Trainer's first step to its last,
measurements left out. `--into FILE` adds each finished run to a report, `--keep FOLDER` saves the trained models.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from hf_lnlm import (
    DNCConfig,
    DNCForSequenceClassification,
    DNCForSequenceTransduction,
    NTMConfig,
    NTMForSequenceTransduction,
)
from hf_lnlm.data.algorithmic import (
    IGNORED,
    AssociativeRecall,
    Copy,
    Curriculum,
    DynamicNGrams,
    RepeatCopy,
    Stream,
    Task,
    pad_rows,
    wrong_bits,
)
from hf_lnlm.data.labelled import load_rows
from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.curriculum import CurriculumCallback
from hf_lnlm.trainer.trainer import LNLMTrainer

from .babi_questions import babi_vocabulary, pad_questions

SEEDS = (1, 2, 3, 4, 5)
COMMAND = "python -m tests.learning.memory --data FOLDER --json"
Measure = Callable[[Any], Any]


class LSTMTransducer(nn.Module):
    """The baseline: nn.LSTM of the controller's size and a linear layer."""

    def __init__(self, task: Task, size: int = 100) -> None:
        super().__init__()
        self.lstm = nn.LSTM(task.input_size, size, batch_first=True)
        self.output = nn.Linear(size, task.output_size)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Rows are padded on the right, which an LSTM in one direction doesn't see: the mask isn't needed."""
        logits = self.output(self.lstm(inputs_embeds)[0])
        found = {"logits": logits}
        if labels is not None:
            asked = labels != IGNORED
            found = {"loss": nn.functional.binary_cross_entropy_with_logits(logits[asked], labels[asked]), **found}
        return found


class Watch(TrainerCallback):
    """Counts CPU seconds, notes a curve of up to `points` measurements, and ends training when time is up or when a
    measurement is at most `enough`."""

    def __init__(
        self, seconds: float, measure: Measure | None = None, points: int = 10, enough: float | None = None
    ) -> None:
        self.seconds, self.measure, self.points, self.enough = seconds, measure, points, enough
        self.spent, self.curve = 0.0, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = time.process_time()
        self.spent += now - self.begin
        if self.spent > self.seconds:
            control.should_training_stop = True
        if self.measure is not None and self.spent > self.seconds * (len(self.curve) + 1) / self.points:
            self.curve.append([state.global_step, round(self.spent, 1), self.measure(model)])
            if self.enough is not None and self.curve[-1][-1] <= self.enough:
                control.should_training_stop = True
        self.begin = time.process_time()


@dataclass(frozen=True)
class Recipe:
    """How a task is trained.

    Attributes:
        batch: sequences a step, all of one size.
        sequences: most sequences.
        first: longest size at first; the curriculum raises it. None: all sizes from the start.
        seconds: most CPU seconds.
        decay: share of the steps over which the learning rate falls to a tenth at the end.
        threshold: share of wrong bits below which the curriculum goes on.
    """

    batch: int = 4
    rate: float = 1e-3
    sequences: int = 40_000
    first: int | None = 3
    seconds: float = 60.0
    decay: float = 0.2
    threshold: float = 0.1

    def arguments(self, folder: str, seed: int) -> LNLMTrainingArguments:
        steps = self.sequences // self.batch
        schedule = {"num_decay_steps": int(self.decay * steps), "min_lr_ratio": 0.1, "num_stable_steps": None}
        return LNLMTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=self.batch, learning_rate=self.rate,
            lr_scheduler_type="warmup_stable_decay" if self.decay else "constant",
            lr_scheduler_kwargs=schedule if self.decay else {}, adam_beta2=0.99, max_grad_norm=10.0, weight_decay=0.0,
            seed=seed, save_strategy="no", logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip


def train(model: Any, task: Task, seed: int, recipe: Recipe, measure: Measure | None = None) -> dict[str, Any]:
    """Train on a stream of the task; returns what it cost and the curve."""
    stream = Stream(task, recipe.batch, seed, recipe.first)
    watch, grow = Watch(recipe.seconds, measure), CurriculumCallback(Curriculum(stream, recipe.threshold))
    with tempfile.TemporaryDirectory() as folder:
        trainer = LNLMTrainer(
            model=model, args=recipe.arguments(folder, seed), train_dataset=stream, data_collator=pad_rows,
            callbacks=[watch, grow],
        )  # fmt: skip
        trainer.train()
    steps = trainer.state.global_step
    found = {"sequences": steps * recipe.batch, "cpu_seconds": round(watch.spent, 1),
             "ms_a_step": round(1e3 * watch.spent / steps, 2), "longest": stream.longest}  # fmt: skip
    return found | ({"curve": watch.curve} if measure is not None else {})


@torch.no_grad()
def errors(model: Any, task: Task, sizes: tuple[int, ...], count: int = 64) -> dict[str, float]:
    """Mean wrong bits a sequence at each size, of fixed rows that training never sees."""
    training, found = model.training, {}
    model.eval()
    for size in sizes:
        generator = torch.Generator().manual_seed(10_000 + size)
        rows = [exactly(task, generator, size) for _ in range(count)]
        batch = pad_rows(rows)
        logits = model(inputs_embeds=batch["inputs_embeds"])["logits"]
        found[str(size)] = round(float(wrong_bits(logits, batch["labels"]).float().mean()), 3)
    model.train(training)
    return found


def exactly(task: Task, generator: torch.Generator, size: int) -> Any:
    """A row of that size; of repeat copy, that length and that many repeats."""
    return task.exact_row(generator, size, size) if isinstance(task, RepeatCopy) else task.row(generator, size)


def ntm(task: Task, seed: int, **fields: Any) -> NTMForSequenceTransduction:
    """The paper's bare machine, whose memory begins as a tape."""
    torch.manual_seed(seed)
    sizes = {"input_size": task.input_size, "output_size": task.output_size, "hidden_size": task.output_size}
    fields = {"initial_weighting": "peaked", "initial_addressing": "tape"} | fields
    return NTMForSequenceTransduction(
        NTMConfig(**sizes, residual=False, **({"controller_size": 100} | fields), use_cache=False)
    )


def dnc(task: Task, seed: int, **fields: Any) -> DNCForSequenceTransduction:
    """The paper's bare computer."""
    torch.manual_seed(seed)
    sizes = {"input_size": task.input_size, "output_size": task.output_size, "hidden_size": task.output_size}
    return DNCForSequenceTransduction(
        DNCConfig(**sizes, residual=False, **({"controller_size": 100} | fields), use_cache=False)
    )


def lstm(task: Task, seed: int) -> LSTMTransducer:
    """The controller alone."""
    torch.manual_seed(seed)
    return LSTMTransducer(task)


NTM_COPY, DNC_COPY = Recipe(sequences=32_000, decay=0.3), Recipe(batch=16, rate=3e-3, sequences=24_000)
AT_ONCE = Recipe(sequences=30_000, first=None)
LONG = Recipe(batch=16, sequences=168_000, first=None, rate=5e-4, seconds=600.0, decay=0.5)
CURVE = Recipe(batch=8, sequences=10**6, first=2, seconds=300.0, decay=0.0)


def ntm_copy(seed: int, keep: Path | None) -> dict[str, Any]:
    """Copy at lengths up to 20, growing from 3, with the paper's feed-forward controller."""
    model = ntm(Copy(), seed, controller_type="feedforward")
    found = train(model, Copy(), seed, NTM_COPY)
    saved(model, keep, f"ntm_copy_{seed}")
    return judged(model, found)


def ntm_copy_at_once(controller: str, seed: int, keep: Path | None) -> dict[str, Any]:
    """All lengths from the start."""
    model = ntm(Copy(), seed, controller_type=controller)
    return judged(model, train(model, Copy(), seed, AT_ONCE))


def judged(model: Any, found: dict[str, Any]) -> dict[str, Any]:
    """With wrong bits at several lengths, and whether the bars are kept."""
    wrong = errors(model, Copy(), (10, 20, 30, 50, 100, 120))
    passed = wrong["20"] <= 0.5 and wrong["30"] <= 1.0 and found["cpu_seconds"] <= 60
    return found | {"wrong_bits": wrong, "passed": passed}


def ntm_copy_long(seed: int, keep: Path | None) -> dict[str, Any]:
    """The same network, trained on to 200,000 sequences in all."""
    folder = None if keep is None else keep / f"ntm_copy_{seed}"
    if folder is None or not folder.exists():
        with tempfile.TemporaryDirectory() as place:
            ntm_copy(seed, Path(place))
            model = NTMForSequenceTransduction.from_pretrained(Path(place) / f"ntm_copy_{seed}")
    else:
        model = NTMForSequenceTransduction.from_pretrained(folder)
    found = train(model.train(), Copy(), 100 + seed, LONG)
    saved(model, keep, f"ntm_copy_long_{seed}")
    found["sequences"] += NTM_COPY.sequences
    return found | {"wrong_bits": errors(model, Copy(), (20, 30, 50, 100, 120))}


def trainer_cost(seed: int, keep: Path | None) -> dict[str, Any]:
    """Milliseconds a step of copy at length 20 by Trainer, and by the barest loop over the same batches."""
    recipe, task = Recipe(sequences=2000, first=None, decay=0.0), Copy(shortest=20)
    found = {"trainer": 0.0, "bare loop": 0.0}
    for _ in range(2):  # the first time warms up
        model = ntm(task, seed, controller_type="feedforward")
        found["trainer"] = train(model, task, seed, recipe)["ms_a_step"]
        model, rows, steps = ntm(task, seed, controller_type="feedforward"), iter(Stream(task, 4, seed)), 500
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        begin = time.process_time()
        for _ in range(steps):
            loss = model(**pad_rows([next(rows) for _ in range(4)])).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        found["bare loop"] = round(1e3 * (time.process_time() - begin) / steps, 2)
    return {"ms_a_step": found}


def lstm_copy(seed: int, keep: Path | None) -> dict[str, Any]:
    """An LSTM on the Turing machine's task, by its recipe but with 40,000 sequences."""
    model = lstm(Copy(), seed)
    found = train(model, Copy(), seed, Recipe())
    found["wrong_bits"] = errors(model, Copy(), (10, 20, 30))
    return found | {"passed": found["wrong_bits"]["20"] >= 10}


def dnc_copy(seed: int, keep: Path | None) -> dict[str, Any]:
    """Copy at lengths up to 10, growing from 3, with 32 slots of width 20 and a feed-forward controller."""
    task, model = Copy(longest=10), dnc(Copy(), seed, memory_size=32, controller_type="feedforward")
    found = train(model, task, seed, DNC_COPY)
    found["wrong_bits"] = wrong = errors(model, task, (5, 10, 15, 20))
    saved(model, keep, f"dnc_copy_{seed}")
    return found | {"passed": wrong["10"] <= 0.1 and wrong["5"] <= 0.1}


def saved(model: Any, keep: Path | None, name: str) -> None:
    """Save a trained model if a folder is given."""
    if keep is not None:
        model.save_pretrained(keep / name)


def curve(make: Callable[[Task, int], Any], task: Task, recipe: Recipe, seed: int, keep: Path | None) -> dict[str, Any]:
    """How wrong bits (or bits above the optimum) fall with time; the last point is at the end."""
    sizes = tuple(dict.fromkeys((task.shortest, task.longest // 2 + 1, task.longest, 2 * task.longest)))
    if isinstance(task, DynamicNGrams):
        measure = partial(ngram_excess, task=task)
    else:
        measure = partial(errors, task=task, sizes=sizes)
    model = make(task, seed)
    found = train(model, task, seed, recipe, measure)
    if hasattr(model, "save_pretrained"):
        saved(model, keep, f"{model.config.model_type}_{task.name}_{seed}")
    return found | {"end": measure(model)}


@torch.no_grad()
def ngram_excess(model: Any, task: DynamicNGrams, count: int = 200) -> float:
    """Cross-entropy above the Bayes-optimal predictor's, in bits a symbol."""
    training, generator = model.training, torch.Generator().manual_seed(99)
    rows = [task.row(generator, task.longest) for _ in range(count)]
    inputs, labels = (torch.stack([row[name] for row in rows]) for name in ("inputs_embeds", "labels"))
    best = torch.stack([task.optimal_probabilities(row["inputs_embeds"][:, 0]) for row in rows])
    found = model.eval()(inputs_embeds=inputs)["logits"][..., 0].double().sigmoid()
    model.train(training)
    entropy = nn.functional.binary_cross_entropy
    nats = [entropy(p.clamp(1e-9, 1 - 1e-9), labels[..., 0].double()) for p in (found, best)]
    return round(float((nats[0] - nats[1]) / torch.log(torch.tensor(2.0))), 4)


def babi(number: int, data: Path, seconds: float, seed: int, keep: Path | None) -> dict[str, Any]:
    """One bAbI task by a neural computer with masks and de-allocation, without links; errors in percent.

    A tenth of the training questions is held out: training ends early when none of it is wrong.
    """
    (home,) = data.glob(f"qa{number:02d}_*")
    lines, asked = (
        load_rows(str(home / f"{part}.jsonl.gz"), ["context", "question", "answer"], task="babi").train
        for part in ("train", "test")
    )
    vocabulary = babi_vocabulary(lines)
    cut = 9 * len(lines) // 10
    rows, held, test = ([vocabulary.encode(line) for line in read] for read in (lines[:cut], lines[cut:], asked))
    torch.manual_seed(seed)
    model = DNCForSequenceClassification(
        DNCConfig(
            vocab_size=vocabulary.size, num_labels=len(vocabulary.answers), pad_token_id=0, hidden_size=64,
            controller_size=64, memory_size=32, memory_width=24, num_read_heads=2, residual=False, use_cache=False,
            use_temporal_links=False, use_masking=True, mask_min=0.1, use_deallocation=True,
        )
    )  # fmt: skip
    recipe = Recipe(batch=32, rate=2e-3, sequences=10**7, seconds=seconds, decay=0.0)
    watch = Watch(seconds, partial(answer_errors, rows=held), points=30, enough=0.0)
    with tempfile.TemporaryDirectory() as work:
        trainer = LNLMTrainer(model=model, args=recipe.arguments(work, seed), train_dataset=rows,
                              data_collator=pad_questions, callbacks=[watch])  # fmt: skip
        trainer.train()
    saved(model, keep, f"dnc_babi_{number}_{seed}")
    return {"cpu_seconds": round(watch.spent, 1), "epochs": round(float(trainer.state.epoch or 0), 1),
            "curve": watch.curve, "test_error_percent": answer_errors(model, test)}  # fmt: skip


@torch.no_grad()
def answer_errors(model: Any, rows: list[dict[str, Any]]) -> float:
    """Wrong answers in percent."""
    training, wrong = model.training, 0
    model.eval()
    for start in range(0, len(rows), 100):
        batch = pad_questions(rows[start : start + 100])
        labels = batch.pop("labels")
        wrong += int((model(**batch).logits.argmax(-1) != labels).sum())
    model.train(training)
    return round(100 * wrong / len(rows), 2)


def runs(data: Path | None) -> dict[str, tuple[tuple[int, ...], Callable[[int, Path | None], dict[str, Any]]]]:
    """Name → its seeds and what runs one of them."""
    few, ngrams, short = (1,), replace(CURVE, first=None), replace(CURVE, seconds=100.0)
    found: dict[str, Any] = {
        "ntm copy": (SEEDS, ntm_copy),
        "ntm copy, no curriculum": (tuple(range(1, 11)), partial(ntm_copy_at_once, "feedforward")),
        "ntm copy, lstm controller, no curriculum": (SEEDS, partial(ntm_copy_at_once, "lstm")),
        "dnc copy": (SEEDS, dnc_copy),
        "lstm copy": (few, lstm_copy),
        "what trainer costs": (few, trainer_cost),
        "ntm copy, long": (SEEDS, ntm_copy_long),
        "associative recall, dnc": (few, partial(curve, partial(dnc, memory_size=32), AssociativeRecall(), short)),
        "associative recall, lstm": (few, partial(curve, lstm, AssociativeRecall(), short)),
        "repeat copy, ntm": (few, partial(curve, ntm, RepeatCopy(), short)),
        "repeat copy, lstm": (few, partial(curve, lstm, RepeatCopy(), short)),
        "6-grams, ntm": (few, partial(curve, ntm, DynamicNGrams(), ngrams)),
        "6-grams, lstm": (few, partial(curve, lstm, DynamicNGrams(), ngrams)),
    }
    if data is not None:
        found |= {f"babi {number}": (few, partial(babi, number, data, 900.0)) for number in (1, 4, 6, 15)}
    return found


def read_report(path: Path | None) -> dict[str, Any]:
    """The report so far: other runs stay in it."""
    report = json.loads(path.read_text()) if path is not None and path.exists() else {"rows": {}}
    stamp = {"date": time.strftime("%Y-%m-%d"), "command": COMMAND}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**stamp, **versions, "python": platform.python_version(), "rows": report["rows"]}


def main() -> None:
    """Run the proofs asked for and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run the proof of this name only")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of each proof's own")
    parser.add_argument("--data", type=Path, help="folder of the bAbI tasks")
    parser.add_argument("--into", type=Path, help="file that every finished run is added to")
    parser.add_argument("--keep", type=Path, help="folder that trained models are saved in")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = read_report(given.into)
    known = runs(given.data)
    if given.only is not None and given.only not in known:
        parser.error(f"--only must be one of {', '.join(known)}, got {given.only}")
    for name, (seeds, run) in known.items():
        if given.only not in (None, name):
            continue
        for seed in given.seeds or seeds:
            result = run(seed, given.keep)
            report = read_report(given.into) if given.into else report  # other processes may have added to it
            report["rows"].setdefault(name, {})[str(seed)] = result
            if given.into is not None:
                given.into.write_text(json.dumps(report, indent=1) + "\n")
            if not given.json:
                print(f"{name}, seed {seed}: {result}", flush=True)
    if given.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
