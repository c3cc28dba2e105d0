"""Checkpoints that don't fit what they claim are refused in one line that names what, before they are used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import hf_lnlm
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.hub.check import check_folder, is_fit
from hf_lnlm.hub.folder import json_text

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A language model and a text to measure it on."""
    folder, tokenizer = tmp_path_factory.mktemp("saved"), build_tokenizer("byte")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, model_type, fields in (
        ("rnn", "lnlm_rnn", {"hidden_size": 8}),
        ("gpt2", "gpt2", {"n_embd": 8, "n_head": 2}),
    ):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **ids, **fields)).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("some text to measure\n" * 20)
    return folder


def changed(folder: Path, change) -> None:
    """Change the weights of a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(name for name in sorted(tensors) if "layer" in name or "h.0.attn.c_attn.weight" in name))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def linked(folder: Path, name: str) -> None:
    """Put a file elsewhere, and a link in its place."""
    shutil.move(folder / name, folder.parent / f"elsewhere-{name}")
    (folder / name).symlink_to(folder.parent / f"elsewhere-{name}")


def indexed(folder: Path, name: str) -> None:
    """Name the file of weights in an index, and put it there."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / WEIGHTS), name)}
    shutil.move(folder / WEIGHTS, folder / name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


DAMAGES = {
    "missing": (lambda f: changed(f, lambda t, k: t.pop(k)), "no file holds 1 of the model's tensors, e.g. "),
    "unexpected": (lambda f: changed(f, lambda t, k: t.update(stray=t[k].clone())), "does not use 1 of .* e.g. stray"),
    "shape": (
        lambda f: changed(f, lambda t, k: t.update({k: torch.ones(3, 5)})),
        r"another shape .*\[3, 5\] instead of",
    ),
    "nan": (lambda f: changed(f, lambda t, k: t[k].view(-1)[:1].fill_(torch.nan)), "not finite: .*"),
    "whole": (lambda f: changed(f, lambda t, k: t.update({k: t[k].long()})), "stored as I64: whole numbers"),
    "half": (lambda f: changed(f, lambda t, k: t.update({k: t[k].half()})), "float32, but .* is stored as F16"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "model.safetensors is cut off"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors"),
    "link": (lambda f: linked(f, WEIGHTS), "model.safetensors is (no regular file|a link)"),
    "config link": (lambda f: linked(f, CONFIG), "config.json is (no regular file|a link)"),
    "index": (lambda f: indexed(f, "../outside.safetensors"), "index.json points outside the folder"),
    "list": (lambda f: (f / CONFIG).write_text("[]"), "config.json is not a JSON object"),
    "twice": (lambda f: (f / CONFIG).write_text('{"a": 1, "a": 2}'), "config.json holds a twice"),
    "surrogate": (
        lambda f: (f / "tokenizer_config.json").write_text('{"a": "\\ud800"}'),
        "tokenizer_config.json holds half",
    ),
    "not a number": (lambda f: (f / CONFIG).write_text('{"a": NaN}'), "config.json holds NaN"),
    "large": (lambda f: _set(f, hidden_size=10**6, n_embd=10**6), "describes .* parameters, the files hold"),
}


def _set(folder: Path, **fields) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {k: v for k, v in fields.items() if k in values}))


@pytest.mark.parametrize("family", ["rnn", "gpt2"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(damage: str, family: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / family, folder)
    change, message = DAMAGES[damage]
    change(folder)
    for use in (
        lambda: hf_lnlm.generate(folder, ["a"], max_new_tokens=1),
        lambda: hf_lnlm.evaluate(folder, data=str(saved / "text.txt")),
        lambda: hf_lnlm.predict(folder, ["a"]),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            use()
        assert "\n" not in str(refusal.value)
    assert not is_fit(check_folder(folder))
    assert not (folder / "evaluation.json").exists()


def test_a_new_head_is_allowed_on_demand_and_said(saved: Path, tmp_path: Path, capsys) -> None:
    from hf_lnlm.flows.models import load_trained
    from hf_lnlm.flows.recipe import ModelSection

    section, name = ModelSection(checkpoint=str(saved / "rnn")), "AutoModelForSequenceClassification"
    with pytest.raises(ValueError, match=r"no file holds .* \(--allow-new-weights draws a new head\)"):
        load_trained(section, name)
    model = load_trained(section, name, allow_new_weights=True)
    said = capsys.readouterr()
    assert type(model).__name__ == "RNNForSequenceClassification"
    assert "drawn at random" in said.err and said.out == ""
    changed(Path(shutil.copytree(saved / "rnn", tmp_path / "hole")), lambda t, k: t.pop(k))
    with pytest.raises(ValueError, match="doesn't fit its config: no file holds 1 of"):
        load_trained(ModelSection(checkpoint=str(tmp_path / "hole")), name, allow_new_weights=True)


def test_adapters_that_match_nothing_are_refused(saved: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    base = AutoModelForCausalLM.from_pretrained(saved / "rnn")
    get_peft_model(base, hf_lnlm.lora_config(base, r=2)).save_pretrained(tmp_path)
    build_tokenizer("byte").save_pretrained(tmp_path)
    assert len(hf_lnlm.generate(tmp_path, ["a"], max_new_tokens=1)) == 1
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("lora_A", "lora_X"): value for name, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"is no adapter of its base: no file holds .*; the model does not use"):
        hf_lnlm.generate(tmp_path, ["a"], max_new_tokens=1)
    save_file({name: value * torch.inf for name, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="weights that are not finite"):
        hf_lnlm.generate(tmp_path, ["a"], max_new_tokens=1)


def test_json_is_strict() -> None:
    value = {"loss": float("nan"), "more": [float("inf"), (1.5, -float("inf"))], "text": "é", "cut": "\ud800"}
    found = json.loads(json_text(value), parse_constant=lambda name: pytest.fail(name))
    assert found == {"loss": None, "more": [None, [1.5, None]], "text": "é", "cut": "\ud800"}
    assert json_text({"text": "é"}) == '{"text": "é"}'
