"""Denoising by hand: sentences, spans and masks, their shares and their lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.denoising import infilled, permuted, span_lengths

TOKENIZER = build_tokenizer("byte", template="bert")
MASK, EOS = TOKENIZER.mask_token_id, TOKENIZER.eos_token_id


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_sentences_are_shuffled_whole_and_every_order_is_equally_likely() -> None:
    ends = np.zeros(10, bool)
    ends[[8, 9]] = True
    ids = np.array([1, 2, 8, 3, 9, 4, 5])  # three sentences: the last has no end of its own
    drawn = Counter(tuple(permuted(ids, ends, random(seed)).tolist()) for seed in range(3000))
    parts = ([1, 2, 8], [3, 9], [4, 5])
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert set(drawn) == {tuple(token for part in order for token in parts[part]) for order in orders}
    assert all(400 < count < 600 for count in drawn.values())


def test_spans_are_poisson_and_hide_what_they_should() -> None:
    lengths = [span_lengths(300, 3.0, random(seed)) for seed in range(200)]
    assert {int(drawn.sum()) for drawn in lengths} == {300}
    whole = np.concatenate([drawn[:-1] for drawn in lengths])
    assert abs(whole.mean() - 3.0) < 0.1 and abs((whole == 0).mean() - np.exp(-3.0)) < 0.01
    assert span_lengths(0, 3.0, random(0)).tolist() == []
    assert span_lengths(3, 0.001, random(0)).tolist() == [0, 0, 3]  # at most three spans


def test_masks_stand_for_spans_by_hand() -> None:
    ids = np.array([1, 2, 3, 4])
    one = Counter(tuple(infilled(ids, np.array([2]), 9, random(seed)).tolist()) for seed in range(3000))
    assert set(one) == {(9, 3, 4), (1, 9, 4), (1, 2, 9)} and min(one.values()) > 900
    two = {tuple(infilled(ids, np.array([1, 1]), 9, random(seed)).tolist()) for seed in range(200)}
    assert two == {(9, 2, 9, 4), (9, 2, 3, 9), (1, 9, 3, 9)}  # spans do not touch
    none = {tuple(infilled(ids, np.array([0]), 9, random(seed)).tolist()) for seed in range(200)}
    assert none == {(*ids[:at].tolist(), 9, *ids[at:].tolist()) for at in range(5)}
    assert infilled(ids, np.array([1, 1, 1]), 9, random(0)).tolist().count(9) == 1  # no room: joined


@pytest.mark.parametrize("permute", [True, False])
def test_targets_are_the_text_and_inputs_what_is_left(permute: bool) -> None:
    goal = objective("denoising", permute_sentences=permute)
    text = TOKENIZER("One. Two three? Four five six!\nSeven eight, nine.", add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": np.array(text), "example_id": number, "epoch": 0} for number in range(64)]
    batch = goal.collator(TOKENIZER, seed=3)(rows)
    assert all(labels == [*text, EOS] for labels in batch["labels"].tolist())
    hidden = round(len(text) * 0.3)
    for inputs, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        left = [token for token, real in zip(inputs, mask, strict=True) if real]
        assert left[-1] == EOS and len(left) <= len(text) + 1
        stays = [token for token in left[:-1] if token != MASK]
        assert len(stays) == len(text) - hidden and not Counter(stays) - Counter(text)
        if not permute:
            rest = iter(text)
            assert all(token in rest for token in stays)  # in order
    again = goal.collator(TOKENIZER, seed=3)(rows[:1])["input_ids"][0].tolist()
    assert again == batch["input_ids"][0].tolist()[: len(again)]


def test_what_does_not_fit_is_refused() -> None:
    for fields, said in (({"rate": 1.0}, "rate must be 0 or more"), ({"mean_span": 0.0}, "mean_span must be above 0")):
        with pytest.raises(ValueError, match=said):
            objective("denoising", **fields)
    goal = objective("denoising")
    assert goal.raw_length(128) == 127
    with pytest.raises(ValueError, match="length must be 3 or more"):
        goal.raw_length(2)
    plain = build_tokenizer("byte")
    plain.mask_token = None
    with pytest.raises(ValueError, match=r"needs tokenizer\.mask_token"):
        goal.check_tokenizer(plain)
    with pytest.raises(ValueError, match="needs 2 tokens or more, got 1"):
        goal.collator(TOKENIZER)([{"input_ids": np.array([5]), "example_id": 0}])
