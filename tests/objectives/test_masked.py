"""Masked language modelling: rates, whole words, and masks that are a function of (seed, epoch, example)."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler

from hf_lnlm.data.blocks import PackedBlocks, PackedStream
from hf_lnlm.data.epochs import EpochRows
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.masked import choose, special_ids, word_groups
from tests.data.subwords import subword_tokenizer, texts

BYTE = build_tokenizer("byte", sentinels=5, template="bert")
KINDS = ["wordpiece", "byte-bpe", "unigram"]


def blocks_for(tokenizer, length: int = 128, **options) -> PackedBlocks:
    documents = Dataset.from_dict({"text": texts(40)})
    return PackedBlocks(documents, tokenizer, **objective("masked", **options).packing(tokenizer, length))


def mask_all(blocks: PackedBlocks, tokenizer, seed: int = 0, **options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input ids, labels, original ids) of all rows, each `[rows, tokens]`."""
    rows = [blocks[index] for index in range(len(blocks))]
    batch = objective("masked", **options).collator(tokenizer, seed)(rows)
    return batch["input_ids"].numpy(), batch["labels"].numpy(), np.stack([row["input_ids"] for row in rows])


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("kind", ["byte", *KINDS])
def test_rates_on_a_hundred_thousand_tokens(kind: str, whole_word: bool) -> None:
    tokenizer = BYTE if kind == "byte" else subword_tokenizer(kind)
    blocks = blocks_for(tokenizer, whole_word=whole_word)
    runs = [
        mask_all(blocks, tokenizer, seed, whole_word=whole_word) for seed in range(-(-100_000 // (128 * len(blocks))))
    ]
    inputs, labels, original = (np.concatenate(arrays) for arrays in zip(*runs, strict=True))
    assert inputs.size >= 100_000
    chosen = labels != -100
    special = np.isin(original, special_ids(tokenizer))
    assert not (chosen & special).any()
    assert np.array_equal(labels[chosen], original[chosen]) and np.array_equal(inputs[~chosen], original[~chosen])
    assert 0.14 < chosen.sum() / (~special).sum() < 0.16
    masked, kept = inputs[chosen] == tokenizer.mask_token_id, inputs[chosen] == original[chosen]
    random = inputs[chosen][~masked & ~kept]
    assert abs(masked.mean() - 0.8) < 0.01 and abs(kept.mean() - 0.1) < 0.01
    assert abs(len(random) / chosen.sum() - 0.1) < 0.01
    assert not np.isin(random, special_ids(tokenizer)).any()
    assert len(np.unique(random)) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_no_word_is_half_masked(kind: str) -> None:
    tokenizer = subword_tokenizer(kind)
    blocks = blocks_for(tokenizer, whole_word=True)
    inputs, labels, _ = mask_all(blocks, tokenizer, whole_word=True)
    pieces = 0
    for index, (row, label) in enumerate(zip(inputs[:200], labels[:200], strict=True)):
        groups = word_groups(blocks[index]["word_ids"])
        for head in np.unique(groups):
            word = groups == head
            pieces = max(pieces, word.sum())
            assert len(np.unique(label[word] == -100)) == 1
            assert len(np.unique(row[word] == tokenizer.mask_token_id)) == 1
    assert pieces >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_word_numbers_are_the_words_of_the_text(kind: str) -> None:
    tokenizer = subword_tokenizer(kind)
    text = "Unbelievable zebras jumped_over 12345 hedges"
    documents = Dataset.from_dict({"text": [text]})
    row = PackedBlocks(documents, tokenizer, 6, words=True, drop_last=False)
    words = np.concatenate([row[i]["word_ids"] for i in range(len(row))])
    ids = np.concatenate([row[i]["input_ids"] for i in range(len(row))])
    spelt = [tokenizer.decode(ids[words == word]).strip().replace(" ", "") for word in range(words.max() + 1)]
    assert "".join(spelt).lower() == text.replace(" ", "").lower()
    assert {"zebras", "hedges", "12345"} <= {word.lower() for word in spelt}


class Batches:
    """Collates and keeps the example ids beside the batch."""

    def __init__(self, collator) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict]) -> tuple[list[int], dict[str, torch.Tensor]]:
        return [row["example_id"] for row in rows], self.collator(rows)


def masks_by_example(dataset, collator, batch_size: int, workers: int, shuffle: bool) -> dict[int, tuple]:
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(batch_size)) if shuffle else None
    loader = DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=Batches(collator))
    return {
        example: (inputs.tolist(), labels.tolist())
        for examples, batch in loader
        for example, inputs, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True)
    }


@pytest.mark.parametrize("name", ["masked", "span"])
def test_noise_depends_on_seed_epoch_and_example_only(name: str) -> None:
    documents = Dataset.from_dict({"text": texts(4)})
    learnt = objective(name)
    tokenizer = build_tokenizer("byte", sentinels=50)
    packing = learnt.packing(tokenizer, 64)
    dataset, stream = PackedBlocks(documents, tokenizer, **packing), PackedStream(documents, tokenizer, **packing)
    collator = learnt.collator(tokenizer, seed=3)
    dataset.set_epoch(2), stream.set_epoch(2)
    first = masks_by_example(dataset, collator, 4, 0, shuffle=False)
    assert len(first) == len(dataset) > 50
    for batch_size, workers, shuffle in ((2, 2, True), (8, 0, True), (3, 1, False)):
        assert masks_by_example(dataset, collator, batch_size, workers, shuffle) == first
    assert masks_by_example(stream, collator, 4, 2, shuffle=False) == first
    torch.manual_seed(123), np.random.seed(123)
    assert masks_by_example(dataset, learnt.collator(tokenizer, seed=3), 4, 0, shuffle=False) == first
    other_seed = masks_by_example(dataset, learnt.collator(tokenizer, seed=4), 4, 0, shuffle=False)
    dataset.set_epoch(3)
    other_epoch = masks_by_example(dataset, collator, 4, 0, shuffle=False)
    for other in (other_seed, other_epoch):
        assert sum(other[example] == first[example] for example in first) < len(first) / 10


def test_static_masks_come_back() -> None:
    dataset = blocks_for(BYTE)
    collator = objective("masked", dynamic=False, copies=3).collator(BYTE, 0)

    def labels(epoch: int) -> list:
        dataset.set_epoch(epoch)
        return collator([dataset[0], dataset[1]])["labels"].tolist()

    seen = [labels(epoch) for epoch in range(6)]
    assert seen[:3] == seen[3:] and seen[0] != seen[1] != seen[2]


def test_padding_is_never_chosen_and_changes_nothing() -> None:
    rows = EpochRows(Dataset.from_dict({"input_ids": [[104] * 9, [105] * 30]}))
    collator = objective("masked").collator(BYTE, 0)
    both, alone = collator([rows[0], rows[1]]), collator([rows[0]])
    assert both["attention_mask"].sum(1).tolist() == [9, 30]
    assert (both["labels"][0, 9:] == -100).all() and (both["input_ids"][0, 9:] == BYTE.pad_token_id).all()
    assert torch.equal(both["labels"][0, :9], alone["labels"][0])
    assert "attention_mask" not in alone


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=30),
    st.floats(0.05, 0.6),
    st.integers(0, 2**32 - 1),
)
def test_choose_keeps_to_whole_groups_and_to_the_budget(sizes: list[int], rate: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = word_groups(np.repeat(np.arange(len(sizes)), sizes))
    free = np.repeat(random.random(len(sizes)) < 0.8, sizes)
    chosen = choose(groups, free, random.random(len(groups)), rate, random.random(2))
    assert not chosen[~free].any()
    for head in np.unique(groups):
        assert len(np.unique(chosen[groups == head])) == 1
    assert chosen.any() == free.any()
    assert chosen.sum() <= max(rate * free.sum() + 1 + max(sizes), 1)


def test_choose_by_hand() -> None:
    groups, free = np.array([0, 0, 2, 3, 3, 5]), np.array([1, 1, 1, 1, 1, 0], bool)
    rank = np.array([0.5, 0, 0.9, 0.1, 0, 0])
    # Budget 0.4 · 5 = 2: the words by rank are {3, 4}, {0, 1}, {2}; the first fills it.
    assert choose(groups, free, rank, 0.4, np.zeros(2)).tolist() == [False, False, False, True, True, False]
    # Budget 3: the second word has room for one of its two tokens, so it is taken with probability 1/2.
    assert choose(groups, free, rank, 0.6, np.array([0, 0.49])).tolist() == [True, True, False, True, True, False]
    assert choose(groups, free, rank, 0.6, np.array([0, 0.51])).tolist() == [False, False, False, True, True, False]
    # Nothing in the budget: the smallest word.
    assert choose(groups, free, rank, 0.1, np.array([0, 0.5])).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must lie between 0 and 1 (exclusive), got 0.0"),
        ({"copies": 0}, "copies must be 1 or more, got 0"),
        ({"mask_share": 0.8, "random_share": 0.3}, "sum to 1 at most"),
        ({"whole_words": True}, "got 'whole_words'; did you mean 'whole_word'?"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        objective("masked", **options)


def test_bad_rows() -> None:
    collator = objective("masked").collator(BYTE)
    with pytest.raises(ValueError, match=r"0 of 4 labels \(0 %\) count in a batch of 2 rows"):
        collator([{"input_ids": [5, 6], "example_id": 0}, {"input_ids": [5, 6], "example_id": 1}])
    with pytest.raises(ValueError, match=r"token ids must lie in 0 … 267 \(the tokenizer's\), got 268"):
        collator([{"input_ids": [5, 268], "example_id": 0}])
    with pytest.raises(ValueError, match="whole words and spans need rows with word_ids"):
        objective("masked", whole_word=True).collator(BYTE)([{"input_ids": [104, 105], "example_id": 0}])
    without = build_tokenizer("byte")
    without.mask_token = None
    with pytest.raises(ValueError, match="needs a mask token and the tokenizer has none"):
        objective("masked").collator(without)
