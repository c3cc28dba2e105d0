"""Questions about texts and multiple choice: windows lose no answer, the best stretch counts, bad rows are named."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from hf_lnlm.data.labelled import LabelledRows, load_rows, read_cells
from hf_lnlm.data.section import DataSection
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.tasks.question_answering import (
    MultipleChoice,
    QuestionAnswering,
    Window,
    best_answer,
    exact_match,
    place_answer,
    word_f1,
)

TEXTS = ["the cat sat on the mat and the dog lay under the old tree"] * 20
WORDS = build_tokenizer("word", TEXTS, template="bert")
BYTES = build_tokenizer("byte")
CONFIG = SimpleNamespace(type_vocab_size=2)
PLAIN = SimpleNamespace(type_vocab_size=0)
DATA = DataSection()
TASK = QuestionAnswering(stride=3)
ROW = {"question": "the cat", "context": TEXTS[0], "answers": {"text": ["old tree"], "answer_start": [49]}}


def asked(**cells):
    return TASK.read({**ROW, **cells}, DATA)


@pytest.mark.parametrize("tokenizer, config", [(WORDS, CONFIG), (BYTES, PLAIN)], ids=["word", "byte"])
@pytest.mark.parametrize("answer", ["cat sat", "the mat", "dog lay under the", "tree"])
def test_every_answer_lies_in_a_window_and_reads_back(tokenizer, config, answer):
    task, length = QuestionAnswering(stride=20 if tokenizer is BYTES else 5), 12 if tokenizer is WORDS else 40
    row = asked(answers=answer)
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
    held, cut = QuestionAnswering(stride=3).encode_held([asked()], DATA, WORDS, CONFIG, 12)
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
    row = asked(answers="sat on the mat and the dog lay under")
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
    rows, _ = task.encode_held([asked(), asked(answers="cat")], DATA, WORDS, CONFIG, 12)
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
    "cells, message",
    [
        ({"answers": "zebra"}, "the answer 'zebra' is not in the text"),
        (
            {"answers": {"text": ["the"], "answer_start": [4]}},
            "answer_start 4 is at 'cat', but the answer 'the' stands",
        ),
        ({"answers": {"text": ["cat"], "answer_start": []}}, "column 'answers' holds 1 answers but 0 starts"),
        ({"answers": None}, "column 'answers' must hold a list of answers, got null"),
        ({"context": " "}, "column 'context' holds no text"),
        ({"question": None}, "column 'question' must hold text, got null"),
    ],
)
def test_bad_questions_are_refused_by_column(cells, message):
    with pytest.raises(ValueError, match=message):
        asked(**cells)


def test_wrong_starts_are_mended_where_the_answer_stands_once():
    row = asked(answers={"text": ["old tree", "the cat"], "answer_start": [7, 0]})
    assert row["answers"] == [(49, "old tree"), (0, "the cat")]
    assert TASK.notes([row, asked()], DATA) == [
        "1 answers stand elsewhere than answer_start says and were mended: each stands once"
    ]
    assert TASK.notes([asked(answers="cat")], DATA) == []
    assert place_answer("the", None, TEXTS[0]) == 0 and place_answer("the", 11, "the cat on the mat") == 11
    assert place_answer("cat", -5, "the cat") == 4
    with pytest.raises(ValueError, match="more than once"):
        place_answer("aa", 5, "aaa")


def test_too_much_stride_is_refused():
    with pytest.raises(ValueError, match=r"objective.stride is 32, but a question leaves \d+ of data.block_size=16"):
        QuestionAnswering().encode([asked()], DATA, WORDS, CONFIG, 16)
    with pytest.raises(ValueError, match="stride must be 0 or more"):
        QuestionAnswering(stride=-1)


def test_questions_without_an_answer():
    assert asked(answers={"text": [], "answer_start": []})["answers"] == []
    rows, lost = QuestionAnswering(stride=3).encode([asked(answers="")], DATA, WORDS, CONFIG, 12)
    assert lost == 0 and {row["start_positions"] for row in rows} == {0}


def test_choices_are_padded_together():
    task = MultipleChoice()
    rows = [
        {"context": "the cat", "choices": ["sat", "lay under the tree"], "label": 1},
        {"context": "the dog", "choices": ["lay", "sat on"], "label": "lay"},
    ]
    encoded, cut = task.encode([task.read(row, DATA) for row in rows], DATA, WORDS, CONFIG, 16)
    batch = task.collator(WORDS)(encoded)
    assert cut == 0
    assert batch["input_ids"].shape[:2] == (2, 2) and batch["labels"].tolist() == [1, 0]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    found = task.summary(task.sums(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), batch))
    assert found["accuracy"] == 0.5


ARC = {"text": ["paris", "rome"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    "choices, label, right",
    [
        (["b", "c"], 1, 1),
        (["b", "c"], "1", 1),
        (["b", "c"], "c", 1),
        (["0", "1"], 0, 0),
        (ARC, "B", 1),
        (ARC, "rome", 1),
        (ARC, 0, 0),
        ({"text": ["b", "c"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["b", "c"], "label": ["1", "2"]}, 1, 0),
    ],
)
def test_the_right_choice_by_name_text_or_number(choices, label, right):
    row = MultipleChoice().read({"context": "a", "choices": choices, "label": label}, DATA)
    assert row["label"] == right and len(row["choices"]) == 2 and isinstance(row["choices"][0], str)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"context": "a", "choices": "b c", "label": 0}, "column 'choices' must hold a list of choices, got text"),
        (
            {"context": "a", "choices": ["b", "c"], "label": 2},
            r"label a number \(2\) is neither a choice nor a number",
        ),
        ({"context": "a", "choices": ["b", "c"], "label": None}, "label null is neither"),
        (
            {"context": "a", "choices": ARC, "label": "C"},
            r"label 'C' is neither a choice's name \(A, B\), a choice nor",
        ),
        ({"context": "a", "choices": ["b", None], "label": 0}, "column 'choices' must hold text, got null as item 2"),
        ({"context": None, "choices": ["b", "c"], "label": 0}, "column 'context' must hold text, got null"),
    ],
)
def test_bad_choices_are_refused_by_column(row, message):
    with pytest.raises(ValueError, match=message):
        MultipleChoice().read(row, DATA)


def test_rows_with_another_number_of_choices_than_most_are_outliers():
    rows = [{"context": "a", "choices": ["b"] * size, "label": 0} for size in (3, 4, 4, 5, 4)]
    found = MultipleChoice().outliers(rows, DATA)
    assert found == {0: "3 choices, but most rows have 4", 3: "5 choices, but most rows have 4"}
    loaded = LabelledRows(rows[:3], rows[3:])
    kept = read_cells(loaded, dict, True, lambda rows: MultipleChoice().outliers(rows, DATA))
    assert [len(kept.train), len(kept.validation), len(kept.skipped)] == [2, 1, 2]
    with pytest.raises(ValueError, match="row 1: 3 choices"):
        read_cells(loaded, dict, False, lambda rows: MultipleChoice().outliers(rows, DATA))


def test_standard_library_questions_and_choices(library):
    rows = load_rows("stdlib", ["question", "context", "answers"], task="question_answering").train
    assert len(rows) > 50
    for row in rows:
        (start,), (text,) = row["answers"]["answer_start"], row["answers"]["text"]
        assert row["context"][start : start + len(text)] == text
    choices = load_rows("stdlib", ["context", "choices", "label"], task="multiple_choice").train
    assert len(choices) > 20 and {row["label"] for row in choices} == {0, 1, 2, 3}
