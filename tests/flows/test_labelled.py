"""Rows with labels in a run: bad ones of every kind, in every format and task; the classes of a head, kept or new."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_lnlm import evaluate, finetune
from hf_lnlm.data.section import DataSection
from hf_lnlm.flows.labelled import label_order, read_rows
from hf_lnlm.flows.recipe import ModelSection, Recipe
from hf_lnlm.tasks import TASKS

GOOD = {
    "sequence_classification": {"text": "a film", "label": "good", "second": "b"},
    "multi_label_classification": {"text": "a film", "label": ["good"], "second": "b"},
    "regression": {"text": "a film", "label": 0.5, "second": "b"},
    "token_classification": {"tokens": ["a", "film"], "tags": ["O", "B-x"]},
    "question_answering": {"question": "who", "context": "ada slept", "answers": ["ada"]},
    "multiple_choice": {"context": "who", "choices": ["ada", "bob"], "label": 0},
    "text_to_text": {"source": "a", "target": "b"},
}
BAD = {"null": None, "list": [["x"]], "struct": {"a": "secret"}, "number": 7, "empty": ""}
MEANS_SOMETHING = {
    ("question_answering", "answers", "empty"),
    ("multiple_choice", "label", "number"),
    ("sequence_classification", "label", "number"),
    ("regression", "label", "number"),
    ("multi_label_classification", "label", "empty"),
}
CASES = [
    (task, column, what)
    for task, row in GOOD.items()
    for column in row
    for what in BAD
    if (task, column, what) not in MEANS_SOMETHING
]


def written(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_of(source: str, **data) -> Recipe:
    return Recipe(data=DataSection(source=source, validation=0.25, **data), training={"seed": 0})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("task, column, what", CASES)
def test_what_means_nothing_is_refused_by_place_or_skipped(task, column, what, kind, tmp_path, capsys):
    pair = "second" if "second" in GOOD[task] else None
    good = [GOOD[task] | {"id": str(number)} for number in range(20)]
    bad = GOOD[task] | {column: BAD[what], "id": "bad"}
    if kind != "jsonl" and what != "null":  # a column of tables has one type: all of it is bad
        good = [bad | {"id": str(number)} for number in range(20)]
    source = written(tmp_path / f"rows.{kind}", [*good[:13], bad, *good[13:]])
    place = r"line 14 \(row 14\)" if kind == "jsonl" else "row 14" if what == "null" else r"row \d+"
    with pytest.raises(ValueError, match=rf"^{re.escape(source)}, {place}: .*{column if column != 'label' else ''}"):
        read_rows(recipe_of(source, pair_column=pair), TASKS[task]())
    skipping = recipe_of(source, pair_column=pair, skip_bad_rows=True)
    if kind != "jsonl" and what != "null":
        with pytest.raises(ValueError, match=r"all .* rows are bad"):
            read_rows(skipping, TASKS[task]())
        return
    rows = read_rows(skipping, TASKS[task]())
    assert len(rows.train) + len(rows.validation) == 20
    assert re.search(rf"skipped 1 of 21 rows: {re.escape(source)}, {place}", capsys.readouterr().err)


def test_three_skipped_rows_are_shown(tmp_path, capsys):
    rows = [{"text": "" if number % 5 == 0 else "a", "label": number % 2, "id": number} for number in range(30)]
    read_rows(recipe_of(written(tmp_path / "a.jsonl", rows), skip_bad_rows=True), TASKS["sequence_classification"]())
    said = capsys.readouterr().err
    assert "skipped 6 of 30 rows" in said and said.count("holds no text") == 3 and said.rstrip().endswith("…")


def order_of(rows: list[dict], task: str = "sequence_classification", **more) -> list[str]:
    recipe = Recipe(data=DataSection(source=rows, **more), training={"seed": 0})
    objective = TASKS[task]()
    return label_order(recipe, objective, read_rows(recipe, objective))


def test_labels_that_only_the_validation_rows_hold_are_classes_too(tmp_path, capsys):
    rows = [{"text": str(number), "label": "ab"[number % 2]} for number in range(20)]
    held = written(tmp_path / "held.jsonl", [{"text": "x", "label": name} for name in ("a", "c", "c")])
    assert order_of(rows, validation=held) == ["a", "b", "c"]
    assert "only the validation rows hold 'c' (2)" in capsys.readouterr().err


def test_fixed_labels(tmp_path):
    rows = [{"text": str(number), "label": [-1, 1][number % 2]} for number in range(20)]
    objective = TASKS["sequence_classification"]()
    recipe = Recipe(data=DataSection(source=rows, validation=0.25), training={"seed": 0})
    with pytest.raises(ValueError, match="row 1: column 'label' holds -1, which stands for no label unless"):
        read_rows(recipe, objective)
    recipe.model = ModelSection(labels=["1", "-1"])
    assert label_order(recipe, objective, read_rows(recipe, objective)) == ["1", "-1"]
    recipe.model = ModelSection(labels=["1", "2"])
    with pytest.raises(ValueError, match="row 1: column 'label' holds -1"):
        read_rows(recipe, objective)


def test_a_column_of_scores_is_no_set_of_classes(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("text,label\n" + "".join(f"film {n},{n / 4}\n" for n in range(20)))
    with pytest.raises(ValueError, match=r"holds fractions .* the task regression learns them"):
        order_of(str(path), validation=0.25)


def test_names_of_a_saved_dataset_keep_their_order(tmp_path):
    features = Features(text=Value("string"), label=ClassLabel(names=["z", "b", "a", "never"]))
    rows = [{"text": str(number), "label": number % 3} for number in range(20)]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert order_of(str(tmp_path / "saved"), validation=0.25) == ["z", "b", "a", "never"]


def test_columns_of_public_corpora_are_found_and_told(tmp_path, capsys):
    rows = [{"sentence1": "a", "sentence2": f"b {n}", "gold_label": ["-", "neutral", "x"][n % 3]} for n in range(21)]
    source = written(tmp_path / "snli.jsonl", rows)
    recipe, objective = recipe_of(source, skip_bad_rows=True), TASKS["sequence_classification"]()
    rows = read_rows(recipe, objective)
    assert (recipe.data.text_column, recipe.data.pair_column, recipe.data.label_column) == (
        "sentence1",
        "sentence2",
        "gold_label",
    )
    said = capsys.readouterr()
    assert "columns    sentence1, sentence2, gold_label" in said.out and "skipped 7 of 21 rows" in said.err
    assert label_order(recipe, objective, rows) == ["neutral", "x"]


# ---- whole runs ---------------------------------------------------------------------------------------------------------


def films(labels, count: int = 24) -> list[dict]:
    return [{"text": f"{'good' if n % 2 else 'bad'} film {n}", "label": labels[n % len(labels)]} for n in range(count)]


def tuned(tmp_path: Path, name: str, rows, task: str = "sequence_classification", **more):
    more = {"family": "lnlm_text_cnn", "size": "tiny", "tokenizer": "byte"} | more
    if "checkpoint" in more:
        more = {key: value for key, value in more.items() if key not in ("family", "size", "tokenizer")}
    source = rows if isinstance(rows, str) else written(tmp_path / f"{name}.jsonl", rows)
    training = {"max_steps": 1, "learning_rate": 1e-9, "use_cpu": True, "report_to": "none"}
    return finetune(task=task, data=source, output=str(tmp_path / name), training=training, **more).folder


def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def head_of(model) -> torch.Tensor:
    return next(value for name, value in model.named_parameters() if value.shape[0] == model.config.num_labels)


@pytest.mark.parametrize(
    "task, labels",
    [("regression", [0.5, "2", -1]), ("multi_label_classification", [["a"], ["a", "b"], []])],
)
def test_numbers_and_several_classes_are_trained_and_measured(task, labels, tmp_path):
    folder = tuned(tmp_path, "run", films(labels), task)
    config = classifier(folder).config
    assert config.problem_type == task and config.num_labels == (1 if task == "regression" else 2)
    found = evaluate(folder, save=False).result["metrics"]
    names = {"regression": {"rmse", "pearson", "spearman"}}.get(task, {"accuracy", "micro_f1", "macro_f1"})
    assert set(found) == names | {"loss"}
    other = evaluate(folder, data=written(tmp_path / "other.jsonl", films(labels, 7)), save=False)
    assert set(other.result["metrics"]) == set(found) and other.result["task"] == task


def test_a_checkpoints_order_of_classes_stays_where_they_are_the_same(tmp_path):
    first = tuned(tmp_path, "first", films(["bad", "good"]), labels=["good", "bad"])
    second = tuned(tmp_path, "second", films(["bad", "good"]), checkpoint=str(first))
    assert classifier(second).config.id2label == {0: "good", 1: "bad"}
    assert torch.allclose(head_of(classifier(first)), head_of(classifier(second)), atol=1e-6)


def test_other_classes_get_a_new_head_and_it_is_said(tmp_path, capsys):
    first = tuned(tmp_path, "first", films(["bad", "good"]))
    capsys.readouterr()
    second = tuned(tmp_path, "second", films(["ham", "spam"]), checkpoint=str(first))
    assert (
        "the checkpoint tells bad, good apart, the rows hold ham, spam: it gets a new head" in capsys.readouterr().err
    )
    old, new = classifier(first), classifier(second)
    assert new.config.id2label == {0: "ham", 1: "spam"}
    assert not torch.allclose(head_of(old), head_of(new), atol=1e-3)
    body = [name for name, value in old.named_parameters() if value.shape[0] != 2]
    rest = dict(new.named_parameters())
    assert body and all(torch.allclose(old.get_parameter(name), rest[name], atol=1e-6) for name in body)
    third = tuned(tmp_path, "third", films([1.5, 0.5]), "regression", checkpoint=str(first))
    assert "the checkpoint's head is for single_label_classification, the task is regression" in capsys.readouterr().err
    assert classifier(third).config.num_labels == 1


def test_a_taggers_order_stays_too(tmp_path):
    rows = [{"tokens": ["ada", "slept"], "tags": ["B-x", "O"]}, {"tokens": ["bob"], "tags": ["B-x"]}] * 8
    rows = [row | {"id": n} for n, row in enumerate(rows)]
    first = tuned(tmp_path, "first", rows, "token_classification", family="lnlm_rnn", labels=["B-x", "O"])
    second = tuned(tmp_path, "second", rows, "token_classification", checkpoint=str(first))
    old, new = (AutoModelForTokenClassification.from_pretrained(folder) for folder in (first, second))
    assert new.config.id2label == {0: "B-x", 1: "O"}
    assert torch.allclose(head_of(old), head_of(new), atol=1e-6)


def test_labels_that_a_checkpoint_does_not_know_count_as_its_errors(tmp_path, capsys):
    folder = tuned(tmp_path, "run", films(["bad", "good"]))
    known = evaluate(folder, data=written(tmp_path / "known.jsonl", films(["bad", "good"], 8)), save=False).result[
        "metrics"
    ]
    rows = films(["bad", "good"], 8) + films(["ugly"], 8)
    found = evaluate(folder, data=written(tmp_path / "more.jsonl", rows), save=False).result["metrics"]
    assert found["accuracy"] == known["accuracy"] / 2
    assert found["loss"] == pytest.approx(known["loss"])
    assert "8 labels are no class of the checkpoint and count as its errors: 'ugly' (8)" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"no label is a class of the checkpoint: it knows bad, good, not 'ugly' \(8\)"
    ):
        evaluate(folder, data=written(tmp_path / "none.jsonl", films(["ugly"], 8)), save=False)


def test_classes_without_names_are_numbers(tmp_path):
    folder = tuned(tmp_path, "run", films([0, 1]))
    model = classifier(folder)
    model.config.id2label, model.config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    model.config.save_pretrained(folder)
    found = evaluate(folder, data=written(tmp_path / "more.jsonl", films([0, 1], 8)), save=False).result["metrics"]
    assert 0 <= found["accuracy"] <= 1
    again = tuned(tmp_path, "again", films([0, 1]), checkpoint=str(folder))
    assert torch.allclose(head_of(classifier(folder)), head_of(classifier(again)), atol=1e-6)
