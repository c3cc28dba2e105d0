"""EncoderCNN against the same encoder with its stock head on TREC, MR and SST-2, as many steps, 3 seeds fixed in advance.

    python -m tests.learning.encoder_cnn --data FOLDER --json

FOLDER holds `trec`, `mr`, `sst2` and `ag_news_7600` as JSON Lines. The encoder is a tiny BERT pre-trained by
`training/recipes/bert_text.yaml` on the texts of the training parts (no text that is tested on is among them). It is kept
in the folder for temporary files and found there by the next run. MR is tested on its first fold.
"""

import random
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lnlm.cli.main import main
from hf_lnlm.models.hybrid.modeling_encoder_cnn import EncoderCNNForSequenceClassification

from .classification import Example, Recipe, Task, prove, read_rows, split_dev, train

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"
ENCODER = Path(tempfile.gettempdir()) / "hf_lnlm_bert_text"
SEEDS = (0, 1, 2)
EPOCHS = {"trec": 8, "mr": 4, "sst2": 4}
CLASSES = {"trec": 6, "mr": 2, "sst2": 2}


def corpus(folder: Path, name: str) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to test on, lower-cased."""
    if name == "mr":
        rows = read_rows(folder / "mr/folds.jsonl.gz")
        parts = [row for row in rows if row["fold"] != 0], [row for row in rows if row["fold"] == 0]
    else:
        parts = read_rows(folder / name / "train.jsonl.gz"), read_rows(folder / name / "test.jsonl.gz")
    train_rows, test = ([{"text": row["text"].lower(), "label": row["label"]} for row in part] for part in parts)
    return train_rows, test


def sentences(folder: Path) -> list[str]:
    """Texts to pre-train on, each once: all training parts and AG News, without any text that is tested on."""
    parts = {name: corpus(folder, name) for name in CLASSES}
    tested = {row["text"] for _, test in parts.values() for row in test}
    texts = [row["text"] for rows, _ in parts.values() for row in rows]
    texts += [f"{row['title']} {row['text']}".lower() for row in read_rows(folder / "ag_news_7600/train.jsonl.gz")]
    return [text for text in dict.fromkeys(texts) if text not in tested]


@cache
def encoder(folder: Path) -> Path:
    """The pre-trained encoder's checkpoint."""
    if not (ENCODER / "config.json").exists():
        texts = ENCODER.with_suffix(".txt")
        texts.write_text("\n".join(sentences(folder)) + "\n", encoding="utf-8")
        began, output = time.process_time(), sys.stdout
        sys.stdout = sys.stderr
        try:
            further = ["--resume"] if ENCODER.exists() else []
            main(
                ["pretrain", str(RECIPES / "bert_text.yaml"), "--data", str(texts), "--output", str(ENCODER), *further]
            )
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.stdout = output
        print(f"pre-trained in {time.process_time() - began:.0f} CPU seconds", file=sys.stderr)
    return ENCODER


def encoded(rows: list[dict], tokenizer: Any) -> list[Example]:
    """Token ids and label of each row."""
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)["input_ids"]
    return [(found, row["label"]) for found, row in zip(ids, rows)]


def run(name: str, convolutions: bool, folder: Path, seed: int) -> dict:
    """Fine-tune once."""
    place = encoder(folder)
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows, test = corpus(folder, name)
    train_part, dev = split_dev(encoded(rows, tokenizer), 0.1, seed)
    torch.manual_seed(seed)
    random.seed(seed)
    if convolutions:
        options: dict[str, Any] = {"mode": "last_n", "num_filters": 64, "num_labels": CLASSES[name]}
        model = EncoderCNNForSequenceClassification.from_encoder_pretrained(str(place), **options)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=CLASSES[name])
    recipe = Recipe(EPOCHS[name], 32, 5e-4, weight_decay=0.01, clip=1.0, decay=lambda share: 1.0 - share)
    return train(model, recipe, {"train": train_part, "dev": dev, "test": encoded(test, tokenizer)}, seed)


TITLES = {"trec": "TREC", "mr": "MR (fold 0)", "sst2": "SST-2 (sentences)"}
TASKS = {
    f"{name}_{head}": Task(f"{title}, tiny BERT, {label}", partial(run, name, head == "cnn"), SEEDS)
    for name, title in TITLES.items()
    for head, label in (("cnn", "EncoderCNN"), ("stock", "stock head"))
}

if __name__ == "__main__":
    prove(__doc__ or "", "python -m tests.learning.encoder_cnn --data FOLDER --json", TASKS)
