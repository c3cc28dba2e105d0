"""Labelled rows: one behaviour for all formats, bad rows named by their place, published corpora read as they are."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hf_lnlm.data.labelled import LabelledRows, load_rows, read_cells
from hf_lnlm.data.published import published_columns
from hf_lnlm.data.readers import FileOptions, Record
from hf_lnlm.data.section import DataSection

SKIP = FileOptions(skip_bad_rows=True)


def rows_of(source, *columns: str, **options) -> LabelledRows:
    return load_rows(source if isinstance(source, list) else str(source), columns, task="any", **options)


def write(path: Path, text: str) -> Path:
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def table(path: Path, rows: list[dict]) -> Path:
    """Rows as a file of the kind that the path's ending says, or as a saved dataset."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    elif kind == "json":
        write(path, json.dumps(rows, indent=1))
    elif kind == "jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.StringIO()
        options = {"quoting": csv.QUOTE_NONE, "quotechar": None, "delimiter": "\t"} if kind == "tsv" else {}
        writer = csv.DictWriter(text, rows[0], lineterminator="\n", **options)
        writer.writeheader()
        writer.writerows(rows)
        write(path, text.getvalue())
    return path


FORMATS = ["jsonl", "json", "csv", "tsv", "parquet", "saved", "jsonl.gz", "csv.gz"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows_and_places(kind, tmp_path):
    texts = ["plain", "with, comma", "tail ", "NULL", "é 猫", "zero\0byte"]
    wanted = [{"text": text, "label": str(index)} for index, text in enumerate(texts)]
    path = table(tmp_path / f"data.{kind}", wanted)
    found = rows_of(path, "text", "label").train
    assert found == wanted
    line = {"json": "line 10 (row 3)", "csv": "line 4 (row 3)", "tsv": "line 4 (row 3)", "jsonl": "line 3 (row 3)"}
    assert str(found[2].place) == f"{path}, {line.get(kind.removesuffix('.gz'), 'row 3')}"


def read_text(row):
    if not isinstance(row["text"], str):
        raise ValueError("no text")
    return row


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_bad_rows_are_named_by_their_place_on_either_side_of_a_split(kind, tmp_path):
    rows = [{"text": None if index == 41 else f"text {index}", "label": index % 2} for index in range(60)]
    path = table(tmp_path / f"data.{kind}", rows)
    for seed in range(4):
        loaded = rows_of(path, "text", validation=0.3, seed=seed)
        with pytest.raises(ValueError, match=rf"^{path}, .*row 42\)?: no text$"):
            read_cells(loaded, read_text)
        good = read_cells(loaded, read_text, skip=True)
        assert len(good.train) + len(good.validation) == 59 and len(good.skipped) == 1 and "row 42" in good.skipped[0]


def test_a_set_of_bad_rows_is_no_set():
    with pytest.raises(ValueError, match="all 2 rows are bad: row 1: no text; row 2: no text"):
        read_cells(LabelledRows([{"text": 1}, {"text": 2}]), read_text, skip=True)


def test_a_quote_in_a_tab_separated_file_is_a_character(tmp_path):
    texts = ["plain", '"opens', 'in " between', 'closes"', '"both"', '""', "'"]
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"{text}\t0\n" for text in texts))
    assert [row["text"] for row in rows_of(path, "text").train] == texts
    quoted = write(tmp_path / "b.tsv", 'text\tlabel\n"a ""b""\tc"\t0\n')
    assert rows_of(quoted, "text", options=FileOptions(quoted=True)).train == [{"text": 'a "b"\tc', "label": "0"}]
    plain = write(tmp_path / "c.csv", 'text,label\n"opens,0\n')
    assert rows_of(plain, options=FileOptions(quoted=False)).train == [{"text": '"opens', "label": "0"}]


@pytest.mark.parametrize(
    "name, text, options, message",
    [
        (
            "a.tsv",
            'text\tlabel\n"one\ntwo"\t0\n',
            {},
            r"a.tsv, line 2 \(row 1\): a record of 2 .* data.quoted=true",
        ),
        ("a.tsv", 'text\tlabel\nx\t0\n"one\ntwo"\t0\n', {"quoted": True}, r"a.tsv, line 3: the record ends in line 4"),
        ("a.csv", 'text,label\n"opens,0\nhe said "no",0\n', {}, r"a.csv, line 2: not CSV .* data.quoted=false"),
        ("a.csv", 'text,label\n"early" end,0\n', {}, r"a.csv, line 2: not CSV"),
        ("a.csv", 'text,label\nx,0\n"never closed,0\n', {}, r"a.csv, line 3: not CSV"),
        ("a.csv", "text,text\na,b\n", {}, r"a.csv, line 1: column 'text' is there twice"),
        ("a.tsv", "text\tlabel\tlabel\n", {}, r"a.tsv, line 1: column 'label' is there twice"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "a", "text": "b"}\n',
            {},
            r"line 2 \(row 2\): column 'text' is there twice",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n\n3\n',
            {},
            r"line 3 \(row 2\): must be an object with named columns, got a number",
        ),
        ("a.json", '[{"text": "a"},\n {"text": "b"} {}]', {}, r"a.json, line 2: not JSON \(Expecting ',' delimiter"),
        ("a.json", '[{"text": "a"}] []', {}, r"a.json, line 1: not JSON \(Extra data"),
        ("a.json", "[[1]]", {}, r"line 1 \(row 1\): must be an object with named columns, got a list"),
        ("a.conll", "a\tO\nb\n\n", {}, r"a.conll, line 1 \(row 1\): .* 2 columns, got 1 in line 2"),
    ],
)
def test_records_that_are_not_whole_are_refused_by_line(name, text, options, message, tmp_path):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        rows_of(path, options=FileOptions(**options))


def test_duplicate_columns_of_parquet(tmp_path):
    column = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'text' is there twice"):
        rows_of(tmp_path / "a.parquet")


def test_records_of_csv_may_span_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\r\n"one\r\ntwo",0\r\nthree,1\r\n')
    found = rows_of(path, "text").train
    assert [row["text"] for row in found] == ["one\r\ntwo", "three"]
    assert [row.place.line for row in found] == [2, 4]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "mixed"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "conll"])
def test_line_ends_and_marks(kind, end, tmp_path):
    lines = {
        "jsonl": ['{"text": "a\\u2028b"}', '{"text": "c"}'],
        "csv": ["text,label", "a\u2028b,0", "c,1"],
        "tsv": ["text\tlabel", "a\u2028b\t0", "c\t1"],
        "conll": ["a\u2028b\tO", "", "c\tO"],
    }[kind]
    ends = ["\r\n" if index % 2 else "\n" for index in range(len(lines))] if end == "mixed" else [end] * len(lines)
    path = write(tmp_path / f"a.{kind}", "\ufeff" + "".join(line + ending for line, ending in zip(lines, ends)))
    found = [row["tokens"][0] if kind == "conll" else row["text"] for row in rows_of(path).train]
    assert found == ["a\u2028b", "c"]


def test_wide_characters_without_a_mark_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\na,0\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match=re.escape("zero bytes: name its encoding (encoding=utf-16-le?)")):
        rows_of(tmp_path / "a.csv")
    assert rows_of(tmp_path / "a.csv", options=FileOptions(encoding="utf-16-le")).train == [{"text": "a", "label": "0"}]


def test_a_field_of_ten_megabytes(tmp_path):
    long = "word " * 2_000_000
    for kind in ("csv", "tsv", "jsonl"):
        assert rows_of(table(tmp_path / f"a.{kind}", [{"text": long, "label": "0"}])).train[0]["text"] == long


def test_what_is_no_record_is_skipped_on_demand(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": \n[]\n{"body": "b"}\n{"text": "c"}\n')
    found = rows_of(path, "text", options=SKIP)
    assert [row["text"] for row in found.train] == ["a", "c"]
    assert [re.search(r"line (\d)", said)[1] for said in found.skipped] == ["2", "3", "4"]


NAMES = ["positive", "negative", "neutral"]


@pytest.mark.parametrize("kind", ["saved", "splits", "parquet"])
def test_names_of_classes_are_kept_in_their_order(kind, tmp_path):
    features = Features(text=Value("string"), label=ClassLabel(names=NAMES), tags=List(ClassLabel(names=["O", "B-x"])))
    rows = [{"text": f"{index}", "label": index % 3 - (index == 5) * 3, "tags": [0, 1]} for index in range(9)]
    data, path = Dataset.from_list(rows, features=features), tmp_path / f"data.{kind}"
    if kind == "parquet":
        data.to_parquet(path)
    else:
        (data if kind == "saved" else DatasetDict(train=data, validation=data.select([0, 1]))).save_to_disk(path)
    found = rows_of(path, "text", "label", "tags")
    assert found.names == {"label": NAMES, "tags": ["O", "B-x"]}
    assert [row["label"] for row in found.train] == [*NAMES, *NAMES[:2], -1, *NAMES]
    assert found.train[0]["tags"] == ["O", "B-x"]
    if kind == "splits":
        assert [row["label"] for row in found.validation] == NAMES[:2]
        assert str(found.validation[1].place) == f"{path} (validation), row 2"


def test_conll(tmp_path):
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n# NN I-NP O\n"
    for name in ("train.txt", "train.conll", "eng.train"):
        path = write(tmp_path / name, text)
        found = rows_of(path, "tokens", "tags").train
        assert found == [
            {
                "tokens": ["EU", "rejects"],
                "pos_tags": ["NNP", "VBZ"],
                "chunk_tags": ["B-NP", "B-VP"],
                "ner_tags": ["B-ORG", "O"],
                "tags": ["B-ORG", "O"],
            },
            {"tokens": ["#"], "pos_tags": ["NN"], "chunk_tags": ["I-NP"], "ner_tags": ["O"], "tags": ["O"]},
        ]
        assert [row.place.line for row in found] == [3, 6]
    path = write(tmp_path / "two.conll", "#tag\tO\na b\tB-x\n\t\nc\tO")
    assert [row["tokens"] for row in rows_of(path).train] == [["#tag", "a b"], ["c"]]


def test_conll_u(tmp_path):
    lines = ["# sent_id = 1", "# text = del", "1-2\tdel" + "\t_" * 8]
    lines += [f"{i}\t{word}\t{word}\t{tag}" + "\t_" * 6 for i, word, tag in ((1, "de", "ADP"), (2, "el", "DET"))]
    path = write(tmp_path / "a.conllu", "\n".join([*lines, "2.1\tx" + "\t_" * 8, "", ""]))
    (row,) = rows_of(path, "tokens", "tags").train
    assert row["tokens"] == ["de", "el"] and row["tags"] == row["upos"] == ["ADP", "DET"]


BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary took the milk.
5 What is Mary carrying? \tmilk,apple\t4 1
1 Ada slept.
2 Who slept? \tAda\t1
"""


def test_babi(tmp_path):
    path = write(tmp_path / "qa1_single-supporting-fact_train.txt", BABI)
    found = rows_of(path, "context", "question", "answer").train
    assert found[1] == {
        "context": "Mary moved to the bathroom. John went to the hallway. Mary took the milk.",
        "question": "What is Mary carrying?",
        "answer": "milk,apple",
        "supporting": [2, 0],
    }
    assert [row["context"] for row in found][2] == "Ada slept." and [row.place.line for row in found] == [3, 5, 7]
    broken = write(tmp_path / "broken.txt", BABI.replace("2 Who slept? ", "Who slept?"))
    assert rows_of(broken, options=FileOptions(skip_bad_rows=True)).train == [{"text": broken.read_text()}]


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "context": "Rome is old.",
                    "qas": [
                        {"id": "1", "question": "What is old?", "answers": [{"text": "Rome", "answer_start": 0}]},
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_squad(indent, tmp_path):
    path = write(tmp_path / "train-v1.1.json", json.dumps(SQUAD, indent=indent))
    found = rows_of(path, "question", "context", "answers").train
    assert [(row["title"], row["context"]) for row in found] == [("Rome", "Rome is old.")] * 2
    assert [row["answers"] for row in found] == [[{"text": "Rome", "answer_start": 0}], []]
    listed = write(tmp_path / "rows.json", json.dumps({"version": 2, "data": [{"text": "a"}, {"text": "b"}]}))
    assert [row["text"] for row in rows_of(listed).train] == ["a", "b"]


def test_arc_and_snli(tmp_path):
    choices = [{"text": "paris", "label": "A"}, {"text": "rome", "label": "B"}]
    asked = {"id": "1", "question": {"stem": "Capital of Italy?", "choices": choices}, "answerKey": "B"}
    (row,) = rows_of(table(tmp_path / "ARC-Easy-Train.jsonl", [asked])).train
    assert (row["question"], row["choices"], row["answerKey"]) == ("Capital of Italy?", choices, "B")
    assert published_columns("multiple_choice", row, DataSection()) == {
        "context_column": "question",
        "label_column": "answerKey",
    }
    path = write(tmp_path / "snli_1.0_dev.txt", 'gold_label\tsentence1\tsentence2\nneutral\t"a\tb\n-\tc\td\n')
    found = rows_of(path, "gold_label").train
    assert found[0] == {"gold_label": "neutral", "sentence1": '"a', "sentence2": "b"}
    assert published_columns("sequence_classification", found[0], DataSection()) == {
        "text_column": "sentence1",
        "pair_column": "sentence2",
        "label_column": "gold_label",
    }


def test_columns_that_the_recipe_names_are_never_replaced():
    columns = ["premise", "hypothesis", "label", "mood"]
    assert published_columns("sequence_classification", columns, DataSection(label_column="mood")) == {}
    assert published_columns("sequence_classification", columns, DataSection(text_column="premise")) == {
        "pair_column": "hypothesis"
    }
    assert published_columns("sequence_classification", ["a", "b"], DataSection()) == {}
    assert published_columns("token_classification", ["tokens", "pos_tags", "ner_tags"], DataSection()) == {
        "tags_column": "ner_tags"
    }


def test_rows_given_as_they_are():
    found = rows_of([{"text": "a"}, {"text": "b"}], "text").train
    assert found == [{"text": "a"}, {"text": "b"}] and isinstance(found[0], Record)
    with pytest.raises(ValueError, match="row 2: no column 'text'; its columns are body"):
        rows_of([{"text": "a"}, {"body": "b"}], "text")
