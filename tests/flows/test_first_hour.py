"""What a new user asks for first: all keys of a recipe, a run that is only rehearsed, and a task that needs no name."""

from __future__ import annotations

import dataclasses
import json

import pytest

import hf_lnlm
from hf_lnlm.errors import UsageProblem
from hf_lnlm.flows.keys import MEANINGS, UNSAID, recipe_keys_starting
from hf_lnlm.flows.recipe import Recipe, field_types, load_recipe
from hf_lnlm.flows.sizes import stock_config_class
from hf_lnlm.objectives import OBJECTIVES
from hf_lnlm.tasks import TASKS
from hf_lnlm.trainer.arguments import LNLMTrainingArguments

from ..cli.running import run, succeed


def test_every_key_is_listed_with_a_meaning_and_can_be_set():
    listed = {key.name for key in recipe_keys_starting() if not key.of}
    sections = {name: kind for name, kind in field_types(Recipe).items() if name != "training"}
    wanted = {
        f"{name}.{item.name}" for name, kind in sections.items() for item in dataclasses.fields(kind) if item.init
    }
    wanted |= {f"training.{item.name}" for item in dataclasses.fields(LNLMTrainingArguments) if item.init}
    assert listed == wanted - set(UNSAID) and MEANINGS.keys() <= listed
    assert not [key.name for key in recipe_keys_starting() if not (key.meaning and key.type)]
    options = {(key.of, key.name) for key in recipe_keys_starting() if key.of}
    assert options == {
        (name, f"objective.{item.name}")
        for name, kind in {**OBJECTIVES, **TASKS}.items()
        for item in dataclasses.fields(kind)
        if item.init
    }
    assert load_recipe(None, {}, ["data.limit=3", "training.learning_rate=1e-3"]).data.limit == 3
    found = json.loads(succeed("config-keys", "data.b", "--json").out)
    assert [(row["name"], row["type"], row["default"]) for row in found] == [("data.block_size", "int | None", "")]
    assert "objective.rate" in succeed("config-keys", "objective.masked").out
    assert "did you mean 'data.limit'" in run("config-keys", "data.limti").err


def test_a_rehearsed_run_says_what_it_would_do_and_writes_nothing(text_file, tmp_path):
    words = ["--family", "lnlm_rnn", "--data", text_file, "--tokenizer", "byte", "--output", tmp_path / "out"]
    said = succeed("pretrain", *words, "--dry-run", "--set", "data.block_size=32").out
    assert "block_size: 32" in said and "learning_rate:" in said and not (tmp_path / "out").exists()
    options = {"family": "lnlm_rnn", "tokenizer": "byte", "data": str(text_file), "settings": ["data.block_size=32"]}
    found = hf_lnlm.pretrain(output=tmp_path / "out", dry_run=True, **options).result
    assert f"{found['parameters']:,} parameters" in said and f"{found['tokens_per_epoch']:,} tokens" in said
    assert found["memory_bytes"] == 16 * found["parameters"] and found["recipe"]["data"]["block_size"] == 32
    assert found["tokens_per_epoch"] == found["steps_per_epoch"] * 16 * 32
    rows = [{"text": f"good film {n}", "label": "pn"[n % 2]} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = hf_lnlm.finetune(
        family="lnlm_text_cnn", data=str(tmp_path / "rows.jsonl"), output=tmp_path / "out", dry_run=True
    )
    assert tuned.result["recipe"]["objective"]["name"] == "sequence_classification"
    assert 0 < tuned.result["tokens_per_epoch"] < 24 * 12 and not (tmp_path / "out").exists()
    drawn = hf_lnlm.pretrain(family="lnlm_ntm", data="synthetic:copy", output=tmp_path / "out", dry_run=True)
    assert drawn.result["tokens_per_epoch"] is None


@pytest.mark.parametrize("words", [["--family", "lnlm_rnn"], ["--checkpoint", "RNN"]])
def test_a_family_with_several_heads_wants_a_task_of_those_that_fit(words, rnn, text_file, tmp_path):
    given = [str(rnn) if word == "RNN" else word for word in words]
    said = run("finetune", *given, "--data", text_file, "--output", tmp_path / "out").err
    assert "no task: give --task, one of sequence_classification" in said and "multiple_choice" not in said
    assert ("causal" in said) == ("RNN" in words) and "span" not in said


@pytest.mark.parametrize(("word", "meant"), [("rnn", "lnlm_rnn"), ("LSTM", "lnlm_rnn"), ("turing", "lnlm_ntm")])
def test_a_family_by_its_everyday_name_is_recognised(word: str, meant: str):
    with pytest.raises(UsageProblem, match=f"no family '{word}' .did you mean '{meant}'"):
        stock_config_class(word)
