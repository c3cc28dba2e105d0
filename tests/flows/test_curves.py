"""Learning curves: every run's table and picture, resumed and overwritten runs, several runs in one picture, refusals."""

from __future__ import annotations

import csv
import json

import pytest

from hf_lnlm.flows.curves import draw_run, read_curves, style_of

from ..cli.running import run, settings, succeed

QUICK = ["data.block_size=32", "training.per_device_train_batch_size=4", "training.warmup_steps=0"]
STEPS = ["training.logging_steps=1", "training.eval_steps=2", "training.save_steps=2", "training.max_steps=4"]


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves") / "rnn"
    words = ["--family", "lnlm_rnn", "--data", text_file, "--tokenizer", "byte", "--output", folder]
    succeed("pretrain", *words, *settings(*QUICK, *STEPS, "model.config.use_cache=true"))
    return folder


def test_a_run_leaves_its_curves_as_table_and_picture(trained):
    from PIL import Image

    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["step", "epoch", "learning_rate", "loss"] and "train_runtime" not in rows[0]
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows if row["eval_loss"]] == ["2", "4"]
    assert all(float(row["tokens_per_second"]) > 0 for row in rows if row["loss"])
    history = json.loads((trained / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    wanted = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert read_curves(trained)["loss"] == wanted
    with Image.open(trained / "curves.png") as picture:
        assert min(picture.size) > 400
    listed = json.loads((trained / ".hf_lnlm_run.json").read_text())["files"]
    assert {"metrics.csv", "curves.png"} <= listed.keys()
    for config in ("config.json", "checkpoint-4/config.json"):
        assert json.loads((trained / config).read_text()).get("use_cache", True) is True


def test_a_resumed_run_goes_on_with_its_curves_and_an_overwritten_one_drops_them(trained, text_file, tmp_path):
    before = read_curves(trained)["loss"]
    succeed("pretrain", "--resume", "--output", trained, *settings("training.max_steps=6"))
    assert read_curves(trained)["loss"][:4] == before and len(read_curves(trained)["loss"]) == 6
    words = ["--family", "lnlm_rnn", "--data", text_file, "--tokenizer", "byte", "--output", trained, "--overwrite"]
    succeed("pretrain", *words, *settings(*QUICK, *STEPS, "training.max_steps=2"))
    assert [step for step, _ in read_curves(trained)["loss"]] == [1, 2]


def test_runs_over_each_other(trained, tmp_path):
    other = tmp_path / "gru"
    other.mkdir()
    (other / "metrics.csv").write_text("step,epoch,loss,eval_f1\n1,0.1,3.5,\n2,0.2,2.5,0.25\n")
    picture = tmp_path / "both.svg"
    assert "rnn, gru" in succeed("plot", "curves", trained, other, "--output", picture).out
    text = picture.read_text()
    assert all(
        f"<!-- {word} -->" in text for word in ("rnn", "gru", "validation", "loss", "learning rate", "bits per byte")
    )
    assert len({str(style_of(number)) for number in range(32)}) == 32
    for words, said in (
        ([trained, "--metric", "eval_bleu", "--output", picture], "no run has 'eval_bleu'; they have"),
        ([trained, trained, "--output", picture], "is given twice"),
        ([tmp_path, "--output", picture], "no metrics.csv in"),
        ([trained, "--output", tmp_path / "x.doc"], "must end in .png"),
    ):
        result = run("plot", "curves", *words)
        assert result.status == 2 and said in result.err, (said, result.err)
    (other / "metrics.csv").write_text("step,loss\nfirst,3\n")
    assert "line 2: a step and numbers wanted" in run("plot", "curves", other, "--output", picture).err


@pytest.mark.parametrize("name", ["_hidden", "$\\nothing$"])
def test_a_picture_is_drawn_whatever_the_run_is_called_and_never_through_a_link(tmp_path, capsys, name):
    run_folder, other = tmp_path / name, tmp_path / "others"
    run_folder.mkdir()
    (run_folder / "metrics.csv").write_text("step,epoch,loss\n1,0.1,3.5\n2,0.2,2.5\n")
    draw_run(run_folder)
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().err == ""
    other.write_text("mine")
    (run_folder / "curves.png").unlink()
    (run_folder / "curves.png").symlink_to(other)
    draw_run(run_folder)
    assert other.read_text() == "mine" and "is no regular file" in capsys.readouterr().err
    assert run("plot", "curves", run_folder, "--output", run_folder / "names.svg").status == 0
    assert f"<!-- {name.replace('_', ' _', 1)} -->" in (run_folder / "names.svg").read_text()


def test_a_reporter_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    words = ["pretrain", "--family", "lnlm_rnn", "--data", "/nowhere", "--output", tmp_path / "out"]
    for name, said in (("neptune", "pip install neptune"), ("tensorbord", "did you mean 'tensorboard'")):
        result = run(*words, *settings(f"training.report_to={name}"))
        assert result.status == 2 and "training.report_to" in result.err and said in result.err, result.err
    assert "no training.report_to" not in run(*words, *settings("training.report_to=none")).err
