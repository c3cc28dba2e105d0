"""Conversions by command: every row of the table in and, where it goes out, back; what would run code is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import hf_lnlm
from hf_lnlm.convert.table import CONVERTERS, markdown_table
from hf_lnlm.flows.convert import convert

from ..cli.running import run, succeed
from ..convert.test_memory import INPUTS, SLOTS, variables

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {**SIZES, "state_size": 4, "n_groups": 1, "head_dim": 8, "num_heads": 4}
BERT = {**SIZES, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24}
STOCK = {
    "mamba": ("CausalLM", MAMBA, []),
    "mamba2": ("CausalLM", MAMBA, []),
    "falcon_mamba": ("CausalLM", MAMBA, []),
    "bert": ("SequenceClassification", BERT, ["projected_size=24", "projection=mean_pool"]),
    "roberta": ("MaskedLM", BERT, ["projected_size=23", "projection=mean_pool"]),
    "gpt2": ("CausalLM", {**SIZES, "n_head": 2, "n_positions": 24}, []),
    "gpt_neo": ("CausalLM", {**SIZES, "num_heads": 2, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}, []),
}  # fmt: skip
IDS = torch.arange(3, 15).view(1, 12)


def fields(*values):
    return [word for value in values for word in ("--set", value)]


def logits(folder, **inputs):
    config = transformers.AutoConfig.from_pretrained(folder)
    head = config.architectures[0]
    kind = getattr(transformers, head, None) or getattr(hf_lnlm, head)
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(**(inputs or {"input_ids": IDS}))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def test_every_row_is_tried_here_and_stands_in_the_table():
    other = {"state-spaces", "word_language_model", "nn.LSTM", "dnc", "word-vectors", "fairseq-lstm"}
    assert {row.kind for row in CONVERTERS} >= {*STOCK, *other}
    told = (Path(hf_lnlm.__file__).parents[1] / "model_cards" / "README.md").read_text(encoding="utf-8")
    assert f"<!-- converters -->\n{markdown_table()}\n<!-- /converters -->" in told, (
        "write convert.table.markdown_table()"
    )


@pytest.mark.parametrize("kind", STOCK)
def test_stock_models_come_in_by_themselves_and_go_back(kind, tmp_path):
    head, values, chosen = STOCK[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(transformers.AutoConfig.for_model(kind, **values))
    model.save_pretrained(tmp_path / "stock")
    tokenizer = hf_lnlm.build_tokenizer("char", ["abc"])
    tokenizer.save_pretrained(tmp_path / "stock")
    said = succeed("convert", tmp_path / "stock", "--output", tmp_path / "ours", *fields(*chosen)).out
    assert f"from       {kind}" in said and (tmp_path / "ours" / "README.md").is_file()
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    length = {"input_ids": torch.arange(24 - (kind == "roberta")).view(1, -1) + 3}
    wanted = logits(tmp_path / "stock", **length)
    assert torch.allclose(logits(tmp_path / "ours", **length), wanted, atol=2e-5)
    row = next(row for row in CONVERTERS if row.kind == kind)
    if row.write is None:
        assert (
            f"{kind} only comes in" in run("convert", tmp_path / "ours", "--to", kind, "--output", tmp_path / "no").err
        )
        return
    succeed("convert", tmp_path / "ours", "--to", kind, "--output", tmp_path / "back")
    assert torch.allclose(logits(tmp_path / "back", **length), wanted, atol=1e-6)


def test_the_original_mamba_comes_in_from_its_pickle_of_tensors_and_goes_back(tmp_path):
    ours = hf_lnlm.SelectiveSSMForCausalLM(
        hf_lnlm.SelectiveSSMConfig(**{**SIZES, "state_size": 4}, bidirectional="none")
    )
    ours.save_pretrained(tmp_path / "ours")
    succeed("convert", tmp_path / "ours", "--to", "state-spaces", "--output", tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["config.json", "pytorch_model.bin"]
    assert "from       state-spaces" in succeed("convert", tmp_path / "theirs", "--output", tmp_path / "again").out
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "ours"))
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    gone = sorted(tensors)[0]
    save_file(
        {name: value for name, value in tensors.items() if name != gone},
        tmp_path / "again/model.safetensors",
        {"format": "pt"},
    )
    refused = run("convert", tmp_path / "again", "--to", "state-spaces", "--output", tmp_path / "no")
    assert refused.status == 2 and gone in refused.err and not (tmp_path / "no").exists()
    assert (
        "made of lnlm_linformer" in run("convert", tmp_path / "ours", "--to", "bert", "--output", tmp_path / "no").err
    )
    assert "not mamba2" in run("convert", tmp_path / "ours", "--to", "mamba2", "--output", tmp_path / "no").err


class Example(nn.Module):
    """PyTorch's word_language_model, as far as its weights go."""

    def __init__(self, kind):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(97, 12), nn.Linear(16, 97)
        self.rnn = getattr(nn, kind)(12, 16, 2)

    def forward(self, ids):
        return self.decoder(self.rnn(self.encoder(ids.T))[0]).transpose(0, 1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_models_of_plain_torch(kind, tmp_path):
    torch.manual_seed(0)
    example = Example(kind)
    torch.save({"epoch": 3, "state_dict": example.state_dict()}, tmp_path / "model.pt")
    succeed("convert", tmp_path / "model.pt", "--output", tmp_path / "ours")
    assert torch.allclose(logits(tmp_path / "ours"), example(IDS), atol=1e-6)
    succeed("convert", tmp_path / "ours", "--to", "word_language_model", "--output", tmp_path / "back")
    back = load_file(tmp_path / "back" / "weights.safetensors")
    assert back.keys() == example.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in example.state_dict().items())
    layer = getattr(nn, kind)(12, 16, 2, bidirectional=True, batch_first=True)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    words = ["convert", tmp_path / "layer.safetensors", "--output", tmp_path / "layers"]
    assert "vocab_size=N" in run(*words).err
    succeed(*words, "--set", "vocab_size=97")
    inputs = torch.randn(2, 5, 12)
    assert torch.allclose(logits(tmp_path / "layers", inputs_embeds=inputs), layer(inputs)[0], atol=1e-6)
    succeed("convert", tmp_path / "layers", "--to", "nn.LSTM", "--output", tmp_path / "out")
    layer.load_state_dict(load_file(tmp_path / "out" / "weights.safetensors"))


def test_variables_of_deepminds_dnc(tmp_path):
    found = variables(2, 1)
    np.savez(tmp_path / "dnc.npz", **{name: value.numpy() for name, value in found.items()})
    words = ["convert", tmp_path / "dnc.npz", "--output", tmp_path / "ours"]
    assert "memory_size=N" in run(*words).err
    succeed(*words, "--set", f"memory_size={SLOTS}")
    assert logits(tmp_path / "ours", inputs_embeds=torch.randn(1, 4, INPUTS)).isfinite().all()
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (saved["num_read_heads"], saved["controller_size"], saved["memory_size"]) == (2, 11, SLOTS)


def test_word_vectors_fill_a_checkpoint(tmp_path):
    tokenizer = hf_lnlm.build_tokenizer("word", ["good bad film"])
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = hf_lnlm.TextCNNForSequenceClassification(hf_lnlm.TextCNNConfig(**ids, hidden_size=4))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "cnn")
    (tmp_path / "vectors.txt").write_text("good 1 2 3 4\nunheard 0 0 0 0\n")
    words = ["convert", tmp_path / "vectors.txt", "--output", tmp_path / "filled"]
    assert "give --into CHECKPOINT" in run(*words).err
    succeed(*words, "--into", tmp_path / "cnn")
    table = (
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "filled")
        .get_input_embeddings()
        .weight
    )
    assert table[tokenizer.get_vocab()["good"]].tolist() == [1, 2, 3, 4]
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "filled")) == len(tokenizer)


def test_what_would_run_code_or_fits_nothing_is_refused_and_leaves_nothing(tmp_path):
    torch.save(Example("LSTM"), tmp_path / "module.pt")
    torch.save({"args": argparse.Namespace(arch="lstm"), "model": Example("LSTM").state_dict()}, tmp_path / "whole.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 nothing")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    np.savez(tmp_path / "objects.npz", words=np.array([{}], dtype=object))
    config = transformers.AutoConfig.for_model("gpt2", **{**SIZES, "n_head": 2, "n_positions": 24})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    before = sorted(path.name for path in tmp_path.iterdir())
    for source, words, said in (
        ("module.pt", [], "would run its code. Where it was made, save the tensors alone"),
        (
            "whole.pt",
            [],
            "argparse.Namespace is pickled in it), and reading it would run its code. Where it was made, export",
        ),
        ("damaged.pt", [], "no file of torch, or damaged"),
        ("objects.npz", [], "must hold arrays of numbers"),
        ("damaged.npz", [], "must hold arrays of numbers"),
        ("other.safetensors", [], "of no kind that can be told from it: give --from, one of mamba"),
        ("other.safetensors", ["--from", "nn.LSTM", "--set", "vocab_size=9"], "'weight' is not a weight of nn.LSTM"),
        ("other.safetensors", ["--from", "nn.LTSM"], "did you mean 'nn.LSTM'"),
        ("other.safetensors", ["--from", "mamba", "--to", "bert"], "give one of them"),
        ("gpt2", [], "weights of GPT2LMHeadModel are missing: transformer.h.1.mlp.c_fc.weight"),
        ("t5", [], "(model_type t5) is of no kind"),
        ("missing.pt", [], "no such file or folder"),
        ("other.safetensors", ["--output", full], "--output wants a new folder"),
    ):
        where = [] if "--output" in words else ["--output", tmp_path / "out"]
        result = run("convert", tmp_path / source, *where, *words)
        assert result.status == 2 and said in result.err, (said, result.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_from_python(tmp_path):
    save_file(nn.GRU(3, 4).state_dict(), tmp_path / "gru.safetensors")
    folder = convert(tmp_path / "gru.safetensors", tmp_path / "ours", from_kind="nn.LSTM", fields={"vocab_size": 9})
    assert transformers.AutoConfig.from_pretrained(folder).cell_type == "gru"
