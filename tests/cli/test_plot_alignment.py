"""`hf-lnlm plot alignment`: ours and stock, what is drawn where, and clear errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import hf_lnlm
from hf_lnlm.cli.plot_alignment import draw_alignment
from hf_lnlm.flows.translate import Alignment, alignment
from tests.contract.cases import add_noise
from tests.flows.test_translate import IDS, TINY, TOKENIZER

from .running import run, succeed


def checkpoint(folder: Path, kind: str, **fields: object) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **IDS, **TINY[kind], **fields)
    add_noise(AutoModelForSeq2SeqLM.from_config(config), 1).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", TINY)
def test_weights_are_the_models_own(kind: str, tmp_path: Path):
    folder = checkpoint(tmp_path / "model", kind)
    found = alignment(folder, "one two", target="ab")
    assert found.source[:3] == ["o", "n", "e"]
    assert found.target == ["a", "b", "<eos>"]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([[*TOKENIZER("one two")["input_ids"], TOKENIZER.eos_token_id]])
    target = torch.tensor([[model.config.decoder_start_token_id, *TOKENIZER("ab")["input_ids"]]])
    with torch.no_grad():
        weights = model(ids, decoder_input_ids=target, output_attentions=True).cross_attentions[-1][0].mean(0)
    assert torch.allclose(torch.tensor(found.weights), weights, atol=1e-6)
    assert found.weights != alignment(folder, "one twO", target="ab").weights


def test_draws_a_picture_of_what_the_model_writes(tmp_path: Path):
    folder = checkpoint(tmp_path / "model", "lnlm_seq2seq")
    picture = tmp_path / "alignment.png"
    said = succeed("plot", "alignment", folder, "one", "--max-new-tokens", 3, "--output", picture).out
    assert str(picture) in said
    from PIL import Image

    with Image.open(picture) as image:
        assert min(image.size) > 300


def test_a_cell_is_dark_where_was_looked(tmp_path: Path):
    found = Alignment(["das", "$x$", "Haus"], ["the", "house"], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    draw_alignment(found, tmp_path / "a.svg")
    words = re.findall("<!-- (.+?) -->", (tmp_path / "a.svg").read_text())
    assert [word for word in words if not re.fullmatch(r"[\d.]+", word)] == ["das", "$x$", "Haus", "the", "house"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layer", 1], "--layer must lie between 0 and 0, got 1"),
        (["--output", "picture.txt"], "--output must end in .png"),
        (["--target", ""], "--target must have a token"),
    ],
)
def test_bad_requests_are_one_clear_line(words: list[object], said: str, tmp_path: Path):
    folder = checkpoint(tmp_path / "model", "lnlm_seq2seq")
    result = run(
        "plot", "alignment", folder, "one", *words, *([] if "--output" in words else ["--output", tmp_path / "a.png"])
    )
    assert result.status == 2 and said in result.err
    assert not (tmp_path / "a.png").exists()


def test_models_that_look_nowhere_are_refused(tmp_path: Path):
    folder = checkpoint(tmp_path / "blind", "lnlm_seq2seq", attention="none")
    result = run("plot", "alignment", folder, "one", "--output", tmp_path / "a.png")
    assert result.status == 2 and "has no attention over its source" in result.err
    config = hf_lnlm.RNNConfig(hidden_size=8, num_hidden_layers=1, **IDS)
    hf_lnlm.RNNForCausalLM(config).save_pretrained(tmp_path / "lm")
    result = run("plot", "alignment", tmp_path / "lm", "one", "--output", tmp_path / "a.png")
    assert result.status == 2 and "no encoder with a decoder" in result.err
