"""Span corruption: exact lengths, descending sentinels, and pairs that give back their text."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_lnlm.data.blocks import PackedBlocks
from hf_lnlm.data.tokenizers import build_tokenizer, sentinel_ids
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.span import fold, interleave, noise_mask
from tests.data.subwords import texts

TOKENIZER = build_tokenizer("byte", sentinels=100, template="t5")
SENTINELS = sentinel_ids(TOKENIZER)
EOS = TOKENIZER.eos_token_id


@pytest.mark.parametrize(
    ("length", "raw", "targets"), [(128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229)]
)
def test_exact_lengths(length: int, raw: int, targets: int) -> None:
    span = objective("span")
    assert (span.raw_length(length), span.target_length(length)) == (raw, targets)
    blocks = PackedBlocks(Dataset.from_dict({"text": texts()}), TOKENIZER, **span.packing(TOKENIZER, length))
    batch = span.collator(TOKENIZER)([blocks[index] for index in range(8)])
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (8, length) and batch["labels"].shape == (8, targets)


def test_a_thousand_rows_give_back_their_text() -> None:
    span = objective("span")
    blocks = PackedBlocks(Dataset.from_dict({"text": texts()}), TOKENIZER, **span.packing(TOKENIZER, 128))
    rows = [{**blocks[index % len(blocks)], "example_id": index} for index in range(1000)]
    batch = span.collator(TOKENIZER, seed=1)(rows)
    shapes = set()
    for row, inputs, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert interleave(inputs, labels, TOKENIZER) == row["input_ids"].tolist()
        for ids in (inputs, labels):
            used = [token for token in ids if token in set(SENTINELS)]
            assert used == SENTINELS[:7] and used == sorted(used, reverse=True)
            assert ids[-1] == EOS
        assert inputs[0] not in SENTINELS and labels[0] == SENTINELS[0]
        shapes.add(tuple(index for index, token in enumerate(inputs) if token in set(SENTINELS)))
    assert len(shapes) > 990


def test_every_way_to_cut_a_row_is_equally_likely() -> None:
    # 4 kept and 3 noise tokens in two parts each: 3 · 2 ways.
    drawn = Counter(tuple(noise_mask(7, 3, 2, np.random.default_rng(seed)).tolist()) for seed in range(6000))
    assert len(drawn) == 6
    assert all(900 < count < 1100 for count in drawn.values())
    assert all(not mask[0] and mask[-1] and sum(mask) == 3 for mask in drawn)


@given(st.integers(2, 300), st.floats(0.05, 0.9), st.floats(1, 8), st.integers(0, 2**20))
def test_interleave_gives_back_any_row(length: int, rate: float, mean_span: float, example: int) -> None:
    span = objective("span", rate=rate, mean_span=mean_span)
    noise, spans = span.noise(length)
    if spans > len(SENTINELS):
        with pytest.raises(ValueError, match=f"has {spans} spans but the tokenizer has 100 sentinels"):
            span.collator(TOKENIZER)([{"input_ids": [104] * length, "example_id": example}])
        return
    ids = np.random.default_rng(example).integers(0, 263, length)
    ids[-1] = EOS
    batch = span.collator(TOKENIZER)([{"input_ids": ids, "example_id": example}])
    inputs, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert interleave(inputs, labels, TOKENIZER) == ids.tolist()
    assert len(inputs) == length - noise + spans + 1 and len(labels) == noise + spans + 1


def test_fold_by_hand() -> None:
    ids, noise = np.arange(10, 18), np.array([0, 0, 1, 1, 0, 1, 0, 1], bool)
    sentinels = np.array([99, 98, 97, 96])
    assert fold(ids, noise, sentinels, 1).tolist() == [10, 11, 99, 14, 98, 16, 97, 1]
    assert fold(ids, ~noise, sentinels, 1).tolist() == [99, 12, 13, 98, 15, 97, 17, 1]


def test_rows_of_different_lengths_are_padded() -> None:
    rows = [{"input_ids": [104] * 20, "example_id": 0}, {"input_ids": [104] * 60, "example_id": 1}]
    batch = objective("span").collator(TOKENIZER)(rows)
    assert batch["attention_mask"].sum(1).tolist() == [20 - 3 + 1 + 1, 60 - 9 + 3 + 1]
    assert (batch["labels"][0] != -100).sum() == 3 + 1 + 1
    padded = [{**rows[0], "input_ids": [104] * 20 + [0] * 5, "attention_mask": [1] * 20 + [0] * 5}]
    assert objective("span").collator(TOKENIZER)(padded)["input_ids"].tolist() == batch["input_ids"][:1, :19].tolist()


def test_tokenizers_without_sentinels_are_refused() -> None:
    with pytest.raises(ValueError, match="needs sentinels <extra_id_0>"):
        objective("span").collator(build_tokenizer("byte"))
    few = build_tokenizer("byte", sentinels=3)
    with pytest.raises(ValueError, match="has 7 spans but the tokenizer has 3 sentinels"):
        objective("span").packing(few, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rate": 1.0}, "rate must lie between 0 and 1"), ({"mean_span": 0.5}, "mean_span must be 1 or more, got 0.5")],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        objective("span", **options)


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match="needs 2 tokens or more, got 1"):
        objective("span").collator(TOKENIZER)([{"input_ids": [104], "example_id": 0}])
    with pytest.raises(ValueError, match="no span for <extra_id_1>"):
        interleave([104, SENTINELS[1]], [SENTINELS[0], 105], TOKENIZER)
    with pytest.raises(ValueError, match="length must be 3 or more"):
        objective("span").raw_length(2)
