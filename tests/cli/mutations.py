"""Wrong requests and damaged checkpoints by the hundred: each must be refused by one line.

Every mutation is wrong by construction, so that exit status 0 is a silent acceptance. Commands run in processes forked
from one that has imported everything, each with at most ten CPU-seconds. `python -m tests.cli.mutations` prints the
figures and what it found.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_lnlm.cli.main import main
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.flows.recipe import RecipeDumper
from hf_lnlm.registry import FAMILIES

from ..contract.cases import tiny_fields

CPU_SECONDS = 10
LAST_RESORT = ("TypeError:", "AttributeError:", "KeyError:", "IndexError:", "AssertionError:", "NotImplementedError:")


@dataclass(frozen=True)
class Mutation:
    """A wrong request: what is wrong, and the command's words."""

    kind: str
    what: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of it: exit status (negative: a signal), and both streams."""

    mutation: Mutation
    status: int
    out: str
    err: str

    @property
    def faults(self) -> list[str]:
        """What is wrong with the answer."""
        found = []
        if "Traceback (most recent call last)" in self.err + self.out:
            found.append("traceback")
        if self.status == 0:
            found.append("silent acceptance")
        if self.status < 0:
            found.append(f"killed by signal {-self.status}")
        if self.status > 0 and not (self.err.strip() or self.out.strip()):
            found.append("no message")
        if "error: " in self.err and self.err.rpartition("error: ")[2].startswith(LAST_RESORT):
            found.append("message of the last resort")
        return found


# ---- requests -------------------------------------------------------------------------------------------------------

OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "training.learning_rate": (-1e-3, float("nan"), float("inf"), "fast", [1e-3], True),
    "training.weight_decay": (-0.1, float("nan"), float("-inf"), "none"),
    "training.max_grad_norm": (-1.0, float("nan")),
    "training.max_steps": (0, -5, 2.5, "many", float("inf")),
    "training.num_train_epochs": (0, -1, float("nan"), float("inf")),
    "training.save_steps": (-2, 0, float("nan")),
    "training.eval_steps": (-1, 0, float("inf")),
    "training.logging_steps": (-3, 0, "often"),
    "training.warmup_steps": (-1, float("nan"), "x"),
    "training.per_device_train_batch_size": (0, -4, 1.5, "big"),
    "training.per_device_eval_batch_size": (0, -1),
    "training.gradient_accumulation_steps": (0, -2, 0.5),
    "training.label_smoothing_factor": (-0.1, 5, float("nan")),
    "training.adam_beta1": (-0.5, 1.5),
    "training.adam_beta2": (float("nan"), 7),
    "training.adam_epsilon": (-1e-8, float("nan")),
    "training.seed": (-1, 2**40, 0.5, "lucky"),
    "training.save_total_limit": (0, -1, 1.5),
    "training.dataloader_num_workers": (-1, "two"),
    "training.lr_scheduler_type": ("cosin", 3, None, "linear_decay"),
    "training.optim": ("adamz", 1, "sgd_w"),
    "training.eval_strategy": ("sometimes", 2),
    "training.early_stopping_patience": (0, -1, 1.5),
    "training.fp16": (True, "half"),
    "training.resume_from_checkpoint": ("elsewhere",),
    "training.do_train": (True,),
    "training.hub_token": ("hf_" + "a" * 34,),
    "training.output_dir": ("", 3),
    "data.validation": (-0.5, 1.0, 2.5, float("nan"), "missing.txt"),
    "data.limit": (0, -3, 1.5, "few"),
    "data.block_size": (0, -8, 4, 2.5, "long"),
    "data.unit": ("page", 1),
    "data.encoding": ("utf-99", "", 8),
    "data.errors": ("lenient",),
    "data.source": ("missing/*.txt", "no-such-file.txt", 7, {}),
    "tokenizer.kind": ("bytes", "bpe2", 1),
    "tokenizer.vocab_size": (0, -1, "big", 3),
    "tokenizer.path": ("nowhere",),
    "model.size": ("huge", 1),
    "model.family": ("lnlm_rmn", "bort", 5, ""),
    "model.trust_remote_code": (True,),
    "objective.name": ("casual", "masked_lm", 4),
    "objective.mask_probability": (0.3,),
    "lora.r": (8, 4),
    "lora.dropout": (0.1,),
    "lora.alpha": (16,),
    "hub.private": ("maybe",),
    "hub.token": ("hf_" + "b" * 34,),
}
"""Recipe key → values that are wrong in a recipe that trains a causal model on text."""

TEXTS: dict[str, bytes] = {
    "tab": b"model:\n\tfamily: lnlm_rnn\n",
    "unclosed": b"model: {family: lnlm_rnn\n",
    "twice": b"model: {family: lnlm_rnn}\nmodel: {family: lnlm_ssm}\n",
    "list": b"- model\n- data\n",
    "number": b"7\n",
    "text": b"family lnlm_rnn\n",
    "not UTF-8": b"model: {family: \xff\xfe}\n",
    "binary": bytes(range(256)),
    "deep": b"model: " + b"[" * 5000,
    "large": b"# " + b"x" * (1 << 20) + b"\n",
    "object": b"model: !!python/object/apply:os.system [true]\n",
    "section is a list": b"model: [family]\n",
    "section is text": b"training: fast\n",
    "endless alias": b"model: &a [*a]\n",
    "half a pair": b'model: {family: "\\ud800"}\n',
    "null byte": b"model: {family: lnlm\x00rnn}\n",
    "terminal": b'model: {family: "\\x1b[31mred"}\n',
    "date": b"training: {learning_rate: 2020-01-01}\n",
}
"""Whole recipe files that are wrong."""


def base_recipe(data: Path, family: str) -> dict[str, Any]:
    """A recipe that trains for one step."""
    fields = {"hidden_size": 16} if family != "lnlm_ssm" else {}
    return {
        "model": {"family": family, "size": "tiny", "config": fields},
        "tokenizer": {"kind": "byte"},
        "data": {"source": str(data), "validation": 0.2, "unit": "line", "block_size": 16},
        "objective": {"name": "causal"},
        "training": {"max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 2, "use_cpu": True},
    }


def misspelt(name: str, known: set[str], draw: random.Random) -> str:
    """A name that isn't known, one slip away from one that is."""
    while True:
        place = draw.randrange(len(name))
        slip = draw.choice(("drop", "double", "swap", "other"))
        wrong = {
            "drop": name[:place] + name[place + 1 :],
            "double": name[:place] + name[place] + name[place:],
            "swap": name[:place] + name[place : place + 2][::-1] + name[place + 2 :],
            "other": name[:place] + draw.choice("abcdefghijklmnopqrstuvwxyz") + name[place + 1 :],
        }[slip]
        if wrong not in known and wrong.isidentifier():
            return wrong


def recipe_mutations(count: int, folder: Path, data: Path, draw: random.Random) -> Iterator[Mutation]:
    """Wrong recipes and flags, kind after kind."""
    kinds = [_value, _misspelling, _file, _setting, _flags, _field]
    for number in range(count):
        place = folder / f"request{number}"
        place.mkdir()
        yield kinds[number % len(kinds)](place, data, draw)


def _family(draw: random.Random) -> str:
    return draw.choice([row.model_type for row in FAMILIES if "AutoModelForCausalLM" in row.models and row.room != "x"])


def _written(place: Path, recipe: dict[str, Any], *more: str) -> tuple[str, ...]:
    file = place / "recipe.yaml"
    file.write_text(yaml.dump(recipe, Dumper=RecipeDumper, allow_unicode=True))
    return ("pretrain", str(file), "--output", str(place / "out"), *more)


def _value(place: Path, data: Path, draw: random.Random) -> Mutation:
    key = draw.choice(sorted(OUT_OF_RANGE))
    value = draw.choice(OUT_OF_RANGE[key])
    recipe = base_recipe(data, _family(draw))
    section, _, name = key.partition(".")
    recipe.setdefault(section, {})[name] = value
    words = _written(place, recipe)
    if key == "training.output_dir":
        words = words[:2]
    return Mutation("value", f"{key}={value!r}", words)


def _misspelling(place: Path, data: Path, draw: random.Random) -> Mutation:
    recipe = base_recipe(data, _family(draw))
    section = draw.choice(sorted(recipe))
    if draw.random() < 0.25:
        wrong = misspelt(section, set(recipe) | {"lora", "hub"}, draw)
        recipe[wrong] = recipe.pop(section)
        return Mutation("misspelt", wrong, _written(place, recipe))
    key = draw.choice(sorted(recipe[section]))
    wrong = misspelt(key, set(recipe[section]) | {"path", "unit", "mode"}, draw)
    recipe[section][wrong] = recipe[section][key]
    return Mutation("misspelt", f"{section}.{wrong}", _written(place, recipe))


def _file(place: Path, data: Path, draw: random.Random) -> Mutation:
    name = draw.choice(sorted(TEXTS))
    file = place / "recipe.yaml"
    file.write_bytes(TEXTS[name])
    words = ("pretrain", str(file), "--data", str(data), "--output", str(place / "out"))
    return Mutation("file", name, words)


def _setting(place: Path, data: Path, draw: random.Random) -> Mutation:
    wrong = draw.choice((
        ["training.learning_rate=-1"], ["training.lr_scheduler_type=cosine_with_min_lr"], ["learning_rate=1"], ["=1"],
        ["training.lr_scheduler_kwargs={min_lr: 0.1}"], ["training.lr_scheduler_kwargs={powr: 2}"],
        ["training.lr_scheduler_type=warmup_stable_decay"], ["training.early_stopping_threshold=0.1"],
        ["data.validation=0", "training.metric_for_best_model=accuracy"], ["training.early_stopping_patience=2"],
        ["training.load_best_model_at_end=true", "training.metric_for_best_model=accuracyy"],
        ["training.learning_rate={"], ["training..x=1"], ["model.config.hidden_sise=8"], ["lora.r=4"],
        ["model.config=7"], ["training=3"], ["objective.mask_probability=0.1"], ["model.head=lnlm_encoder_cnn"],
        ["training.max_steps=\\ud800"], ["data.text_column=[text]"], ["tokenizer.template=gpt"], ["hub.push=yes please"],
    ))  # fmt: skip
    words = _written(place, base_recipe(data, _family(draw)))
    return Mutation("setting", " ".join(wrong), (*words, *[word for item in wrong for word in ("--set", item)]))


def _flags(place: Path, data: Path, draw: random.Random) -> Mutation:
    out = str(place / "out")
    (place / "file").write_text("x")
    wrong = draw.choice((
        ("pretrain",), ("pretrain", "--family", "lnlm_rnn"), ("pretrain", "--family", "lnlm_rnn", "--data", "nothing.txt"),
        ("pretrain", "--family", "lnlm_text_cnn", "--data", str(data)), ("finetune", "--family", "lnlm_rnn"),
        ("finetune", "--checkpoint", "nowhere", "--task", "regression", "--data", str(data)), ("generate", "nowhere"),
        ("pretrain", "--family", "lnlm_rnn", "--data", str(data), "--output", str(place / "file")),
        ("pretrain", "--family", "lnlm_rnn", "--data", str(data), "--resume", "--output", out),
        ("pretrain", "--family", "lnlm_rnn", "--data", str(data), "--output", out, "--resume", "--overwrite"),
        ("pretrain", "--family", "lnlm_rnn", "--data", str(data), "--objective", "masked", "--size", "tinny"),
        ("pretrain", "--family", "lnlm_gpt3", "--data", str(data), "--objective", "span", "--output", out),
        ("pretrain", "--family", "lnlm_rnn", "--data", str(data), "--tokenizer", "morse", "--output", out),
        ("pretrain", "--family", "lnlm_rnn", "--data", str(data), "--validation", "1.5", "--output", out),
        ("evaluate", str(place)), ("evaluate", "a/b/c"), ("evaluate", "x\udcff"), ("check", str(place / "file")),
        ("check", "nowhere"), ("push", "nowhere", "a/b"), ("push", str(place), "a b/c", "--dry-run"),
        ("generate", str(place), "--prompt", "x\udcff"), ("generate", "x", "--temperature", "hot"),
        ("generate", str(place), "--max-new-tokens", "0"), ("align", "--method", "ppo"), ("align", "--data", str(data)),
        ("plot", "addressing", "nowhere"), ("list", "--jsn"), ("conjure",), ("demo", "--seconds", "-1"),
        ("plot", "addressing", str(place), "--task", "cpy"), ("plot", "addressing", str(place), "--output", "x.doc"),
        ("finetune", "--family", "lnlm_rnn", "--task", "sequence_classifcation", "--data", str(data), "--output", out),
        ("finetune", "--family", "lnlm_rnn", "--task", "causal", "--data", str(data), "--output", out),
        ("finetune", "--family", "lnlm_rnn", "--task", "regression", "--data", str(data), "--merge", "--output", out),
    ))  # fmt: skip
    return Mutation("flags", " ".join(wrong[:6]), wrong)


def _field(place: Path, data: Path, draw: random.Random) -> Mutation:
    family = _family(draw)
    row = next(row for row in FAMILIES if row.model_type == family)
    names = [
        name for name in tiny_fields(family) if name not in ("num_labels", "filter_sizes") and "token_id" not in name
    ]
    name = draw.choice(names)
    value = draw.choice((-1, 0, 2**40, "many", None, [3], {"x": 1}, float("nan"), 0.5))
    if row.config_class.__dataclass_fields__.get(name) is None or "None" in str(
        row.config_class.__annotations__.get(name)
    ):
        value = "many"
    recipe = base_recipe(data, family)
    recipe["model"]["config"] = {name: value}
    return Mutation("field", f"{family} {name}={value!r}", _written(place, recipe))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoints(folder: Path) -> list[Path]:
    """A tiny checkpoint of every family: its language model, else its text classifier."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    found = []
    tokenizer = build_tokenizer("byte")
    for row in FAMILIES:
        causal = "AutoModelForCausalLM" in row.models
        fields = tiny_fields(row.model_type) | {"vocab_size": len(tokenizer), "pad_token_id": 0}
        if row.model_type == "lnlm_linformer":
            fields |= {"is_decoder": True}
        fields.pop("num_labels", None) if causal else None
        auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        place = folder / row.model_type
        auto.from_config(row.config_class(**fields)).save_pretrained(place)
        tokenizer.save_pretrained(place)
        found.append(place)
    return found


def _cut(name: str) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: draw.randrange(len(content) // 2)])

    return damage


def _text(name: str, *contents: bytes) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        (folder / name).write_bytes(draw.choice(contents))

    return damage


def _changed(name: str, *changes: dict[str, Any]) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | draw.choice(changes)))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, draw: random.Random) -> None:
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        tensors = {name: value.clone() for name, value in load_file(file).items()}
        change(tensors, draw.choice([name for name, value in sorted(tensors.items()) if value.is_floating_point()]))
        save_file(tensors, file, {"format": "pt"})

    return damage


def _header(folder: Path, draw: random.Random) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = draw.choice((0, 3, 7, 8, 12))
    content[place] ^= 0x7F
    file.write_bytes(bytes(content))


def _removed(name: str) -> Callable[[Path, random.Random], None]:
    return lambda folder, draw: (folder / name).unlink()


def _indexed(folder: Path, draw: random.Random) -> None:
    (folder / "model.safetensors").unlink()
    index = draw.choice((b"7", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"x": "../../x.safetensors"}}', b"{", b"[]",
                         b'{"metadata": {}, "weight_map": {"x": "/dev/zero"}}', b'{"weight_map": {"x": 5}}'))  # fmt: skip
    (folder / "model.safetensors.index.json").write_bytes(index)


_DEEP = b'{"a":' * 20000 + b"1" + b"}" * 20000
_WRONG_JSON = (
    b"",
    b"7",
    b"[]",
    b"null",
    b"{",
    b'"text"',
    b"\xff\xfe{}",
    b"\x00\x01",
    _DEEP,
    b'{"model_type": "lnlm_rnn"',
)
DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "weights cut": _cut("model.safetensors"),
    "weights without content": _text("model.safetensors", b"", b"\x00" * 8, b"\xff" * 64),
    "weights' header": _header,
    "weights missing": _removed("model.safetensors"),
    "weights' index": _indexed,
    "a tensor missing": _tensors(lambda tensors, name: tensors.pop(name)),
    "a tensor renamed": _tensors(lambda tensors, name: tensors.update({name + "x": tensors.pop(name)})),
    "a tensor of another shape": _tensors(lambda tensors, name: tensors.update({name: torch.zeros(3, 5, 7)})),
    "a tensor not finite": _tensors(lambda tensors, name: tensors[name].fill_(float("nan"))),
    "a tensor of whole numbers": _tensors(lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)})),
    "config cut": _cut("config.json"),
    "config is no config": _text("config.json", *_WRONG_JSON),
    "config missing": _removed("config.json"),
    "model type": _changed("config.json", *({"model_type": x} for x in (7, None, ["lnlm_rnn"], {}, "", "lnlm_x"))),
    "sizes": _changed("config.json", *({"vocab_size": x} for x in (0, -1, 2**60, 5, "263", None, [263], 1.5))),
    "tokenizer cut": _cut("tokenizer.json"),
    "tokenizer is none": _text("tokenizer.json", b"", b"7", b"[]", b"null", b"{}", b"\xff\xfe", b'{"model": 1}'),
    "tokenizer's settings": _text("tokenizer_config.json", b"", b"7", b"[]", b"null", b"{", b"\xff\xfe"),
}
"""Kind → what damages a checkpoint's folder."""


def checkpoint_mutations(
    count: int, folder: Path, sound: list[Path], data: Path, draw: random.Random
) -> Iterator[Mutation]:
    """Damaged checkpoints: every kind for every family before any comes twice."""
    pairs = [(kind, place) for kind in DAMAGES for place in sound]
    draw.shuffle(pairs)
    for number, (kind, place) in enumerate(pairs[:count]):
        damaged = folder / f"damaged{number}" / place.name
        shutil.copytree(place, damaged)
        DAMAGES[kind](damaged, draw)
        writes = not json.loads((place / "config.json").read_text())["architectures"][0].endswith("Classification")
        commands = [("push", str(damaged), "a/b", "--dry-run"), ("check", str(damaged))]
        if writes:
            commands.append(("generate", str(damaged), "--prompt", "ab", "--max-new-tokens", "2"))
            commands.append(("evaluate", str(damaged), "--data", str(data), "--task", "causal"))
        yield Mutation(kind, place.name, commands[number % len(commands)])


# ---- running --------------------------------------------------------------------------------------------------------


def attempt(mutation: Mutation, folder: Path) -> Outcome:
    """Run a mutation's command in a forked process."""
    out, err = folder / "stdout", folder / "stderr"
    child = os.fork()
    if child == 0:
        _become(mutation, out, err)
    _, ended = os.waitpid(child, 0)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return Outcome(mutation, os.waitstatus_to_exitcode(ended), *texts)


def _become(mutation: Mutation, out: Path, err: Path) -> None:
    status = 99
    try:
        used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + CPU_SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (used, used + 5))
        os.chdir(out.parent)
        sys.stdout, sys.stderr, sys.stdin = (
            os.fdopen(os.open(path, flags, 0o600), mode, encoding="utf-8")
            for path, flags, mode in (
                (out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "w"),
                (err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "w"),
                (os.devnull, os.O_RDONLY, "r"),
            )
        )
        try:
            main(list(mutation.words))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException as error:  # what a console would show as a traceback
            print(f"Traceback (most recent call last): {type(error).__name__}: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def outcomes(requests: int, checkpoints: int, folder: Path, seed: int = 0) -> Iterator[Outcome]:
    """Run so many wrong requests and damaged checkpoints in `folder`."""
    import hf_lnlm

    hf_lnlm.register()
    import peft  # noqa: F401  (before the forks, once for all)

    import hf_lnlm.cli.check
    import hf_lnlm.cli.evaluate
    import hf_lnlm.flows.align
    import hf_lnlm.flows.finetune
    import hf_lnlm.flows.push
    import hf_lnlm.trainer.trainer

    data = folder / "text.txt"
    data.write_text("".join(f"line {number} of a text that is long enough\n" for number in range(60)))
    draw = random.Random(seed)
    for mutation in recipe_mutations(requests, folder, data, draw):
        yield attempt(mutation, folder)
    sound = save_checkpoints(folder / "sound")
    for mutation in checkpoint_mutations(checkpoints, folder, sound, data, draw):
        yield attempt(mutation, folder)


def figures(found: list[Outcome]) -> str:
    """What came of all: counts by kind and fault, and every fault."""
    faults = Counter(fault for outcome in found for fault in outcome.faults)
    lines = [
        f"{len(found)} mutations of {len({o.mutation.kind for o in found})} kinds; faults: {dict(faults) or 'none'}"
    ]
    for outcome in found:
        if outcome.faults:
            last = (outcome.err.strip() or outcome.out.strip()).splitlines()[-1:]
            lines.append(
                f"{outcome.faults} {outcome.mutation.kind}: {outcome.mutation.what} | {outcome.mutation.words[0]} | {last}"
            )
    return "\n".join(lines)


def messages(found: list[Outcome]) -> str:
    """What each was answered."""
    return "\n".join(f"{o.mutation.what[:60]} → {o.status} {(o.err.strip() or o.out.strip())[-260:]!r}" for o in found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
        results = list(outcomes(*(numbers[:2] or [300, 200]), Path(place), *numbers[2:]))
        print(messages(results) if "--messages" in sys.argv else figures(results))
