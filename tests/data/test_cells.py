"""Cells: what they mean is read, anything else is refused in words, never turned into text."""

from __future__ import annotations

import re

import pytest

from hf_lnlm.data.cells import (
    answers_cell,
    choices_cell,
    class_cell,
    class_names,
    classes_cell,
    number_cell,
    tags_cell,
    text_cell,
    words_cell,
)

NO_TEXT = {
    "null": None,
    "a list": ["two", "words"],
    "a mapping": {"a": "secret"},
    "a number (3)": 3,
    "a number (0.5)": 0.5,
    "true": True,
    "bytes": b"raw",
}


@pytest.mark.parametrize("said, value", NO_TEXT.items(), ids=str)
@pytest.mark.parametrize("read", [text_cell, words_cell, choices_cell, answers_cell], ids=lambda read: read.__name__)
def test_what_is_no_text_is_refused_alone_and_in_lists(read, said, value):
    if read is text_cell or not isinstance(value, (list, dict)):
        with pytest.raises(ValueError, match=re.escape(said)):
            read(value)
    if read is not text_cell and not isinstance(value, dict):
        with pytest.raises(ValueError, match=rf"must hold text, got {re.escape(said)} as item 2"):
            read(["good", value])


@pytest.mark.parametrize("empty", ["", "  ", "\n\t"])
def test_empty_texts_are_refused(empty):
    for read, value in (
        (text_cell, empty),
        (words_cell, empty),
        (words_cell, ["a", empty]),
        (choices_cell, ["a", empty]),
    ):
        with pytest.raises(ValueError, match="holds no text"):
            read(value)
    with pytest.raises(ValueError, match="holds no word"):
        words_cell([])
    assert text_cell(empty, empty=True) == empty


def test_text_stays_as_it_is():
    for text in ("None", "null", "nan", "3", '"quoted', " spaces ", "zero\0byte", "a\u2028b", "\N{GRINNING FACE}"):
        assert text_cell(text) == text
    with pytest.raises(ValueError, match=r"half a character \(U\+D800 at character 1\)"):
        text_cell("a\ud800b")


def test_classes():
    assert [class_cell(value) for value in ("a b", 3, "3", True, " x")] == ["a b", "3", "3", "True", " x"]
    for value in (None, 0.5, 1.0, ["a"], {"a": 1}):
        with pytest.raises(ValueError, match="must hold a class"):
            class_cell(value)
    for code in (-1, "-1", "-", "", " ", -100):
        with pytest.raises(ValueError, match="stands for no label unless"):
            class_cell(code)
    assert class_cell(-1, ("-1", "1")) == "-1"
    with pytest.raises(ValueError, match="holds 'c', which is none of the labels a, b"):
        class_cell("c", ("a", "b"))


def test_order_of_classes():
    assert class_names(["b", "a", "O", "b"]) == ["O", "a", "b"]
    assert class_names([10, 2, 1]) == ["1", "2", "10"]
    assert class_names(["1", "0"]) == ["0", "1"]
    assert class_names(["a"], ("b", "a")) == ["b", "a"]
    assert class_names(["0.5", "good"]) == ["0.5", "good"]


@pytest.mark.parametrize("column", [["0.5", "1.25"], ["1", "2", "2.5"], ["1e-3", "0.1"], ["1.0", "2.0"]])
def test_a_column_of_fractions_is_no_set_of_classes(column):
    with pytest.raises(ValueError, match="scores are no classes"):
        class_names(column)
    assert class_names(column, tuple(column)) == column


def test_lists_of_classes():
    assert (
        classes_cell(["b", "a", "b"])
        == ["b", "a"]
        == classes_cell("b|a")
        == classes_cell("b, a")
        == classes_cell("b;a")
    )
    assert classes_cell([]) == [] == classes_cell("")
    assert classes_cell("a") == ["a"]
    for value, said in ((None, "a list of classes, got null"), (["a", None], "as item 2"), ([-1], "no label")):
        with pytest.raises(ValueError, match=said):
            classes_cell(value)
    assert tags_cell("O - B-x") == ["O", "-", "B-x"]


def test_numbers():
    assert [number_cell(value) for value in (1, 0.5, "2.5", " -1e3 ")] == [1.0, 0.5, 2.5, -1000.0]
    for value in (None, True, "", "high", "nan", float("inf"), [1.0], 10**400):
        with pytest.raises(ValueError, match="must hold a finite number"):
            number_cell(value)


def test_choices_as_in_arc():
    texts, names = ["paris", "rome"], ["A", "B"]
    assert choices_cell(texts) == (texts, [])
    assert choices_cell({"text": texts, "label": names}) == (texts, names)
    assert choices_cell([{"text": t, "label": n} for t, n in zip(texts, names)]) == (texts, names)
    for value, said in (
        ({"label": names}, "a list of choices, got null"),
        (["one"], "2 choices or more, got 1"),
        ({"text": texts, "label": ["A"]}, "name each of 2 choices"),
        ({"text": texts, "label": ["A", "A"]}, "name each of 2 choices"),
        ({"text": "paris", "label": "A"}, "a list of choices, got text"),
    ):
        with pytest.raises(ValueError, match=said):
            choices_cell(value)


def test_answers_as_in_squad():
    assert answers_cell({"text": ["a", "b"], "answer_start": [1, 2]}) == [(1, "a"), (2, "b")]
    assert answers_cell([{"text": "a", "answer_start": 1}, {"text": "b"}]) == [(1, "a"), (None, "b")]
    assert answers_cell("a") == answers_cell(["a"]) == answers_cell({"text": ["a"]}) == [(None, "a")]
    assert answers_cell({"text": "a", "answer_start": 4}) == [(4, "a")]
    assert answers_cell([]) == answers_cell("") == answers_cell({"text": [], "answer_start": []}) == []
    for value, said in (
        ({"text": ["a"], "answer_start": []}, "1 answers but 0 starts"),
        ({"text": ["a"], "answer_start": ["1"]}, "whole numbers as starts"),
        ({"text": ["a"], "answer_start": [1.0]}, "whole numbers as starts"),
        (None, "a list of answers, got null"),
        ({"answer_start": [1]}, "a list of answers, got null"),
        ([""], "holds no text as item 1"),
    ):
        with pytest.raises(ValueError, match=said):
            answers_cell(value)
