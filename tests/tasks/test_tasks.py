"""Tasks: words and tokens are aligned by characters, metrics are sums, bad rows are named."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_lnlm.data.labelled import load_rows
from hf_lnlm.data.section import DataSection
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.tasks import TASKS
from hf_lnlm.tasks.classification import SequenceClassification, TokenClassification, token_words
from hf_lnlm.tasks.scores import MultiLabelClassification, Regression
from hf_lnlm.tasks.text_to_text import TextToText

BYTES = build_tokenizer("byte")
TEXT = ["the cat sat on the mat", "a naïve café's über-cat: 猫!"] * 30
BPE = build_tokenizer("bpe", TEXT, vocab_size=300)
CONFIG = SimpleNamespace(label2id={"O": 0, "X": 1}, id2label={0: "O", 1: "X"}, type_vocab_size=0)


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
        (TokenClassification(), {"tokens": ["a"], "tags": ["O", "X"]}, "1 words but 2 tags"),
        (
            TokenClassification(),
            {"tokens": ["a", None], "tags": "O O"},
            "'tokens' must hold text, got null as item 2",
        ),
        (
            TokenClassification(),
            {"tokens": "a b", "tags": ["O", -1]},
            "column 'tags' holds -1, which stands for no label",
        ),
        (SequenceClassification(), {"text": "", "label": "X"}, "column 'text' holds no text"),
        (SequenceClassification(), {"text": ["a"], "label": "X"}, "column 'text' must hold text, got a list"),
        (SequenceClassification(), {"text": "a", "label": None}, "column 'label' must hold a class .*, got null"),
        (SequenceClassification(), {"text": "a", "label": 0.5}, "column 'label' must hold a class"),
        (SequenceClassification(), {"text": "a"}, "no column 'label'; its columns are text"),
        (Regression(), {"text": "a", "label": "high"}, "column 'label' must hold a finite number, got 'high'"),
        (
            MultiLabelClassification(),
            {"text": "a", "label": None},
            "column 'label' must hold a list of classes, got null",
        ),
        (TextToText(), {"source": "a", "target": ""}, "column 'target' holds no text"),
        (TextToText(), {"source": {"en": "a"}, "target": "b"}, "column 'source' must hold text, got a mapping"),
    ],
)
def test_bad_rows_are_refused_by_column(task, row, message):
    with pytest.raises(ValueError, match=message):
        task.read(row, DataSection())


def test_labels_out_of_a_closed_set_are_bad_and_of_an_open_one_strange():
    row = {"text": "a", "label": "Z"}
    with pytest.raises(ValueError, match="holds 'Z', which is none of the labels O, X"):
        SequenceClassification().reading(("O", "X"), only=True).read(row, DataSection())
    row = SequenceClassification().reading(("O", "X"), only=False).read(row, DataSection())
    with pytest.raises(ValueError, match="row 1: label 'Z' is none of the training labels: O, X"):
        SequenceClassification().encode([row], DataSection(), BYTES, CONFIG, 16)
    codes = SequenceClassification().reading(("-1", "1"), only=True)
    assert codes.read({"text": "a", "label": -1}, DataSection())["label"] == "-1"


def test_labels_without_a_class_count_as_errors():
    """As scikit-learn's accuracy_score and f1_score(average="macro") count them."""
    task, data = SequenceClassification().bound(CONFIG), DataSection()
    rows, _ = task.encode_held([{"text": "a", "label": name} for name in "OXZZ"], data, BYTES, CONFIG, 16)
    task = task.measuring(rows)
    assert task.measured_classes == ("O", "X", "Z")
    batch = task.collator(BYTES, bookkeeping=True)(rows)
    assert batch["labels"].tolist() == [0, 1, -100, -100] and batch["strange"].tolist() == [-100, -100, 2, 2]
    logits = torch.tensor([[3.0, 0.0]] * 2 + [[0.0, 3.0]] * 2)
    found = task.summary(task.sums(logits, batch))
    assert found["accuracy"] == 0.25
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits[:2], torch.tensor([0, 1])).item())


def test_tags_without_a_class_count_as_errors():
    config = SimpleNamespace(label2id={"O": 0, "B-x": 1}, id2label={0: "O", 1: "B-x"})
    task = TokenClassification().bound(config)
    rows, _ = task.encode_held(
        [{"tokens": ["ab", "c"], "tags": ["B-y", "O"]}, {"tokens": ["d"], "tags": ["B-x"]}],
        DataSection(),
        BYTES,
        config,
        16,
    )
    task = task.measuring(rows)
    batch = task.collator(BYTES, bookkeeping=True)(rows)
    assert batch["labels"].tolist() == [[-100, -100, -100, 0], [1, -100, -100, -100]]
    assert batch["strange"][0].tolist() == [2, -100, -100, -100]
    logits = torch.zeros(2, 4, 2)
    logits[..., 0], logits[1, 0, 1] = 1.0, 2.0
    found = task.summary(task.sums(logits, batch))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["precision"], found["recall"]) == (1.0, 0.5)  # the unknown kind of entity was missed


def test_regression_by_hand():
    task, data = Regression(), DataSection()
    labels = [1, "2.5", 2.5, -4]
    rows = [task.read({"text": "a", "label": label}, data) for label in labels]
    encoded, _ = task.encode(rows, data, BYTES, CONFIG, 16)
    task = task.measuring(encoded)
    collate = task.collator(BYTES, bookkeeping=True)
    guesses = torch.tensor([[1.0], [2.0], [3.0], [0.0]])
    whole = task.summary(task.sums(guesses, collate(encoded)))
    parts = [task.sums(guesses[i : i + 2], collate(encoded[i : i + 2])) for i in (0, 2)]
    assert task.summary({"table": parts[0]["table"] + parts[1]["table"]}) == whole
    assert whole["rmse"] == pytest.approx(((0 + 0.25 + 0.25 + 16) / 4) ** 0.5)
    assert whole["loss"] == pytest.approx(whole["rmse"] ** 2)
    assert whole["pearson"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, -4], guesses[:, 0])[0, 1])
    # ranks 2, 3.5, 3.5, 1 against 2, 3, 4, 1
    assert whole["spearman"] == pytest.approx(np.corrcoef([2, 3.5, 3.5, 1], [2, 3, 4, 1])[0, 1])
    constant = task.summary(task.sums(torch.ones(4, 1), collate(encoded)))
    assert constant["pearson"] == constant["spearman"] == 0.0


def test_several_classes_by_hand():
    config = SimpleNamespace(label2id={"a": 0, "b": 1, "c": 2}, num_labels=3, id2label=dict(enumerate("abc")))
    task, data = MultiLabelClassification().bound(config), DataSection()
    rows = [task.read({"text": "x", "label": label}, data) for label in (["a", "b"], [], "b|c")]
    encoded, _ = task.encode(rows, data, BYTES, config, 16)
    assert [row["labels"] for row in encoded] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    batch = task.collator(BYTES, bookkeeping=True)(encoded)
    assert batch["labels"].shape == (3, 3) and batch["labels"].dtype == torch.float32
    guesses = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1]])
    found = task.summary(task.sums(guesses * 4 - 2, batch))
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(guesses * 4 - 2, batch["labels"])
    assert found["loss"] == pytest.approx(loss.item())
    with pytest.raises(ValueError, match="row 1: label 'z' is none of the training labels"):
        task.encode([{"text": "x", "label": ["a", "z"]}], data, BYTES, config, 16)
    strange, _ = task.encode_held([{"text": "x", "label": ["a", "z"]}], data, BYTES, config, 16)
    task = task.measuring(strange)
    found = task.summary(task.sums(torch.tensor([[2.0, -2, -2]]), task.collator(BYTES, bookkeeping=True)(strange)))
    assert found["micro_f1"] == pytest.approx(2 / 3) and found["accuracy"] == 0.0


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


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("question_answering", "regression")])
def test_sums_do_not_depend_on_batches(name):
    task = TASKS[name]()
    tokens = name in ("token_classification", "text_to_text")
    shape = (6, 5, 3) if tokens else (6, 3)
    logits, labels = torch.randn(shape), torch.randint(0, 3, shape[:-1])
    if name == "multi_label_classification":
        labels = torch.randint(0, 2, shape).float()
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


def test_rows_name_the_missing_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 \(row 2\): no column 'label'; its columns are text"):
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
