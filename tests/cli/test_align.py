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
        (
            ["--method", "dpo", *settings("model.head=lnlm_encoder_cnn")],
            "model.head=lnlm_encoder_cnn is trained on labels",
        ),
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


def test_a_run_is_resumed_from_its_last_checkpoint(rnn, tmp_path):
    words = ["--checkpoint", rnn, "--method", "dpo", "--data", "stdlib"]
    quick = [*QUICK, *settings("training.save_steps=2", "training.lr_scheduler_type=constant")]
    for folder, steps in (("whole", 4), ("parts", 2)):
        more = settings(f"training.max_steps={steps}")
        succeed("align", *words, "--output", tmp_path / folder, *quick, *more)
    parts = tmp_path / "parts"
    torn = parts / "checkpoint-3"  # as a run leaves it that is killed while it saves
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    changed = run("align", "--resume", "--output", parts, *settings("objective.beta=0.9"))
    assert changed.status == 2 and "objective.beta" in changed.err
    succeed("align", "--resume", "--output", parts, *settings("training.max_steps=4"))
    states = [
        json.loads((tmp_path / f / "checkpoint-4" / "trainer_state.json").read_text()) for f in ("whole", "parts")
    ]
    assert states[1]["global_step"] == 4 and len([entry for entry in states[1]["log_history"] if "loss" in entry]) == 4
    whole, again = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts"))
    assert whole == again
    assert "nothing to resume" in run("align", parts / "recipe.yaml", "--resume", "--output", tmp_path / "none").err


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
