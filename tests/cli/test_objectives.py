"""Objectives whose models are made of several, through the commands: parts that are checkpoints of their own."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from hf_lnlm.flows.recipe import read_recipe
from hf_lnlm.objectives import OBJECTIVES
from hf_lnlm.tasks import TASKS
from hf_lnlm.trainer.alignment import METHODS

from .running import QUICK, run, settings, succeed

SMALL = [*QUICK, "data.block_size=32", "training.per_device_train_batch_size=4", "data.validation=0.2"]


def pretrained(family, objective, library, folder, *more):
    words = ["--family", family, "--data", library / "json", "--tokenizer", "byte", "--objective", objective]
    succeed("pretrain", *words, "--output", folder, *settings(*SMALL, *more))
    return folder


@pytest.fixture(scope="module")
def detected(library, tmp_path_factory):
    """A generator and a discriminator of ours, of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "detected"
    return pretrained("lnlm_rnn", "replaced_token", library, folder, "objective.generator_fraction=0.5")


def test_the_whole_and_its_parts_are_fit(detected):
    for folder in (detected, detected / "generator", detected / "discriminator"):
        result = succeed("check", folder)
        assert "fail" not in {line.split()[0] for line in result.out.splitlines()}, result.out
        assert (folder / "tokenizer.json").is_file() and (folder / "README.md").is_file()
    assert "trust_remote_code=True" in (detected / "README.md").read_text()
    assert "import hf_lnlm.objectives" not in (detected / "generator" / "README.md").read_text()
    assert "keys        all" in succeed("check", detected).out
    assert read_recipe(detected / "recipe.yaml").objective.options["generator_fraction"] == 0.5


def test_the_whole_is_measured_and_gone_on_with(detected, tmp_path):
    trained = json.loads((detected / "evaluation.json").read_text())["metrics"]
    assert {"discriminator_auc", "generator_loss", "replaced_share"} <= set(trained)
    measured = json.loads(succeed("evaluate", detected, "--json", "--output", tmp_path / "found.json").out)[0]
    assert measured["task"] == "replaced_token" and measured["metrics"] == pytest.approx(trained)
    words = ["--checkpoint", detected, "--data", detected / "recipe.yaml", "--output", tmp_path / "on"]
    succeed("pretrain", *words, *settings(*QUICK, "data.block_size=16", "data.validation=0"))
    assert read_recipe(tmp_path / "on" / "recipe.yaml").objective.name == "replaced_token"


def test_the_discriminator_is_fine_tuned_and_the_generator_fills_masks(detected, tmp_path):
    rows = "".join(json.dumps({"text": f"{'ab'[i % 2]} {i}", "label": "ab"[i % 2]}) + "\n" for i in range(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = [
        "--checkpoint",
        detected / "discriminator",
        "--data",
        tmp_path / "rows.jsonl",
        "--output",
        tmp_path / "tuned",
    ]
    succeed("finetune", *words, "--task", "sequence_classification", *settings(*QUICK))
    masked = [
        "--checkpoint",
        detected / "generator",
        "--data",
        detected / "recipe.yaml",
        "--output",
        tmp_path / "filling",
    ]
    succeed("pretrain", *masked, *settings(*QUICK, "data.block_size=16", "data.validation=0"))
    assert read_recipe(tmp_path / "filling" / "recipe.yaml").objective.name == "masked"


def test_a_plain_checkpoint_becomes_the_discriminator(detected, tmp_path):
    start = detected / "generator"
    words = ["--checkpoint", start, "--data", detected / "recipe.yaml", "--output", tmp_path / "run", "--objective"]
    quick = [*QUICK, "data.block_size=16", "data.validation=0", "training.learning_rate=0"]
    succeed("pretrain", *words, "replaced_token", *settings(*quick))
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "run" / "discriminator"))
    name = "layers.0.forwards.input_gates.weight"
    assert after[name].equal(before[f"model.{name}"])


@pytest.mark.parametrize("objective", ["bidirectional", "sentence_order"])
def test_other_objectives_leave_parts_that_are_fit(objective, library, tmp_path):
    folder = pretrained("lnlm_rnn", objective, library, tmp_path / "run")
    for name in ("forwards", "backwards") if objective == "bidirectional" else ("encoder",):
        succeed("check", folder / name)
    assert succeed("check", folder).status == 0
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert {"loss", "bits_per_byte" if objective == "bidirectional" else "pair_accuracy"} <= set(metrics)


def test_options_that_a_checkpoint_can_not_follow_are_refused(detected, tmp_path):
    words = ["pretrain", "--checkpoint", detected, "--data", detected / "recipe.yaml", "--output", tmp_path / "run"]
    quick = [*QUICK, "data.block_size=16", "data.validation=0"]
    for setting, message in (
        ("objective.generator_fraction=0.25", "the checkpoint was made with another generator"),
        ("objective.share_embeddings=false", "the checkpoint was made with share_embeddings=True, got False"),
        ("model.head=lnlm_encoder_cnn", "is trained on labels; this objective takes text alone"),
        ("model.config.wieght=2", "did you mean 'weight'?"),
        ("lora.enabled=true", "lora adapts a checkpoint: hf-lnlm finetune"),
    ):
        result = run(*words, *settings(*quick, setting))
        assert result.status == 2 and len(result.err.splitlines()) == 1 and message in result.err, result.err
    succeed(*words, *settings(*quick, "objective.weight=7", "objective.generator_fraction=0.5"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weight"] == 7


def test_fields_of_a_checkpoints_config_are_changed(rnn, text_file, tmp_path):
    for number, words in enumerate((["pretrain"], ["finetune", "--task", "causal"])):
        folder = tmp_path / str(number)
        words = [*words, "--checkpoint", rnn, "--data", text_file, "--output", folder]
        succeed(*words, *settings(*SMALL, "model.config.output_dropout=0.3"))
        assert json.loads((folder / "config.json").read_text())["output_dropout"] == 0.3
        refused = run(*words, "--overwrite", *settings(*SMALL, "model.config.output_dropout=2"))
        assert refused.status == 2 and "output_dropout" in refused.err


COMPOSED = ["replaced_token", "bidirectional", "sentence_order", "next_sentence"]


@pytest.fixture(scope="module")
def encoder(library, tmp_path_factory):
    """A stock ALBERT, masked for two steps: its own head tells the order of sentences, and nothing else of these."""
    small = [
        "hidden_size=16",
        "embedding_size=8",
        "num_hidden_layers=1",
        "num_attention_heads=2",
        "intermediate_size=16",
    ]
    folder = tmp_path_factory.mktemp("runs") / "albert"
    return pretrained("albert", "masked", library, folder, *(f"model.config.{field}" for field in small))


@pytest.mark.parametrize("goal", COMPOSED)
def test_every_objective_is_fine_tuned_in_full_and_by_adapters(goal, encoder, rnn, library, tmp_path):
    start = rnn if goal == "bidirectional" else encoder
    more = ["--data", library / "json", "--task", goal]
    full, tuned = tmp_path / "full", tmp_path / "tuned"
    succeed("finetune", "--checkpoint", start, *more, "--output", full, *settings(*SMALL))
    metrics = json.loads((full / "evaluation.json").read_text())["metrics"]
    succeed("finetune", "--checkpoint", full, *more, "--lora", "--merge", "--output", tuned, *settings(*SMALL))
    assert (tuned / "adapter_model.safetensors").is_file() and not (tuned / "model.safetensors").exists()
    measured = json.loads(succeed("evaluate", tuned, "--json").out)[0]["metrics"]
    assert set(measured) == set(metrics)
    assert measured == pytest.approx(json.loads((tuned / "evaluation.json").read_text())["metrics"])
    found = [path.parent for path in (tuned / "merged").glob("**/config.json")]
    assert len(found) == 1 + len([path for path in full.iterdir() if (path / "config.json").is_file()
                                  and not path.name.startswith("checkpoint")])  # fmt: skip
    for folder in (tuned, *found):
        succeed("check", folder)
    if goal != "sentence_order":  # ALBERT's own head
        refused = run(
            "finetune", "--checkpoint", start, *more, "--lora", "--output", tmp_path / "no", *settings(*SMALL)
        )
        assert refused.status == 2 and f"{goal!r} adds parts with fresh weights" in refused.err


def test_a_masked_model_is_adapted_with_its_embeddings(encoder, library, tmp_path):
    words = ["finetune", "--checkpoint", encoder, "--data", library / "json", "--task", "masked", "--lora"]
    succeed(*words, "--output", tmp_path / "run", *settings(*SMALL, "lora.embeddings=true", "lora.r=2"))
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert any("position_embeddings" in name for name in adapter["target_modules"]) and adapter["lora_alpha"] == 4
    assert succeed("evaluate", tmp_path / "run", "--json").out


def test_overwrite_spares_what_the_run_reads(detected):
    start = detected / "generator"
    words = ["--checkpoint", start, "--data", detected / "recipe.yaml", "--output", detected, "--overwrite"]
    result = run("pretrain", *words, "--objective", "masked")
    assert result.status == 2
    assert "is read by this run and would be deleted" in result.err
    assert (start / "model.safetensors").is_file()


def test_the_help_names_every_objective_task_and_method():
    for command, names in (("pretrain", OBJECTIVES), ("finetune", TASKS), ("align", METHODS)):
        text = succeed(command, "--help").out
        assert all(name in text for name in names), command


def test_what_does_not_fit_is_refused_in_one_line(library):
    words = ["pretrain", "--family", "bert", "--data", library / "json", "--tokenizer", "byte", "--set"]
    for setting, message in (
        ("objective.generator={model_type: gpt2}", "the generator must read both ways"),
        ("objective.generator={vocab_size: 50}", "need one vocabulary, got vocab_size generator 50"),
        ("objective.generator_fraction=2", "generator_fraction must lie above 0 and be 1 at most, got 2"),
        ("data.mode=lanes", "replaced_token with lnlm_replaced_token has none"),
    ):
        result = run(*words, setting, "--objective", "replaced_token")
        assert result.status == 2 and len(result.err.splitlines()) == 1 and message in result.err
    result = run(*words, "data.streaming=true", "--objective", "next_sentence")
    assert result.status == 2 and "got a stream: use data.streaming=false" in result.err
