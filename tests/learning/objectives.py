"""Do the pre-training objectives teach anything on Python's own standard library, and which teaches more?

`detection`: replaced-token detection with a bidirectional GRU; the area under the discriminator's ROC curve on held-out
files after a fixed CPU time. `bert`: the same with a tiny BERT. `probe`: encoders pre-trained for equal CPU time by
replaced-token detection and by masked language modelling, and one from scratch, fine-tuned on a few labelled passages:
what is each token to Python (keyword, name of a call, attribute, definition …), by Python's own tokenizer.

    python -m tests.learning.objectives --json [--only detection] [--seeds 3] [--seconds 110] [--output FILE]

CPU seconds are of one thread and of training alone. Files are held out as `hf_lnlm.data` splits them.
"""

import argparse
import io
import json
import keyword
import platform
import statistics
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import Subset
from transformers import AutoConfig, AutoModelForTokenClassification

from hf_lnlm.data.blocks import PackedBlocks
from hf_lnlm.data.sources import load_documents
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.objectives import objective
from hf_lnlm.trainer.arguments import LNLMTrainingArguments
from hf_lnlm.trainer.trainer import LNLMTrainer

DOCUMENTS, HELD_BLOCKS, LABELLED = 400, 256, (16, 64)
TAGS = ("keyword", "call", "attribute", "definition", "name", "operator", "number", "string", "comment")
BAR, AIM = 0.65, 0.75
RNN = {"model_type": "lnlm_rnn", "cell_type": "gru", "hidden_size": 96, "num_hidden_layers": 1, "bidirectional": True}
BERT = {
    "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 256, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
}  # fmt: skip


class Library:
    """The standard library with a vocabulary: blocks to train on and blocks of other files.

    Args:
        vocabulary: tokens of the byte-level BPE, or None for bytes themselves.
        length: tokens of a row.
    """

    def __init__(self, vocabulary: int | None, length: int) -> None:
        self.length = length
        documents = load_documents("stdlib", limit=DOCUMENTS, validation=0.05)
        self.parts = (documents.train, documents.validation)
        texts = (row["text"] for row in documents.train)
        self.tokenizer = build_tokenizer("bpe" if vocabulary else "byte", texts, vocab_size=vocabulary)

    def blocks(self, learnt: Any) -> tuple[Any, Any]:
        """Training and held-out rows of an objective."""
        options = learnt.packing(self.tokenizer, self.length)
        train, held = (PackedBlocks(rows, self.tokenizer, **options) for rows in self.parts)
        chosen = np.linspace(0, len(held) - 1, HELD_BLOCKS).astype(int).tolist()
        return train, Subset(held, chosen)


class Budget(transformers.TrainerCallback):
    """Ends training when its CPU time is spent, and sets the learning rate by the share spent.

    Args:
        seconds: CPU seconds of this process.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.process_time()

    @property
    def share(self) -> float:
        return (time.process_time() - self.began) / self.seconds

    def factor(self, step: int) -> float:
        """Linear warm-up over a twentieth of the time, then linear to zero."""
        return max(min(self.share / 0.05, (1 - self.share) / 0.95, 1.0), 0.02)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.share >= 1


def pretrained(
    library: Library, learnt: Any, config: dict[str, Any], seed: int, seconds: float, rate: float,
    start: Any | None = None, **changed: Any,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """A model trained by an objective for some CPU time, and what it reaches on held-out files.

    Args:
        library: text and vocabulary.
        learnt: the objective.
        config: fields of the encoder's configuration, `model_type` included.
        seed: of weights, order and noise.
        seconds: CPU time.
        rate: learning rate at its peak.
        start: a masked language model that generator and discriminator start from, instead of fresh weights.
        changed: TrainingArguments that differ.
    """
    torch.manual_seed(seed)
    made = AutoConfig.for_model(**config, vocab_size=len(library.tokenizer), pad_token_id=0)
    learnt.check(made, library.tokenizer)
    model = learnt.build(made)
    if start is not None:
        model.start_from(start)
    train, held = library.blocks(learnt)
    budget = Budget(seconds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.factor)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder, "max_steps": 1_000_000, "per_device_train_batch_size": 32, "seed": seed,
            "save_strategy": "no", "logging_steps": 250, "use_cpu": True, "prediction_loss_only": True,
            "remove_unused_columns": False, "report_to": [], "dataloader_pin_memory": False, "disable_tqdm": True,
        }  # fmt: skip
        arguments = LNLMTrainingArguments(**settings | changed)
        trainer = LNLMTrainer(
            model=model, args=arguments, train_dataset=train, eval_dataset=held, objective=learnt, callbacks=[budget],
            data_collator=learnt.collator(library.tokenizer, seed, bookkeeping=True), optimizers=(optimizer, schedule),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    kept = {k: round(v, 4) for k, v in found.items() if "per_second" not in k and k not in ("epoch", "runtime")}
    spent = round(budget.seconds * min(budget.share, 1.0), 1)
    return model, {"seed": seed, "steps": trainer.state.global_step, "cpu_seconds": spent, **kept}


def detection(library: Library, seed: int, seconds: float) -> dict[str, Any]:
    """Replaced-token detection with bidirectional GRUs, the generator half as wide."""
    learnt = objective("replaced_token", generator_fraction=0.5)
    return pretrained(library, learnt, RNN, seed, seconds, 4e-3)[1]


def bert(library: Library, seed: int, seconds: float) -> dict[str, Any]:
    """Replaced-token detection with tiny BERTs of equal size over bytes, in short rows and small batches."""
    learnt = objective("replaced_token", generator_fraction=1.0)
    return pretrained(library, learnt, BERT, seed, seconds, 4e-3, per_device_train_batch_size=16)[1]


# ---- the probe ------------------------------------------------------------------------------------------------------


def passages(texts: Iterator[str], tokenizer: Any, length: int) -> Iterator[dict[str, list[int]]]:
    """Rows `input_ids`, `labels` `[length]`: passages of files, the class of each token that begins a Python token."""
    for text in texts:
        starts = dict(token_classes(text))
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        labels = []
        for begin, end in found["offset_mapping"]:
            at = next((place for place in range(begin, end) if place in starts), None)
            labels.append(-100 if at is None else starts[at])
        for first in range(0, len(labels) - length, 4 * length):
            row = slice(first, first + length)
            yield {"input_ids": found["input_ids"][row], "labels": labels[row]}


def token_classes(text: str) -> Iterator[tuple[int, int]]:
    """(character, class) of every token of a source text."""
    lines = np.cumsum([0, *(len(line) for line in text.splitlines(keepends=True))])
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string.strip()]
    except (tokenize.TokenError, SyntaxError):
        return
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None]):
        kind = _class(getattr(before, "string", ""), token, getattr(after, "string", ""))
        if kind is not None:
            yield int(lines[token.start[0] - 1]) + token.start[1], TAGS.index(kind)


def _class(before: str, token: tokenize.TokenInfo, after: str) -> str | None:
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "keyword"
        if before in ("def", "class"):
            return "definition"
        return "call" if after == "(" else "attribute" if before == "." else "name"
    kinds = {tokenize.OP: "operator", tokenize.NUMBER: "number", tokenize.STRING: "string"}
    return "comment" if token.type == tokenize.COMMENT else kinds.get(token.type)


def probe(library: Library, encoder: Any | None, config: dict[str, Any], seed: int, rows: int, steps: int) -> float:
    """Accuracy on held-out files after fine-tuning a tagger on some passages; from scratch without an encoder."""
    torch.manual_seed(seed)
    made = AutoConfig.for_model(
        **config, vocab_size=len(library.tokenizer), pad_token_id=0, num_labels=len(TAGS), classifier_dropout=0.0
    )
    tagger = AutoModelForTokenClassification.from_config(made)
    if encoder is not None:
        tagger.base_model.load_state_dict(encoder.state_dict(), strict=False)
    train, test = _labelled(library)
    order = np.random.default_rng(seed).permutation(len(train))[:rows]
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20) * max(0.0, 1 - step / steps))
    draws = np.random.default_rng(seed + 1)
    for _ in range(steps):
        tagger(**_batch(train, draws.choice(order, 16))).loss.backward()
        nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    tagger.eval()
    batch = _batch(test, np.arange(len(test)))
    with torch.no_grad():
        found = tagger(input_ids=batch["input_ids"]).logits.argmax(-1)
    counted = batch["labels"] != -100
    return round(float((found == batch["labels"])[counted].float().mean()), 4)


def _labelled(library: Library) -> tuple[list[Any], list[Any]]:
    if not hasattr(library, "labelled"):
        parts = []
        for rows, most in zip(library.parts, (2000, 500)):
            found = list(passages((row["text"] for row in rows), library.tokenizer, library.length))
            chosen = np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)
            parts.append([found[index] for index in chosen])
        library.labelled = tuple(parts)
    return library.labelled


def _batch(rows: list[Any], indices: np.ndarray) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([rows[index][name] for index in indices]) for name in ("input_ids", "labels")}


def encoder_of(model: Any) -> Any:
    """The bare encoder of what an objective trained."""
    part = getattr(model, "discriminator", model)
    return part.base_model


def compared(library: Library, config: dict[str, Any], rate: float, seed: int, seconds: float) -> dict[str, Any]:
    """One encoder pre-trained in three ways (or not at all) and probed with few and with more labels."""
    found: dict[str, Any] = {"seed": seed}
    goals = {
        "replaced_token": objective("replaced_token", generator_fraction=0.5),
        "masked": objective("masked"),
        "scratch": None,
    }
    for name, learnt in goals.items():
        made = None if learnt is None else pretrained(library, learnt, config, seed, seconds, rate)
        encoder = None if made is None else encoder_of(made[0])
        accuracies = {f"rows_{rows}": probe(library, encoder, config, seed, rows, 300) for rows in LABELLED}
        found[name] = {**accuracies, **({} if made is None else {"pretraining": made[1]})}
        print(f"  {name} {json.dumps(found[name])}", file=sys.stderr, flush=True)
    return found


# ---- the report -----------------------------------------------------------------------------------------------------

PROOFS: dict[str, tuple[Any, int | None, int]] = {
    "detection": (detection, 512, 64),
    "bert": (bert, None, 32),
    "probe": (lambda library, seed, seconds: compared(library, RNN, 4e-3, seed, seconds), 512, 64),
}
"""Name → what to run, vocabulary, tokens of a row."""


def main() -> None:
    """Run the proofs seed by seed; what is finished is in the file after every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the proofs whose name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seconds", type=float, default=110.0, help="CPU seconds of each pre-training")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="file to write after every seed")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    stamp = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "transformers": transformers.__version__}
    command = f"python -m tests.learning.objectives --json --seeds {asked.seeds} --seconds {asked.seconds:.0f}"
    command += f" --only {asked.only}" if asked.only else ""
    report: dict[str, Any] = {
        **stamp,
        "python": platform.python_version(),
        "command": command,
        "rows": [],
    }
    for name in [name for name in PROOFS if asked.only in name]:
        row: dict[str, Any] = {"name": name, "seconds": asked.seconds, "runs": []}
        report["rows"].append(row)
        run, vocabulary, length = PROOFS[name]
        library = Library(vocabulary, length)
        for seed in range(asked.first, asked.first + asked.seeds):
            row["runs"].append(run(library, seed, asked.seconds))
            row |= summary(name, row["runs"])
            print(f"{name} {json.dumps(row['runs'][-1])}", file=sys.stderr, flush=True)
            if asked.output:
                asked.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1) if asked.json else "\n".join(map(str, report["rows"])))


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds; the bar is that of `detection` (the tiny BERT's aim is to leave chance, 0.5)."""
    if "discriminator_auc" in runs[0]:
        median = statistics.median(run["discriminator_auc"] for run in runs)
        bars = {"bar": BAR, "aim": AIM, "passed": median >= BAR} if name == "detection" else {}
        return {"median_auc": median, **bars}
    kinds = [name for name in runs[0] if name != "seed"]
    sizes = [name for name in runs[0][kinds[0]] if name.startswith("rows_")]
    return {"median": {k: {s: statistics.median(run[k][s] for run in runs) for s in sizes} for k in kinds}}


if __name__ == "__main__":
    main()
