"""`hf-lnlm align`: what it leaves, and what it refuses in which words."""

from __future__ import annotations

import json

import pytest

from .running import run, settings, succeed

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own
QUICK = settings("training.max_steps=2", "training.per_device_train_batch_size=4", "data.limit=16")


def test_refusals(rnn, tmp_path):
    words = ["align", "--checkpoint", rnn, "--data", "stdlib", "--output", tmp_path / "out"]
    for extra, message in (
        (["--method", "ppo"], "TRL has no PPO any more"),
        (["--method", "dpoo"], "did you mean 'dpo'?"),
        ([], "no method: give --method"),
        (["--method", "grpo"], "needs a reward for them"),
        (["--method", "dpo", *settings("objective.betta=1.0")], "did you mean 'beta'?"),
        (["--method", "dpo", *settings("training.carry_state=true")], "training.carry_state doesn't go with dpo"),
    ):
        result = run(*words, *extra)
        assert result.status == 2 and message in result.err, result.err
    assert "no data" in run("align", "--checkpoint", rnn, "--method", "dpo").err


def test_rows_without_the_columns_are_named(rnn, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a {i}", "text": "b"}) + "\n" for i in range(200)))
    result = run("align", "--checkpoint", rnn, "--method", "dpo", "--data", path, "--output", tmp_path / "out")
    assert result.status == 2 and "dpo wants prompt, chosen, rejected" in result.err


def test_dpo_leaves_a_folder_that_is_fit(rnn, tmp_path):
    folder = tmp_path / "run"
    succeed("align", "--checkpoint", rnn, "--method", "dpo", "--data", "stdlib", "--output", folder, *QUICK)
    assert {"model.safetensors", "recipe.yaml", "README.md", "evaluation.json"} <= {p.name for p in folder.iterdir()}
    assert list(folder.glob("modeling_*.py"))
    assert "loss" in json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert {line.split()[0] for line in succeed("check", folder).out.splitlines()} == {"ok"}


@pytest.mark.slow
def test_adapters_only(rnn, tmp_path):
    folder = tmp_path / "run"
    words = ["--method", "sft", "--lora", "--data", "stdlib", "--output", folder]
    succeed("align", "--checkpoint", rnn, *words, *QUICK)
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_a_reward_model_rates_completions(rnn, tmp_path):
    words = ["align", "--checkpoint", rnn, "--data", "stdlib", *QUICK]
    succeed(*words, "--method", "reward", "--output", tmp_path / "reward")
    few = settings("objective.num_generations=2", "objective.max_completion_length=4")
    succeed(*words, "--method", "grpo", "--reward", tmp_path / "reward", "--output", tmp_path / "out", *few)
    assert "reward" in json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    refused = run(*words, "--method", "rloo", "--reward", tmp_path / "nothing", "--output", tmp_path / "none")
    assert refused.status == 2 and "no such checkpoint folder" in refused.err
