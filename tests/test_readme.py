"""The README does what it says: its commands and its script are run, its figures and its table are checked for form."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lnlm.flows.recipe import read_recipe
from hf_lnlm.registry import FAMILIES, Family

from .contract.cases import tiny_fields

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/"
INSTALLING = [text.strip() for language, text in BLOCKS if "pip install" in text]
RUNNABLE = [
    (language, text) for language, text in BLOCKS if language in ("bash", "python") and "pip install" not in text
]
PATHS = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)


def test_the_two_commands_stand_as_promised():
    assert len(README.splitlines()) <= 220
    assert sorted(INSTALLING) == [f"{INSTALL}hf-lnlm demo", f"{INSTALL}pytest"]
    assert all(language or text.strip() in INSTALLING for language, text in BLOCKS), "a block that no test runs"
    assert {language for language, _ in BLOCKS} <= {"", "bash", "python"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder as a reader has it. Every block has its own: it stands on what it does itself."""
    for name in ("training", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    return done.stdout


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(len(RUNNABLE)))
def test_block_runs(number: int, folder: Path):
    language, text = RUNNABLE[number]
    if language == "python":
        (folder / f"block{number}.py").write_text(text)
        assert run([sys.executable, f"block{number}.py"], folder)
        return
    for line in filter(None, (line.split("  # ")[0].strip() for line in text.splitlines())):
        assert line.startswith(("hf-lnlm ", "python -m ")), line
        run(shlex.split(line), folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_for_several_processes_works_on_a_cpu(folder: Path, monkeypatch):
    (command,) = re.findall(r"`(torchrun [^`]+)`", README)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PET_MASTER_PORT", str(free.getsockname()[1]))
    (folder / "text.txt").write_text("".join(f"line {number} of a text for two processes\n" for number in range(2000)))
    quick = ["training.max_steps=2", "training.warmup_steps=0", "training.eval_steps=2", "training.save_steps=2"]
    quick += ["data.source=text.txt", "data.unit=line", "training.per_device_train_batch_size=2"]
    printed = run([*shlex.split(command), "--output", "two", *[w for q in quick for w in ("--set", q)]], folder)
    assert printed.count("saved to") == 1
    recipe = read_recipe(folder / "two" / "recipe.yaml")
    assert recipe.training["max_steps"] == 2 and "use_cpu" not in recipe.training
    assert (folder / "two" / "model.safetensors").is_file()


def script() -> str:
    """The README's script with stock classes only."""
    (text,) = (text for language, text in RUNNABLE if language == "python" and "Trainer(" in text)
    return text


def test_the_script_is_short_and_stock():
    lines = [line for line in script().splitlines() if line.strip()]
    code = [line for line in lines if "import" not in line]
    assert len(code) <= 20
    assert set(re.findall(r"hf_lnlm\.(\w+)", script())) <= {"build_tokenizer"}


def script_for(family: Family) -> str:
    """The README's script with another family in the place of the recurrent one, and a few steps.

    A family without a causal language model takes its masked one, or only the second half: fine-tuning.
    """
    special = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "num_labels"}
    fields = {name: value for name, value in tiny_fields(family.model_type).items() if name not in special}
    text, pretrained = script(), "AutoModelForCausalLM"
    if "AutoModelForCausalLM" not in family.models and "AutoModelForMaskedLM" in family.models:
        pretrained = "AutoModelForMaskedLM"
        text = re.sub(r'print\(pipeline\("text-generation".*\n', "", text).replace("mlm=False", "mlm=True")
        text = text.replace("AutoModelForCausalLM", pretrained)
        if family.bidirectional:
            fields |= family.bidirectional
    elif "AutoModelForCausalLM" not in family.models:
        text = re.sub(r"^(texts = |Trainer\(model, |print\(pipeline\(\"text-gen).*\n", "", text, flags=re.MULTILINE)
        text = text.replace("AutoModelForCausalLM.from_config", "AutoModelForSequenceClassification.from_config")
    text = text.replace('"lnlm_rnn", hidden_size=64', f'"{family.model_type}", **{fields}')
    assert f'"{family.model_type}"' in text
    return re.sub(r"max_steps=\d+", "max_steps=2", text)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)
def test_the_script_runs_for_every_family(family: Family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "AutoModelForSequenceClassification" not in family.models:
        pytest.fail(f"{family.model_type} cannot be fine-tuned as the README promises")
    exec(compile(script_for(family), "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "score" in printed
    assert (tmp_path / "runs" / "script" / "classifier" / f"modeling_{family.name}.py").is_file()


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_link_leads_somewhere(path: str):
    assert (ROOT / path).exists()
