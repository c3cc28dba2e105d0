"""Commands end to end: what they leave, what they refuse and in which words, with which exit status."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from safetensors.torch import load_file

from hf_lnlm.flows.recipe import read_recipe

from .running import QUICK, run, settings, succeed

SMALL = [*QUICK, "data.block_size=32", "training.per_device_train_batch_size=4"]


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def rows(path, number=24):
    path.write_text(
        "".join(json.dumps({"text": f"{'ab'[i % 2]} {i}", "label": "ab"[i % 2]}) + "\n" for i in range(number))
    )
    return path


def test_list_names_every_family_objective_and_task():
    from hf_lnlm.objectives import OBJECTIVES
    from hf_lnlm.registry import FAMILIES
    from hf_lnlm.tasks import TASKS

    text = succeed("list").out
    for name in [*(row.model_type for row in FAMILIES), *OBJECTIVES, *TASKS, "gpt2", "t5"]:
        assert name in text
    assert "\x1b" not in text
    found = json.loads(succeed("list", "--json").out)
    assert [row["model_type"] for row in found["families"]] == [row.model_type for row in FAMILIES]


def test_pretraining_leaves_a_folder_that_is_fit(rnn):
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "recipe.yaml", "evaluation.json"} <= {
        path.name for path in rnn.iterdir()
    }
    result = succeed("check", rnn)
    assert {line.split()[0] for line in result.out.splitlines()} == {"ok"}
    evaluation = json.loads((rnn / "evaluation.json").read_text())
    assert {"loss", "perplexity", "bits_per_byte", "accuracy"} <= set(evaluation["metrics"])
    assert not list(rnn.glob("*.bin"))


def test_the_resolved_recipe_gives_the_same_weights(rnn, tmp_path):
    succeed("pretrain", rnn / "recipe.yaml", "--output", tmp_path / "again")
    assert digest(tmp_path / "again") == digest(rnn)
    assert read_recipe(tmp_path / "again" / "recipe.yaml").data == read_recipe(rnn / "recipe.yaml").data


def test_folders_in_use_are_not_touched(rnn, text_file, tmp_path):
    before = digest(rnn)
    words = ["pretrain", rnn / "recipe.yaml"]
    refused = run(*words, "--output", rnn)
    assert refused.status == 2
    assert "--resume" in refused.err and "--overwrite" in refused.err and refused.err.count("\n") == 1
    assert digest(rnn) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("years of work")
    refused = run(*words, "--output", tmp_path / "mine", "--overwrite")
    assert (refused.status, "delete it yourself" in refused.err) == (2, True)
    assert (tmp_path / "mine" / "novel.txt").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in run(*words, "--output", tmp_path / "file").err
    assert "nothing to resume" in run(*words, "--output", tmp_path / "none", "--resume").err
    assert "give one of them" in run(*words, "--output", rnn, "--resume", "--overwrite").err


def test_resume_goes_on_and_overwrite_starts_anew(rnn, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(rnn, folder)
    more = settings("training.max_steps=4")
    succeed("pretrain", "--resume", "--output", folder, *more)
    assert (folder / "checkpoint-4").is_dir() and digest(folder) != digest(rnn)
    changed = run("pretrain", "--resume", "--output", folder, *settings("model.config.cell_type=gru"))
    assert changed.status == 2 and "model.config" in changed.err
    succeed("pretrain", folder / "recipe.yaml", "--overwrite", "--output", folder, *settings("training.max_steps=2"))
    assert not (folder / "checkpoint-4").exists()
    assert digest(folder) == digest(rnn)


def test_a_second_run_in_two_parts_equals_one(rnn, tmp_path):
    steps = settings("training.max_steps=4", "training.lr_scheduler_type=constant")
    succeed("pretrain", rnn / "recipe.yaml", "--output", tmp_path / "whole", *steps)
    first = [*steps[:1], "training.max_steps=2", *steps[2:]]
    succeed("pretrain", rnn / "recipe.yaml", "--output", tmp_path / "parts", *first)
    succeed("pretrain", "--resume", "--output", tmp_path / "parts", *settings("training.max_steps=4"))
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "words, message",
    [
        (["pretrain"], "no model: give --family"),
        (["pretrain", "--family", "lnlm_rnn"], "no data: give --data"),
        (["pretrain", "--family", "lnlm_rn", "--data", "stdlib"], "did you mean 'lnlm_rnn'"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--size", "huge"], "tiny, small, base"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--objective", "causl"], "did you mean 'causal'"),
        (["pretrain", "--family", "lnlm_gpt3", "--data", "DATA", "--objective", "masked"], "fit lnlm_gpt3: causal"),
        (["pretrain", "--family", "gpt2", "--data", "DATA", "--objective", "replaced_token"], "lnlm_linformer, bert"),
        (["pretrain", "--family", "bert", "--data", "DATA", "--objective", "permutation"], "'permutation': xlnet"),
        (["pretrain", "--family", "bert", "--data", "DATA", "--set", "objective.span=ngram"], "'spans'"),
        (["pretrain", "--family", "gpt2", "--data", "DATA", "--objective", "span"], "objective 'span' needs"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--objective", "token_classification"], "finetune"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--tokenizer", "bpr"], "did you mean 'bpe'"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "/nowhere/x.txt"], "/nowhere/x.txt"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--set", "model.config.cel_type=gru"], "'cell_type'"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--set", "model.config.cell_type=tree"], "cell_type"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--set", "objective.boundary=1"], "'boundaries'"),
        (["pretrain", "--family", "lnlm_rnn", "--data", "DATA", "--set", "training.learning_rate=fast"], "a number"),
        (["pretrain", "--family", "gpt2", "--data", "DATA", "--set", "data.mode=lanes"], "gpt2 has none"),
        (["pretrain", "--checkpoint", "runs/none", "--data", "DATA"], "no such checkpoint folder: runs/none"),
        (["pretrain", "nowhere.yaml"], "no such recipe: nowhere.yaml"),
        (["finetune"], "no model: give --checkpoint"),
        (["finetune", "--family", "gpt2", "--data", "DATA", "--task", "causal"], "use `hf-lnlm pretrain`"),
        (["finetune", "--checkpoint", "RNN", "--data", "DATA"], "no task: give --task, one of sequence_classification"),
        (["finetune", "--checkpoint", "RNN", "--data", "DATA", "--task", "tagging"], "unknown task 'tagging'"),
        (
            ["finetune", "--checkpoint", "RNN", "--data", "ROWS", "--task", "sequence_classification", "--merge"],
            "--lora",
        ),
        (["finetune", "--checkpoint", "RNN", "--data", "ROWS", "--task", "token_classification"], "no column 'tokens'"),
        (["finetune", "--checkpoint", "RNN", "--data", "stdlib", "--task", "text_to_text"], "AutoModelForSeq2SeqLM"),
        (["evaluate", "/nowhere"], "give --data"),
        (["evaluate", "/nowhere", "--data", "DATA"], "no such checkpoint folder: /nowhere"),
        (["evaluate", "RNN", "--data", "DATA", "--task", "masked"], "masked"),
        (["generate", "/nowhere", "--prompt", "a"], "no such checkpoint folder: /nowhere"),
        (["generate", "RNN", "--prompt", "a", "--temperature", "0"], "--temperature must be above 0"),
        (["generate", "RNN", "--prompt", "a", "--greedy", "--count", "2"], "--count above 1"),
        (["push", "/nowhere", "a/b"], "/nowhere is not a folder"),
        (["push", "RNN"], "no repository"),
        (["push", "RNN", "a/b/c"], "a repository is called owner/name, got 'a/b/c'"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_wrong_requests_are_one_line_with_status_2(words, message, rnn, text_file, tmp_path):
    places = {"DATA": text_file, "RNN": rnn, "ROWS": rows(tmp_path / "rows.jsonl")}
    words = [places.get(word, word) for word in words]
    if words[0] in ("pretrain", "finetune"):
        words += ["--output", tmp_path / "out"]
    result = run(*words)
    assert result.status == 2, result.out + result.err
    assert message in result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no text in"),
        (b"caf\xe9 " * 100, "isn't valid utf-8"),
        (b"short", "too short"),
    ],
)
def test_bad_text_is_one_line(content, message, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    result = run("pretrain", "--family", "lnlm_rnn", "--data", tmp_path / "text.txt", "--tokenizer", "byte",
                 "--output", tmp_path / "out", *settings(*SMALL))  # fmt: skip
    assert result.status == 2 and message in result.err and "Traceback" not in result.err


def test_too_many_positions(text_file, tmp_path):
    words = ["--family", "gpt2", "--data", text_file, "--tokenizer", "byte", "--output", tmp_path / "gpt2"]
    small = settings(*SMALL, "model.config.n_positions=40", "model.config.n_embd=16", "model.config.n_layer=1")
    succeed("pretrain", *words, *small)
    result = run("evaluate", tmp_path / "gpt2", "--data", text_file, *settings("data.block_size=64"))
    assert result.status == 2 and "gpt2 has 40 positions" in result.err


def test_a_wrong_tokenizer_is_refused_by_both_sizes(rnn, text_file, tmp_path):
    shutil.copytree(rnn, tmp_path / "model")
    from hf_lnlm.data.tokenizers import build_tokenizer

    build_tokenizer("protein").save_pretrained(tmp_path / "model")
    result = run("evaluate", tmp_path / "model", "--data", text_file)
    assert result.status == 2 and "35" in result.err and "263" in result.err


def test_finetuning_a_classifier_saves_its_labels(rnn, tmp_path):
    data = rows(tmp_path / "rows.jsonl")
    words = ["--checkpoint", rnn, "--task", "sequence_classification", "--data", data, "--output", tmp_path / "out"]
    succeed("finetune", *words, *settings(*SMALL))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b"} and config["label2id"] == {"a": 0, "b": 1}
    assert read_recipe(tmp_path / "out" / "recipe.yaml").model.labels == ["a", "b"]
    again = tmp_path / "again"
    succeed("finetune", tmp_path / "out" / "recipe.yaml", "--output", again)
    assert digest(again) == digest(tmp_path / "out")


@pytest.mark.parametrize("family", ["lnlm_text_cnn", "bert"])
def test_families_are_trained_on_labels_from_scratch(family, tmp_path):
    data, out = rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    words = ["--family", family, "--tokenizer", "byte", "--task", "sequence_classification", "--data", data]
    succeed("finetune", *words, "--output", out, "--set", *SMALL)
    assert succeed("check", out)
    assert json.loads((out / "config.json").read_text())["label2id"] == {"a": 0, "b": 1}
    metrics = json.loads(succeed("evaluate", out, "--json").out)[0]["metrics"]
    assert metrics == pytest.approx(json.loads((out / "evaluation.json").read_text())["metrics"])


def test_families_without_a_language_head_are_sent_to_finetune(text_file, tmp_path):
    words = ["--family", "lnlm_text_cnn", "--data", text_file, "--output", tmp_path / "out"]
    result = run("pretrain", *words)
    assert result.status == 2 and "hf-lnlm finetune --family lnlm_text_cnn" in result.err
    result = run("finetune", *words, "--task", "token_classification")
    assert result.status == 2 and "lnlm_text_cnn has not" in result.err


def test_fixed_labels_refuse_others_or_skip_them(rnn, tmp_path):
    data, held = rows(tmp_path / "rows.jsonl"), tmp_path / "held.jsonl"
    held.write_text('{"text": "a", "label": "zebra"}\n')
    words = ["--checkpoint", rnn, "--task", "sequence_classification", "--data", data, "--validation", held]
    words += ["--output", tmp_path / "out", "--labels", "a,b", *settings(*SMALL)]
    result = run("finetune", *words)
    assert result.status == 2 and "held.jsonl, line 1 (row 1): column 'label' holds 'zebra'" in result.err
    held.write_text('{"text": "a", "label": "zebra"}\n{"text": "a", "label": "b"}\n')
    result = run("finetune", *words, "--skip-bad-rows")
    assert result.status == 0 and "skipped 1 of" in result.err


def test_adapter_base_and_merged_agree(rnn, tmp_path):
    """The adapter on its base, reloaded, and the merged checkpoint give the same metrics; the base is as it was."""
    before, data = digest(rnn), rows(tmp_path / "rows.jsonl")
    words = ["--checkpoint", rnn, "--task", "sequence_classification", "--data", data, "--lora", "--merge"]
    fast = settings(*SMALL, "training.learning_rate=0.05")
    succeed("finetune", *words, "--output", tmp_path / "out", *fast)
    assert digest(rnn) == before
    folder = tmp_path / "out"
    names = load_file(folder / "adapter_model.safetensors")
    assert any("lora_A" in name for name in names) and not (folder / "model.safetensors").exists()
    trained = json.loads((folder / "evaluation.json").read_text())["metrics"]
    task = ["--task", "sequence_classification"]
    adapter = json.loads(succeed("evaluate", folder, "--json").out)[0]["metrics"]
    merged = json.loads(succeed("evaluate", folder / "merged", *task, "--data", data, "--json").out)[0]["metrics"]
    whole = json.loads(succeed("evaluate", folder, "--data", data, "--json").out)[0]["metrics"]
    assert adapter == trained
    assert merged["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert run("check", folder).status == 0 and run("check", folder / "merged").status == 0


def test_an_adapter_of_a_language_model_carries_its_state_and_is_resumed(rnn, text_file, tmp_path):
    words = ["--checkpoint", rnn, "--task", "causal", "--data", text_file, "--lora", "--output", tmp_path / "out"]
    succeed("finetune", *words, "--set", *SMALL)
    assert read_recipe(tmp_path / "out" / "recipe.yaml").data.mode == "lanes"
    metrics = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert json.loads(succeed("evaluate", tmp_path / "out", "--json").out)[0]["metrics"] == pytest.approx(metrics)
    assert succeed("generate", tmp_path / "out", "--prompt", "def", "--max-new-tokens", "3").out
    succeed("finetune", "--resume", "--output", tmp_path / "out", "--set", "training.max_steps=4")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_evaluation_is_written_and_printed(rnn, text_file, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(rnn, copy)
    whole = succeed("evaluate", copy, rnn, "--data", text_file, "--output", tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["checkpoint"] for row in found] == [str(copy), str(rnn)]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert "bits per byte" in whole.out and f"{found[0]['metrics']['perplexity']:.5g}" in whole.out
    held = json.loads(succeed("evaluate", copy, "--json").out)[0]
    assert held["metrics"] == pytest.approx(json.loads((rnn / "evaluation.json").read_text())["metrics"])


def test_generation_in_a_batch_equals_one_by_one(rnn):
    prompts = ["def wrap(", "a", "import textwrap as"]
    options = ["--greedy", "--max-new-tokens", "8", "--json"]
    together = succeed("generate", rnn, *[word for text in prompts for word in ("--prompt", text)], *options).out
    alone = "".join(succeed("generate", rnn, "--prompt", text, *options).out for text in prompts)
    assert together == alone
    for line, prompt in zip(together.splitlines(), prompts):
        assert json.loads(line)["text"].startswith(prompt)


def test_generation_is_repeatable_and_counts(rnn):
    words = ["generate", rnn, "--prompt", "def", "--count", "3", "--max-new-tokens", "6", "--json"]
    first, other = succeed(*words).out, succeed(*words, "--seed", "1").out
    assert first == succeed(*words).out != other
    assert len(first.splitlines()) == 3
    assert succeed("generate", rnn, "--prompt", "", "--max-new-tokens", "3").out


def test_classifiers_do_not_generate(rnn, tmp_path):
    shutil.copytree(rnn, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["architectures"] = ["RNNForSequenceClassification"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = run("generate", tmp_path / "model", "--prompt", "a")
    assert result.status == 2 and "doesn't write text" in result.err


def test_dry_run_lists_exactly_what_would_go_up(rnn):
    before = {path: path.read_bytes() for path in rnn.iterdir() if path.is_file()}
    result = succeed("push", rnn, "someone/model", "--dry-run")
    listed = {line.split()[-1] for line in result.out.splitlines() if line[:1] == " "}
    assert listed == {path.name for path in before if not path.name.startswith(".")}
    assert {path: path.read_bytes() for path in rnn.iterdir() if path.is_file()} == before


def test_a_folder_that_fails_is_not_pushed(rnn, tmp_path):
    shutil.copytree(rnn, tmp_path / "model")
    (tmp_path / "model" / "x.pkl").write_bytes(b"\x80\x04")
    result = run("push", tmp_path / "model", "someone/model")
    assert result.status == 1 and "not pushed" in result.out


def test_check_fails_with_status_1(tmp_path):
    result = run("check", tmp_path)
    assert result.status == 1 and "no config.json" in result.out
    assert json.loads(run("check", tmp_path, "--json").out)[0]["level"] == "fail"
