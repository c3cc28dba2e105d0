"""`--import`: a user's objective and family in any command; by flag only, and never from the working directory by name."""

from __future__ import annotations

import json
import sys

import pytest

from hf_lnlm.objectives import OBJECTIVES

from .running import QUICK, run, settings, succeed

OWN = '''
from dataclasses import dataclass
from typing import ClassVar
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from hf_lnlm.objectives import OBJECTIVES
from hf_lnlm.objectives.causal import CausalObjective


@dataclass(frozen=True)
class Mine(CausalObjective):
    """Predicts each token from those before it.

    Args:
        patience: unused.
    """

    name: ClassVar[str] = "mine"
    patience: int = 3


class MineConfig(GPT2Config):
    model_type = "mine_gpt"


class MineForCausalLM(GPT2LMHeadModel):
    config_class = MineConfig


OBJECTIVES["mine"] = Mine
AutoConfig.register("mine_gpt", MineConfig, exist_ok=True)
AutoModelForCausalLM.register(MineConfig, MineForCausalLM, exist_ok=True)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the working directory; nothing of it stays."""
    (tmp_path / "own_things.py").write_text(OWN)
    (tmp_path / "broken_things.py").write_text("raise KeyError('no such thing')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    before = dict(OBJECTIVES)
    yield tmp_path
    OBJECTIVES.clear()
    OBJECTIVES.update(before)
    sys.modules.pop("own_things", None)


def test_an_own_objective_and_family_train(own, text_file):
    words = ["pretrain", "--family", "mine_gpt", "--data", text_file, "--tokenizer", "byte", "--objective", "mine"]
    quick = settings(*QUICK, "data.block_size=32", "objective.patience=4", "model.config.n_layer=1")
    succeed(*words, "--output", "run", *quick, "--import", "./own_things.py")
    assert json.loads((own / "run" / "config.json").read_text())["model_type"] == "mine_gpt"
    assert json.loads((own / "run" / "evaluation.json").read_text())["task"] == "mine"
    assert "import" not in (own / "run" / "recipe.yaml").read_text().replace("important", "")


def test_modules_are_found_on_the_path_but_not_in_the_working_directory(own, monkeypatch):
    (own / "library").mkdir()
    (own / "own_things.py").rename(own / "library" / "own_things.py")
    assert "--import ./own_things.py" in run("config-keys", "--import", "own_things").err
    monkeypatch.setattr(sys, "path", [str(own / "library"), *sys.path])
    assert "objective.patience" in succeed("--import=own_things", "config-keys", "objective.mine").out


def test_what_is_no_module_of_the_user_is_refused(own, text_file):
    (own / "asks.yaml").write_text("import: ./own_things.py\nmodel: {family: lnlm_rnn}\n")
    for words, said in (
        (
            ["list", "--import", "own_things"],
            "doesn't count: a file in it is --import ./own_things.py",
        ),
        (["list", "--import", "own_things.py"], "a file is given by a path, as in --import ./own_things.py"),
        (["list", "--import", "./nothing.py"], "no such Python file"),
        (["list", "--import", "./broken_things.py"], "failed: KeyError: 'no such thing'"),
        (["list", "--import", "os; x"], "wants a module's name"),
        (["pretrain", "asks.yaml", "--data", text_file], "import can't be given by a recipe"),
        (["pretrain", "--family", "lnlm_rnn", "--data", text_file, "--objective", "mine"], "unknown objective 'mine'"),
    ):
        result = run(*words)
        assert result.status == 2 and said in result.err, (said, result.err)
