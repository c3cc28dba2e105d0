"""Four labelled corpora x four families from scratch, each for the same CPU time, through the package's own `finetune`.

    python -m tests.learning.finetuning --data DIR [--output FILE] [--only trec] [--seeds 3] [--runs 2] [--seconds 20]

`--data` holds trec, sst2, wnut17 and ud_ewt_upos as JSON Lines. Every run trains its model (the family's size `tiny`, a
byte-pair vocabulary of the corpus) for as many steps as fit the CPU time, measured on its first steps, with a learning
rate that falls to 0; nothing is selected by the test set. With `--output` every finished run is written at once, and a
second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_lnlm.flows.finetune import finetuning_setup, resolve_task
from hf_lnlm.flows.output import plain_when_piped
from hf_lnlm.flows.recipe import Recipe, load_recipe
from hf_lnlm.flows.run import TrainingSetup, own_metrics
from hf_lnlm.trainer.trainer import LNLMTrainer

CORPORA: dict[str, dict[str, Any]] = {
    "trec": {"task": "sequence_classification", "label": "label_name", "metric": "accuracy"},
    "sst2": {"task": "sequence_classification", "label": "label", "metric": "accuracy"},
    "wnut17": {"task": "token_classification", "label": "ner_tags", "metric": "f1"},
    "ud_ewt_upos": {"task": "token_classification", "label": "upos", "metric": "accuracy"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "lnlm_rnn": {"rate": 2e-3, "config": {}},
    "lnlm_ssm": {"rate": 2e-3, "config": {}},
    "lnlm_linformer": {"rate": 1e-3, "config": {}},
    "bert": {"rate": 1e-3, "config": {}},
}
BATCH, LENGTH, VOCABULARY, WARM_UP, MEASURED, MOST_EPOCHS = 16, 96, 4096, 4, 12, 20


class Clock(transformers.TrainerCallback):
    """CPU seconds of a step, without the first ones, which compile and fill caches."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            self.began = time.process_time()
        if state.global_step == WARM_UP + MEASURED:
            self.seconds = (time.process_time() - self.began) / MEASURED


def recipe_of(corpus: str, family: str, data: Path, seed: int, **training: Any) -> Recipe:
    """What one run does, as a recipe."""
    facts, folder = CORPORA[corpus], data / corpus
    flags = {
        "model.family": family,
        "model.size": "tiny",
        "model.config": FAMILIES[family]["config"],
        "tokenizer.vocab_size": VOCABULARY,
        "objective.name": facts["task"],
        "data.source": str(folder / "train.jsonl.gz"),
        "data.validation": str(folder / "test.jsonl.gz"),
        "data.block_size": LENGTH,
        ("data.label_column" if facts["task"].startswith("seq") else "data.tags_column"): facts["label"],
        "training": {
            "seed": seed,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": 64,
            "learning_rate": FAMILIES[family]["rate"],
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_strategy": "no",
            **training,
        },
    }
    recipe = load_recipe(None, flags, [])
    resolve_task(recipe)
    return recipe


def trainer_of(recipe: Recipe, setup: TrainingSetup) -> LNLMTrainer:
    """The Trainer that `finetune` would use."""
    trainer = setup.trainer(recipe)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run(corpus: str, family: str, data: Path, seed: int, seconds: float) -> dict[str, Any]:
    """Train one model for `seconds` of CPU time and measure it on the test set."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"output_dir": folder, "max_steps": WARM_UP + MEASURED}
        recipe = recipe_of(corpus, family, data, seed, **options)
        clock = Clock()
        rehearsal = trainer_of(recipe, finetuning_setup(recipe))
        rehearsal.add_callback(clock)
        rehearsal.train()
        recipe = recipe_of(corpus, family, data, seed, **options)
        setup = finetuning_setup(recipe)
        longest = MOST_EPOCHS * len(setup.train) // BATCH
        recipe.training["max_steps"] = steps = min(max(int(seconds / clock.seconds), 1), longest)
        trainer = trainer_of(recipe, setup)
        began = time.process_time()
        trainer.train()
        spent = time.process_time() - began
        metrics = own_metrics(trainer.evaluate())
    size = sum(p.numel() for p in setup.model.parameters())
    row = {"corpus": corpus, "family": family, "seed": seed, "parameters": size, "steps": steps}
    row |= {"epochs": round(steps * BATCH / len(setup.train), 1), "cpu_seconds": round(spent, 1)}
    return row | {"test": {name: round(value, 4) for name, value in metrics.items()}}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a corpus and family: mean and spread of its metric over the seeds."""
    rows = []
    for corpus, facts in CORPORA.items():
        for family in FAMILIES:
            found = [r["test"][facts["metric"]] for r in runs if (r["corpus"], r["family"]) == (corpus, family)]
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                row = {"corpus": corpus, "family": family, "metric": facts["metric"], "seeds": len(found)}
                rows.append(row | {"mean": round(statistics.mean(found), 4), "stdev": round(spread, 4)})
    return rows


def report(runs: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Everything that is written: when and with what it was made, the table, and every run."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "command": f"python -m tests.learning.finetuning --data DIR --seconds {seconds:g} --json",
        "cpu_seconds_a_run": seconds,
        "table": summary(runs),
        "runs": runs,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpora")
    parser.add_argument("--output", type=Path, help="JSON file that every finished run is added to")
    parser.add_argument("--only", default="", help="run the corpora or families whose name contains this")
    parser.add_argument("--runs", type=int, default=10**6, help="stop after so many runs; a later call goes on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of training a run")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def main() -> None:
    """Run what is missing and print the table."""
    options = arguments()
    torch.set_num_threads(1)
    plain_when_piped()
    runs: list[dict[str, Any]] = []
    if options.output and options.output.exists():
        runs = json.loads(options.output.read_text())["runs"]
    done = {(r["corpus"], r["family"], r["seed"]) for r in runs}
    cells = [(c, f, s) for s in range(options.seeds) for c in CORPORA for f in FAMILIES if options.only in f"{c} {f}"]
    missing = [cell for cell in cells if cell not in done]
    for corpus, family, seed in missing[: options.runs]:
        runs.append(run(corpus, family, options.data, seed, options.seconds))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        if options.output:
            options.output.write_text(json.dumps(report(runs, options.seconds), indent=1) + "\n")
    found = report(runs, options.seconds)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for row in found["table"]:
        print(f"{row['corpus']:<12} {row['family']:<16} {row['metric']:<9} {row['mean']:.4f} ± {row['stdev']:.4f}")


if __name__ == "__main__":
    main()
