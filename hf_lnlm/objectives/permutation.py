"""Permutation language modelling: predict some tokens one after the other, in a random order of factorisation.

[1] Yang et al. 2019, "XLNet: Generalized autoregressive pretraining for language understanding", §2.2 (objective), §2.3
    (two streams), §2.4 (memory), §2.6 and appendix A.4 (spans, partial prediction).

Glossary: z a permutation of a row's tokens; *target* a token that is predicted, one in K (`rate` = 1/K, K = 6);
*functional* special tokens; h, g content and query stream. A target may see the tokens that aren't predicted, special
tokens and targets earlier in z, of which h reads the true words; its own word is seen by h only.
Loss: −Σ log p(x_z(t) | x_z(<t)) over targets.

Where this differs from transformers' DataCollatorForPermutationLanguageModeling, each tested by hand:
* inputs keep the true words; there targets are replaced by the mask token, so that a target sees of earlier ones that
  they were predicted, but not what they are (masked language modelling of the targets, not an autoregression);
* `target_mapping` has a row for each target only, `(targets, length)`; there it is the identity, so that all positions
  go through the query stream and the softmax;
* padding is masked by `attention_mask`; there pads are attended;
* a row's number of targets is exactly `rate` of its tokens; there it varies, and short rows get too many;
* spans are 1 to 5 whole words with p(n) ∝ 1/n; there 1 to 5 tokens, all lengths equally likely;
* any length, and no need of a mask token or a pad token in full rows; there odd lengths are refused and a tokenizer
  without a pad token fails;
* the order covers the row (or blocks of `perm_size`, of which none sees a later one); there always two halves, the first
  of which may see what isn't predicted in the second;
* special tokens keep a place in the order; there all see them.

Memory: with `memory=True` rows are contiguous streams, and the content stream of a row is what the next row attends to
besides itself; nothing of it is a target's own word. Deviations from the authors' code: no second segment, no half of the
batch read backwards (`bi_data`), and an n-gram counts words rightly (theirs tests the first piece again and again).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .base import IGNORED, Collator, Direction, Objective, Row
from .families import accepts
from .masked import special_ids, word_groups


class PermutationCollator(Collator):
    """Rows → `input_ids` `(batch, tokens)`, `perm_mask` `(batch, tokens, tokens)`, `target_mapping`
    `(batch, targets, tokens)`, `labels` `(batch, targets)`, and `attention_mask` if rows are padded.
    """

    @cached_property
    def special(self) -> np.ndarray:
        """Ids of the special tokens, `(tokens,)`."""
        return np.array(special_ids(self.tokenizer), np.int64)

    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Ids, targets and who sees whom; refused are rows without a token to predict, or without a `word_ids` needed."""
        ids, mask, extra = self.padded(rows)
        real = np.ones(ids.shape, bool) if mask is None else mask
        drawn = [self._row(row, ids[index], real[index]) for index, row in enumerate(rows)]
        most = max(int(targets.sum()) for targets, _ in drawn)
        labels = np.full((len(rows), most), IGNORED, np.int64)
        mapping = np.zeros((len(rows), most, ids.shape[1]), np.float32)
        for index, (targets, _) in enumerate(drawn):
            places = np.flatnonzero(targets)
            labels[index, : len(places)] = ids[index, places]
            mapping[index, np.arange(len(places)), places] = 1
        hidden = np.stack([hidden for _, hidden in drawn]).astype(np.float32)
        return {"input_ids": ids, "labels": labels, "target_mapping": mapping, "perm_mask": hidden, **extra}

    def _row(self, row: Row, ids: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(targets bool `(tokens,)`, who sees whom not, bool `(tokens, tokens)`) of one padded row."""
        functional = np.isin(ids, self.special) & real
        free = real & ~functional
        if not free.any():
            raise ValueError(f"row {row['example_id']} has nothing to predict: every token is special or padding")
        random = self.random(row, "permutation")
        goal = max(1, round(self.objective.rate * int(free.sum())))
        targets = choose_targets(free, self._starts(row, len(ids)), goal, self.objective, random)
        size = self.objective.perm_size or len(ids)
        blocks = np.arange(len(ids)) // size
        order = np.argsort(np.argsort(blocks + random.random(len(ids))))
        return targets, hidden_from(targets, functional, order, blocks)

    def _starts(self, row: Row, length: int) -> np.ndarray:
        """Which tokens begin a word, bool `(tokens,)`; all if words don't matter."""
        starts = np.ones(length, bool)
        if self.objective.by_words:
            if "word_ids" not in row:
                raise ValueError(
                    f"whole_word=True needs rows with word_ids (words=True when packing), got {sorted(row)}"
                )
            words = np.asarray(row["word_ids"])
            starts[: len(words)] = word_groups(words) == np.arange(len(words))
        return starts


@dataclass(frozen=True)
class PermutationObjective(Objective):
    """Predicts tokens in a random order (XLNet).

    Args:
        rate: Share of tokens predicted, 1/K; between 0 and 1.
        max_gram: Longest span in words.
        whole_word: Spans are of whole words; rows need `word_ids`, which streams don't have. None: yes, without a memory.
        perm_size: Tokens of a block that is permuted by itself; the whole row if None.
        memory: Rows are contiguous streams and the model's memory is carried from batch to batch.
    """

    name: ClassVar[str] = "permutation"
    title: ClassVar[str] = "Permutation language modelling"
    paper: ClassVar[str] = "Yang et al. 2019"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    direction: ClassVar[Direction] = "both"
    batches: ClassVar[type[Collator]] = PermutationCollator

    rate: float = 1 / 6
    max_gram: int = 5
    whole_word: bool | None = None
    perm_size: int | None = None
    memory: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1 (exclusive), got {self.rate}")
        if self.max_gram < 1:
            raise ValueError(f"max_gram must be 1 or more, got {self.max_gram}")
        if self.perm_size is not None and self.perm_size < 2:
            raise ValueError(f"perm_size must be 2 or more, got {self.perm_size}")
        if self.memory and self.whole_word:
            raise ValueError("whole_word must be false with memory=True, got true: streams bring no word numbers")

    @property
    def by_words(self) -> bool:
        """Whether spans are of whole words."""
        return not self.memory if self.whole_word is None else self.whole_word

    @classmethod
    def learns(cls, config: Any) -> bool:
        """A model with two streams: its `forward` takes `perm_mask` and `target_mapping`."""
        return super().learns(config) and accepts(config, cls.auto_class, "perm_mask", "target_mapping")

    def check(self, config: Any, tokenizer: Any) -> None:
        """As for every objective; carrying a memory needs a model that keeps one."""
        super().check(config, tokenizer)
        if self.memory and not getattr(config, "mem_len", None):
            raise ValueError(f"memory=True needs a model with mem_len of 1 or more, got {config.mem_len}")

    def takes_streams(self, model: Any) -> bool:
        """Whether a memory is carried."""
        return self.memory

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Rows of `length` tokens that end in sep and cls, as far as the tokenizer has them."""
        tail = tuple(i for i in (tokenizer.sep_token_id, tokenizer.cls_token_id) if i is not None)
        return {"length": length, "words": self.by_words, "tail": tail}


def choose_targets(
    free: np.ndarray, starts: np.ndarray, goal: int, options: PermutationObjective, random: np.random.Generator
) -> np.ndarray:
    """Choose spans of words with context around them, from left to right, then single tokens up to the goal.

    Args:
        free: Tokens that may be predicted, bool `(tokens,)`.
        starts: Tokens that begin a word, bool `(tokens,)`.
        goal: How many to choose.
        options: `rate` (a span of n words gets n / rate of context) and `max_gram`.
        random: Where the numbers come from.

    Returns:
        bool `(tokens,)`, exactly `goal` of them true, or all free ones if there are fewer.
    """
    pieces = free.sum() / max(1, int((starts & free).sum()))  # tokens of a word: context is counted in tokens
    odds = 1 / np.arange(1, options.max_gram + 1)
    odds /= odds.sum()
    chosen, at, length = np.zeros(len(free), bool), 0, len(free)
    while at < length and (left := goal - int(chosen.sum())) > 0:
        words = min(1 + int(random.choice(len(odds), p=odds)), left)
        context = max(1, round(words * pieces / options.rate))
        before = int(random.integers(context))
        following = np.flatnonzero(starts[at + before :]) + at + before
        if not len(following):
            break
        begin = int(following[0])
        end = int(following[words]) if len(following) > words else length
        end = min(end, begin + left)
        chosen[begin:end] = free[begin:end]
        at = end + context - before
    rest = np.flatnonzero(free & ~chosen)
    chosen[random.permutation(rest)[: max(0, goal - int(chosen.sum()))]] = True
    return chosen


def hidden_from(targets: np.ndarray, functional: np.ndarray, order: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Which tokens each token may not see.

    Args:
        targets: Tokens that are predicted, bool `(tokens,)`.
        functional: Special tokens, bool `(tokens,)`.
        order: Place of each token in the order of factorisation, `(tokens,)`.
        blocks: Block of each token, `(tokens,)`; earlier blocks are seen, later ones aren't.

    Returns:
        bool `(tokens, tokens)`: row i, column j true if i doesn't see j. A target doesn't see itself (the model's content
        stream does nevertheless); what isn't predicted is seen by all and sees no target.
    """
    ordered = targets | functional
    place = np.where(ordered, order, -1)
    own = np.where(targets, place, place + 1)
    hidden = (own[:, None] <= place[None, :]) & ordered[None, :]
    hidden &= blocks[:, None] <= blocks[None, :]
    return hidden | (blocks[:, None] < blocks[None, :])
