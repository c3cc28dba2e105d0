"""Trust in a stranger's code is the flag's alone; what lies beside a checkpoint decides nothing; no secret is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hf_lnlm.flows.evaluate import evaluation_recipe
from hf_lnlm.flows.recipe import dump_recipe, load_recipe

from .running import run, settings, succeed

CODE = """
open({mark!r}, "w").close()
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class StrangeConfig(GPT2Config): model_type = "strange"
class Strange(GPT2LMHeadModel): config_class = StrangeConfig
class StrangeTokenizer(PreTrainedTokenizerFast): pass
"""
TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT"


@pytest.fixture
def strange(rnn, tmp_path):
    """A function that makes a folder whose config or tokenizer wants its own code; that code leaves a mark."""

    def make(wants: str):
        folder, mark = tmp_path / wants, tmp_path / "RAN"
        shutil.copytree(rnn, folder)
        for path in folder.glob("*.py"):
            path.unlink()
        (folder / "strange.py").write_text(CODE.format(mark=str(mark)))
        if wants == "config":
            maps = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.Strange"}
            edit(folder / "config.json", model_type="strange", auto_map=maps, architectures=["Strange"])
        else:
            edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "strange.StrangeTokenizer"]})
        return folder, mark

    return make


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("wants", ["config", "tokenizer"])
@pytest.mark.parametrize("command", ["evaluate", "generate", "finetune", "pretrain", "align", "check", "push"])
def test_no_command_runs_a_folders_code_unasked(strange, text_file, tmp_path, command, wants):
    folder, mark = strange(wants)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("model:", "model:\n  trust_remote_code: true", 1))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "a{i}", "completion": "b"}}\n' for i in range(90)))
    words = {
        "evaluate": [folder],
        "generate": [folder, "--prompt", "a"],
        "finetune": ["--checkpoint", folder, "--task", "causal", "--data", text_file, "--output", tmp_path / "out"],
        "pretrain": ["--checkpoint", folder, "--data", text_file, "--output", tmp_path / "out"],
        "align": ["--checkpoint", folder, "--method", "sft", "--data", pairs, "--output", tmp_path / "out"],
        "check": [folder],
        "push": [folder, "me/it", "--dry-run"],
    }[command]
    result = run(command, *words)
    assert not mark.exists() and "Traceback" not in result.err, result
    reads_only = command in ("check", "push")
    if wants == "config" and not reads_only:  # a stock tokenizer stands in for the folder's own
        assert result.status == 2 and "--trust-remote-code" in result.err, result


def test_the_flag_grants_it(strange, text_file):
    folder, mark = strange("tokenizer")
    result = run("evaluate", folder, "--data", text_file, "--trust-remote-code")
    assert mark.exists(), result


@pytest.mark.parametrize(
    "setting",
    [
        "model.trust_remote_code=true",
        "model.config.encoder_trust_remote_code=true",
        "training.hub_token=hf_x",
        "training.push_to_hub_token=x",
        f"training.run_name={TOKEN}",
        f"objective.reward={TOKEN}",
        f"data.source=https://me:{TOKEN}@example.org/data.csv",
        "data.source=https://someone:word@example.org/data.csv",
        "model.config.api_key=abc",
    ],
)
def test_no_recipe_holds_trust_or_a_secret(tmp_path, setting):
    words = ["--family", "lnlm_rnn", "--data", "stdlib", "--output", tmp_path / "out"]
    result = run("pretrain", *words, *settings(setting))
    key = setting.partition("=")[0]
    assert result.status == 2 and key in result.err, result
    assert TOKEN not in result.out + result.err and not (tmp_path / "out").exists()
    *sections, last = key.split(".")
    values: dict = {last: setting.partition("=")[2]}
    for section in reversed(sections):
        values = {section: values}
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        load_recipe(values, {}, [])


def test_secrets_of_the_environment_are_known_by_their_value(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plainword-but-secret")
    with pytest.raises(ValueError, match=r"training\.run_name holds the value of \$HF_TOKEN"):
        load_recipe({"training": {"run_name": "plainword-but-secret"}}, {}, [])


def test_trust_is_not_written():
    recipe = load_recipe({"model": {"checkpoint": "x"}}, {}, [])
    recipe.model.trust_remote_code = True
    assert "trust" not in dump_recipe(recipe)


def test_what_lies_beside_a_checkpoint_says_task_columns_and_limits_only(rnn, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(rnn, folder)
    (folder / "recipe.yaml").write_text(
        "model: {trust_remote_code: true, revision: evil, labels: [a, b], config: {vocab_size: 3}, head: x}\n"
        "objective: {name: causal}\n"
        "data: {source: stdlib, text_column: body, limit: 7, validation: 0.5}\n"
        "training: {seed: 5, report_to: wandb, output_dir: /elsewhere, push_to_hub: true, hub_token: x}\n"
        "hub: {push: true, repo_id: me/it}\nimport: evil\ntokenizer: {path: /elsewhere}\nlora: {enabled: true}\n"
    )
    recipe = evaluation_recipe(str(folder), {}, [])
    assert vars(recipe.model) == vars(type(recipe.model)(checkpoint=str(folder), labels=["a", "b"]))
    assert recipe.training == {"seed": 5} and recipe.hub.push is False and recipe.tokenizer.path is None
    assert (recipe.data.source, recipe.data.text_column, recipe.data.limit) == ("stdlib", "body", 7)
    fresh = evaluation_recipe(str(folder), {"data.source": "other.txt"}, [])
    assert (fresh.data.source, fresh.data.validation, fresh.data.limit) == ("other.txt", 0.0, None)


def test_the_source_beside_a_checkpoint_is_told_first(rnn):
    result = succeed("evaluate", rnn, "--json")
    assert result.err.splitlines()[0].startswith("data       ") and "recipe.yaml says" in result.err
    json.loads(result.out)


def test_training_arguments_are_saved_without_a_token(rnn, text_file, tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    from hf_lnlm import LNLMTrainer

    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * 2
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, hub_token=TOKEN)
    trainer = LNLMTrainer(AutoModelForCausalLM.from_pretrained(rnn), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert arguments.hub_token == TOKEN
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("token", "x"), ("secrets.json", "{}"), ("id_rsa", "x"), ("my.pem", "x"), (".env", "A=1"),
        (".aws/credentials", "x"),
        ("notes.txt", f"the token is {TOKEN}"), ("README.md", "-----BEGIN RSA PRIVATE KEY-----\n"),
        ("evaluation.json", '{"data": "https://me:pw@example.org/x.csv"}'),
    ],
)  # fmt: skip
def test_push_stops_at_what_looks_like_a_secret(rnn, tmp_path, name, text):
    folder = tmp_path / "model"
    shutil.copytree(rnn, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    result = run("push", folder, "me/it", "--dry-run")
    assert result.status != 0 and f"{name} looks like a secret" in result.err and TOKEN not in result.err
    if name in ("notes.txt", "token"):
        assert name in succeed("push", folder, "me/it", "--dry-run", "--include", name).out


def test_push_leaves_out_and_lists_what_is_foreign(rnn, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(rnn, folder)
    foreign = ["wandb/run.log", "events.out.tfevents.1", "notes.txt~", "thesis.docx", "more/model.safetensors"]
    for name in foreign:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    out = succeed("push", folder, "me/it", "--dry-run").out
    assert all(f"left out   {name} " in out for name in foreign), out
    assert "config.json" in out.partition("would push")[2] and "thesis" not in out.partition("would push")[2]
    assert (
        "thesis.docx" in succeed("push", folder, "--dry-run", "--include", "thesis.docx").out.partition("would push")[2]
    )
    assert "names no file" in run("push", folder, "--dry-run", "--include", "thesis.doc").err
