"""`hf-lnlm pretrain` of algorithmic tasks: what is measured, resuming with a curriculum, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_lnlm.data.algorithmic import Copy, Curriculum, Stream, pad_rows
from hf_lnlm.flows.algorithm import Algorithm, load_transducer
from hf_lnlm.trainer.curriculum import CurriculumCallback

from .running import run, settings, succeed

SMALL = [
    "model.config.memory_size=9", "model.config.memory_width=5", "model.config.controller_size=16",
    "training.per_device_train_batch_size=2", "training.max_steps=12", "training.save_steps=4",
    "training.eval_strategy=no", "objective.first=2", "objective.threshold=1.0", "objective.longest=9",
]  # fmt: skip


def learn(folder, *more, family="lnlm_ntm", status=0):
    words = ["pretrain", "--family", family, "--objective", "copy", "--output", folder, *settings(*SMALL), *more]
    result = run(*words)
    assert result.status == status, result.out + result.err
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    learn(folder)
    return folder


def longest(folder, step):
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["CurriculumCallback"]["attributes"]["longest"]


def test_a_run_leaves_a_measured_checkpoint_with_a_card(whole):
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert evaluation["task"] == "copy" and evaluation["data"] == "64 rows of copy, size 9"
    assert evaluation["metrics"]["wrong_bits"] == pytest.approx(72 * (1 - evaluation["metrics"]["accuracy"]))
    card = (whole / "README.md").read_text()
    assert "from hf_lnlm import NTMForSequenceTransduction" in card and "tokenizer" not in card.lower()
    assert load_transducer(str(whole)).config.residual is False


def test_sequences_grow_and_a_resumed_run_goes_on_with_them(whole, tmp_path):
    assert [longest(whole, step) for step in (8, 12)] == [9, 9]
    cut = tmp_path / "cut"
    learn(cut, "--set", "training.max_steps=2", "--set", "training.save_steps=2")
    assert longest(cut, 2) == 4
    recipe = cut / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("max_steps: 2", "max_steps: 12").replace("save_steps: 2", "save_steps: 4")
    )
    succeed("pretrain", recipe, "--resume", "--output", cut)
    assert longest(cut, 12) == 9
    found, expected = load_file(cut / "model.safetensors"), load_file(whole / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


def test_a_checkpoint_learns_on(whole, tmp_path):
    words = ["pretrain", "--checkpoint", whole, "--objective", "copy", "--output", tmp_path / "more"]
    succeed(*words, *settings("training.max_steps=1", "objective.longest=5"))
    result = run("pretrain", "--checkpoint", whole, "--objective", "repeat_copy", "--output", tmp_path / "other")
    assert result.status == 2 and "widths" in result.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "objective.longst=5"], "did you mean 'longest'"),
        (["--set", "objective.longest=none at all"], "objective.longest"),
        (["--set", "objective.shortest=10"], "shortest <= longest"),
        (["--set", "objective.first=10"], "longest must lie between 1 and 9"),
        (["--set", "model.config.memory_sise=9"], "memory_size"),
        (["--data", "stdlib"], "draws its own rows"),
        (["--family", "lnlm_rnn"], "lnlm_ntm"),
    ],
)
def test_bad_recipes_are_one_clear_line(tmp_path, more, message):
    result = learn(tmp_path / "run", *more, status=2)
    assert message in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_no_model_is_an_error(tmp_path):
    result = run("pretrain", "--objective", "copy", "--output", tmp_path / "run")
    assert result.status == 2 and "--family" in result.err


def test_sums_count_bits_that_are_asked_for():
    batch = pad_rows([Copy().row(torch.Generator().manual_seed(0), size) for size in (2, 3)])
    learnt = Algorithm(Copy())
    perfect = torch.where(batch["labels"] > 0.5, 9.0, -9.0)
    assert learnt.summary(learnt.sums(perfect, batch)) == {"wrong_bits": 0.0, "accuracy": 1.0}
    perfect[0, 3, 0] *= -1
    assert learnt.summary(learnt.sums(perfect, batch)) == pytest.approx({"wrong_bits": 0.5, "accuracy": 1 - 1 / 40})


def test_sequences_that_grow_are_drawn_by_the_training_process_alone():
    callback = CurriculumCallback(Curriculum(Stream(Copy(), 1, 0, 3)))
    arguments = type("Arguments", (), {"dataloader_num_workers": 2})()
    with pytest.raises(ValueError, match="dataloader_num_workers must be 0, got 2"):
        callback.on_train_begin(arguments, None, None)


def test_the_callback_stops_looking_when_training_ends():
    model, curriculum = torch.nn.Linear(1, 1), Curriculum(Stream(Copy(), 1, 0, 3))
    callback = CurriculumCallback(curriculum)
    callback.on_train_begin(None, type("State", (), {"global_step": 0, "stateful_callbacks": {}})(), None, model=model)
    assert len(model._forward_hooks) == 1
    callback.on_train_end(None, None, None)
    assert not model._forward_hooks
