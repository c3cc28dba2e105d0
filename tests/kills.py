"""Runs of every kind of family, killed again and again: each must go on, and end with the bits of one that was left alone.

`python -m tests.kills [--number 100] [--seed 0] [KIND …]` prints one line of JSON a kind. A run is a command's function
in a forked process. It is killed at its n-th use of a file in its folder (before it happens), in the middle of a file
that grows beyond some size, or at some time; the first and the last uses by a run that goes on are drawn more often.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as T

import hf_lnlm
from hf_lnlm.flows.output import is_draft
from hf_lnlm.hub.folder import safetensors_entries

from .trainer.runs import forked, wait

COMMON = ["training.per_device_train_batch_size=4", "training.save_steps=1", "training.lr_scheduler_type=constant",
          "training.warmup_steps=0", "training.save_total_limit=2", "training.logging_steps=1000",
          "training.use_cpu=true"]  # fmt: skip
SMALL = ["data.block_size=16", "data.validation=0"]
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lanes": ("pretrain", {"family": "lnlm_rnn", "tokenizer": "byte"}, SMALL),
    "bpe": ("pretrain", {"family": "gpt2", "tokenizer": "bpe"}, [*SMALL, "tokenizer.vocab_size=300", "data.unit=line"]),
    "stream": ("pretrain", {"family": "lnlm_ssm", "tokenizer": "byte"},
               [*SMALL, "data.streaming=true", "model.config.backend=eager"]),
    "masked": ("pretrain", {"family": "lnlm_linformer", "tokenizer": "char", "objective": "masked"}, SMALL),
    "composed": ("pretrain", {"family": "lnlm_rnn", "tokenizer": "byte", "objective": "replaced_token"}, SMALL),
    "memory": ("pretrain", {"family": "lnlm_ntm", "objective": "copy"}, ["objective.longest=4"]),
    "classes": ("finetune", {"family": "lnlm_text_cnn", "tokenizer": "word", "task": "sequence_classification"}, SMALL),
    "tags": ("finetune", {"family": "lnlm_dnc", "tokenizer": "word", "task": "token_classification"},
             [*SMALL, "model.config.backend=eager"]),
    "adapter": ("finetune", {"task": "causal", "lora": True}, SMALL),
}  # fmt: skip
USES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"})
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
STEPS = 3


def write_data(root: Path) -> dict[str, Path]:
    """Write a file for each command and kind of rows; returns kind → file."""
    text, rows, tags = root / "t.txt", root / "rows.jsonl", root / "tags.conll"
    text.write_text("".join(f"line {n} of {n * n}\n" for n in range(60)))
    rows.write_text("".join(json.dumps({"text": f"film {n}", "label": "pn"[n % 2]}) + "\n" for n in range(30)))
    tags.write_text("".join(f"Berlin\tB-LOC\nfilm{n % 7}\tO\n\n" for n in range(30)))
    return dict.fromkeys(KINDS, text) | {"classes": rows, "tags": tags}


class Uses:
    """Counts the uses of files in a folder, and ends the process at one of them.

    Args:
        folder: only its files count.
        at: the use to end at, from 1; 0 for none.
        most_bytes: end when a file grows beyond so many bytes after that use, instead of at once; 0 for at once.
    """

    def __init__(self, folder: Path, at: int = 0, most_bytes: int = 0) -> None:
        self.prefix, self.at, self.most_bytes, self.count = str(folder), at, most_bytes, 0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in USES or not str(arguments[0]).startswith(self.prefix):
            return
        self.count += 1
        if self.count == self.at:
            if not self.most_bytes:
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most_bytes, resource.RLIM_INFINITY))


class Killed:
    """A run of one kind in its folder, as somebody starts it again whenever it has died.

    Args:
        kind: of `KINDS`.
        folder: the run's.
        data: its file.
        base: checkpoint that an adapter is trained on.
    """

    def __init__(self, kind: str, folder: Path, data: Path, base: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.command, self.options, self.settings = KINDS[kind]
        if kind != "memory":
            self.options = {**self.options, "data": data}
        if kind == "adapter":
            self.options = {**self.options, "checkpoint": base}

    def start(self, steps: int, at: int = 0, most_bytes: int = 0) -> int:
        """Start it in a process of its own, going on if there is something to go on with; returns the process's id."""
        return forked(lambda: self._run(steps, at, most_bytes))

    def _run(self, steps: int, at: int, most_bytes: int) -> None:
        with self.log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        uses = Uses(self.folder, at, most_bytes)
        command, begun = getattr(hf_lnlm, self.command), (self.folder / "recipe.yaml").exists()
        more = {"settings": [f"training.max_steps={steps}"], "resume": True}
        command(output=self.folder, **(more if begun else self._first(steps)))
        self.folder.with_suffix(".uses").write_text(str(uses.count))

    def _first(self, steps: int) -> dict[str, Any]:
        return {**self.options, "settings": [*COMMON, *self.settings, f"training.max_steps={steps}"]}

    def finish(self, steps: int) -> int:
        """Run to the end; returns how many uses of files that took.

        Raises:
            RuntimeError: it fails; with what it said.
        """
        if status := wait(self.start(steps)):
            raise RuntimeError(f"{self.folder.name} ends with {status}: {self.log.read_text()[-2000:]}")
        return int(self.folder.with_suffix(".uses").read_text())

    def weights(self) -> bytes:
        """The bytes of its weights."""
        found = {path.name: path for path in self.folder.glob("*model.safetensors")}
        path = found.get("adapter_model.safetensors") or found["model.safetensors"]
        assert safetensors_entries(path)
        return path.read_bytes()


def drawn(generator: random.Random, uses: int) -> int:
    """A use of a file to die at: one of the first, of the last, or any."""
    return generator.choice(
        [generator.randint(1, min(40, uses)), generator.randint(max(1, uses - 40), uses), generator.randint(1, uses)]
    )


def kill_again_and_again(kind: str, number: int, seed: int, root: Path, data: Path, base: Path) -> dict[str, Any]:
    """Kill a run `number` times, go on each time, and compare its end with that of one that was left alone.

    Returns:
        The kind, how many kills hit, what went wrong, steps, and whether the end is the same.
    """
    generator = random.Random(f"{seed} {kind}")
    straight, run = (Killed(kind, root / f"{kind}_{name}", data, base) for name in ("straight", "run"))
    fresh = straight.finish(STEPS)
    again = straight.finish(2 * STEPS)
    found: dict[str, Any] = {"kind": kind, "kills": 0, "faults": []}
    goal, tries, started = STEPS, 0, time.monotonic()
    while found["kills"] < number and tries < 2 * number and not found["faults"]:
        tries += 1
        begun = (run.folder / "recipe.yaml").exists()
        most = generator.choice([0, 0, generator.randint(1, 60_000)])
        child = run.start(goal, drawn(generator, again if begun else fresh), most)
        late = threading.Timer(generator.uniform(0.05, 1.5), os.kill, (child, signal.SIGKILL))
        if generator.random() < 0.2:
            late.start()
        status = wait(child)
        late.cancel()
        found["kills"] += status in KILLED
        if status == 0:
            goal += STEPS
        elif status not in KILLED:
            found["faults"].append(f"status {status}: {run.log.read_text()[-1500:]}")
    if found["faults"]:
        return found
    goal = max(goal, 2 * STEPS)
    run.finish(goal)
    straight.finish(goal)
    left = [
        path.name for path in run.folder.iterdir() if is_draft(path.name) or path.name.startswith((".st", ".de", ".re"))
    ]
    same = run.weights() == straight.weights()
    return {**found, "steps": goal, "same": same, "left": left, "seconds": round(time.monotonic() - started)}


def main() -> None:
    """Kill what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--number", type=int, default=100, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    T.logging.set_verbosity_error()
    import datasets
    import peft  # noqa: F401 (loaded once, before processes are forked)

    import hf_lnlm.flows.finetune  # noqa: F401

    datasets.disable_progress_bars()
    bad = False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        root = Path(place)
        files, base = write_data(root), Killed("lanes", root / "base", root / "t.txt", root)
        if "adapter" in (asked.kinds or KINDS):
            base.finish(1)
        for kind in asked.kinds or KINDS:
            found = kill_again_and_again(kind, asked.number, asked.seed, root, files[kind], base.folder)
            bad |= bool(found["faults"]) or found["kills"] < asked.number or not found["same"] or bool(found["left"])
            print(json.dumps(found), flush=True)
    raise SystemExit(bad)


if __name__ == "__main__":
    main()
