"""What sparse attention and Linformer can learn: `python -m tests.learning.sparse_attention [--only NAME] --json`.

* copy: say at each of 256 places what stood 4 l = 128 places before (l = 32). The strided pattern reaches it in two
  steps; two layers of local attention never do, and dense attention learns it later.
* recovery: a stock BERT that finds a marked token, made a Linformer with k = n/4 mean-pooled slots, then fine-tuned.
* masked: masked language modelling of Python's standard library in rows of 4,096 tokens, Linformer beside BERT with
  the same CPU time.

`--output FILE` is written after every run, so that a run that is cut short leaves what it has finished.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from hf_lnlm import LinformerConfig, LinformerForMaskedLM, SparseTransformerConfig, SparseTransformerForCausalLM
from hf_lnlm.convert.sparse_attention import linformer_from_stock

SEEDS = (0, 1, 2)
IGNORED = -100
Batch = dict[str, torch.Tensor]

# --- copying at a distance --------------------------------------------------------------------------------------------
LENGTH, STRIDE, SYMBOLS, DISTANCE = 256, 32, 16, 128


def copy_batch(generator: torch.Generator, rows: int = 16) -> Batch:
    """Random symbols; each place from `DISTANCE` on is asked what stood `DISTANCE` before (labels shift by one)."""
    ids = torch.randint(SYMBOLS, (rows, LENGTH), generator=generator)
    answers = torch.full((rows, LENGTH + 1), IGNORED)
    answers[:, 1 + DISTANCE :] = ids[:, :-DISTANCE]
    return {"input_ids": torch.nn.functional.pad(ids, (0, 1)), "labels": answers}


def copy_model(pattern: str) -> SparseTransformerForCausalLM:
    """Two layers of width 64."""
    config = SparseTransformerConfig(
        vocab_size=SYMBOLS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
        attention_pattern=pattern, stride=STRIDE, summary_size=4, use_cache=False,
    )  # fmt: skip
    return SparseTransformerForCausalLM(config)


@torch.no_grad()
def answered(model: Any, batch: Batch) -> float:
    """Share of right answers of a causal model."""
    model.eval()
    answers = batch["labels"][:, 1:]
    right = model(batch["input_ids"]).logits[:, :-1].argmax(-1) == answers
    model.train()
    return right[answers != IGNORED].float().mean().item()


def copying(pattern: str, seed: int, steps: int = 200) -> dict[str, Any]:
    """Train on fresh rows; accuracy on fresh rows every 25 steps."""
    torch.manual_seed(seed)
    model, generator = copy_model(pattern), torch.Generator().manual_seed(seed)
    batches = (copy_batch(generator) for _ in itertools.count())
    test = copy_batch(torch.Generator().manual_seed(10_000), 64)
    spent, curve = fit(model, batches, 3e-3, steps, 25, lambda: answered(model, test))
    first = next((step for step, value in curve if value >= 0.99), None)
    return {"pattern": pattern, "seed": seed, "accuracy": round(curve[-1][1], 4), "steps_to_0.99": first,
            "curve": curve, "cpu_seconds": spent}  # fmt: skip


def copy(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Strided attention, its local half alone, and dense attention."""
    for pattern in ("strided", "local", "full"):
        for seed in SEEDS[: given.seeds]:
            yield copying(pattern, seed)


def copy_passed(runs: list[dict[str, Any]]) -> bool:
    """Strided at least 0.99 and local at most 0.10, every seed."""
    strided = [run["accuracy"] for run in runs if run["pattern"] == "strided"]
    local = [run["accuracy"] for run in runs if run["pattern"] == "local"]
    return bool(strided and local) and min(strided) >= 0.99 and max(local) <= 0.10


def fit(
    model: Any,
    batches: Iterator[Batch],
    rate: float,
    steps: int,
    every: int,
    measure: Callable[[], float],
    stop: float = 2.0,
) -> tuple[float, list[tuple[int, float]]]:
    """Train by AdamW with a warm-up of 20 steps; CPU seconds of training, and (step, measure) pairs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    model.train()
    spent, curve = 0.0, []
    for step in range(1, steps + 1):
        begin = time.process_time()
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        spent += time.process_time() - begin
        if step % every == 0 or step == steps:
            curve.append((step, round(measure(), 4)))
            if curve[-1][1] >= stop:
                break
    return round(spent, 1), curve


# --- recovering a teacher ---------------------------------------------------------------------------------------------
MARKED_LENGTH, CLASSES = 128, 16


def marked_batch(generator: torch.Generator, rows: int = 32) -> Batch:
    """A first token 0, then random ids from 1 to 16; one token after the first is of type 1: its id is the class."""
    ids = torch.randint(1, 1 + CLASSES, (rows, MARKED_LENGTH), generator=generator)
    ids[:, 0] = 0
    place = torch.randint(1, MARKED_LENGTH, (rows, 1), generator=generator)
    types = torch.zeros_like(ids).scatter_(1, place, 1)
    return {"input_ids": ids, "token_type_ids": types, "labels": (ids.gather(1, place) - 1).squeeze(1)}


@torch.no_grad()
def classified(model: Any, batch: Batch) -> float:
    """Share of right classes."""
    model.eval()
    found = model(batch["input_ids"], token_type_ids=batch["token_type_ids"]).logits.argmax(-1)
    model.train()
    return (found == batch["labels"]).float().mean().item()


def recovering(seed: int) -> dict[str, Any]:
    """A teacher of at least 0.99, then its Linformer before and after at most 150 steps of fine-tuning."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=1 + CLASSES, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=MARKED_LENGTH, num_labels=CLASSES, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    teacher, generator = BertForSequenceClassification(config), torch.Generator().manual_seed(seed)
    batches = (marked_batch(generator) for _ in itertools.count())
    test = marked_batch(torch.Generator().manual_seed(10_000), 1000)
    spent, taught = fit(teacher, batches, 1e-3, 1500, 50, lambda: classified(teacher, test), stop=0.995)
    student = linformer_from_stock(teacher, projected_size=MARKED_LENGTH // 4)
    before = classified(student, test)
    more, curve = fit(student, batches, 1e-3, 150, 25, lambda: classified(student, test))
    return {"seed": seed, "teacher": taught[-1][1], "teacher_steps": taught[-1][0], "converted": round(before, 4),
            "accuracy": curve[-1][1], "curve": curve, "cpu_seconds": more, "teacher_cpu_seconds": spent}  # fmt: skip


def recovery(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All seeds."""
    for seed in SEEDS[: given.seeds]:
        yield recovering(seed)


def recovery_passed(runs: list[dict[str, Any]]) -> bool:
    """Teachers of at least 0.99, recovered to at least 0.98 of it."""
    return all(run["teacher"] >= 0.99 and run["accuracy"] >= 0.98 * run["teacher"] for run in runs)


# --- masked language modelling of long rows ---------------------------------------------------------------------------
ROW, VOCABULARY, HELD = 4096, 2048, 24


def library() -> tuple[Any, Any, Any]:
    """Tokenizer, training rows and validation rows of Python's standard library."""
    from hf_lnlm.data.blocks import PackedBlocks
    from hf_lnlm.data.sources import load_documents
    from hf_lnlm.data.tokenizers import build_tokenizer
    from hf_lnlm.objectives import objective

    documents = load_documents("stdlib", validation=0.04, seed=0)
    tokenizer = build_tokenizer("bpe", documents.train["text"][:300], vocab_size=VOCABULARY, template="bert")
    packing = objective("masked").packing(tokenizer, ROW)
    return (
        tokenizer,
        PackedBlocks(documents.train, tokenizer, **packing),
        PackedBlocks(documents.validation, tokenizer, **packing),
    )


def masked_model(kind: str, tokenizer: Any) -> Any:
    """BERT, or the Linformer of the recipe (k = 256 windows of 16 tokens), of the same width, depth and heads; both start
    wider than BERT's 0.02, which is meant for widths of 768."""
    fields = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 512, "max_position_embeddings": ROW, "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.06,
    }  # fmt: skip
    if kind == "bert":
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForMaskedLM._from_config(BertConfig(**fields, **none), attn_implementation="sdpa")
    none = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    own = {"projected_size": 256, "projection": kind.removeprefix("linformer_"), "sharing": "key_value"}
    return LinformerForMaskedLM(LinformerConfig(**fields, **none, **own))


@torch.no_grad()
def masked_bits(model: Any, rows: list[Any], collate: Any, widths: torch.Tensor) -> float:
    """Bits of the masked tokens for each byte that they stand for."""
    model.eval()
    nats, size = 0.0, 0
    for row in rows:
        batch = collate([row])
        labels = batch.pop("labels")
        logits = model(**batch).logits[labels != IGNORED]
        wanted = labels[labels != IGNORED]
        nats += cross_entropy(logits, wanted, reduction="sum").item()
        size += int(widths[wanted].sum())
    model.train()
    return nats / math.log(2) / size


def masking(kind: str, seconds: float, rate: float, parts: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Train for so many CPU seconds, measuring ten times."""
    from hf_lnlm.objectives import objective

    tokenizer, train, held = parts
    torch.manual_seed(0)
    model, collate = masked_model(kind, tokenizer), objective("masked").collator(tokenizer, 0)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    widths = torch.tensor([len(name) for name in names])  # byte-level pieces write each byte as one character
    rows = [dict(held[i]) for i in range(0, len(held), max(1, len(held) // HELD))][:HELD]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    spent, tokens, curve = 0.0, 0, []
    for step in itertools.count():
        share = min(1.0, spent / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        batch = collate([dict(train[order[step % len(order)]]) | {"epoch": step // len(order)}])
        begin = time.process_time()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent, tokens = spent + time.process_time() - begin, tokens + ROW
        if spent >= seconds * (len(curve) + 1) / 10:
            found = masked_bits(model, rows, collate, widths)
            curve.append((round(spent), round(found, 4)))
            print(kind, step, curve[-1], flush=True)
        if spent >= seconds:
            break
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"model": kind, "bits_per_byte": curve[-1][1], "cpu_seconds": round(spent, 1), "steps": step + 1,
            "tokens": tokens, "parameters": count, "learning_rate": rate, "curve": curve}  # fmt: skip


def masked(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Linformer, then BERT, the same CPU seconds each."""
    parts = library()
    for kind in given.models.split(","):
        yield masking(kind, given.seconds, given.rate, parts)


def masked_passed(runs: list[dict[str, Any]]) -> bool:
    """No bar: the figures are reported side by side."""
    return bool(runs)


PROOFS = {"copy": (copy, copy_passed), "recovery": (recovery, recovery_passed), "masked": (masked, masked_passed)}


def stamped(rows: list[dict[str, Any]]) -> str:
    """The report as JSON, with date and versions."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    stamp = {"date": time.strftime("%Y-%m-%d"), **versions, "python": platform.python_version()}
    return json.dumps({**stamp, "command": "python -m tests.learning.sparse_attention --json", "rows": rows}, indent=1)


def main() -> None:
    """Run the proofs asked for and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the proofs whose name contains this")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of each masked language model")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the masked language models")
    parser.add_argument("--models", default="linformer_mean_pool,bert", help="the masked language models")
    parser.add_argument("--output", type=Path, help="file to write after every run")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, (prove, passed) in PROOFS.items():
        if given.only not in name:
            continue
        row: dict[str, Any] = {"name": name, "passed": False, "runs": []}
        rows.append(row)
        for run in prove(given):
            row["runs"].append(run)
            row["passed"] = passed(row["runs"])
            if given.output:
                given.output.write_text(stamped(rows) + "\n")
    if given.json:
        print(stamped(rows))
        return
    for row in rows:
        for run in row["runs"]:
            print(row["name"], row["passed"], {key: value for key, value in run.items() if key != "curve"})


if __name__ == "__main__":
    main()
