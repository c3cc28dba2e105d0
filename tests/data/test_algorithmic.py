"""The algorithmic tasks: what a row holds, the optimal predictor, streams, batches and the curriculum."""

from __future__ import annotations

from itertools import islice, product

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
    with pytest.raises(ValueError, match="size must be a whole number between 2 and"):
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


def test_the_papers_sizes_are_the_defaults():
    """arXiv 1410.5401, sections 4.1 to 4.5."""
    assert Copy() == Copy(shortest=1, longest=20, width=8)
    assert RepeatCopy() == RepeatCopy(shortest=1, longest=10, width=8)
    assert AssociativeRecall() == AssociativeRecall(shortest=2, longest=6, width=6, item_length=3)
    assert DynamicNGrams() == DynamicNGrams(shortest=200, longest=200, context=5)
    assert PrioritySort() == PrioritySort(shortest=20, longest=20, width=8, kept=0.8)


@pytest.mark.parametrize("context", [0, 1])
def test_the_optimal_predictor_is_bayes(context):
    """Against brute force: every sequence of 7 bits, its likelihood integrated over a grid of whole tables."""
    angles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * (torch.pi / 2)
    ones = angles.sin().square()  # Beta(1/2, 1/2), equally likely each
    tables = torch.cartesian_prod(*[ones] * 2**context).view(-1, 2**context)

    def likelihood(bits: tuple[int, ...]) -> torch.Tensor:
        result = torch.full((len(tables),), 0.5**context, dtype=torch.float64)
        for t in range(context, len(bits)):
            one = tables[:, bits[t - 1] if context else 0]
            result = result * (one if bits[t] else 1 - one)
        return result.mean()

    for bits in product((0, 1), repeat=7):
        found = DynamicNGrams(context=context).optimal_probabilities(torch.tensor(bits))
        for t in (2, 6):
            seen = bits[: t + 1]
            torch.testing.assert_close(found[t], likelihood((*seen, 1)) / likelihood(seen), rtol=1e-4, atol=0)


def test_drawn_bits_follow_the_optimal_predictor():
    """Of all the times it says p, about a share p must be ones: true of the right posterior only."""
    task, said, came = DynamicNGrams(shortest=60, longest=60, context=2), [], []
    for seed in range(250):
        row = task.row(generator(seed), 60)
        said.append(task.optimal_probabilities(row["inputs_embeds"][:, 0])[2:])
        came.append(row["labels"][2:, 0].double())
    probabilities, ones = torch.cat(said), torch.cat(came)
    for low in (0.0, 0.1, 0.3, 0.45, 0.55, 0.7, 0.9):
        chosen = (probabilities >= low) & (probabilities < low + 0.1)
        spread = (probabilities[chosen] * (1 - probabilities[chosen])).sum().sqrt() / chosen.sum()
        assert abs(ones[chosen].mean() - probabilities[chosen].mean()) < 4 * spread


def test_streams_are_endless_and_repeatable():
    stream = Stream(Copy(), batch_size=3, seed=1)
    first, again = list(islice(stream, 30)), list(islice(stream, 30))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, again, strict=True))
    lengths = [len(row["labels"]) for row in first]
    assert all(lengths[i] == lengths[i + 1] == lengths[i + 2] for i in range(0, 30, 3)) and len(set(lengths)) > 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_share_the_batches_out():
    stream = Stream(Copy(), batch_size=3, seed=1)
    loader = torch.utils.data.DataLoader(stream, batch_size=3, collate_fn=pad_rows, num_workers=2)
    plain = torch.utils.data.DataLoader(stream, batch_size=3, collate_fn=pad_rows)
    for one, other in islice(zip(loader, plain, strict=False), 5):
        assert torch.equal(one["inputs_embeds"], other["inputs_embeds"])


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


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("copies", {}, "one of copy, repeat_copy"),
        ("copy", {"bits": 3}, "bits"),
        ("copy", {"longest": 0}, "longest must be a whole number between 1 and 1048576, got 0"),
        ("copy", {"longest": 10**12}, "longest must be a whole number between 1 and 1048576"),
        ("copy", {"shortest": 21}, "shortest <= longest, got 21 and 20"),
        ("copy", {"shortest": True}, "shortest"),
        ("copy", {"longest": "9"}, "longest"),
        ("copy", {"width": 0}, "width"),
        ("copy", {"width": 2.5}, "width"),
        ("repeat_copy", {"width": -1}, "width"),
        ("associative_recall", {"shortest": 1}, "shortest must be a whole number between 2"),
        ("associative_recall", {"item_length": 0}, "item_length"),
        ("dynamic_ngrams", {"context": 17}, "context must be a whole number between 0 and 16, got 17"),
        ("dynamic_ngrams", {"context": -1}, "context"),
        ("priority_sort", {"kept": 0.0}, "kept"),
        ("priority_sort", {"kept": 1.5}, "kept must be a number above 0 and up to 1, got 1.5"),
        ("priority_sort", {"kept": float("nan")}, "kept"),
    ],
)
def test_bad_tasks_are_refused_by_name(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        algorithmic_task(name, **sizes)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_rows_of_no_size_are_refused(name, size):
    with pytest.raises(ValueError, match="size must be"):
        algorithmic_task(name).row(generator(), size)


def test_bad_numbers_are_refused_by_name():
    for field, make in {
        "repeats": lambda: RepeatCopy().exact_row(generator(), 3, 0),
        "length": lambda: RepeatCopy().exact_row(generator(), 0, 3),
        "size": lambda: task_rows(Copy(), 2, seed=0, size=0),
        "rows": lambda: task_rows(Copy(), 0, seed=0),
        "batch_size": lambda: Stream(Copy(), 0, seed=0),
        "seed": lambda: Stream(Copy(), 1, seed=-1),
        "longest": lambda: Stream(Copy(), 1, seed=0, longest=21),
        "threshold": lambda: Curriculum(Stream(Copy(), 1, seed=0), threshold=0.0),
        "bits": lambda: DynamicNGrams().optimal_probabilities(torch.tensor([0.0, 2.0])),
    }.items():
        with pytest.raises(ValueError, match=field):
            make()
