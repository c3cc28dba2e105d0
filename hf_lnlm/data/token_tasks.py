"""Synthetic tasks on tokens, for any causal language model: what the papers of state space models test memory with.

References:
    [1] Gu and Dao 2023, Mamba, arXiv 2312.00752, sections 4.1.1 (selective copying) and 4.1.2 (induction heads)
    [2] Arora et al. 2023, Zoology, arXiv 2312.04927 (multi-query associative recall)
    [3] Lahoti et al. 2026, Mamba-3, arXiv 2603.15569, table 5 (parity)

A row has `input_ids` and `labels`, both int64 `(tokens,)`; labels are −100 where nothing is asked, and stand where language
models want them: the token before a label's place predicts it.

Complexity: O(length) a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..nn.loss_heads import IGNORED
from .algorithmic import Row, Task

Tokens = torch.Tensor


def asked(ids: Tokens, answers: Tokens) -> Row:
    """Rows that ask for `answers` (−100: nothing) at each position, `(rows, length)` → `(rows, length + 1)`.

    Args:
        ids, answers: `(rows, length)`.
    """
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, 1)),
        "labels": torch.nn.functional.pad(answers, (1, 0), value=IGNORED),
    }


def places(generator: torch.Generator, rows: int, length: int, count: int) -> Tokens:
    """`count` different places below `length` for each row, ascending, `(rows, count)`."""
    return torch.rand(rows, length, generator=generator).argsort(1)[:, :count].sort(1).values


def induction_heads(generator: torch.Generator, rows: int, length: int) -> Row:
    """Noise of 15 tokens; token 15 comes eight times, and what followed it first must follow it always."""
    ids = torch.randint(15, (rows, length), generator=generator)
    special = places(generator, rows, length // 2 - 1, 8) * 2
    followers = ids.gather(1, special[:, :1] + 1)
    ids.scatter_(1, special, 15).scatter_(1, special + 1, followers.expand(-1, 8))
    answers = torch.full_like(ids, IGNORED).scatter_(1, special[:, 1:], followers.expand(-1, 7))
    return asked(ids, answers)


def selective_copying(generator: torch.Generator, rows: int, length: int) -> Row:
    """Eight tokens (1 to 14) among blanks (0); eight marks (15) then ask for them in order."""
    tokens = torch.randint(1, 15, (rows, 8), generator=generator)
    body = torch.zeros(rows, length, dtype=torch.long).scatter_(1, places(generator, rows, length, 8), tokens)
    ids = torch.cat([body, torch.full((rows, 8), 15)], 1)
    return asked(ids, torch.cat([torch.full_like(body, IGNORED), tokens], 1))


def multi_query_recall(generator: torch.Generator, rows: int, length: int) -> Row:
    """Four pairs of key (1 to 31) and value (32 to 63), then every key once among blanks (0), asking for its value."""
    keys = torch.rand(rows, 31, generator=generator).argsort(1)[:, :4] + 1
    values = torch.randint(32, 64, (rows, 4), generator=generator)
    pairs = torch.stack([keys, values], 2).flatten(1)
    where = torch.rand(rows, length - 8, generator=generator).argsort(1)[:, :4]
    rest = torch.zeros(rows, length - 8, dtype=torch.long).scatter_(1, where, keys)
    answers = torch.full_like(rest, IGNORED).scatter_(1, where, values)
    return asked(torch.cat([pairs, rest], 1), torch.cat([torch.full_like(pairs, IGNORED), answers], 1))


def parity(generator: torch.Generator, rows: int, length: int) -> Row:
    """Bits; every position asks for the parity so far.

    >>> row = parity(torch.Generator().manual_seed(0), 1, 4)
    >>> row["input_ids"].tolist(), row["labels"].tolist()
    ([[0, 1, 1, 0, 0]], [[-100, 0, 1, 0, 0]])
    """
    ids = torch.randint(2, (rows, length), generator=generator)
    return asked(ids, ids.cumsum(1) % 2)


@dataclass(frozen=True)
class TokenTask(Task):
    """A task on tokens; size = length of the row before its questions."""

    vocab_size: ClassVar[int]

    def _row(self, generator: torch.Generator, size: int) -> Row:
        row = self.draw(generator, 1, size)
        return {name: value[0] for name, value in row.items()}

    @staticmethod
    def draw(generator: torch.Generator, rows: int, length: int) -> Row:
        """Draw rows of one length.

        Args:
            generator: source of randomness.
            rows: how many.
            length: their size.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class InductionHeads(TokenTask):
    """What followed the special token once must follow it again [1], section 4.1.2: size = length."""

    name: ClassVar[str] = "induction_heads"
    smallest: ClassVar[int] = 18
    vocab_size: ClassVar[int] = 16
    shortest: int = 64
    longest: int = 256
    draw = staticmethod(induction_heads)


@dataclass(frozen=True)
class SelectiveCopying(TokenTask):
    """Eight tokens among blanks, then asked for in order [1], section 4.1.1: size = places of tokens and blanks."""

    name: ClassVar[str] = "selective_copying"
    smallest: ClassVar[int] = 8
    vocab_size: ClassVar[int] = 16
    shortest: int = 64
    longest: int = 64
    draw = staticmethod(selective_copying)


@dataclass(frozen=True)
class MultiQueryRecall(TokenTask):
    """Four pairs of key and value, then each key again, asking for its value [2]: size = length."""

    name: ClassVar[str] = "multi_query_recall"
    smallest: ClassVar[int] = 12
    vocab_size: ClassVar[int] = 64
    shortest: int = 64
    longest: int = 64
    draw = staticmethod(multi_query_recall)


@dataclass(frozen=True)
class Parity(TokenTask):
    """The parity of all bits so far, asked at every place [3], table 5: size = bits."""

    name: ClassVar[str] = "parity"
    vocab_size: ClassVar[int] = 2
    shortest: int = 8
    longest: int = 40
    draw = staticmethod(parity)


TOKEN_TASKS: dict[str, type[TokenTask]] = {
    task.name: task for task in (InductionHeads, SelectiveCopying, MultiQueryRecall, Parity)
}


def wrong_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Wrong answers of each row, `(batch,)`.

    Args:
        logits: `(batch, tokens, vocabulary)`.
        labels: `(batch, tokens)`; −100 is not counted.
    """
    guesses, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((guesses != wanted) & (wanted != IGNORED)).sum(1)
