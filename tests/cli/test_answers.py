"""Questions about texts and multiple choice: windows lose no answer, the best stretch counts, bad rows are named."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from hf_lnlm.cli.answers import (
    MultipleChoice,
    QuestionAnswering,
    Window,
    answers_of,
    best_answer,
    exact_match,
    word_f1,
)
from hf_lnlm.cli.recipe import DataSection
from hf_lnlm.data.labelled import load_rows
from hf_lnlm.data.tokenizers import build_tokenizer

TEXTS = ["the cat sat on the mat and the dog lay under the old tree"] * 20
WORDS = build_tokenizer("word", TEXTS, template="bert")
BYTES = build_tokenizer("byte")
CONFIG = SimpleNamespace(type_vocab_size=2)
PLAIN = SimpleNamespace(type_vocab_size=0)
DATA = DataSection()
ROW = {"question": "the cat", "context": TEXTS[0], "answers": {"text": ["old tree"], "answer_start": [49]}}


@pytest.mark.parametrize("tokenizer, config", [(WORDS, CONFIG), (BYTES, PLAIN)], ids=["word", "byte"])
@pytest.mark.parametrize("answer", ["cat sat", "the mat", "dog lay under the", "tree"])
def test_every_answer_lies_in_a_window_and_reads_back(tokenizer, config, answer):
    task, length = QuestionAnswering(stride=20 if tokenizer is BYTES else 5), 12 if tokenizer is WORDS else 40
    row = {"question": "the cat", "context": TEXTS[0], "answers": answer}
    rows, lost = task.encode([row], DATA, tokenizer, config, length)
    assert lost == 0 and len(rows) > 1
    assert all(len(encoded["input_ids"]) <= length for encoded in rows)
    marked = [encoded for encoded in rows if encoded["start_positions"]]
    assert marked
    for encoded in marked:
        ids = encoded["input_ids"][encoded["start_positions"] : encoded["end_positions"] + 1]
        assert tokenizer.decode(ids).strip() == answer
    assert ("token_type_ids" in rows[0]) is (config is CONFIG)


def test_windows_overlap_by_the_stride_and_cover_the_text():
    held, cut = QuestionAnswering(stride=3).encode_held([ROW], DATA, WORDS, CONFIG, 12)
    spans = [[span for span in window.spans if span] for window in held[0]["windows"]]
    assert cut == 0
    assert {span for window in spans for span in window} == {
        (start, start + len(word)) for start, word in _words(TEXTS[0])
    }
    assert all(one[-3:] == two[:3] for one, two in itertools.pairwise(spans))


def _words(text):
    at = 0
    for word in text.split():
        yield at, word
        at += len(word) + 1


def test_an_answer_that_fits_into_no_window_is_counted():
    row = {"question": "the cat", "context": TEXTS[0], "answers": "sat on the mat and the dog lay under"}
    rows, lost = QuestionAnswering(stride=2).encode([row], DATA, WORDS, CONFIG, 11)
    assert lost == 1
    assert all(encoded["start_positions"] == encoded["end_positions"] == 0 for encoded in rows)


def test_the_best_stretch_over_windows_by_hand():
    windows = [Window({"input_ids": [1, 2, 3]}, [None, (0, 2), (3, 5)]), Window({}, [None, (3, 5), (6, 8)])]
    row = {"windows": windows, "context": "ab cd ef", "answers": ["cd ef"]}
    scores = torch.zeros(2, 3, 2)
    scores[1, 1, 0], scores[1, 2, 1] = 3.0, 3.0  # "cd ef" in the second window
    assert best_answer(scores, row, 5, nulls=False) == "cd ef"
    scores[0, 2, 0], scores[0, 1, 1] = 2.0, 9.0  # an end before its start is no answer
    assert best_answer(scores, row, 5, nulls=False) == "ab"
    scores[0] = 0.0
    assert best_answer(scores, row, 5, nulls=False) == "cd ef"
    assert best_answer(scores, row, 1, nulls=False) in ("cd", "ef")
    scores[:, 0] = 4.0
    assert best_answer(scores, row, 5, nulls=True) == ""
    assert best_answer(scores, row, 5, nulls=False) == "cd ef"


def test_exact_match_and_f1_by_hand():
    assert exact_match("The Cat!", ["a dog", "cat"]) == 1.0
    assert exact_match("", []) == 1.0 and exact_match("x", []) == 0.0
    assert word_f1("old red tree", ["old tree"]) == pytest.approx(2 * 2 / 5)
    assert word_f1("", ["x"]) == 0.0 and word_f1("", []) == 1.0


def test_sums_are_over_questions_whatever_the_batch():
    task = QuestionAnswering(stride=3)
    rows, _ = task.encode_held([ROW, {**ROW, "answers": "cat"}], DATA, WORDS, CONFIG, 12)
    task = task.measuring(rows)
    collate = task.collator(WORDS, bookkeeping=True)
    whole = collate(rows)
    assert whole["example"].tolist() == sorted(whole["example"].tolist())
    logits = torch.full((*whole["input_ids"].shape, 2), -5.0)
    for index, (start, end) in enumerate(zip(whole["start_positions"], whole["end_positions"])):
        logits[index, start, 0], logits[index, end, 1] = 5.0, 5.0
    found = task.summary(task.sums(logits, whole))
    assert found == {"exact_match": 1.0, "f1": 1.0}
    first = collate(rows[:1])
    part = task.sums(logits[: len(first["input_ids"])], first)
    assert part["answers"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "row, message",
    [
        ({**ROW, "answers": "zebra"}, "row 1: the answer 'zebra' is not in the text"),
        ({**ROW, "answers": {"text": ["cat"], "answer_start": [3]}}, "row 1: the answer 'cat' is not in the text"),
        ({**ROW, "answers": {"text": ["cat"], "answer_start": []}}, "row 1: 1 answers but 0 starts"),
        ({**ROW, "context": " "}, "row 1: an empty question or text"),
    ],
)
def test_bad_questions_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        QuestionAnswering(stride=3).encode([row], DATA, WORDS, CONFIG, 12)


def test_too_much_stride_is_refused():
    with pytest.raises(ValueError, match=r"objective.stride is 32, but a question leaves \d+ of data.block_size=16"):
        QuestionAnswering().encode([ROW], DATA, WORDS, CONFIG, 16)
    with pytest.raises(ValueError, match="stride must be 0 or more"):
        QuestionAnswering(stride=-1)


def test_questions_without_an_answer():
    assert answers_of({**ROW, "answers": {"text": [], "answer_start": []}}, DATA, 1) == []
    rows, lost = QuestionAnswering(stride=3).encode([{**ROW, "answers": ""}], DATA, WORDS, CONFIG, 12)
    assert lost == 0 and {row["start_positions"] for row in rows} == {0}


def test_choices_are_padded_together():
    task = MultipleChoice()
    rows = [
        {"context": "the cat", "choices": ["sat", "lay under the tree"], "label": 1},
        {"context": "the dog", "choices": ["lay", "sat on"], "label": "lay"},
    ]
    encoded, cut = task.encode(rows, DATA, WORDS, CONFIG, 16)
    batch = task.collator(WORDS)(encoded)
    assert cut == 0
    assert batch["input_ids"].shape[:2] == (2, 2) and batch["labels"].tolist() == [1, 0]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    found = task.summary(task.sums(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), batch))
    assert found["accuracy"] == 0.5


@pytest.mark.parametrize(
    "row, message",
    [
        ({"context": "a", "choices": "b c", "label": 0}, "must be a list of 2 choices or more"),
        ({"context": "a", "choices": ["b", "c", "d"], "label": 0}, "row 2: 3 choices, but the first row has 2"),
        (
            {"context": "a", "choices": ["b", "c"], "label": 2},
            "row 2: label 2 is neither a choice nor a number from 0 to 1",
        ),
    ],
)
def test_bad_choices_are_named(row, message):
    good = {"context": "the", "choices": ["cat", "dog"], "label": 0}
    with pytest.raises(ValueError, match=message):
        MultipleChoice().encode([good, row], DATA, WORDS, CONFIG, 16)


def test_standard_library_questions_and_choices(library):
    rows = load_rows("stdlib", ["question", "context", "answers"], task="question_answering").train
    assert len(rows) > 50
    for row in rows:
        (start,), (text,) = row["answers"]["answer_start"], row["answers"]["text"]
        assert row["context"][start : start + len(text)] == text
    choices = load_rows("stdlib", ["context", "choices", "label"], task="multiple_choice").train
    assert len(choices) > 20 and {row["label"] for row in choices} == {0, 1, 2, 3}
