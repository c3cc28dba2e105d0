"""`check` finds each fault, says it in one line, and runs nothing of a stranger's folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lnlm import RNNConfig, RNNForCausalLM
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.hub.card import write_card
from hf_lnlm.hub.check import check_folder, is_fit
from hf_lnlm.hub.folder import looks_pickled


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of ours that has everything."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = build_tokenizer("byte")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = RNNConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=2, **ids)
    RNNForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def failures(folder, **options):
    return {f.topic: f.message for f in check_folder(folder, **options) if f.level == "fail"}


def edit_json(path, **values):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({key: item for key, item in {**value, **values}.items() if item is not ...}))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_whole_folder_is_fit_and_every_examination_spoke(folder):
    findings = check_folder(folder)
    assert {f.level for f in findings} == {"ok"}, findings
    assert [f.topic for f in findings] == [
        "files", "pickles", "config", "weights", "keys", "tokenizer", "generation", "card", "code",
    ]  # fmt: skip


def test_a_stock_checkpoint_needs_no_code(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=263)).save_pretrained(tmp_path)
    build_tokenizer("byte").save_pretrained(tmp_path)
    write_card(tmp_path)
    assert failures(tmp_path) == {"generation": "bos_token_id 50256 is outside vocab_size 263"}


def test_not_a_folder(tmp_path):
    assert failures(tmp_path / "nowhere")["folder"].endswith("nowhere is not a folder")
    assert failures(tmp_path)["files"] == "no config.json"


def test_links_and_special_files(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "extra.json").symlink_to(secret)
    assert "is a link to" in failures(folder)["files"]
    (folder / "extra.json").unlink()
    os.mkfifo(folder / "pipe.json")
    assert "pipe.json is no regular file" in failures(folder)["files"]


def test_linked_weights_are_not_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    found = failures(folder)
    assert "is a link" in found["files"]
    assert found["weights"] == "missing: model.safetensors"


@pytest.mark.parametrize("content", [b"\x80\x04\x95", b"PK\x03\x04rest"])
def test_pickles_by_content_whatever_their_name(folder, content):
    (folder / "notes.txt").write_bytes(content)
    assert "notes.txt" in failures(folder)["pickles"]


def test_a_header_whose_length_reads_like_a_pickle_is_none(tmp_path):
    for length in (640, 896, 1152, 1408):  # 80 02 … 80 05
        file = tmp_path / f"{length}.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + b"{".ljust(length))
        assert not looks_pickled(file)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(pickle.dumps({"weights": [1.0]}, protocol=2))
    assert looks_pickled(disguised)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.pkl"])
def test_pickles_by_name(folder, name):
    (folder / name).write_bytes(b"anything")
    assert name in failures(folder)["pickles"]


def test_state_of_a_run_is_left_out_of_account(folder):
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"\x80\x04")
    assert is_fit(check_folder(folder))


def test_empty_file(folder):
    (folder / "tokenizer.json").write_bytes(b"")
    assert failures(folder)["files"] == "empty: tokenizer.json"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json is not JSON"),
        ("[1]", "config.json is not a JSON object"),
        ("{}", "config.json has no model_type"),
        ("[" * 100_000, "config.json is not JSON"),
    ],
)
def test_broken_config(folder, content, message):
    (folder / "config.json").write_text(content)
    assert message in failures(folder)["config"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": "8"}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"cell_type": "xlstm"}, "cell_type"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_config_values_are_refused_by_field(folder, values, message):
    edit_json(folder / "config.json", **values)
    assert message in failures(folder)["config"]


def test_config_larger_than_its_files_is_not_built(folder):
    edit_json(folder / "config.json", hidden_size=4096, embedding_size=4096, last_hidden_size=4096)
    assert "parameters, the files hold" in failures(folder)["keys"]


@pytest.mark.parametrize("value", ["someone/elsewhere--modeling_rnn.RNNModel", "../x.Y", "a.b.C"])
def test_auto_map_must_stay_inside(folder, value):
    edit_json(folder / "config.json", auto_map={"AutoModel": value})
    assert "points outside the folder" in failures(folder)["config"]


def test_kernels_of_strangers_are_not_fetched(folder):
    edit_json(folder / "config.json", attn_implementation="someone/kernel", nested={"_attn_implementation": "a/b@c"})
    assert "points outside the folder" in failures(folder)["config"]
    assert "keys" not in {f.topic for f in check_folder(folder)}


def test_layers_without_tensors_are_not_built(folder):
    edit_json(folder / "config.json", num_hidden_layers=9000)
    assert failures(folder)["keys"] == "config.json: num_hidden_layers = 9000, the files hold 9 tensors"


def test_auto_map_of_the_tokenizer_too(folder):
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "other/repo--tok.Tok"]})
    assert "tokenizer_config.json: auto_map" in failures(folder)["config"]


def test_not_finite(folder):
    edit_weights(folder, lambda t: t["model.embed_tokens.weight"].view(-1)[3:5].fill_(float("nan")))
    assert failures(folder)["weights"] == "not finite: model.embed_tokens.weight (2 of 2104)"


def test_missing_unexpected_and_reshaped_tensors(folder):
    def edit(tensors):
        name = next(name for name in tensors if "embed" not in name)
        tensors["renamed"] = tensors.pop(name)

    edit_weights(folder, edit)
    messages = [f.message for f in check_folder(folder) if f.topic == "keys"]
    assert any("no file holds 1 of the model's tensors" in message for message in messages)
    assert any("does not use 1 of the files' tensors, e.g. renamed" in message for message in messages)


def test_shapes(folder):
    edit_weights(folder, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(263, 4)}))
    assert "another shape" in failures(folder)["keys"]


def test_truncated_and_padded_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "cut off or padded" in failures(folder)["weights"]
    path.write_bytes(whole + b"payload")
    assert "cut off or padded" in failures(folder)["weights"]
    path.write_bytes(whole[:6])
    assert "cut off" in failures(folder)["weights"]


@pytest.mark.parametrize(
    "row",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        17,
    ],
)
def test_malformed_headers(folder, row):
    write_header(folder / "model.safetensors", {"a": row}, b"\0" * 4)
    assert "weights" in failures(folder)


def test_index_stays_inside(folder):
    index = folder / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "sub/../../x.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "points outside the folder" in failures(folder)["weights"]
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert failures(folder)["weights"] == "missing: gone.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert "the index names 1 tensors no file holds" in " ".join(f.message for f in check_folder(folder))


def test_shards_are_read_through_the_index(folder):
    model = RNNForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert failures(folder) == {}


def test_tokenizer_fits(folder):
    build_tokenizer("byte", sentinels=5).save_pretrained(folder)
    assert failures(folder)["tokenizer"] == "its largest id is 267, but config.vocab_size is 263"
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "tokenizer.json can't be read" in failures(folder)["tokenizer"]


def test_special_tokens_agree(folder):
    edit_json(folder / "config.json", pad_token_id=5)
    assert "config.pad_token_id is 5" in failures(folder)["tokenizer"]
    edit_json(folder / "tokenizer_config.json", eos_token="<end>")
    assert "eos_token <end> is not in the vocabulary" in failures(folder)["tokenizer"]


def test_generation_ids(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9999]}')
    assert failures(folder)["generation"] == "eos_token_id 9999 is outside vocab_size 263"


@pytest.mark.parametrize(
    "text, message",
    [
        ("no header", "does not open with a YAML block"),
        ("---\n- a\n---\n", "its YAML block is not a mapping"),
        ("---\na: [\n---\n", "its YAML block is not valid"),
        ("---\nlicense: mit\n---\n", "lacks library_name, pipeline_tag, tags"),
    ],
)
def test_card(folder, text, message):
    (folder / "README.md").write_text(text)
    assert message in failures(folder)["card"]


def test_no_card(folder):
    (folder / "README.md").unlink()
    assert "no README.md" in failures(folder)["card"]


def test_code_is_carried(folder):
    (folder / "nn_state.py").unlink()
    assert "nn_state.py is missing" in failures(folder)["code"]


def test_every_head_is_in_auto_map(folder):
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    del auto_map["AutoModelForTokenClassification"]
    edit_json(folder / "config.json", auto_map=auto_map)
    assert failures(folder)["code"] == "not carried: auto_map lacks AutoModelForTokenClassification"


@pytest.mark.parametrize(
    "source, message",
    [
        ("import hf_lnlm", "imports hf_lnlm, which a reader may not have"),
        ("from requests import get", "imports requests"),
        ("from ..x import y", "an import that transformers can't carry"),
        ("def f(:", "is not Python"),
        ("(" * 5000, "is not Python"),
    ],
)
def test_carried_code_is_parsed(folder, source, message):
    (folder / "nn_state.py").write_text(source)
    assert message in failures(folder)["code"]


def test_nothing_in_the_folder_runs(folder, tmp_path):
    witness = tmp_path / "ran"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(witness)!r}, 'w').close()\n" + path.read_text())
    edit_json(folder / "config.json", model_type="stranger", architectures=["RNNForCausalLM"])
    findings = check_folder(folder)
    assert not witness.exists()
    assert any(f.level == "warn" and "--run-code" in f.message for f in findings)


def test_a_hostile_name_does_not_reach_the_terminal(folder):
    (folder / "a\x1b[2J.bin").write_bytes(b"x")
    assert "\x1b" not in failures(folder)["pickles"]
    assert "\\x1b" in failures(folder)["pickles"]


def test_messages_are_one_line(folder):
    edit_json(folder / "config.json", hidden_size="8")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    (folder / "README.md").write_text("---\na: [\n---\n")
    for finding in check_folder(folder):
        assert "\n" not in finding.message


@pytest.mark.parametrize("value", ["", "lnlm_x", "lnlm_ssm"])
def test_a_model_type_that_is_not_that_of_the_carried_config_is_a_failure(folder, value):
    edit_json(folder / "config.json", model_type=value)
    said = failures(folder)["config"]
    assert said == (
        f"model_type must be lnlm_rnn, as auto_map says, got {value}" if value else "config.json has no model_type"
    )
