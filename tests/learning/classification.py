"""What the learning proofs of the text classifiers share: reading a corpus, a training loop, and the report."""

import argparse
import gzip
import json
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn

PAD, UNKNOWN = 0, 1
Example = tuple[list[int], int]


@dataclass
class Recipe:
    """How a classifier is trained.

    `decay` maps the share of steps done to a factor of the learning rate; `unknown_rate` is the share of once-seen words
    that training reads as unknown, so that the unknown word's vector is learnt.
    """

    epochs: int
    batch_size: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    unknown_rate: float = 0.0
    clip: float = 0.0
    decay: Callable[[float], float] = field(default=lambda share: 1.0)


def read_rows(path: Path) -> list[dict]:
    """Rows of a `.jsonl` or `.jsonl.gz` file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def build_vocabulary(texts: list[str], min_count: int = 1) -> tuple[dict[str, int], set[int]]:
    """Ids of the words, frequent ones first, and the ids of words seen once."""
    counts = Counter(word for text in texts for word in text.split())
    words = [word for word, count in counts.most_common() if count >= min_count]
    ids = {word: index + 2 for index, word in enumerate(words)}
    return ids, {ids[word] for word in words if counts[word] == 1}


def encode(rows: list[dict], ids: dict[str, int], text: Callable[[dict], str]) -> list[Example]:
    """Word ids and label of each row; an empty text becomes one unknown word."""
    return [([ids.get(word, UNKNOWN) for word in text(row).split()] or [UNKNOWN], row["label"]) for row in rows]


def batches(examples: list[Example], size: int, rng: random.Random | None) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches of texts of similar length; in random order if there is a generator."""
    order = list(range(len(examples)))
    if rng:
        rng.shuffle(order)
    chunk = size * 20
    groups = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lambda index: len(examples[index][0]))
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    if rng:
        rng.shuffle(groups)
    for group in groups:
        yield collate([examples[index] for index in group])


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    longest = max(len(words) for words, _ in examples)
    ids = torch.tensor([words + [PAD] * (longest - len(words)) for words, _ in examples])
    mask = torch.tensor([[1] * len(words) + [0] * (longest - len(words)) for words, _ in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in examples])}


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[Example], size: int = 200) -> float:
    """Percentage of right labels."""
    model.eval()
    right = sum(
        int((model(**batch).logits.argmax(1) == batch["labels"]).sum()) for batch in batches(examples, size, None)
    )
    return 100.0 * right / len(examples)


def train(
    model: nn.Module, recipe: Recipe, examples: dict[str, list[Example]], seed: int, rare: set[int] = frozenset()
) -> dict[str, float]:
    """Train, keep the epoch that is best on `dev`, and report accuracies and CPU seconds.

    `examples` holds `train`, `dev` and `test`; the weights of the best epoch are in the model afterwards.
    """
    began, rng = time.process_time(), random.Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    steps = recipe.epochs * -(-len(examples["train"]) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.decay(step / steps))
    best, kept = -1.0, {}
    for epoch in range(recipe.epochs):
        model.train()
        seen = _with_unknown(examples["train"], rare, recipe.unknown_rate, rng)
        for batch in batches(seen, recipe.batch_size, rng):
            _step(model, batch, optimizer, parameters, recipe.clip)
            schedule.step()
        found = accuracy(model, examples["dev"])
        print(
            f"  epoch {epoch + 1}: dev {found:.2f} ({time.process_time() - began:.0f} s)", file=sys.stderr, flush=True
        )
        if found > best:
            best, kept = found, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    seconds = time.process_time() - began
    found = {"dev": best, "test": accuracy(model, examples["test"]), "cpu_seconds": round(seconds, 1)}
    print(f"  {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def _step(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer, parameters: list, clip: float) -> None:
    model(**batch).loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    if hasattr(model, "apply_constraints"):
        model.apply_constraints()


def _with_unknown(examples: list[Example], rare: set[int], rate: float, rng: random.Random) -> list[Example]:
    if not rate:
        return examples
    return [
        ([UNKNOWN if word in rare and rng.random() < rate else word for word in words], label)
        for words, label in examples
    ]


def split_dev(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and development part, drawn at random."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    cut = round(len(order) * share)
    return [examples[i] for i in order[cut:]], [examples[i] for i in order[:cut]]


@dataclass(frozen=True)
class Task:
    """One row of a report.

    Attributes:
        name: what is trained on what.
        run: trains once, given the folder of the corpora and a seed (or fold); its result has `test` and `cpu_seconds`.
        seeds: fixed in advance.
        bar, aim, paper: percentages of right labels; None where there is none.
        note: what a reader must know to compare.
        figure: what `test` is.
    """

    name: str
    run: Callable[[Path, int], dict]
    seeds: tuple[int, ...] = (0,)
    bar: float | None = None
    aim: float | None = None
    paper: float | None = None
    note: str = ""
    figure: str = "accuracy"

    def row(self, runs: list[dict]) -> dict:
        """Mean test accuracy beside its bar and the paper's figure; `passed` is None until every seed has run."""
        mean = statistics.mean(run["test"] for run in runs)
        whole = len(runs) == len(self.seeds)
        return {
            "name": self.name,
            "measure": self.figure,
            self.figure: round(mean, 3),
            "bar": self.bar,
            "aim": self.aim,
            "paper": self.paper,
            "passed": (self.bar is None or mean >= self.bar) if whole else None,
            "most_cpu_seconds": max(run["cpu_seconds"] for run in runs),
            **({"note": self.note} if self.note else {}),
            "runs": runs,
        }


def prove(description: str, command: str, tasks: dict[str, Task], needs_data: bool = True) -> None:
    """Run the tasks asked for, seed by seed, and report them; without `needs_data` their corpus is Python's own.

    `--output FILE` is written after every run; what it already holds is not run again, so a run that was cut goes on
    where it stopped.
    """
    torch.set_num_threads(1)
    given = arguments(description, needs_data)
    found: dict[str, list[dict]] = {}
    if given.output and given.output.exists():
        found = {row["name"]: row["runs"] for row in json.loads(given.output.read_text())["rows"]}
    for name, task in tasks.items():
        if given.only and name not in given.only:
            continue
        runs = found.setdefault(task.name, [])
        for seed in task.seeds:
            if seed not in [run["seed"] for run in runs]:
                print(f"{task.name}, seed {seed}", file=sys.stderr, flush=True)
                runs.append({"seed": seed, **task.run(given.data, seed)})
            if given.output:
                given.output.write_text(document(command, tasks, found) + "\n")
    print(document(command, tasks, found) if given.json else table(tasks, found))


def arguments(description: str, needs_data: bool = True) -> argparse.Namespace:
    """Command line of a proof."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=needs_data, help="folder with the corpora")
    parser.add_argument("--only", nargs="*", help="run these tasks")
    parser.add_argument("--output", type=Path, help="JSON file to write after every run and to go on from")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def document(command: str, tasks: dict[str, Task], found: dict[str, list[dict]]) -> str:
    """The rows with date, versions and command, as JSON."""
    stamp = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "command": command,
    }
    return json.dumps({**stamp, "rows": _rows(tasks, found)}, indent=1)


def table(tasks: dict[str, Task], found: dict[str, list[dict]]) -> str:
    """The rows, a line each."""
    lines = [
        f"{row['name']:<52} {row[row['measure']]:7.2f} (bar {row['bar']}, paper {row['paper']})"
        for row in _rows(tasks, found)
    ]
    return "\n".join(lines)


def _rows(tasks: dict[str, Task], found: dict[str, list[dict]]) -> list[dict]:
    return [task.row(found[task.name]) for task in tasks.values() if found.get(task.name)]
