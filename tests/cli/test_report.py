"""Reports by class equal scikit-learn's and seqeval's, texts written are rated, training stops early and keeps the best."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from sklearn.metrics import classification_report

from hf_lnlm.flows.report import class_report, draw_confusion, entity_report
from hf_lnlm.tasks.classification_metrics import confusion_matrix, entity_counts
from hf_lnlm.tasks.generation_metrics import written_metrics
from hf_lnlm.trainer.arguments import LNLMTrainingArguments

from .running import run, settings, succeed

NAMES = ["ant", "bee", "cow", "dog"]
QUICK = ["training.max_steps=6", "training.eval_steps=2", "training.save_steps=2", "data.block_size=32"]


def test_report_by_class_is_scikit_learns():
    wanted, guesses = torch.randint(0, 3, (2, 100), generator=torch.Generator().manual_seed(0))
    found = class_report(confusion_matrix(guesses, wanted, 4), NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = classification_report(
            wanted, guesses, labels=range(4), target_names=NAMES, output_dict=True, zero_division=0
        )
    for name in (*NAMES, "macro avg", "weighted avg"):
        assert found[name] == pytest.approx(plain[name])


def test_report_by_entity_is_seqevals():
    facts, guesses = [["B-a", "I-a", "O", "B-b"], ["B-a"]], [["B-a", "O", "O", "B-b"], ["B-a"]]
    counts = sum(entity_counts(guess, fact, ["a", "b"]) for guess, fact in zip(guesses, facts))
    found = entity_report(counts, ["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from seqeval.metrics import classification_report as report

        plain = report(facts, guesses, output_dict=True)
    for kind in ("a", "b"):
        assert found[kind] == pytest.approx(plain[kind])


@pytest.mark.parametrize("classes", [2, 40])
def test_the_picture_is_one(classes, tmp_path):
    from matplotlib.image import imread

    confusion = torch.eye(classes, dtype=torch.float64) * 9 + 1
    draw_confusion(confusion, [f"class {i}" for i in range(classes)], tmp_path / "picture.png", "a model on some data")
    pixels = imread(tmp_path / "picture.png")
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05
    (tmp_path / "link.png").symlink_to(tmp_path / "picture.png")
    before = (tmp_path / "picture.png").read_bytes()
    with pytest.raises(ValueError, match="is no regular file: nothing was written"):
        draw_confusion(confusion, ["a"] * classes, tmp_path / "link.png", "through a link")
    assert (tmp_path / "picture.png").read_bytes() == before


def test_written_texts_by_hand():
    found = written_metrics(["a cat sat", "x"], ["a cat sat", "y z"])
    assert found["exact_written"] == 0.5
    assert found["rouge_l"] == pytest.approx(0.5)
    assert written_metrics(["a b c d e"], ["a b c d e"])["bleu"] == pytest.approx(100.0)


def test_early_stopping_needs_the_best_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="early_stopping_patience needs load_best_model_at_end=true"):
        LNLMTrainingArguments(tmp_path, early_stopping_patience=2)
    with pytest.raises(ValueError, match="early_stopping_patience must be at least 1, got 0"):
        LNLMTrainingArguments(tmp_path, early_stopping_patience=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"text": f"{'ab'[i % 3 == 0]} {i}", "label": "ab"[i % 3 == 0]} for i in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_class_weights_best_checkpoint_and_report(rnn, rows, tmp_path):
    words = ["--checkpoint", rnn, "--task", "sequence_classification", "--data", rows, "--validation", "0.4"]
    best = ["training.load_best_model_at_end=true", "training.metric_for_best_model=macro_f1"]
    best += ["training.early_stopping_patience=1", "objective.class_weights=balanced", "training.learning_rate=0.0"]
    folder = tmp_path / "run"
    succeed("finetune", *words, "--output", folder, *settings(*QUICK, *best))
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4, "two evaluations alike, so it stopped before the third"
    assert state["best_model_checkpoint"].endswith("checkpoint-2")
    report = tmp_path / "report"
    out = succeed("evaluate", folder, "--report", report).out
    assert "By class" in out and (report / "confusion_matrix.png").stat().st_size > 5000
    found = json.loads((report / "report.json").read_text())
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert found["classes"]["macro avg"]["f1-score"] == pytest.approx(metrics["macro_f1"])
    assert found["confusion"]["names"] == ["a", "b"]


def test_wrong_options_are_named(rnn, rows, tmp_path):
    words = ["--checkpoint", rnn, "--data", rows, "--output", tmp_path / "out"]
    task = ["--task", "sequence_classification"]
    weights = run("finetune", *words, *task, *settings("objective.class_weights={c: 2.0}"))
    assert weights.status == 2 and "no class 'c'" in weights.err
    words[1] = str(rnn)
    refused = run("evaluate", rnn, "--report", tmp_path / "report")
    assert refused.status == 2 and "a report by class needs a task with classes" in refused.err
    assert (
        "needs AutoModelForMultipleChoice, which lnlm_rnn has not"
        in run("finetune", *words, "--task", "multiple_choice").err
    )
