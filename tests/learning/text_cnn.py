"""TextCNN with random word vectors on TREC (3 seeds) and MR (10 fixed folds), as in Kim 2014, table 2, row "CNN-rand".

    python -m tests.learning.text_cnn --data FOLDER --json

FOLDER holds `trec/train.jsonl.gz`, `trec/test.jsonl.gz` and `mr/folds.jsonl.gz` with fields `text`, `label` (and `fold`).
Per run: Adam, batches of 50, a tenth of the training part as development set, the best epoch on it is tested.
"""

import random
from pathlib import Path

import torch

from hf_lnlm.models.convolutional.configuration_text_cnn import TextCNNConfig
from hf_lnlm.models.convolutional.modeling_text_cnn import TextCNNForSequenceClassification

from .classification import Recipe, Task, build_vocabulary, encode, prove, read_rows, split_dev, train

TREC = Recipe(epochs=10, learning_rate=1e-3, unknown_rate=0.5, decay=lambda share: 1.0 - share)
MR = Recipe(epochs=4, learning_rate=1e-3, unknown_rate=0.5, decay=lambda share: 1.0 - share)


def run(rows: list[dict], test: list[dict], labels: int, recipe: Recipe, seed: int) -> dict:
    """Train once on `rows` and test on `test`."""
    torch.manual_seed(seed)
    random.seed(seed)

    def text(row: dict) -> str:
        return row["text"].lower()

    ids, rare = build_vocabulary([text(row) for row in rows])
    train_part, dev = split_dev(encode(rows, ids, text), 0.1, seed)
    model = TextCNNForSequenceClassification(TextCNNConfig(vocab_size=len(ids) + 2, num_labels=labels))
    parts = {"train": train_part, "dev": dev, "test": encode(test, ids, text)}
    return train(model, recipe, parts, seed, rare)


def trec(folder: Path, seed: int) -> dict:
    """TREC question types."""
    rows, test = read_rows(folder / "trec/train.jsonl.gz"), read_rows(folder / "trec/test.jsonl.gz")
    return run(rows, test, 6, TREC, seed)


def mr(folder: Path, fold: int) -> dict:
    """Movie reviews, one of the 10 fixed folds."""
    rows = read_rows(folder / "mr/folds.jsonl.gz")
    train_rows = [row for row in rows if row["fold"] != fold]
    return run(train_rows, [row for row in rows if row["fold"] == fold], 2, MR, fold)


TASKS = {
    "trec": Task("TREC, TextCNN rand", trec, (0, 1, 2), bar=90.0, aim=91.5, paper=91.2),
    "mr": Task("MR, TextCNN rand", mr, tuple(range(10)), bar=75.5, aim=77.0, paper=76.1, note="a seed is a fold"),
}

if __name__ == "__main__":
    prove(__doc__ or "", "python -m tests.learning.text_cnn --data FOLDER --json", TASKS)
