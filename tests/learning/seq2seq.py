"""Translation from random weights: Multi30k German to English, BLEU of test2016, greedy and by a beam of 4.

    python -m tests.learning.seq2seq --data FOLDER [--seconds 150] [--seeds 0 1 2] [--json]

FOLDER holds `train.jsonl.gz` and `test.jsonl.gz` with fields `de` and `en`. One thread; only training's CPU time counts.
Words are those of sacrebleu's 13a tokenizer, lower-cased, that occur twice in training; BLEU is sacrebleu's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from hf_lnlm import RNNSeq2SeqConfig, RNNSeq2SeqForConditionalGeneration

PAD, START, END, UNKNOWN = range(4)
BATCH, RATE, CLIP = 64, 3e-3, 1.0
FIELDS = {"hidden_size": 256, "num_hidden_layers": 1, "attention": "general", "share_embeddings": False}
FIELDS |= {"input_dropout": 0.2, "output_dropout": 0.2, "loss_head": "chunked", "loss_dtype": "bfloat16"}
BAR, AIM = 24.0, 30.0


def read(path: Path) -> list[tuple[list[str], list[str]]]:
    """Pairs of lower-cased words."""
    split = Tokenizer13a()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [tuple(split(row[side].lower()).split() for side in ("de", "en")) for row in rows]  # type: ignore[misc]


def vocabulary(texts: list[list[str]]) -> dict[str, int]:
    """Word → id of the words that occur twice, the most frequent first."""
    counts = Counter(word for text in texts for word in text)
    return {word: number + 4 for number, (word, count) in enumerate(counts.most_common()) if count > 1}


def ids(text: list[str], known: dict[str, int]) -> list[int]:
    """Ids of a text, its end too."""
    return [*(known.get(word, UNKNOWN) for word in text), END]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of one length, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(pairs: list[Any], draw: random.Random) -> list[list[Any]]:
    """Batches of pairs of like lengths, in random order."""
    order = sorted(pairs, key=lambda pair: (len(pair[1]), len(pair[0]), draw.random()))
    cut = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    draw.shuffle(cut)
    return cut


def train(pairs: list[Any], sizes: tuple[int, int], seconds: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train for so many CPU seconds; the learning rate falls to zero."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    special = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    config = RNNSeq2SeqConfig(vocab_size=sizes[1], source_vocab_size=sizes[0], **FIELDS, **special)
    model = RNNSeq2SeqForConditionalGeneration(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    begin, epochs, steps, share = time.process_time(), 0.0, 0, 0.0
    while share < 1.0:
        cut = batches(pairs, draw)
        for batch in cut:
            share = (time.process_time() - begin) / seconds
            if share >= 1.0:
                break
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (steps + 1) / 50) * (1.0 - share)
            sources, labels = padded([pair[0] for pair in batch], PAD), padded([pair[1] for pair in batch], -100)
            loss = model(sources, (sources != PAD).long(), labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            epochs, steps = epochs + 1 / len(cut), steps + 1
    return model.eval(), {"epochs": round(epochs, 2), "steps": steps}


@torch.no_grad()
def translated(model: Any, sources: list[list[int]], words: dict[int, str], beams: int) -> list[str]:
    """Translations, by batches of like lengths."""
    order = sorted(range(len(sources)), key=lambda at: len(sources[at]))
    found = [""] * len(sources)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        batch = padded([sources[at] for at in places], PAD)
        options = {"num_beams": beams, "max_new_tokens": 50, "do_sample": False, "suppress_tokens": [UNKNOWN]}
        written = model.generate(batch, attention_mask=(batch != PAD).long(), **options)
        for at, row in zip(places, written.tolist(), strict=True):
            found[at] = " ".join(words[token] for token in row if token in words)
    return found


def run(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """One seed: train, translate the test set greedily and by beams, and rate both."""
    train_rows, test = read(folder / "train.jsonl.gz"), read(folder / "test.jsonl.gz")
    source, target = (vocabulary([row[side] for row in train_rows]) for side in (0, 1))
    pairs = [(ids(de, source), ids(en, target)) for de, en in train_rows]
    model, found = train(pairs, (len(source) + 4, len(target) + 4), seconds, seed)
    words = {number: word for word, number in target.items()}
    bleu = sacrebleu.BLEU(lowercase=True, force=True)
    references = [[" ".join(en) for _, en in test]]
    for name, beams in (("greedy", 1), ("beam 4", 4)):
        said = translated(model, [ids(de, source) for de, _ in test], words, beams)
        found[name] = round(bleu.corpus_score(said, references).score, 2)
    return {"seed": seed, **found, "signature": str(bleu.get_signature())}


def main() -> None:
    """Run the seeds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(given.data, given.seconds, seed) for seed in given.seeds]
    median = statistics.median(found["greedy"] for found in runs)
    report = {"fields": FIELDS, "runs": runs, "median greedy": median, "bar": BAR, "aim": AIM, "seconds": given.seconds}
    print(json.dumps(report, indent=1 if not given.json else None))


if __name__ == "__main__":
    main()
