"""The commands as functions: the same bits, the Trainer's result and the folder, the same refusals."""

from __future__ import annotations

import json

import pytest
import yaml

import hf_lnlm
from hf_lnlm.flows.request import OPTIONS, Request, recipe_keys

from ..cli.running import QUICK, settings, succeed

TRAINING = {"max_steps": 2, "warmup_steps": 0, "eval_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = [{"text": f"{'good' if n % 2 else 'bad'} film {n}", "label": "pn"[n % 2]} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def recipe_in(folder):
    found = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert found["training"].pop("output_dir") == str(folder)
    return found


def test_pretraining_from_python_is_the_command(rnn, text_file, tmp_path):
    options = {"family": "lnlm_rnn", "tokenizer": "byte", "output": tmp_path / "run"}
    run = hf_lnlm.pretrain(data=text_file, training=TRAINING, **options, settings=["data.block_size=32"])
    assert run.folder == tmp_path / "run" and weights(run.folder) == weights(rnn)
    assert recipe_in(run.folder) == recipe_in(rnn)
    assert run.result.global_step == 2 and run.result.metrics["train_loss"] == run.result.training_loss
    saved = json.loads((run.folder / "evaluation.json").read_text())["metrics"]
    assert {f"eval_{name}": value for name, value in saved.items()}.items() <= run.result.metrics.items()


def test_a_recipe_may_be_a_mapping_and_is_not_changed(rnn, text_file, tmp_path):
    recipe = {
        "model": {"family": "lnlm_rnn", "size": "tiny"},
        "tokenizer": {"kind": "byte"},
        "data": {"source": str(text_file), "block_size": 64},
        "training": dict(TRAINING),
    }
    before = json.dumps(recipe)
    run = hf_lnlm.pretrain(recipe, data={"block_size": 32}, output=tmp_path / "run")
    assert weights(run.folder) == weights(rnn) and json.dumps(recipe) == before
    again = hf_lnlm.pretrain(run.folder / "recipe.yaml", output=tmp_path / "again")
    assert weights(again.folder) == weights(rnn)


def test_finetuning_and_evaluation_from_python_are_the_commands(rnn, rows, tmp_path):
    words = ["--checkpoint", rnn, "--task", "sequence_classification", "--data", rows, "--output", tmp_path / "command"]
    succeed("finetune", *words, *settings(*QUICK))
    options = {"checkpoint": rnn, "task": "sequence_classification", "data": rows, "output": tmp_path / "function"}
    run = hf_lnlm.finetune(settings=QUICK, **options)
    assert weights(run.folder) == weights(tmp_path / "command")
    measured = hf_lnlm.evaluate(run.folder, data=rows, save=False)
    assert measured.folder == run.folder
    printed = json.loads(succeed("evaluate", tmp_path / "command", "--data", rows, "--json").out)
    assert measured.result["metrics"] == printed[0]["metrics"] and measured.result["task"] == "sequence_classification"


def test_a_short_held_out_text_is_measured_as_in_training(text_file, tmp_path):
    options = {
        "family": "lnlm_rnn",
        "tokenizer": "byte",
        "data": text_file,
        "validation": 0.1,
        "output": tmp_path / "run",
    }
    training = {**TRAINING, "per_device_train_batch_size": 64}
    run = hf_lnlm.pretrain(training=training, **options, settings=["data.block_size=32", "data.unit=line"])
    found = hf_lnlm.evaluate(run.folder).result["metrics"]
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["training"]["per_device_eval_batch_size"] < 64
    assert {f"eval_{name}": value for name, value in found.items()}.items() <= run.result.metrics.items()


def test_generation_from_python_is_the_command(rnn):
    texts = hf_lnlm.generate(rnn, ["def ", "import"], seed=3, max_new_tokens=6, do_sample=True, top_k=4)
    words = ["--prompt", "def ", "--prompt", "import", "--seed", 3, "--max-new-tokens", 6, "--top-k", 4]
    lines = succeed("generate", rnn, *words, "--temperature", 1, "--top-p", 1, "--json").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts


def test_options_are_recipe_keys(tmp_path):
    flags = {
        "family": "lnlm_rnn",
        "size": None,
        "training": {"max_steps": 3},
        "data.limit": 5,
        "tokenizer": str(tmp_path),
    }
    wanted = {"model.family": "lnlm_rnn", "training.max_steps": 3, "data.limit": 5, "tokenizer.path": str(tmp_path)}
    assert dict(recipe_keys(flags)) == wanted
    recipe = {"data": {"source": "a.txt", "limit": 3}}
    assert Request(recipe, {"data": {"limit": None}}).resolved().data.limit is None, "None in a section is a value"
    assert Request(recipe, {"data": tmp_path}, settings=["data.limit=4"]).resolved().data.source == str(tmp_path)
    typed = {"validation": 0.1, "lora": True, "merge": True, "skip_bad_rows": True, "labels": ["x", "y"]}
    for name in OPTIONS.keys() - {"tokenizer"}:
        key = OPTIONS[name].split(".")
        value = typed.get(name, "tiny" if name == "size" else "x")
        resolved = Request(None, {name: value, **({"lora": True} if name == "merge" else {})}).resolved()
        section = getattr(resolved, key[0])
        found = section if isinstance(section, dict) else {**vars(section), **getattr(section, "options", {})}
        assert found[key[1]] == value, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"famly": "lnlm_rnn"}, r"unknown option 'famly'.*did you mean 'family'"),
        ({"family": "lnlm_rnn"}, "no data"),
        ({"family": "lnlm_rnn", "training": {"max_stpes": 1}, "data": "x"}, r"unknown key training\.max_stpes"),
        ({"family": "lnlm_rnn", "data": "x", "tokenizer": "bites"}, r"neither a kind .* nor a folder"),
    ],
)
def test_what_is_wrong_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hf_lnlm.pretrain(output=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_tasks_are_built_by_name():
    assert hf_lnlm.task("token_classification", label_all_pieces=True).label_all_pieces
    with pytest.raises(ValueError, match=r"task must be one of .*, got 'tagging'"):
        hf_lnlm.task("tagging")
    with pytest.raises(ValueError, match="got 'num_beam'; did you mean 'num_beams'"):
        hf_lnlm.task("text_to_text", num_beam=2)
