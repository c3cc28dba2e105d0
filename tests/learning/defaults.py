"""A sweep of what `finetune` and `pretrain` do where the user says nothing: learning rate, tokenizer, dropout by family.

    python -m tests.learning.defaults --data DIR [--output FILE] [--only text_cnn] [--runs 2] [--json]

`--data` holds trec, sst2, ud_ewt_upos (JSON Lines) and tiny_shakespeare. Every run trains a family at size `tiny` through
the package's own flows and is judged on a part held out of the training file by seed; test files are never opened. The best
checkpoint counts, as the flows keep it. With `--output` every finished run is written at once, and a second call goes on
where the first one stopped. `hf_lnlm/flows/defaults.py` holds what was chosen.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_lnlm

CORPORA: dict[str, dict[str, Any]] = {
    "trec": {"task": "sequence_classification", "data": {"label_column": "label_name"}, "metric": "eval_accuracy"},
    "sst2": {"task": "sequence_classification", "data": {}, "metric": "eval_accuracy"},
    "ud_ewt_upos": {"task": "token_classification", "data": {"tags_column": "upos"}, "metric": "eval_accuracy"},
    "tiny_shakespeare": {"task": "causal", "data": {}, "metric": "eval_bits_per_byte"},
}
DROPOUT = {"lnlm_rnn": "output_dropout", "lnlm_text_cnn": "classifier_dropout", "lnlm_ssm": "classifier_dropout"}
CLASSIFIERS = ("lnlm_text_cnn", "lnlm_rnn", "lnlm_ssm", "lnlm_linformer")
DECODERS = ("lnlm_rnn", "lnlm_ssm", "lnlm_gated_cnn", "lnlm_gpt3", "lnlm_sparse_transformer", "lnlm_linformer")
EPOCHS, STEPS, ROWS = 8, 300, 3000


def grid() -> list[dict[str, Any]]:
    """Every run there is to do, the most telling first."""
    found = []
    for corpus, tokenizer, rate, family in product(("trec", "sst2"), ("word", "bpe"), (1e-3, 2e-3, 4e-3), CLASSIFIERS):
        found.append({"corpus": corpus, "family": family, "tokenizer": tokenizer, "learning_rate": rate})
    for tokenizer, rate in product(("word", "bpe"), (2e-3, 5e-3)):
        found.append({"corpus": "ud_ewt_upos", "family": "lnlm_rnn", "tokenizer": tokenizer, "learning_rate": rate})
    for rate, family in product((2e-3, 4e-3, 8e-3, 1.6e-2), DECODERS):
        found.append({"corpus": "tiny_shakespeare", "family": family, "tokenizer": "bpe", "learning_rate": rate})
    return found


def run(cell: dict[str, Any], data: Path, seed: int) -> dict[str, Any]:
    """Train one model; returns the cell with what was measured on the part held out of the training file."""
    facts, folder = CORPORA[cell["corpus"]], data / cell["corpus"]
    with tempfile.TemporaryDirectory() as output:
        options: dict[str, Any] = {"family": cell["family"], "size": "tiny", "output": f"{output}/run"}
        training: dict[str, Any] = {"seed": seed, "learning_rate": cell["learning_rate"], "logging_strategy": "no"}
        options |= {"tokenizer": {"kind": cell["tokenizer"]}, "training": training}
        began = time.process_time()
        if facts["task"] == "causal":
            source = Path(output) / "text.txt"
            source.write_bytes(read_text(folder / "train.txt.gz"))
            training |= {"max_steps": STEPS, "save_strategy": "no"}
            found = hf_lnlm.pretrain(data={"source": str(source)}, **options)
        else:
            limit = {"limit": ROWS} if cell["corpus"] != "trec" else {}
            section = {"source": str(folder / "train.jsonl.gz"), "validation": 0.1, "block_size": 96, **limit}
            training |= {"num_train_epochs": EPOCHS, "per_device_train_batch_size": 32, **BEST}
            found = hf_lnlm.finetune(task=facts["task"], data=section | facts["data"], **options)
        value = float(found.result.metrics[facts["metric"]])
    row = {**cell, "seed": seed, facts["metric"].removeprefix("eval_"): round(value, 4)}
    return row | {"cpu_seconds": round(time.process_time() - began, 1)}


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "early_stopping_patience": 3,
}


def read_text(path: Path) -> bytes:
    """The text in a gzipped file."""
    import gzip

    return gzip.decompress(path.read_bytes())


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is written: when and with what it was made, and every run."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    stamp = {"date": time.strftime("%Y-%m-%d"), **versions, "python": platform.python_version()}
    return {**stamp, "command": "python -m tests.learning.defaults --data DIR --json", "runs": runs}


def main() -> None:
    """Run what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpora")
    parser.add_argument("--output", type=Path, help="JSON file that every finished run is added to")
    parser.add_argument("--only", default="", help="run the cells whose corpus or family contains this")
    parser.add_argument("--runs", type=int, default=10**6, help="stop after so many runs; a later call goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    if options.output and options.output.exists():
        runs = json.loads(options.output.read_text())["runs"]
    wanted = [cell for cell in grid() if options.only in f"{cell['corpus']} {cell['family']}"]
    missing = [
        c for c in wanted if not any(c.items() <= done.items() and done["seed"] == options.seed for done in runs)
    ]
    for cell in missing[: options.runs]:
        runs.append(run(cell, options.data, options.seed))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        if options.output:
            options.output.write_text(json.dumps(report(runs), indent=1) + "\n")
    if options.json:
        print(json.dumps(report(runs), indent=1))
        return
    for row in runs:
        print("  ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
