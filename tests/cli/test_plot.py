"""`hf-lnlm plot addressing`: pictures of both memory families, which slots are drawn, and clear errors."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_lnlm import (
    DNCConfig,
    DNCForSequenceTransduction,
    NTMConfig,
    NTMForCausalLM,
    NTMForSequenceTransduction,
)
from hf_lnlm.cli.plot import Panel, addressing_panels, draw, task_panels
from hf_lnlm.data.algorithmic import Copy, pad_rows

from .running import run, succeed

BITS = {"hidden_size": 8, "controller_size": 12, "input_size": 9, "output_size": 8, "memory_size": 9, "memory_width": 5}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memories")
    torch.manual_seed(0)
    NTMForSequenceTransduction(NTMConfig(**BITS, num_read_heads=2)).save_pretrained(folder / "ntm")
    DNCForSequenceTransduction(DNCConfig(**BITS, num_hidden_layers=2)).save_pretrained(folder / "dnc")
    NTMForCausalLM(NTMConfig(vocab_size=11, hidden_size=8, memory_size=9)).save_pretrained(folder / "words")
    return folder


@pytest.mark.parametrize(("name", "ending"), [("ntm", "png"), ("dnc", "svg")])
def test_draws_a_picture(checkpoints, tmp_path, name, ending):
    picture = tmp_path / f"addressing.{ending}"
    words = ["plot", "addressing", checkpoints / name, "--task", "copy", "--size", 4, "--output", picture]
    said = succeed(*words, *(["--layer", 1] if name == "dnc" else [])).out
    assert "of 32 bits wrong" in said
    if ending == "png":
        from PIL import Image

        image = Image.open(picture).convert("RGB")
        assert min(image.size) > 500 and len(image.getcolors(maxcolors=2**24)) > 50
    else:
        text = picture.read_text()
        assert "DNC: copy, size 4" in text and all(f"<!-- {word} -->" in text for word in ("usage", "gates", "forward"))


def weightings(slots: list[int], count: int = 20) -> torch.Tensor:
    """`(1, length, 1, count)`: one slot after the other."""
    return torch.nn.functional.one_hot(torch.tensor(slots), count).float()[None, :, None]


def test_slots_round_the_end_are_drawn_together():
    outputs = SimpleNamespace(read_weightings=(weightings([18, 19, 0, 1]),), write_weightings=(weightings([19] * 4),))
    panels = addressing_panels(outputs)
    assert [panel.title for panel in panels] == ["write weighting", "read weighting"]
    assert panels[0].labels == ("16", "17", "18", "19", "0", "1", "2", "3")
    assert panels[1].values.argmax(0).tolist() == [2, 3, 4, 5]


def test_a_lonely_slot_and_none_at_all():
    alone = SimpleNamespace(read_weightings=(weightings([5]),), write_weightings=(weightings([5]),))
    assert addressing_panels(alone)[0].labels == ("3", "4", "5", "6", "7")
    flat = torch.full((1, 3, 1, 30), 1 / 30)
    nothing = SimpleNamespace(read_weightings=(flat,), write_weightings=(flat,))
    assert len(addressing_panels(nothing)[0].labels) == 30


def test_axes_say_what_they_count_in_round_numbers(tmp_path):
    values = torch.rand(57, 30)
    slots = Panel("read weighting", values, tuple(str(i % 60) for i in range(33, 90)))
    picture = tmp_path / "axes.svg"
    draw([Panel("inputs", values[:9], bits=True), slots], picture, "title")
    words = set(re.findall("<!-- (.+?) -->", picture.read_text()))
    assert words >= {"title", "inputs", "read weighting", "bit", "slot", "step", "40", "50", "0", "10", "20"}


def test_wrong_bits_are_marked():
    batch = pad_rows([Copy().row(torch.Generator().manual_seed(0), 3)])
    logits = torch.where(batch["labels"] > 0.5, 9.0, -9.0)
    logits[0, 5, 2] *= -1
    outputs = task_panels(batch, logits)[2]
    assert outputs.wrong.nonzero().tolist() == [[2, 5]]
    assert not outputs.values[:, :4].any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "copie"], "did you mean 'copy'"),
        (["--task", "repeat_copy"], "width"),
        (["--size", "0"], "--size"),
        (["--layer", "1"], "--layer"),
        (["--output", "missing/picture.png"], "--output"),
        (["--output", "picture.txt"], ".png"),
    ],
)
def test_bad_requests_are_one_clear_line(checkpoints, words, message):
    result = run("plot", "addressing", checkpoints / "ntm", *words)
    assert result.status == 2 and message in result.err and result.err.count("\n") == 1


def test_other_models_are_refused(checkpoints, tmp_path):
    result = run("plot", "addressing", checkpoints / "words", "--output", tmp_path / "a.png")
    assert result.status == 2 and "NTMForCausalLM" in result.err
    result = run("plot", "addressing", tmp_path, "--output", tmp_path / "a.png")
    assert result.status == 2 and "no checkpoint" in result.err


def test_a_missing_matplotlib_names_its_extra(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("plot", "addressing", checkpoints / "ntm", "--output", tmp_path / "a.png")
    assert result.status == 1 and "hf_lnlm[plot]" in result.err


def test_outputs_without_addressing_are_refused():
    with pytest.raises(ValueError, match="output_addressing"):
        addressing_panels(SimpleNamespace(read_weightings=None))
