"""bAbI questions from JSON lines."""

from __future__ import annotations

import gzip
import json

import pytest

from hf_lnlm.data.babi import ASK, PAD, UNKNOWN, babi_vocabulary, pad_questions, read_babi, split_words

LINES = [
    {"context": "Ada went to the hall.", "question": "Where is Ada?", "answer": "hall"},
    {"context": "Bob went to the garden. Ada took the milk.", "question": "What is Ada carrying?", "answer": "Milk"},
]


@pytest.mark.parametrize("packed", [False, True])
def test_reads_lines(tmp_path, packed):
    text = "\n".join(json.dumps(line) for line in LINES)
    path = tmp_path / ("train.jsonl.gz" if packed else "train.jsonl")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert read_babi(path) == LINES


@pytest.mark.parametrize(
    "text", ["{", '{"context": "a"}', "[]", '{"context": "a", "question": "b?", "answer": ["c", "d"]}']
)
def test_bad_lines_are_named(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1"):
        read_babi(path)


def test_blank_lines_are_nothing_and_a_file_of_them_is_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    assert read_babi(path) == LINES
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="no questions"):
        read_babi(path)


def test_rows_and_batches():
    vocabulary = babi_vocabulary(LINES)
    rows = [vocabulary.encode(line) for line in LINES]
    assert sorted(vocabulary.answers) == ["hall", "milk"] and [row["labels"] for row in rows] == [0, 1]
    assert all(row["input_ids"][-1] == ASK for row in rows)
    batch = pad_questions(rows)
    assert batch["input_ids"][0, 0] == PAD and batch["input_ids"][0, -1] == ASK
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    strange = vocabulary.encode({"context": "Zoe slept.", "question": "Who?", "answer": "zoe"})
    assert strange["labels"] == -100 and strange["input_ids"][0] == UNKNOWN


def test_words():
    assert split_words("Where is Ada?") == ["where", "is", "ada", "?"]
