"""bAbI as classification of whole answers: a vocabulary of words and answers, rows, and batches padded on the left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

PAD, UNKNOWN, ASK = 0, 1, 2
_WORDS = re.compile(r"\w+|[.?]")


@dataclass(frozen=True)
class BabiVocabulary:
    """Words and answers of a training set.

    Attributes:
        words: word → id, from 3 on; 0 is padding, 1 an unknown word, 2 the mark that asks for the answer.
        answers: answer → class.
    """

    words: dict[str, int]
    answers: dict[str, int]

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.words) + 3

    def encode(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a line: `input_ids` and `labels`; -100 for an answer that training lacks.

        Args:
            line: `context`, `question`, `answer`.
        """
        words = split_words(f"{line['context']} {line['question']}")
        ids = [self.words.get(word, UNKNOWN) for word in words]
        return {"input_ids": [*ids, ASK], "labels": self.answers.get(line["answer"].lower(), -100)}


def split_words(text: str) -> list[str]:
    """Return the lower-case words and end marks of a text.

    Args:
        text: statements and question.
    """
    return _WORDS.findall(text.lower())


def babi_vocabulary(lines: Iterable[dict[str, Any]]) -> BabiVocabulary:
    """Collect words and answers of a training set, in order of the alphabet.

    Args:
        lines: with `context`, `question` and `answer`.
    """
    words: set[str] = set()
    answers: set[str] = set()
    for line in lines:
        words.update(split_words(f"{line['context']} {line['question']}"))
        answers.add(line["answer"].lower())
    return BabiVocabulary(
        {word: i + 3 for i, word in enumerate(sorted(words))}, {answer: i for i, answer in enumerate(sorted(answers))}
    )


def pad_questions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch, padded on the left, so that all questions end together.

    Args:
        rows: as `BabiVocabulary.encode` returns them.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    for i, row in enumerate(rows):
        ids[i, longest - len(row["input_ids"]) :] = torch.tensor(row["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
