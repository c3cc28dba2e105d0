"""The command as its own process: what it loads and how it ends when interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from .running import QUICK, settings

HEAVY = ("datasets", "peft", "matplotlib", "trl", "numba", "triton", "transformers.trainer", "hf_lnlm.trainer")
COMMAND = [sys.executable, "-m", "hf_lnlm.cli.main"]


def words(text_file, folder, *more):
    return ["pretrain", "--family", "lnlm_rnn", "--data", str(text_file), "--tokenizer", "byte",
            "--output", str(folder), *settings(*QUICK, "data.block_size=32", *more)]  # fmt: skip


def test_help_loads_no_command():
    code = (
        "import sys, torch, transformers\n"
        "before = (transformers.PreTrainedModel, set(sys.modules))[1]\n"  # torch itself loads triton where it is
        "from hf_lnlm.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules and name not in before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]"), result.stdout[-300:]
    for command in (
        "list",
        "pretrain",
        "finetune",
        "evaluate",
        "generate",
        "check",
        "push",
        "align",
        "plot",
        "demo",
        "warm-up",
    ):
        assert command in result.stdout


def test_interrupt_leaves_a_run_that_can_be_resumed(text_file, tmp_path):
    folder = tmp_path / "run"
    started = [*COMMAND, *words(text_file, folder, "training.max_steps=100000", "training.save_steps=100000")]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.stdout.readline() and not (folder / "recipe.yaml").exists():
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert f"hf-lnlm pretrain --resume --output {folder}" in err and "Traceback" not in err
    [checkpoint] = folder.glob("checkpoint-*")
    steps = int(checkpoint.name.split("-")[1])
    again = [*COMMAND, "pretrain", "--resume", "--output", str(folder)]
    more = settings(f"training.max_steps={steps + 1}")
    subprocess.run([*again, *more], capture_output=True, check=True, timeout=300)
    assert (folder / "model.safetensors").is_file()
