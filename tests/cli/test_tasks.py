"""Tasks: words and tokens are aligned by characters, metrics are sums, bad rows are named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_lnlm.cli.recipe import DataSection
from hf_lnlm.cli.tasks import TASKS, SequenceClassification, TextToText, TokenClassification, token_words
from hf_lnlm.data.labelled import label_names, load_rows
from hf_lnlm.data.tokenizers import build_tokenizer

BYTES = build_tokenizer("byte")
TEXT = ["the cat sat on the mat", "a naïve café's über-cat: 猫!"] * 30
BPE = build_tokenizer("bpe", TEXT, vocab_size=300)
CONFIG = SimpleNamespace(label2id={"O": 0, "X": 1}, type_vocab_size=0)


def test_token_words_by_hand():
    #            "ab c def" -> ab=0..2, c=3..4, def=5..8
    offsets = [(0, 0), (0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (0, 0)]
    assert token_words(["ab", "c", "def"], offsets) == [-1, 0, 0, 1, 2, 2, -1]
    assert token_words(["ab", "c"], [(0, 4)]) == [0]
    assert token_words(["ab"], [(2, 2)]) == [-1]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
@pytest.mark.parametrize("words", [["the", "cat"], ["naïve", "café's", "猫", "!"], ["猫猫"]])
def test_every_word_is_labelled_once_at_its_first_token(tokenizer, words):
    data = DataSection()
    tags = ["X" if index % 2 else "O" for index in range(len(words))]
    rows, cut = TokenClassification().encode([{"tokens": words, "tags": tags}], data, tokenizer, CONFIG, 64)
    labels = [label for label in rows[0]["labels"] if label != -100]
    assert labels == [CONFIG.label2id[tag] for tag in tags]
    assert cut == 0
    assert tokenizer.decode(rows[0]["input_ids"]) == " ".join(words)


def test_all_pieces_on_demand():
    task = TokenClassification(label_all_pieces=True)
    rows, _ = task.encode([{"tokens": ["ab", "c"], "tags": ["X", "O"]}], DataSection(), BYTES, CONFIG, 64)
    assert rows[0]["labels"] == [1, 1, -100, 0]


def test_cut_rows_are_counted():
    row = {"tokens": ["aaaa", "bbbb", "cccc"], "tags": ["O", "X", "O"]}
    rows, cut = TokenClassification().encode([row], DataSection(), BYTES, CONFIG, 9)
    assert cut == 1
    assert [label for label in rows[0]["labels"] if label != -100] == [0, 1]
    rows, cut = SequenceClassification().encode([{"text": "a" * 20, "label": "X"}], DataSection(), BYTES, CONFIG, 9)
    assert (len(rows[0]["input_ids"]), cut) == (9, 1)


@pytest.mark.parametrize(
    "task, row, message",
    [
        (TokenClassification(), {"tokens": ["a"], "tags": ["O", "X"]}, "row 1: 1 words but 2 tags"),
        (TokenClassification(), {"tokens": ["a"], "tags": ["Z"]}, "row 1: label 'Z' is none of .* O, X"),
        (SequenceClassification(), {"text": "", "label": "X"}, "row 1: column 'text' holds no text"),
        (SequenceClassification(), {"text": "a", "label": "Z"}, "row 1: label 'Z'"),
        (TextToText(), {"source": "a", "target": ""}, "row 1: an empty source or target"),
    ],
)
def test_bad_rows_are_named(task, row, message):
    with pytest.raises(ValueError, match=message):
        task.encode([row], DataSection(), BYTES, CONFIG, 16)


def test_text_to_text_ends_both_sides_and_keeps_the_end_when_cut():
    rows, cut = TextToText(prefix="p:").encode([{"source": "abc", "target": "xyz"}], DataSection(), BYTES, CONFIG, 4)
    assert cut == 1
    assert rows[0]["input_ids"][-1] == rows[0]["labels"][-1] == BYTES.eos_token_id
    assert BYTES.decode(rows[0]["input_ids"][:-1]) == "p:a"


def test_class_metrics_by_hand():
    task = SequenceClassification()
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    sums = task.sums(logits, {"labels": torch.tensor([0, 1, 0, 0])})
    found = task.summary(sums)
    assert found["accuracy"] == 0.5
    # class 0: tp 1, fn 2 -> 0.5; class 1: tp 1, fp 1 -> 2/3; class 2: fp 1 -> 0
    assert found["macro_f1"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 0])).item())


@pytest.mark.parametrize("name", [name for name in TASKS if name != "question_answering"])
def test_sums_do_not_depend_on_batches(name):
    task = TASKS[name]()
    shape = (6, 3) if name in ("sequence_classification", "multiple_choice") else (6, 5, 3)
    logits, labels = torch.randn(shape), torch.randint(0, 3, shape[:-1])
    whole = task.summary(task.sums(logits, {"labels": labels}))
    parts = [task.sums(logits[i : i + 2], {"labels": labels[i : i + 2]}) for i in (0, 2, 4)]
    added = {key: sum(part[key] for part in parts) for key in parts[0]}
    assert task.summary(added) == pytest.approx(whole)


def test_collator_pads_on_the_right_and_marks_it():
    rows = [{"input_ids": [5, 6], "labels": [1, -100]}, {"input_ids": [7], "labels": [0]}]
    batch = TokenClassification().collator(BYTES)(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [7, BYTES.pad_token_id]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[1, -100], [0, -100]]


def test_label_names():
    assert label_names(["b", "a", "O"]) == ["O", "a", "b"]
    assert label_names([10, 2, 1]) == ["1", "2", "10"]
    assert label_names(["1", "0"]) == ["0", "1"]
    for bad in (None, 0.5, "", ["a"]):
        with pytest.raises(ValueError, match="a label must be a name or a whole number"):
            label_names([bad])


def test_rows_name_the_missing_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"row 2: no column 'label'; its columns are text"):
        load_rows(str(path), ["text", "label"], task="sequence_classification")


def test_rows_are_split_by_content(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {i % 20},{i % 2}\n" for i in range(80)))
    rows = load_rows(str(path), ["text", "label"], task="sequence_classification", validation=0.3)
    train, held = {row["text"] for row in rows.train}, {row["text"] for row in rows.validation}
    assert train and held and not train & held
    assert len(rows.train) + len(rows.validation) == 80
    again = load_rows(str(path), ["text", "label"], task="sequence_classification", validation=0.3)
    assert again == rows


def test_standard_library_rows(library):
    for task, columns in (
        ("sequence_classification", ["text", "label"]),
        ("token_classification", ["tokens", "tags"]),
        ("text_to_text", ["source", "target"]),
    ):
        rows = load_rows("stdlib", columns, task=task, validation=0.3, limit=60).train
        assert len(rows) > 10
    tags = {"def": "keyword", "=": "operator"}
    tagged = load_rows("stdlib", ["tokens", "tags"], task="token_classification").train
    seen = {word: tag for row in tagged for word, tag in zip(row["tokens"], row["tags"])}
    assert {word: seen[word] for word in tags} == tags
    summaries = load_rows("stdlib", ["source", "target"], task="text_to_text").train
    bisect = next(row for row in summaries if row["source"].startswith("def insort_right"))
    assert bisect["target"] == "Insert item x in list a, and keep it sorted assuming a is sorted."
    assert '"""' not in bisect["source"]
