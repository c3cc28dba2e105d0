"""Objectives whose models are made of several, through the commands: parts that are checkpoints of their own."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from hf_lnlm.cli.recipe import read_recipe
from hf_lnlm.objectives import OBJECTIVES

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
    assert "import hf_lnlm.objectives" in (detected / "README.md").read_text()
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


def test_overwrite_spares_what_the_run_reads(detected):
    start = detected / "generator"
    words = ["--checkpoint", start, "--data", detected / "recipe.yaml", "--output", detected, "--overwrite"]
    result = run("pretrain", *words, "--objective", "masked")
    assert result.status == 2
    assert "is read by this run and would be deleted" in result.err
    assert (start / "model.safetensors").is_file()


def test_the_help_names_every_objective():
    text = succeed("pretrain", "--help").out
    assert all(name in text for name in OBJECTIVES)


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
