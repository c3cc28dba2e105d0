"""Recipes are typed: numbers are numbers, wrong values name key, value and wanted type, misspelt keys get a hint."""

from __future__ import annotations

import pytest

from hf_lnlm.errors import UsageProblem
from hf_lnlm.flows.coerce import coerce, parse_yaml
from hf_lnlm.flows.recipe import Recipe, dump_recipe, load_recipe, typed_recipe


def load(text, tmp_path, flags=None, settings=()):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, flags or {}, list(settings))


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 0.001),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("10", 10),
        ("-3", -3),
        ("1_000", 1000),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("012", 12),
        ("1:30", "1:30"),
        ("'1e-3'", "1e-3"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse_yaml(text, "text") == value
    assert type(parse_yaml(text, "text")) is type(value)


@pytest.mark.parametrize(
    "value, kind, wanted",
    [
        ("1e-3", float, 0.001),
        (1, float, 1.0),
        (1e3, int, 1000),
        ("yes", bool, True),
        ("off", bool, False),
        (None, int | None, None),
        ("0.1", float | str | None, 0.1),
        ("dev.jsonl", float | str | None, "dev.jsonl"),
        ([1, "2"], list[int], [1, 2]),
    ],
)
def test_coercion(value, kind, wanted):
    assert coerce(value, kind, "key") == wanted
    assert type(coerce(value, kind, "key")) is type(wanted)


@pytest.mark.parametrize(
    "value, kind", [("fast", float), (True, int), (1.5, int), ("maybe", bool), (1, bool), (None, int), ({}, list[int])]
)
def test_coercion_refuses(value, kind):
    with pytest.raises(UsageProblem, match=r"a\.b: wanted .*, got " + str(value).replace("{}", r"\{\}").strip("'")[:0]):
        coerce(value, kind, "a.b")


@pytest.mark.parametrize(
    "text, message",
    [
        ("training: {learning_rate: fast}", "training.learning_rate: wanted a number, got 'fast'"),
        ("training: {lerning_rate: 1}", r"unknown key training.lerning_rate \(did you mean 'learning_rate'\?\)"),
        ("trainin: {}", r"unknown section 'trainin' \(did you mean 'training'\?\)"),
        ("model: {size: tinny}", r"model.size: wanted one of: tiny, small, base.*'tinny' \(did you mean 'tiny'"),
        ("training: {lr_scheduler_type: cosin}", r"lr_scheduler_type: wanted one of.*did you mean 'cosine'"),
        ("training: {max_steps: 2.5}", "training.max_steps: wanted a whole number, got 2.5"),
        ("model: [a]", r"model: wanted a mapping of keys, got \['a'\]"),
        ("- a", "a recipe is a mapping of sections, got list"),
        ("model: {family: a, family: b}", "key 'family' is given twice"),
        ("model: {", "line 1: not valid YAML"),
        ("data: {block_size: 1}", "data.block_size must be at least 8, got 1"),
        ("data: {validation: 1.5}", r"data.validation as a share must lie in \[0, 1\), got 1.5"),
        ("model: {family: gpt2, checkpoint: runs/x}", "not both"),
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
    ],
)
def test_bad_recipes(text, message, tmp_path):
    with pytest.raises(UsageProblem, match=message) as caught:
        load(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(UsageProblem, match=r"no such recipe: nowhere\.yaml"):
        load_recipe("nowhere.yaml", {}, [])
    (tmp_path / "empty.yaml").write_text("")
    assert load_recipe(tmp_path / "empty.yaml", {}, []) == Recipe()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageProblem, match=r"not UTF-8 text \(byte 0\)"):
        load_recipe(tmp_path / "binary.yaml", {}, [])


def test_precedence_file_flags_settings(tmp_path):
    text = "model: {size: tiny, family: gpt2}\ntraining: {learning_rate: 1e-3, seed: 1}"
    flags = {"model.size": "small", "data.source": None}
    recipe = load(text, tmp_path, flags, ["training.seed=7", "training.learning_rate=2e-4"])
    assert (recipe.model.size, recipe.model.family) == ("small", "gpt2")
    assert recipe.training == {"learning_rate": 0.0002, "seed": 7}


@pytest.mark.parametrize("setting", ["seed=1", "training.seed", "=1", "training.=1", ".seed=1"])
def test_settings_need_section_key_and_value(setting):
    with pytest.raises(UsageProblem, match=r"--set wants section\.key=value"):
        load_recipe(None, {}, [setting])


def test_objective_options_are_kept_beside_the_name(tmp_path):
    recipe = load("objective: {name: masked, rate: 0.2}", tmp_path, settings=["objective.whole_word=true"])
    assert recipe.objective.name == "masked"
    assert recipe.objective.options == {"rate": 0.2, "whole_word": True}


def test_dump_reads_back_equal(tmp_path):
    values = {
        "model": {"family": "lnlm_rnn", "size": "tiny", "config": {"cell_type": "gru", "weight_dropout": 0.2}},
        "data": {"source": ["a.txt", "no"], "validation": 0.1, "text_column": "1e-3"},
        "objective": {"name": "masked", "rate": 1e-05},
        "lora": {"enabled": True, "targets": ["q", "on"]},
        "training": {"learning_rate": 1e-05, "eval_strategy": "no", "optim_args": "1e5"},
    }
    recipe = typed_recipe(values)
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe, "a header\nof two lines"))
    assert load_recipe(path, {}, []) == recipe
    assert path.read_text().startswith("# a header\n# of two lines\n")
