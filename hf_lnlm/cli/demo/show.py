"""`hf-lnlm demo`: memories that learn to copy, then language models side by side, reloaded where hf_lnlm is missing.

First act: a Neural Turing Machine and a Differentiable Neural Computer copy, beside an LSTM. Second act: models of equal
size get equal CPU time on Python's own standard library, in turns, and one table of bits per byte moves for all. Each is
then saved as it would go to the Hub, examined by `hf-lnlm check`, and loaded again in one process that cannot import
hf_lnlm. Every claim of the report is tested on the way; if one fails, so does the command. A second process compiles
meanwhile what is needed next.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UsageProblem
from ...flows.console import live_table
from ...flows.lock import FolderLock
from ...flows.manifest import clear, leftover, recording
from ...flows.output import is_filled, plain_when_piped, quiet_libraries, say
from ...hub.folder import write_text
from ..errors import INTERRUPT_STATUS
from .ahead import CompileAhead
from .copy_act import CopyAct, copy_act
from .race import STATE_FILE, Contender, Progress, bits_per_byte, quiet_trainer, return_memory
from .report import HEADER, PICTURE, REPORT_FILE, Claim, PeakMemory, compressors, table, write_report

BLOCK, BATCH, VOCABULARY = 192, 12, 1024
TARGET = 450_000
"""Parameters of each model, about."""
SECONDS = 15.0
"""CPU seconds of training of each contender, unless told otherwise."""
ROUNDS = 5
VALIDATION_BLOCKS = 32
PROMPT = "def "
SETTINGS_FILE = "demo.json"
INTRODUCTION = """\
Three acts. Memories learn to copy bytes, beside an LSTM. Then {count} language models of equal size ({names})
get equal CPU time on Python's standard library. Then each is loaded where hf_lnlm is not installed.
The standard library is being read; a second process compiles what the models need, the first time only."""
STOCK = {
    "GPT-2 (stock)": {
        "model_type": "gpt2",
        "n_layer": 3,
        "n_head": 3,
        "n_positions": BLOCK,
        "resid_pdrop": 0.0,  # nobody here sees its text twice, and dropout costs the others nothing either
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "learning_rate": 2e-3,
        "width_step": 12,
    },
    "Mamba (stock)": {
        "model_type": "mamba",
        "num_hidden_layers": 1,
        "learning_rate": 4e-3,
        "batch_size": 1,  # without its kernels a step of the others' batch takes longer than all its time
    },
}
SHOWN = ("RNN-LSTM", "SSM", *STOCK)
"""Contenders unless `--all` asks for every causal family."""
AHEAD = 0.1
"""Bits per byte that tell two models apart."""


def demo(
    all_families: bool,
    output: str,
    seconds: float | None,
    copy_seconds: float | None,
    seed: int,
    resume: bool,
    overwrite: bool,
) -> int:
    """Run the command; the arguments are its options. Returns 0 if every claim holds, else 1."""
    begun = time.monotonic()
    plain_when_piped()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(output)
    settings: dict[str, Any] = {"all": all_families, "seconds": seconds, "copy_seconds": copy_seconds, "seed": seed}
    with FolderLock(folder) as lock:
        settings = prepare(lock, settings, resume, overwrite)
        with recording(folder):
            return _show(folder, settings, resume, begun)


def _show(folder: Path, settings: dict[str, Any], resume: bool, begun: float) -> int:
    """Run the acts and write the report; returns the exit status."""
    from .copy_task import memories

    rows = plans(bool(settings["all"]))
    copying = () if settings["copy_seconds"] == 0 else memories()
    families = dict.fromkeys([*copying, *(str(fields["model_type"]) for fields in rows.values())])
    with PeakMemory() as memory, CompileAhead([*families]) as ahead, one_thread(), quiet_libraries():
        contenders: list[Contender] = []
        try:
            say(INTRODUCTION.format(count=len(rows), names=", ".join(rows)))
            contenders, validation, text = assemble(folder, rows, settings)
            baselines = compressors(text)
            first = copy_act(folder, settings["copy_seconds"], int(settings["seed"]), ahead.wait)
            race(contenders, validation, baselines, resume, ahead.wait)
            samples = {contender.label: sample(contender, settings["seed"]) for contender in contenders}
            claims = [*first.claims, *race_claims(contenders), *publish_claims(folder, contenders, validation)]
        except KeyboardInterrupt:
            for contender in contenders:
                contender.stop()
            print(f"stopped; go on with: hf-lnlm demo --resume --output {folder}", file=sys.stderr)
            return INTERRUPT_STATUS
    facts = {
        "seed": settings["seed"],
        "wall time": f"{time.monotonic() - begun:.0f} s",
        "peak memory": f"{memory.gibibytes:.2f} GiB (this process and those it started)",
        "validation text": f"{len(text):,} bytes in files set aside by a hash of their path",
    }
    report = write_report(folder, first, contenders, baselines, samples, claims, facts)
    for contender in contenders:  # only now: up to here an interrupted demo needs its checkpoints
        shutil.rmtree(contender.folder / "run", ignore_errors=True)
    finish(first, contenders, baselines, samples, claims, facts, report)
    return 0 if all(claim.holds for claim in claims) else 1


def prepare(lock: FolderLock, settings: dict[str, Any], resume: bool, overwrite: bool) -> dict[str, Any]:
    """Lock the output folder and make it ready; returns the settings, those of the earlier run when resuming.

    Raises:
        UsageProblem: the folder is in use, or there is nothing to resume.
    """
    folder = lock.folder
    path = folder / SETTINGS_FILE
    if resume and overwrite:
        raise UsageProblem("--resume goes on with a demo and --overwrite deletes it; give one of them")
    if folder.exists() and not folder.is_dir():
        raise UsageProblem(f"{folder} is a file; --output names a folder")
    lock.refuse_if_held()
    if resume:
        settings = earlier_settings(folder, settings)
        lock.take()
        return settings
    if is_filled(folder):
        if not overwrite:
            raise UsageProblem(f"{folder} holds files already: --resume goes on, --overwrite starts anew")
        found = leftover(folder)
        if not path.is_file() or found.kept:
            strange = found.kept[0] if found.kept else f"{folder} (no {SETTINGS_FILE})"
            raise UsageProblem(f"{strange} was not written by hf-lnlm demo: move it away, or give another --output")
        lock.take()
        clear(folder, found)
    if lock.take() and is_filled(folder):
        raise UsageProblem(f"{folder} has been filled since this demo was started: give another --output")
    with recording(folder, begun=True):
        write_text(path, json.dumps(settings))
    return settings


def earlier_settings(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Settings of the demo in `folder`, which `wanted` must not contradict where it differs from the defaults.

    Raises:
        UsageProblem: there is no demo to go on with, it is finished, or it was begun with other settings.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise UsageProblem(f"nothing to resume in {folder} (no {SETTINGS_FILE})")
    if (folder / REPORT_FILE).is_file():
        raise UsageProblem(f"the demo in {folder} is finished, see {REPORT_FILE} there; --overwrite starts anew")
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise UsageProblem(f"{path} is damaged, so that nothing can go on; give another --output") from None
    for name, value in wanted.items():
        if value and value != found.get(name):
            raise UsageProblem(
                f"--resume goes on with the settings the demo was begun with ({name} = {found.get(name)}), got {value}"
            )
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, so that CPU seconds mean the same for all."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plans(all_families: bool) -> dict[str, dict[str, Any]]:
    """Label → config fields, `model_type`, `learning_rate` and `batch_size` of each contender."""
    from ...registry import FAMILIES

    rows = {
        label: {"model_type": family.model_type, **fields}
        for family in FAMILIES
        for label, fields in family.demo.items()
    }
    rows |= STOCK
    return {label: fields for label, fields in rows.items() if all_families or label in SHOWN}


def assemble(
    folder: Path, rows: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> tuple[list[Contender], list[Any], bytes]:
    """Read the text, build the tokenizer and the models.

    Args:
        folder: the demo's.
        rows: see `plans`.
        settings: the command's.

    Returns:
        the contenders, validation blocks, and the bytes of the validation files.
    """
    from ...data.blocks import PackedBlocks
    from ...data.sources import load_documents
    from ...data.tokenizers import build_tokenizer

    documents = load_documents("stdlib", validation=0.04, seed=0)
    tokenizer = build_tokenizer("bpe", documents.train["text"][:300], vocab_size=VOCABULARY)
    folder.joinpath("models").mkdir(exist_ok=True)
    budget = float(settings["seconds"] or SECONDS)
    data, contenders = PackedBlocks(documents.train, tokenizer, BLOCK, overlap=1), []
    for label, fields in rows.items():
        model = build(dict(fields), tokenizer, int(settings["seed"]))
        home = folder / "models" / label.lower().replace(" ", "-").replace("(", "").replace(")", "")
        home.mkdir(exist_ok=True)
        rate = float(fields.get("learning_rate", 4e-3))
        rows_a_step = int(fields.get("batch_size", BATCH))
        contenders.append(Contender(label, model, tokenizer, data, rate, home, budget, rows_a_step))
    validation_files: Any = documents.validation
    held = validation_files["text"]
    blocks = PackedBlocks(validation_files, tokenizer, BLOCK, overlap=1)
    step = max(1, len(blocks) // VALIDATION_BLOCKS)
    validation = [blocks[index] for index in range(0, len(blocks), step)]
    return contenders, validation, "\n".join(held).encode()


def build(fields: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """Build a model with about `TARGET` parameters: the widest that does not exceed it."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    for name in ("learning_rate", "batch_size"):
        fields.pop(name, None)
    step = int(fields.pop("width_step", 4))
    model_type = fields.pop("model_type")
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}

    def config(width: int) -> Any:
        return AutoConfig.for_model(
            model_type,
            **{"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **special, **fields},
            hidden_size=width,
        )

    width = fitting_width(config, step)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config(width))


def fitting_width(config: Any, step: int) -> int:
    """The hidden size, a multiple of `step`, whose parameter count comes closest to `TARGET`; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    def count(width: int) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config(width))
        return sum(parameter.numel() for parameter in model.parameters())

    low, high = step, 1024 // step * step
    while high - low > step:
        middle = (low + high) // (2 * step) * step
        low, high = (middle, high) if count(middle) <= TARGET else (low, middle)
    return min((low, high), key=lambda width: abs(count(width) - TARGET))


def make_trainer(contender: Contender, turns: Any) -> Any:
    """The contender's Trainer, with the callback that takes turns."""
    from ...objectives import objective

    causal = objective("causal")
    return quiet_trainer(
        contender.model,
        contender.folder / "run",
        contender.batch_size,
        contender.learning_rate,
        {"weight_decay": 0.01, "seed": 0},
        train_dataset=contender.data,
        data_collator=causal.collator(contender.tokenizer, 0),
        processing_class=contender.tokenizer,
        callbacks=[turns],
        objective=causal,
    )


def race(
    contenders: list[Contender],
    validation: list[Any],
    baselines: dict[str, float],
    resume: bool,
    wait: Callable[[str], None],
) -> None:
    """Train all contenders in turns and show the table as it moves; `wait` returns when a family's loops are compiled."""
    from ...trainer.checkpoints import list_checkpoints

    for contender in contenders:
        wait(contender.model.config.model_type)
        run = contender.folder / "run"
        saved = resume and run.is_dir() and bool(list_checkpoints(run))
        if not saved:  # progress without its weights is none
            contender.progress = Progress()
            contender.progress.curve.append((0.0, bits_per_byte(contender.model, validation)))
        warm_up(contender)
        contender.start(make_trainer, saved)
    with moving_table(contenders, baselines) as show:
        show()
        while not all(contender.finished for contender in contenders):
            for contender in contenders:
                if contender.finished:
                    continue
                contender.run_turn(contender.budget / ROUNDS)
                measure(contender, validation)
                return_memory()
                show()


def warm_up(contender: Contender) -> None:
    """Run one training step that changes nothing: what is compiled or loaded at the first is charged to nobody."""
    import torch

    ids = torch.as_tensor(contender.data[0]["input_ids"])[None, :16]
    contender.model(input_ids=ids, labels=ids).loss.backward()
    contender.model.zero_grad()


def measure(contender: Contender, validation: list[Any]) -> None:
    """Add a point to the contender's curve; write its progress down when its weights are written down too."""
    progress: Progress = contender.progress
    progress.curve.append((progress.seconds, bits_per_byte(contender.model, validation)))
    if contender.finished:
        progress.save(contender.folder)


@contextmanager
def moving_table(contenders: list[Contender], baselines: dict[str, float]) -> Iterator[Callable[[], None]]:
    """A table that redraws itself on a terminal; elsewhere one plain line a round."""
    if sys.stdout.isatty():
        with live_table("Python's standard library, held-out files", HEADER) as update:
            yield lambda: update(table(contenders, baselines))
        return
    shown = {"round": -1.0}

    def line() -> None:
        done = min(contender.progress.seconds / contender.budget for contender in contenders)
        if (done < shown["round"] + 0.1 and done < 1.0) or done == shown["round"]:
            return
        shown["round"] = done
        bits = "  ".join(f"{contender.label} {contender.progress.curve[-1][1]:.3f}" for contender in contenders)
        say(f"{min(done, 1):4.0%} of the CPU time, bits per byte: {bits}")

    yield line


def sample(contender: Contender, seed: int) -> str:
    """What a contender writes after `PROMPT`."""
    from transformers import set_seed

    set_seed(seed)
    contender.model.eval()
    inputs = contender.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.7, "top_k": 40}
    written = contender.model.generate(**inputs, pad_token_id=contender.tokenizer.pad_token_id, **options)
    return contender.tokenizer.decode(written[0], skip_special_tokens=True)


def race_claims(contenders: list[Contender]) -> list[Claim]:
    """What must hold of the race: equal size, equal time, and that every model learnt."""
    sizes = [contender.parameters for contender in contenders]
    spent = [contender.progress.seconds for contender in contenders]
    claims = [
        Claim(
            f"parameters lie within 10 % of each other ({min(sizes):,} to {max(sizes):,})",
            max(sizes) <= 1.1 * min(sizes),
        ),
        Claim(
            f"CPU time is equal within 10 % ({min(spent):.1f} to {max(spent):.1f} s)",
            max(spent) <= 1.1 * min(spent) + 0.5,
        ),
    ]
    for contender in contenders:
        first, last = contender.progress.curve[0][1], contender.progress.curve[-1][1]
        claims.append(Claim(f"{contender.label} learnt: {first:.2f} to {last:.2f} bits per byte", last < 0.9 * first))
    bits = {contender.label: contender.progress.curve[-1][1] for contender in contenders}
    ours, theirs = bits.get("SSM"), bits.get("Mamba (stock)")
    if ours is not None and theirs is not None and min(spent) >= SECONDS:
        text = f"the SSM is ahead of stock Mamba: {ours:.2f} and {theirs:.2f} bits per byte"
        claims.append(Claim(text, ours < theirs - AHEAD))
    return claims


def publish_claims(folder: Path, contenders: list[Contender], validation: list[Any]) -> list[Claim]:
    """Save every model as for the Hub, examine it, and load all where hf_lnlm is missing."""
    from ...data.tokenizers import fit_length
    from ...hub.card import write_card, write_evaluation
    from ...hub.check import check_folder, is_fit
    from ...models.base import give_umask_mode

    claims = []
    for contender in contenders:
        contender.model.save_pretrained(contender.folder)
        give_umask_mode(contender.folder)
        fit_length(contender.tokenizer, contender.model.config).save_pretrained(contender.folder)
        bits = contender.progress.curve[-1][1]
        write_evaluation(contender.folder, {"data": "stdlib", "task": "causal", "metrics": {"bits_per_byte": bits}})
        write_card(contender.folder)
        findings = check_folder(contender.folder, published=lambda path: not path.startswith(("run/", STATE_FILE)))
        bad = "; ".join(finding.message for finding in findings if finding.level == "fail")
        claims.append(
            Claim(f"{contender.label}: hf-lnlm check finds nothing wrong{': ' + bad if bad else ''}", is_fit(findings))
        )
    return [*claims, *reload_elsewhere(contenders, validation)]


def reload_elsewhere(contenders: list[Contender], validation: list[Any]) -> list[Claim]:
    """Load all checkpoints in one process that can't import hf_lnlm, and compare logits bit by bit."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in validation[:2]])
    tensors = {"ids": ids}
    with torch.no_grad():
        for contender in contenders:
            # loaded here too: where in memory the weights lie may already change the last bit of a matrix product
            model = AutoModelForCausalLM.from_pretrained(contender.folder).eval()
            tensors[contender.folder.name] = model(input_ids=ids, use_cache=False).logits.contiguous()
    return_memory()
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "logits.safetensors"
        save_file(tensors, reference)
        script = Path(__file__).with_name("reload.py")
        command = [sys.executable, "-P", str(script), str(reference), *(str(c.folder) for c in contenders)]
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    found = {line["name"]: line["identical"] for line in lines}
    if run.returncode and len(found) < len(contenders):
        say(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "the other process said nothing")
    return [
        Claim(
            f"{c.label}: reloaded without hf_lnlm, logits bit-identical to those with it",
            found.get(c.folder.name, False),
        )
        for c in contenders
    ]


def finish(
    first: CopyAct,
    contenders: list[Contender],
    baselines: dict[str, float],
    samples: dict[str, str],
    claims: list[Claim],
    facts: dict[str, Any],
    report: Path,
) -> None:
    """Print the result."""
    say()
    for row in first.table:
        say(f"{row[0]:<32}" + "".join(f"{cell:>18}" for cell in row[1:]))
    say()
    for row in [HEADER, *table(contenders, baselines)]:
        say(f"{row[0]:<16}" + "".join(f"{cell:>15}" for cell in row[1:]))
    for label, text in samples.items():
        say(f"\n{label} writes:\n{text.strip()}")
    say()
    for claim in claims:
        say(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}")
    for line in closing(first, contenders, baselines, report):
        say(line)
    say(f"\n{facts['wall time']}, peak memory {facts['peak memory']}; report: {report}")


def closing(first: CopyAct, contenders: list[Contender], baselines: dict[str, float], report: Path) -> list[str]:
    """What was shown, in words, where the pictures are, and what to type next."""
    bits = {contender.label: contender.progress.curve[-1][1] for contender in contenders}
    order = sorted(bits, key=lambda label: bits[label])
    best = next(contender for contender in contenders if contender.label == order[0])
    spent = max(contender.progress.seconds for contender in contenders)
    places = ", then ".join(f"{label} ({bits[label]:.2f})" for label in order)
    squeezed = ", ".join(f"{name} {value:.2f}" for name, value in baselines.items())
    pictures = [name for name in (*first.pictures, PICTURE) if (report.parent / name).is_file()]
    return [
        "\nWhat was shown:",
        *(f"- {claim.text}" for claim in first.claims if claim.holds),
        f"- after {spent:.0f} CPU seconds each, bits for a byte of Python that none has seen: {places};"
        f" compressors that read it whole: {squeezed}",
        "- every model is a folder that stock transformers loads, hf_lnlm installed or not",
        f"Pictures in {report.parent}: {', '.join(pictures) or 'none, for want of hf_lnlm[plot]'}",
        "Next:",
        f'  hf-lnlm generate {best.folder} --prompt "class "',
        f"  hf-lnlm pretrain --family {best.model.config.model_type} --data FILE.txt --output runs/mine",
    ]
