"""The algorithmic tasks: what a row holds, the optimal predictor, streams, batches and the curriculum."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from hf_lnlm.data.algorithmic import (
    IGNORED,
    TASKS,
    AssociativeRecall,
    Copy,
    Curriculum,
    DynamicNGrams,
    PrioritySort,
    RepeatCopy,
    Stream,
    algorithmic_task,
    pad_rows,
    task_rows,
    wrong_bits,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TASKS)
def test_rows_have_the_widths_of_their_task(name):
    task = algorithmic_task(name)
    row = task.row(generator(), task.longest)
    assert row["inputs_embeds"].shape == (len(row["labels"]), task.input_size)
    assert row["labels"].shape[1] == task.output_size
    assert set(row["labels"].unique().tolist()) <= {IGNORED, 0.0, 1.0}
    again = task.row(generator(), task.longest)
    assert all(torch.equal(row[key], again[key]) for key in row)


def test_copy():
    row = Copy().row(generator(), 5)
    inputs, labels = row["inputs_embeds"], row["labels"]
    assert torch.equal(inputs[:5, :8], labels[6:]) and (labels[:6] == IGNORED).all()
    assert inputs[5].tolist() == [0.0] * 8 + [1.0] and not inputs[6:].any()


def test_repeat_copy():
    row = RepeatCopy().exact_row(generator(), 3, 2)
    inputs, labels = row["inputs_embeds"], row["labels"]
    assert inputs[3, 8] == 1 and inputs[3, 9] == pytest.approx(0.2)
    assert torch.equal(labels[4:10, :8], inputs[:3, :8].repeat(2, 1)) and not labels[4:10, 8].any()
    assert labels[10].tolist() == [0.0] * 8 + [1.0]


def test_associative_recall_asks_for_the_next_item():
    for seed in range(10):
        row = AssociativeRecall().row(generator(seed), 4)
        inputs, labels = row["inputs_embeds"], row["labels"]
        items = [inputs[4 * i + 1 : 4 * i + 4, :6] for i in range(4)]
        query, answer = inputs[17:20, :6], labels[21:]
        assert any(torch.equal(items[i], query) and torch.equal(items[i + 1], answer) for i in range(3))
        assert inputs[:, 6].nonzero().flatten().tolist() == [0, 4, 8, 12]
        assert inputs[:, 7].nonzero().flatten().tolist() == [16, 20]
    with pytest.raises(ValueError, match="2 items"):
        AssociativeRecall().row(generator(), 1)


def test_priority_sort():
    row = PrioritySort().row(generator(), 20)
    inputs, labels = row["inputs_embeds"], row["labels"]
    order = inputs[:20, 8].argsort(descending=True)
    assert len(labels) == 37 and torch.equal(labels[21:], inputs[:20, :8][order[:16]])


def test_ngrams_next_bit_and_table():
    task = DynamicNGrams()
    row = task.row(generator(), 200)
    assert torch.equal(row["inputs_embeds"][1:], row["labels"][:-1])
    # contexts repeat with one hidden probability each: the optimal predictor must beat a fair coin on average
    losses = []
    for seed in range(20):
        row = task.row(generator(seed), 200)
        best = task.optimal_probabilities(row["inputs_embeds"][:, 0])
        losses.append(torch.nn.functional.binary_cross_entropy(best, row["labels"][:, 0].double()))
    assert 0.3 < torch.stack(losses).mean() < 0.66


def test_optimal_probabilities_by_hand():
    task = DynamicNGrams(context=1)
    found = task.optimal_probabilities(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    # after 1: unseen; after 1 again: one 1 seen after 1; after 0: unseen; after 1: a 1 and a 0 seen after 1
    torch.testing.assert_close(found, torch.tensor([0.5, 1.5 / 2, 0.5, 1.5 / 3], dtype=torch.float64))


def test_streams_are_endless_and_repeatable():
    stream = Stream(Copy(), batch_size=3, seed=1)
    first, again = list(islice(stream, 30)), list(islice(stream, 30))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, again, strict=True))
    lengths = [len(row["labels"]) for row in first]
    assert all(lengths[i] == lengths[i + 1] == lengths[i + 2] for i in range(0, 30, 3)) and len(set(lengths)) > 3


def test_batches_are_padded_and_masked():
    rows = [Copy().row(generator(), size) for size in (2, 4)]
    batch = pad_rows(rows)
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]
    assert (batch["labels"][0, 5:] == IGNORED).all()
    assert "attention_mask" not in pad_rows(rows[:1] * 2)


def test_fixed_rows_are_a_dataset():
    rows = task_rows(Copy(), 4, seed=3, size=2)
    assert len(rows) == 4 and torch.equal(pad_rows(list(rows))["labels"][0], rows[0]["labels"])


def test_the_curriculum_goes_on_when_few_bits_are_wrong():
    stream = Stream(Copy(longest=7), 1, seed=0, longest=3)
    curriculum, labels = Curriculum(stream), torch.ones(1, 2, 8)
    curriculum.observe(-labels, labels)
    assert stream.longest == 3
    seen = set()
    for _ in range(1000):
        curriculum.observe(labels, labels)
        seen.add(stream.longest)
    assert seen == {3, 4, 6, 7} and curriculum.finished


def test_wrong_bits():
    labels = torch.tensor([[[1.0, 0.0], [IGNORED, IGNORED]]])
    assert wrong_bits(torch.tensor([[[-1.0, -1.0], [5.0, 5.0]]]), labels).tolist() == [1]


@pytest.mark.parametrize("bad", [{"name": "copies"}, {"name": "copy", "longest": 0}, {"name": "copy", "bits": 3}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError):
        algorithmic_task(**bad)
