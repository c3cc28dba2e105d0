"""A run that goes on: with the tokenizer and the data it was begun with, and by choices that are truly applied."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from hf_lnlm.data.fingerprint import Fingerprint, compare, file_print, last_text
from hf_lnlm.flows.history import RECORD_FILE, History
from hf_lnlm.flows.recipe import read_recipe

from ..cli.running import run, settings, succeed

COMMON = ["training.per_device_train_batch_size=4", "training.save_steps=1000", "training.lr_scheduler_type=constant",
          "training.warmup_steps=0", "data.validation=0", "data.block_size=16"]  # fmt: skip
LANES = ["--family", "lnlm_rnn", "--tokenizer", "byte"]
BLOCKS = [*LANES, *settings("data.mode=blocks", "data.unit=line")]
CLASSES = ["--family", "lnlm_text_cnn", "--task", "sequence_classification", "--tokenizer", "word"]
TAGS = ["--family", "lnlm_rnn", "--task", "token_classification", "--tokenizer", "word"]


def lines(number, begin=0):
    return "".join(f"line {n} of {n * n}\n" for n in range(begin, begin + number))


def labelled(number, begin=0):
    rows = ({"text": f"film {n} is {n * n}", "label": "pn"[n % 2]} for n in range(begin, begin + number))
    return "".join(json.dumps(row) + "\n" for row in rows)


def tagged(number, begin=0):
    return "".join(f"Berlin\tB-LOC\nfilm{n % 7}\tO\n\n" for n in range(begin, begin + number))


KINDS = {  # command, options, file, its text, steps of an epoch of 30 rows, of 42
    "lanes": ("pretrain", LANES, "t.txt", lines, None),
    "blocks": ("pretrain", BLOCKS, "t.txt", lines, None),
    "classes": ("finetune", CLASSES, "r.jsonl", labelled, 8),
    "tags": ("finetune", TAGS, "r.conll", tagged, 8),
}


def parts(folder):
    return json.loads((folder / RECORD_FILE).read_text())["parts"]


def began(folder):
    """Step and epoch at which each of the run's data began."""
    return [list(place) for place in dict.fromkeys(tuple(part["data_since"]) for part in parts(folder))]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def epoch_of(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["epoch"]


def begin(kind, folder, steps, *more):
    """Start a run of a kind of data on 30 rows in `folder`; returns the folder of the run and the data file."""
    command, words, name, text, _ = KINDS[kind]
    folder.mkdir(exist_ok=True)
    data = folder / name
    data.write_text(text(30))
    words = [command, *words, "--data", data, "--output", folder / "run"]
    succeed(*words, *settings(*COMMON, f"training.max_steps={steps}", *more))
    return folder / "run", data


def go_on(kind, folder, *more):
    return run(KINDS[kind][0], "--resume", "--output", folder, *more)


def grown(kind, folder, at, end):
    """A run stopped at a step, its data then longer, and resumed up to another step."""
    folder, data = begin(kind, folder, at)
    with data.open("a") as stream:
        stream.write(KINDS[kind][3](12, 30))
    went_on = go_on(kind, folder, *settings(f"training.max_steps={end}"))
    assert went_on.status == 0, went_on.err
    return folder, went_on


def rows_enter_with_the_next_epoch(kind, root):
    probe, _ = begin(kind, root / "probe", 1)
    whole = round(1 / epoch_of(probe, 1))
    early, said = grown(kind, root / "early", whole - 2, whole + 2)
    at_border, _ = grown(kind, root / "border", whole, whole + 2)
    assert weights(early) == weights(at_border), "the epoch under way must be finished on its own rows"
    assert "what came to the end enters with epoch 2" in said.out
    assert began(early) == [[0, 0], [whole, 1]]
    again = go_on(kind, early, *settings(f"training.max_steps={whole + 4}"))
    straight = go_on(kind, at_border, *settings(f"training.max_steps={whole + 4}"))
    assert again.status == straight.status == 0 and weights(early) == weights(at_border)
    assert 1 < epoch_of(early, whole + 2) < epoch_of(early, whole + 4) < 2
    assert "changed" not in again.out + again.err and began(early) == [[0, 0], [whole, 1]]


@pytest.mark.parametrize("kind", ["lanes", "classes"])
def test_rows_that_came_to_the_end_enter_with_the_next_epoch(kind, tmp_path):
    rows_enter_with_the_next_epoch(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks", "tags"])
def test_rows_that_came_to_the_end_enter_with_the_next_epoch_of_every_kind(kind, tmp_path):
    rows_enter_with_the_next_epoch(kind, tmp_path)


def test_changed_data_are_refused_by_file_and_row_unless_announced(tmp_path):
    folder, data = begin("classes", tmp_path, 2)
    text = data.read_text()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    longer = settings("training.max_steps=3")
    for changed, told in (
        (text.replace("film 6 ", "Film 6 "), f"{data} has changed \\({len(text):,} bytes\\).* row 7 \\({data}, line 7"),
        (labelled(29), "29 training rows \\(were 30\\), the first difference is row 30"),
        (labelled(30, 1), "30 training rows \\(were 30\\), the first difference is row 1 "),
    ):
        data.write_text(changed)
        refused = go_on("classes", folder, *longer)
        assert refused.status == 2 and re.search(told, refused.err), refused.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    went_on = go_on("classes", folder, *longer, "--data-changed")
    assert went_on.status == 0 and "begin with a new epoch at step 2" in went_on.err
    assert began(folder) == [[0, 0], [2, 1]]
    assert epoch_of(folder, 3) == 1 + 1 / 8
    data.rename(moved := tmp_path / "moved.jsonl")  # where data lie is no matter
    assert go_on("classes", folder, *settings("training.max_steps=4"), "--data", moved).status == 0
    assert read_recipe(folder / "recipe.yaml").data.source == str(moved)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["training.learning_rate=1"], "training.learning_rate=0.002, now 1.0"),
        (["training.lr_scheduler_type=linear"], "training.lr_scheduler_type='constant', now 'linear'"),
        (["training.seed=3"], "training.seed=0, now 3"),
        (["training.weight_decay=0.5"], "training.weight_decay="),
        (["training.gradient_accumulation_steps=2"], "begun with 4 rows a step on 1 processes, now 8 on 1"),
        (["training.per_device_train_batch_size=2"], "begun with 4 rows a step on 1 processes, now 2 on 1"),
        (
            ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"],
            "batches and processes must stay as they were",
        ),
        (["training.max_steps=1"], "training.max_steps=1 lies behind step 2"),
        (["training.num_train_epochs=9"], "has no effect beside training.max_steps=2"),
        (["training.resume_from_checkpoint=x"], "--resume goes on from the last whole checkpoint"),
        (["data.block_size=8"], "data.block_size=16, now 8"),
        (["tokenizer.kind=char"], "tokenizer.kind='byte', now 'char'"),
        (["model.config.cell_type=gru"], "model.config"),
        (["objective.boundaries=true"], "objective.boundaries"),
    ],
)
def test_overrides_that_would_be_ignored_are_refused(begun, more, told):
    refused = go_on("lanes", begun, *settings(*more))
    assert refused.status == 2 and told in refused.err and refused.err.count("\n") == 1, refused.err


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return begin("lanes", tmp_path_factory.mktemp("begun"), 2)[0]


def test_overrides_that_are_taken_are_applied_and_written(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    more = ["training.max_steps=5", "training.save_steps=1", "training.save_total_limit=9", "training.logging_steps=1"]
    assert go_on("lanes", folder, *settings(*more)).status == 0
    assert all((folder / f"checkpoint-{step}").is_dir() for step in (2, 3, 4, 5))
    history = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    assert {3, 4, 5} <= {entry["step"] for entry in history if "loss" in entry}
    written = read_recipe(folder / "recipe.yaml").training
    assert {name: written[name] for name in ("max_steps", "save_steps", "logging_steps")} == {
        "max_steps": 5,
        "save_steps": 1,
        "logging_steps": 1,
    }
    assert "--data-changed is about a run that goes on" in run("pretrain", "--data-changed", "--output", folder).err


def test_a_run_that_is_done_makes_no_step_more(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    (folder / "model.safetensors").unlink()  # as if killed before the model was saved
    assert go_on("lanes", folder).status == 0 and weights(folder) == weights(begun)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


def test_rows_a_step_may_be_cut_otherwise(tmp_path):
    folder, _ = begin("classes", tmp_path, 2)
    more = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4", "training.max_steps=8"]
    assert go_on("classes", folder, *settings(*more)).status == 0
    assert epoch_of(folder, 8) == 1


def test_a_longer_run_has_the_learning_rate_of_its_new_length(begun, tmp_path):
    linear = ["training.lr_scheduler_type=linear", "training.logging_steps=1"]
    cut, _ = begin("lanes", tmp_path, 2, *linear)
    assert (
        "learning rate is that of a run of the new length (linear)"
        in go_on("lanes", cut, *settings("training.max_steps=4")).out
    )
    state = json.loads((cut / "checkpoint-4" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx([2e-3, 1e-3, 1e-3, 5e-4])


def test_the_saved_tokenizer_is_used_whatever_became_of_the_data(tmp_path):
    data = tmp_path / "t.txt"
    data.write_text(lines(300))
    words = ["--family", "lnlm_rnn", "--tokenizer", "bpe", "--data", data, "--output", tmp_path / "run"]
    succeed("pretrain", *words, *settings(*COMMON[:4], "training.max_steps=2", "tokenizer.vocab_size=300"))
    vocabulary = (tmp_path / "run" / "tokenizer.json").read_bytes()
    with data.open("a") as stream:
        stream.write("".join(f"zygote {n} xylophone quartz\n" for n in range(900)))
    (tmp_path / "run" / "tokenizer.json").write_text("torn")  # that of a checkpoint is whole
    assert go_on("lanes", tmp_path / "run", *settings("training.max_steps=3")).status == 0
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == vocabulary
    for path in (tmp_path / "run").rglob("tokenizer.json"):
        path.write_text(path.read_text().replace("l", "L"))
    assert "no tokenizer of those" in go_on("lanes", tmp_path / "run").err


def test_streams_go_on_while_their_files_are_the_same(tmp_path):
    (tmp_path / "held.txt").write_text(lines(30))
    stream = ["data.streaming=true", "data.mode=blocks"]
    folder, data = begin("blocks", tmp_path, 2, *stream)
    assert go_on("blocks", folder, *settings("training.max_steps=3")).status == 0
    data.write_text(data.read_text() + lines(12, 30))
    refused = go_on("blocks", folder, *settings("training.max_steps=4"))
    assert refused.status == 2 and f"{data} has" in refused.err
    assert go_on("blocks", folder, *settings("training.max_steps=4"), "--data-changed").status == 0
    assert parts(folder)[-1]["data_since"][0] == 3


def test_a_folder_of_an_older_version_goes_on_unchecked_and_a_damaged_record_is_told(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    whole = json.loads((folder / RECORD_FILE).read_text())["parts"][0]
    rows = {"rows": 1, "bytes": 1, "digest": "", "every": 0, "marks": ""}
    lacking = {name: value for name, value in whole.items() if name != "processes"}
    for part in (lacking, {**whole, "step": "2"}, {**whole, "data": {**whole["data"], "rows": rows}}):
        (folder / RECORD_FILE).write_text(json.dumps({"parts": [part]}))
        with pytest.raises(ValueError, match="is damaged"):
            History.read(folder)
    (folder / RECORD_FILE).write_text("{")
    assert "is damaged" in go_on("lanes", folder).err
    (folder / RECORD_FILE).unlink()
    went_on = go_on("lanes", folder, *settings("training.max_steps=3"))
    assert went_on.status == 0 and "can't be checked" in went_on.err
    assert parts(folder)[0]["data_since"] == [0, 0]


def test_fingerprints_tell_growth_from_change():
    rows = [f"row {n} é" for n in range(9000)]
    whole = compare(rows).now
    assert Fingerprint.of(json.loads(json.dumps(whole.plain()))) == whole and len(whole.marks) < 40_000
    assert compare(rows, whole).same and not compare(rows[:-1], whole).grew
    for longer in ([*rows, "new"], [*rows[:-1], rows[-1] + " and more", "new"]):
        found = compare(longer, whole)
        assert found.grew and not found.same and last_text(longer, whole) == rows[-1]
    few = compare(rows[:50]).now
    assert last_text([["one é", " document"]], compare(["one é do"]).now) == "one é do"
    assert compare([["a", "b"], ["c"]], compare(["ab", "c"]).now).same
    for number in (0, 17, 49):
        changed = rows[:50]
        changed[number] = "other"
        assert compare(changed, few).differs == (number + 1, number + 1)
    assert compare(rows[:8000], whole).differs[1] == 8001


def test_large_files_are_told_apart_by_samples(tmp_path):
    data = bytearray(range(256)) * (5 << 12)
    (tmp_path / "a").write_bytes(data)
    before = file_print(tmp_path / "a")
    data[len(data) // 2 + 70_000] ^= 1
    (tmp_path / "a").write_bytes(data + b"more")
    assert file_print(tmp_path / "a")["bytes"] == before["bytes"] + 4
    assert file_print(tmp_path / "a", 1000) == file_print(tmp_path / "a", 1000) != before


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_the_same_rows_a_step(tmp_path, repository):
    data = tmp_path / "r.jsonl"
    data.write_text(labelled(30))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script, place = str(repository / "training" / "finetune.py"), ["--output", str(tmp_path / "run")]
    first = [*CLASSES, "--data", str(data), *settings(*COMMON, "training.max_steps=2", "training.use_cpu=true")]
    done = subprocess.run([*launch, script, *first, *place], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    refused = go_on("classes", tmp_path / "run", *settings("training.max_steps=3"))
    assert "begun with 8 rows a step on 2 processes, now 4 on 1" in refused.err
    with data.open("a") as stream:
        stream.write(labelled(12, 30))
    longer = ["--resume", *place, *settings("training.max_steps=6")]
    done = subprocess.run([*launch, script, *longer], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("what came to the end enters with epoch 2") == 1
    assert began(tmp_path / "run") == [[0, 0], [4, 1]]
    alone = go_on(
        "classes", tmp_path / "run", *settings("training.max_steps=8", "training.gradient_accumulation_steps=2")
    )
    assert alone.status == 0 and "begun on 2 processes, now 1" in alone.err
    assert epoch_of(tmp_path / "run", 8) == pytest.approx(1 + 4 / 6, abs=0.1)
