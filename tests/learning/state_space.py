"""The state space papers' tasks, learnt through Trainer: `python -m tests.learning.state_space [--only NAME] --json`.

* Induction heads (arXiv 2312.00752, section 4.1.2), the dense variant: the special token comes eight times a row.
* Selective copying (section 4.1.1): 8 tokens among 64 places, then 8 questions.
* Multi-query associative recall (arXiv 2312.04927): 4 pairs, then each key once among 64 places.
* Parity (arXiv 2603.15569, table 5): lengths up to 40, tested at 256; mamba3 beside mamba2.

Every run has a fixed seed and stops when its CPU seconds (process time of training itself, one thread) are spent or its
accuracy on fresh rows is reached. `--into FILE` adds each finished run to a report. `--stock` gives stock Mamba the same
seconds on the induction task.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import MambaConfig, MambaForCausalLM, TrainerCallback

from hf_lnlm import SelectiveSSMConfig, SelectiveSSMForCausalLM
from hf_lnlm.data.token_tasks import induction_heads, multi_query_recall, parity, selective_copying
from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.trainer import LNLMTrainer

SEEDS = (0, 1, 2)
IGNORED = -100
Batch = dict[str, torch.Tensor]
Draw = Callable[[torch.Generator, int, int], Batch]


@dataclass(frozen=True)
class Recipe:
    """One proof.

    Attributes:
        draw: makes batches.
        lengths: step from which on → training lengths (both ends) in force.
        tests: test length → accuracy that is asked for there.
        seconds: CPU seconds of training.
        steps: at most so many; a cosine schedule ends there.
        schedule: of the learning rate.
        fields: of the model's config.
    """

    name: str
    draw: Draw
    lengths: dict[int, tuple[int, int]]
    tests: dict[int, float]
    seconds: float
    rate: float = 3e-3
    batch: int = 32
    steps: int = 20_000
    schedule: str = "constant_with_warmup"
    fields: dict[str, Any] = field(default_factory=dict)

    def length(self, step: int, generator: torch.Generator) -> int:
        low, high = self.lengths[max(first for first in self.lengths if first <= step)]
        return 8 * int(torch.randint(low // 8, high // 8 + 1, (), generator=generator))


SMALL = {"vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "state_size": 64}
PARITY = HEADS | {"vocab_size": 2, "state_size": 16}
GROWING = {0: (8, 8), 100: (8, 40)}
COSINE: dict[str, Any] = {"schedule": "cosine", "steps": 3000}  # rotations must become exact
RECIPES = (
    Recipe(
        "induction heads",
        induction_heads,
        {0: (64, 64), 150: (64, 256)},
        {256: 0.99, 1024: 0.95},
        150,
        batch=16,
        fields=SMALL,
    ),
    Recipe("selective copying", selective_copying, {0: (64, 64)}, {64: 0.95}, 300, fields=SMALL),
    Recipe(
        "associative recall",
        multi_query_recall,
        {0: (64, 64)},
        {64: 0.95},
        200,
        batch=64,
        fields=HEADS | {"vocab_size": 64, "mixer": "mamba2"},
    ),
    Recipe(
        "parity, mamba3", parity, GROWING, {40: 0.99, 256: 0.99}, 200, fields=PARITY | {"mixer": "mamba3"}, **COSINE
    ),
    Recipe(
        "parity, mamba2", parity, GROWING, {40: 0.99, 256: 0.99}, 200, fields=PARITY | {"mixer": "mamba2"}, **COSINE
    ),
)


class Batches(IterableDataset):
    """Endless batches of a recipe, each one row of the data set."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(self.recipe.steps):
            yield self.recipe.draw(generator, self.recipe.batch, self.recipe.length(step, generator))


@torch.no_grad()
def accuracy(model: Any, draw: Draw, length: int, rows: int = 32) -> float:
    """Share of right answers on fresh rows."""
    training = model.training
    batch = draw(torch.Generator().manual_seed(10_000 + length), rows, length)
    answers = batch["labels"][:, 1:]
    found = model.eval()(batch["input_ids"]).logits[:, :-1].argmax(-1)
    model.train(training)
    return (found == answers)[answers != IGNORED].float().mean().item()


class Watch(TrainerCallback):
    """Measures CPU seconds and the learning curve; ends training when all tests are passed or time is up."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.spent, self.curve = recipe, 0.0, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.spent += time.process_time() - self.begin
        over = self.spent > self.recipe.seconds
        if state.global_step % 100 == 0 or over:
            found = {length: accuracy(model, self.recipe.draw, length) for length in self.recipe.tests}
            self.curve.append((state.global_step, round(self.spent, 1), {n: round(a, 3) for n, a in found.items()}))
            margin = {length: (1 + 2 * bar) / 3 for length, bar in self.recipe.tests.items()}
            control.should_training_stop = over or all(found[n] >= margin[n] for n in found)


def train(model: Any, recipe: Recipe, seed: int) -> dict[str, Any]:
    """One run."""
    watch = Watch(recipe)
    with tempfile.TemporaryDirectory() as folder:
        settings = LNLMTrainingArguments(
            output_dir=folder, max_steps=recipe.steps, per_device_train_batch_size=1, learning_rate=recipe.rate,
            lr_scheduler_type=recipe.schedule, warmup_steps=20, weight_decay=0.0, seed=seed, save_strategy="no",
            logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        data = Batches(recipe, seed)
        trainer = LNLMTrainer(
            model=model, args=settings, train_dataset=data, data_collator=lambda rows: rows[0], callbacks=[watch]
        )
        trainer.train()
    found = {length: round(accuracy(model, recipe.draw, length, 128), 4) for length in recipe.tests}
    passed = all(found[length] >= bar for length, bar in recipe.tests.items())
    return {"accuracy": found, "passed": passed, "steps": trainer.state.global_step,
            "cpu_seconds": round(watch.spent, 1), "curve": watch.curve}  # fmt: skip


def build(recipe: Recipe, seed: int, stock: bool) -> Any:
    """A fresh model: ours, or stock Mamba of the same size."""
    torch.manual_seed(seed)
    if stock:
        return MambaForCausalLM(MambaConfig(**recipe.fields, use_cache=False))
    return SelectiveSSMForCausalLM(SelectiveSSMConfig(**recipe.fields, use_cache=False))


def prove(recipe: Recipe, seeds: list[int], stock: bool, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Run some seeds of a recipe and put them into the report; a proof is passed if all but one of its seeds are."""
    name = recipe.name + (", stock Mamba" if stock else "")
    row = report["rows"].setdefault(name, {})
    row |= {"bars": {str(length): bar for length, bar in recipe.tests.items()}, "limit_cpu_seconds": recipe.seconds}
    runs = row.setdefault("runs", {})
    for seed in seeds:
        runs[str(seed)] = train(build(recipe, seed, stock), recipe, seed)
        row["passed"] = sum(run["passed"] for run in runs.values()) >= max(2, len(runs) - 1)
        save()


def read_report(path: Path | None) -> dict[str, Any]:
    """The report so far: runs of other recipes and seeds stay in it."""
    report = json.loads(path.read_text()) if path is not None and path.exists() else {"rows": {}}
    stamp = {"date": time.strftime("%Y-%m-%d"), "command": "python -m tests.learning.state_space --json"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**stamp, **versions, "python": platform.python_version(), "rows": report["rows"]}


def main() -> None:
    """Run the proofs asked for and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the proofs whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--stock", action="store_true", help="train stock Mamba instead, on the induction task")
    parser.add_argument("--into", type=Path, help="file that every finished run is added to")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = read_report(given.into)

    def save() -> None:
        if given.into is not None:
            given.into.write_text(json.dumps(report, indent=1) + "\n")

    for recipe in RECIPES[:1] if given.stock else RECIPES:
        if given.only in recipe.name:
            prove(recipe, given.seeds, given.stock, report, save)
    if given.json:
        print(json.dumps(report, indent=1))
        return
    for name, row in report["rows"].items():
        for seed, run in row["runs"].items():
            print(f"{name:<32} seed {seed} {run['accuracy']} {run['cpu_seconds']} s {run['passed']}")


if __name__ == "__main__":
    main()
