"""What a run does where nothing is said: rates by family and size, the best checkpoint, a line when it learnt nothing."""

from __future__ import annotations

import csv
import random

import pytest

import hf_lnlm
from hf_lnlm.flows.defaults import LORA_RATE, TABLE, learning_rate, tokenizer_kind
from hf_lnlm.flows.recipe import load_recipe
from hf_lnlm.registry import FAMILIES

QUICK = {"max_steps": 4, "eval_steps": 4, "save_steps": 4, "logging_strategy": "no"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    """Rows whose label is told by one word."""
    path, draw = tmp_path_factory.mktemp("rows") / "rows.csv", random.Random(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for n in range(120):
            words = draw.choices(["red", "green", "blue", "stone", "river", "cloud"], k=4)
            rows.writerow([" ".join([*words, "good" if n % 2 else "bad"]), "yes" if n % 2 else "no"])
    return str(path)


def test_rates_follow_family_task_and_size():
    for (family, kind), row in TABLE.items():
        assert family in {known.model_type for known in FAMILIES}
        name = {"classification": "sequence_classification", "tagging": "token_classification"}.get(kind, kind)
        tiny, base = (
            load_recipe(None, {"model.family": family, "model.size": size, "objective.name": name}, [])
            for size in ("tiny", "base")
        )
        assert learning_rate(tiny) == row.learning_rate
        assert learning_rate(base) == pytest.approx(row.learning_rate * 0.3)
        assert tokenizer_kind(tiny) == row.tokenizer
    other = load_recipe(None, {"model.family": "bert", "objective.name": "masked"}, [])
    assert (learning_rate(other), tokenizer_kind(other)) == (2e-3, "bpe")


def test_fine_tuning_keeps_the_best_checkpoint_and_stops(labelled, tmp_path, capsys):
    run = hf_lnlm.finetune(
        family="lnlm_text_cnn",
        data={"source": labelled},
        output=str(tmp_path / "run"),
        training={"learning_rate": 1e-2},
    )
    told = capsys.readouterr()
    assert "held out   10% of the rows for validation, by seed 0" in told.out
    assert "at chance" not in told.err
    assert run.result.metrics["eval_accuracy"] == 1.0
    assert run.result.global_step < 8 * 4  # all epochs of 108 rows in batches of 32
    recipe = load_recipe(run.folder / "recipe.yaml", {}, [])
    assert recipe.training["load_best_model_at_end"]
    assert recipe.training["metric_for_best_model"] == "accuracy"


def test_a_recipe_with_its_own_plan_is_taken_at_its_word(labelled, tmp_path):
    run = hf_lnlm.finetune(family="lnlm_text_cnn", data=labelled, output=str(tmp_path / "run"), training=QUICK)
    recipe = load_recipe(run.folder / "recipe.yaml", {}, [])
    assert "load_best_model_at_end" not in recipe.training
    assert run.result.global_step == 4


def test_a_run_that_ends_at_chance_says_so(labelled, tmp_path, capsys):
    hf_lnlm.finetune(
        family="lnlm_text_cnn", data=labelled, output=str(tmp_path / "run"), training={**QUICK, "learning_rate": 0.0}
    )
    assert "the run ended at chance: accuracy" in capsys.readouterr().err


def test_adapters_have_a_rate_of_their_own(labelled, tmp_path):
    text = {"source": labelled, "unit": "line", "mode": "blocks", "block_size": 16}
    base = hf_lnlm.pretrain(family="lnlm_rnn", data=text, output=str(tmp_path / "base"), training=QUICK).folder
    run = hf_lnlm.finetune(
        checkpoint=str(base), task="sequence_classification", data=labelled, lora={"enabled": True},
        output=str(tmp_path / "lora"), training={**QUICK, "max_steps": 150, "eval_steps": 150, "save_steps": 150},
    )  # fmt: skip
    assert load_recipe(run.folder / "recipe.yaml", {}, []).training["learning_rate"] == LORA_RATE
    assert run.result.metrics["eval_accuracy"] > 0.7
