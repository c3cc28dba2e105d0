"""What commands say when something is wrong: one line, whatever it is, that no data can steer a terminal with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hf_lnlm.cli import listing
from hf_lnlm.errors import printable
from hf_lnlm.flows import console, output
from hf_lnlm.models.hybrid.configuration_encoder_cnn import EncoderCNNConfig
from hf_lnlm.trainer.arguments import LNLMTrainingArguments

from .running import run

RED = "\x1b[31mred\x9b\u202e\r\ud800"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TypeError("int has no len()"), "TypeError: int has no len()"),
        (KeyError("x"), "KeyError: 'x'"),
        (RecursionError("deep"), "something is nested too deeply"),
        (MemoryError(), "not enough memory"),
        (UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"), "can't be read or written in this encoding"),
        (ValueError(RED), "\\x1b[31mred\\x9b\\u202e"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_is_one_line(error, said, monkeypatch):
    def fail(json):
        raise error

    monkeypatch.setattr(listing, "list_families", fail)
    found = run("list")
    assert found.status in (1, 2) and found.err.count("\n") == 1
    assert said in found.err and "\x1b" not in found.err
    monkeypatch.setenv("HF_LNLM_DEBUG", "")  # so that what --debug sets is taken back
    monkeypatch.delenv("HF_LNLM_DEBUG")
    for words in (("--debug", "list"), ("list", "--debug"), ("list", "--traceback")):
        assert "Traceback (most recent call last)" in run(*words).err
        os.environ.pop("HF_LNLM_DEBUG")


def test_control_codes_are_shown_escaped(capsys):
    shown = "\\x1b[31mred\\x9b\\u202e\\r\\ud800"
    assert printable(RED + "\n\té日") == shown + "\n\té日"
    output.say(RED)
    output.warn(RED)
    console.table("title", ["name"], [[RED]])
    console.print_json({"name": "\ud800"})
    found = capsys.readouterr()
    assert found.out.count(shown) == 2 and shown in found.err and '"\\ud800"' in found.out
    assert not any(code in found.out + found.err for code in ("\x1b", "\x9b", "\u202e", "\r"))


def test_a_reader_that_leaves_and_a_narrow_encoding_are_no_errors():
    code = "from hf_lnlm.cli.main import main; main(['list', '--json'])"
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": narrow}
    with subprocess.Popen([sys.executable, "-c", code], **piped) as pipe:
        pipe.stdout.close()
        assert pipe.stderr.read() == b"" and pipe.wait() == 0
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, env=narrow)
    assert found.returncode == 0 and found.stderr == b"" and found.stdout.isascii() and b"\\u" in found.stdout


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number, got nan"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 to count epochs, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"label_smoothing_factor": 5.0}, "label_smoothing_factor must be between 0 and 1, got 5.0"),
        ({"save_steps": -1}, "save_steps must be above 0, got -1"),
        ({"fp16": True}, "fp16 needs an accelerator"),
        ({"early_stopping_threshold": 0.5}, "early_stopping_threshold needs early_stopping_patience, got 0.5"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type='cosine_with_min_lr' can't take"),
        ({"lr_scheduler_kwargs": {"powr": 2}}, "lr_scheduler_type='linear' can't take"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(values, said, tmp_path):
    with pytest.raises(ValueError, match=said.replace("(", "\\(")):
        LNLMTrainingArguments(str(tmp_path), use_cpu=True, **values)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"encoder_config": {"hidden_size": 32}}, "got encoder_config \\(did you mean 'encoder'"),
        ({"encoders": None}, "did you mean 'encoder'"),
        ({"enocder": {"model_type": "bert"}}, "did you mean 'encoder'"),
        ({"encoder": {"model_type": "bert", "hiden_size": 32}}, "no field 'hiden_size' \\(did you mean 'hidden_size'"),
        ({"encoder": {"hidden_size": 32}}, "must name its model_type"),
    ],
    ids=str,
)
def test_a_misspelt_part_of_a_composite_config_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        EncoderCNNConfig(**fields)
