"""N-gram masking (ALBERT) and SpanBERT's span lengths: by hand, and their distributions."""

from __future__ import annotations

import numpy as np
import pytest

from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.objectives import objective
from hf_lnlm.objectives.masked import choose_spans, word_groups

TOKENIZER = build_tokenizer("byte")


def test_spans_by_hand() -> None:
    # words: 0 | 1 2 | 3 | 4 5 | 6 | 7, the last one special
    groups = word_groups(np.array([0, 1, 1, 2, 3, 3, 4, -1]))
    free = np.array([1, 1, 1, 1, 1, 1, 1, 0], bool)
    rank = np.array([0.5, 0.1, 0, 0.9, 0.2, 0, 0.3, 0.0])
    lengths = np.array([3, 2, 9, 1, 5, 9, 2, 2])
    chosen, units = choose_spans(groups, free, rank, lengths, budget=5)
    # from word 1: two words, tokens 1 2 3; then word 4: five words, but the budget leaves room for its own two tokens only
    assert chosen.tolist() == [False, True, True, True, True, True, False, False]
    assert units.tolist() == [0, 1, 1, 1, 4, 4, 6, 7]
    chosen, _ = choose_spans(groups, free, rank, lengths, budget=7)
    assert chosen.tolist() == [True] * 7 + [False], "a span stops at what is special or taken"
    chosen, _ = choose_spans(groups, free, rank, lengths, budget=0)
    assert chosen.tolist() == [True] + [False] * 7, "one word at least, the smallest"


def test_lengths_are_those_of_the_papers() -> None:
    assert objective("masked", spans="ngram").span_lengths() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    odds = objective("masked", spans="geometric").span_lengths()
    assert len(odds) == 10 and odds @ np.arange(1, 11) == pytest.approx(3.8, abs=0.01)
    assert odds[1:] / odds[:-1] == pytest.approx([0.8] * 9)


@pytest.mark.parametrize(("spans", "mean"), [("ngram", 1.64), ("geometric", 3.8)])
def test_rate_and_lengths_in_batches(spans: str, mean: float) -> None:
    learnt = objective("masked", spans=spans)
    random = np.random.default_rng(0)
    words = np.repeat(np.arange(400), 1 + random.integers(0, 3, 400))
    rows = [{"input_ids": 7 + words % 200, "word_ids": words, "example_id": index} for index in range(150)]
    batch = learnt.collator(TOKENIZER)(rows)
    chosen = (batch["labels"] != -100).numpy()
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    same = words[1:] == words[:-1]
    assert (chosen[:, 1:] == chosen[:, :-1])[:, same].all(), "a word is chosen whole or not at all"
    begins = chosen.copy()
    begins[:, 1:] &= ~chosen[:, :-1]
    starts = np.concatenate([[True], ~same])
    # spans may touch, so runs are a little longer than spans
    assert mean * 0.95 < (chosen & starts).sum() / begins.sum() < mean * 1.5
    masked = (batch["input_ids"] == TOKENIZER.mask_token_id).numpy()
    assert masked[chosen].mean() == pytest.approx(0.8, abs=0.03)
    inner = chosen[:, 1:] & chosen[:, :-1]
    assert (masked[:, 1:] == masked[:, :-1])[inner].mean() > 0.9, "a span is masked as a whole"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": "words"}, "spans must be one of none, ngram, geometric, got 'words'"),
        ({"max_span": 0}, "max_span must be 1 or more, got 0"),
        ({"span_p": 1.0}, r"span_p must lie between 0 and 1 \(exclusive\), got 1.0"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective("masked", **options)


def test_rows_without_words_are_refused() -> None:
    with pytest.raises(ValueError, match="whole words and spans need rows with word_ids"):
        objective("masked", spans="ngram").collator(TOKENIZER)([{"input_ids": [8, 9, 10], "example_id": 0}])
    assert objective("masked", spans="ngram").packing(TOKENIZER, 16)["words"]
