"""Masked language modelling: predict some tokens from all the others.

[1] Devlin et al. 2019, "BERT: Pre-training of deep bidirectional transformers", §3.1 and appendix A.1.
[2] Liu et al. 2019, "RoBERTa", §4.1 (dynamic masks), §4.2 (full sentences, no next-sentence prediction).
[3] Whole-word masking: README of google-research/bert, 2019.
[4] Lan et al. 2020, "ALBERT: A lite BERT", §3.1 (n-gram masking, equation 1).
[5] Joshi et al. 2020, "SpanBERT: Improving pre-training by representing and predicting spans", §3.1.

A share `rate` of a row's tokens is chosen; of the chosen 80 % are replaced by the mask token, 10 % by a random word and
10 % stay. Special tokens are neither chosen nor used as random words.

Deviations: the number chosen in a row is `rate · tokens` rounded up or down at random so that its mean is exact (BERT
rounds down, at most 20 of 128), and at least one. With whole words the 80/10/10 draw is made once a word, not once a
piece, so that no piece of a word is left that tells its other pieces.

Spans are of whole words, start at random words and don't cross special tokens. Their lengths follow p(n) = (1/n) / Σ 1/k
up to 3 words [4], or a geometric distribution with p = 0.2 up to 10 words, 3.8 on average [5]. They are taken until the
budget is spent; one that would exceed it is shortened. The 80/10/10 draw is made once a span, as in [5] ([4]: a piece).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from .base import IGNORED, Collator, Direction, Objective, Row, require_labels


@dataclass
class MaskedCollator(Collator):
    """Rows → `input_ids` with masks, `labels` `(batch, tokens)` (−100 where nothing is predicted)."""

    def __post_init__(self) -> None:
        known = list(self.tokenizer.get_vocab().values())
        self.special = np.zeros(max(known) + 1, bool)
        self.special[special_ids(self.tokenizer)] = True
        self.words = np.setdiff1d(known, np.flatnonzero(self.special))

    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Ids with masks, and labels; refused are ids beyond the vocabulary, and whole words without `word_ids`."""
        ids, mask, extra = self.padded(rows)
        self._check_ids(ids)
        free = ~self.special[ids] if mask is None else ~self.special[ids] & mask
        inputs, chosen = ids.copy(), np.zeros(ids.shape, bool)
        for index, row in enumerate(rows):
            own = slice(len(row["input_ids"]))
            chosen[index, own], inputs[index, own] = self._mask_row(row, ids[index, own], free[index, own])
        labels = np.where(chosen, ids, IGNORED)
        require_labels(labels, ids.size, "every token is a special token or padding")
        return {"input_ids": inputs, "labels": labels, **extra}

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.min() < 0 or ids.max() >= len(self.special):
            worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ValueError(f"token ids must lie in 0 … {len(self.special) - 1} (the tokenizer's), got {worst}")

    def _mask_row(self, row: Row, ids: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(chosen bool `(tokens,)`, input ids `(tokens,)`) of one row without its padding."""
        options = self.objective
        random = self.random(row, "masked", None if options.dynamic else options.copies)
        rank, action, draws = random.random(len(ids)), random.random(len(ids)), random.random(2)
        words = self.words[random.integers(len(self.words), size=len(ids))]
        groups = self._groups(row, len(ids))
        if options.spans == "none":
            chosen = choose(groups, free, rank, options.rate, draws)
        else:
            odds = options.span_lengths()
            lengths = 1 + random.choice(len(odds), p=odds, size=len(ids))
            chosen, groups = choose_spans(groups, free, rank, lengths, int(options.rate * free.sum() + draws[0]))
        action = action[groups]
        masked = chosen & (action < options.mask_share)
        replaced = chosen & ~masked & (action < options.mask_share + options.random_share)
        return chosen, np.where(masked, self.tokenizer.mask_token_id, np.where(replaced, words, ids))

    def _groups(self, row: Row, length: int) -> np.ndarray:
        """What is chosen together: for each token the first index of its word, or its own index, `(tokens,)`."""
        own = np.arange(length)
        if not self.objective.by_words:
            return own
        if "word_ids" not in row:
            raise ValueError(
                f"whole words and spans need rows with word_ids (words=True when packing), got {sorted(row)}"
            )
        return word_groups(np.asarray(row["word_ids"]))


@dataclass(frozen=True)
class MaskedObjective(Objective):
    """Predicts masked tokens.

    Args:
        rate: Share of tokens chosen, between 0 and 1.
        whole_word: Chooses words with all their pieces; rows need `word_ids`.
        dynamic: New masks every epoch [2]; otherwise `copies` masks are made of each row and reused in turn [1].
        copies: Number of static masks of a row (BERT's `dupe_factor`); used only with `dynamic=False`.
        mask_share: Share of the chosen that the mask token replaces.
        random_share: Share of the chosen that a random word replaces.
        spans: `none`; `ngram`, as ALBERT masks [4]; or `geometric`, as SpanBERT does [5]. Rows need `word_ids`.
        max_span: Longest span in words; 3 for `ngram` and 10 for `geometric` if None.
        span_p: Parameter of the geometric distribution, between 0 and 1.
    """

    name: ClassVar[str] = "masked"
    title: ClassVar[str] = "Masked language modelling"
    paper: ClassVar[str] = "Devlin et al. 2019; Liu et al. 2019"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    direction: ClassVar[Direction] = "both"
    batches: ClassVar[type[Collator]] = MaskedCollator

    rate: float = 0.15
    whole_word: bool = False
    dynamic: bool = True
    copies: int = 10
    mask_share: float = 0.8
    random_share: float = 0.1
    spans: Literal["none", "ngram", "geometric"] = "none"
    max_span: int | None = None
    span_p: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1 (exclusive), got {self.rate}")
        if self.copies < 1:
            raise ValueError(f"copies must be 1 or more, got {self.copies}")
        shares = (self.mask_share, self.random_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"mask_share and random_share must be 0 or more and sum to 1 at most, got {shares}")
        if self.spans not in ("none", "ngram", "geometric"):
            raise ValueError(f"spans must be one of none, ngram, geometric, got {self.spans!r}")
        if self.max_span is not None and self.max_span < 1:
            raise ValueError(f"max_span must be 1 or more, got {self.max_span}")
        if not 0 < self.span_p < 1:
            raise ValueError(f"span_p must lie between 0 and 1 (exclusive), got {self.span_p}")

    def span_lengths(self) -> np.ndarray:
        """Probability of a span of 1, 2, … words, `(longest,)`."""
        longest = self.max_span or (3 if self.spans == "ngram" else 10)
        words = np.arange(1, longest + 1)
        weights = 1 / words if self.spans == "ngram" else (1 - self.span_p) ** (words - 1)
        return weights / weights.sum()

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without a mask token."""
        require_mask_token(self.name, tokenizer)

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of `length` tokens, cls and sep included as far as the tokenizer has them; word numbers if needed."""
        return {"length": length, "words": self.by_words, **framed(tokenizer)}

    @property
    def by_words(self) -> bool:
        """Whether whole words are chosen."""
        return self.whole_word or self.spans != "none"


def require_mask_token(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer without a mask token.

    Raises:
        ValueError: Names the objective.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(f"objective {name!r} needs a mask token and the tokenizer has none: set its mask_token")


def framed(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Options for packing that put cls before and sep behind each row, as far as the tokenizer has them."""
    head, tail = tokenizer.cls_token_id, tokenizer.sep_token_id
    return {"head": () if head is None else (head,), "tail": () if tail is None else (tail,)}


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of all special tokens, named ones and added ones (sentinels) alike."""
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({*tokenizer.all_special_ids, *added})


def word_groups(word_ids: np.ndarray) -> np.ndarray:
    """First index of each token's word `(tokens,)`; a word is a run of one number, −1 stands for itself."""
    own = np.arange(len(word_ids))
    begins = np.ones(len(word_ids), bool)
    begins[1:] = (word_ids[1:] != word_ids[:-1]) | (word_ids[1:] < 0)
    return np.maximum.accumulate(np.where(begins, own, 0))


def choose(groups: np.ndarray, free: np.ndarray, rank: np.ndarray, rate: float, draws: np.ndarray) -> np.ndarray:
    """Choose groups in random order until `rate` of the free tokens is reached.

    The group that crosses the budget is taken with the probability that makes the expected number of chosen tokens
    equal the budget. Where that leaves nothing, the smallest group is taken.

    Args:
        groups: First index of each token's group, `(tokens,)`.
        free: Tokens that may be chosen, bool `(tokens,)`; a group with a token that may not be is left out.
        rank: Random order, `(tokens,)`; a group's rank is that of its first token.
        rate: Share of the free tokens.
        draws: Two uniform numbers: for rounding the budget and for the crossing group.

    Returns:
        Chosen tokens, bool `(tokens,)`.
    """
    sizes = np.bincount(groups, minlength=len(groups))
    usable = (sizes > 0) & (np.bincount(groups, weights=free, minlength=len(groups)) == sizes)
    heads = np.flatnonzero(usable)
    sizes = sizes[heads]
    if not len(heads):
        return np.zeros(len(groups), bool)
    order = np.argsort(rank[heads], kind="stable")
    budget = np.floor(rate * free.sum() + draws[0])
    ends = np.cumsum(sizes[order])
    before = ends - sizes[order]
    taken = (ends <= budget) | ((before < budget) & (draws[1] < (budget - before) / sizes[order]))
    taken[np.argmin(sizes[order])] |= not taken.any()
    flags = np.zeros(len(groups), bool)
    flags[heads[order[taken]]] = True
    return flags[groups]


def choose_spans(
    groups: np.ndarray, free: np.ndarray, rank: np.ndarray, lengths: np.ndarray, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose spans of words, from random words on, until the budget is spent.

    Args:
        groups: First index of each token's word, `(tokens,)`.
        free: Tokens that may be chosen, bool `(tokens,)`; a word with one that may not be ends a span.
        rank: Random order, `(tokens,)`; a word's rank is that of its first token.
        lengths: Words of a span that begins at each token, `(tokens,)`.
        budget: Tokens to choose, at most; if no word is as small as that, the smallest word is chosen.

    Returns:
        Chosen tokens, bool `(tokens,)`, and the first index of each token's span, or of its word, `(tokens,)`.
    """
    sizes = np.bincount(groups, minlength=len(groups))
    usable = (sizes > 0) & (np.bincount(groups, weights=free, minlength=len(groups)) == sizes)
    chosen, units = np.zeros(len(groups), bool), groups.copy()
    heads = np.flatnonzero(usable)
    for head in heads[np.argsort(rank[heads], kind="stable")]:
        end = _end_of_span(head, lengths[head], sizes, usable & ~chosen, budget - int(chosen.sum()))
        chosen[head:end] = True
        units[head:end] = head
    if len(heads) and not chosen.any():
        head = heads[np.argmin(sizes[heads])]
        chosen[head : head + sizes[head]] = True
    return chosen, units


def _end_of_span(head: int, words: int, sizes: np.ndarray, usable: np.ndarray, budget: int) -> int:
    """Where a span of so many words ends, cut short by a word that is taken or doesn't fit the budget."""
    end = head
    for _ in range(words):
        if end >= len(sizes) or not usable[end] or end + sizes[end] - head > budget:
            break
        end += sizes[end]
    return end
