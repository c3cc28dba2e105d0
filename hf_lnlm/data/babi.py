"""bAbI questions from JSON lines, for classifying answers.

References:
    [1] Weston et al. 2015, Towards AI-Complete Question Answering, arXiv 1502.05698

A line has `context` (the statements so far), `question` and `answer` (words, separated by commas where there are
several). A row reads context, question and a closing mark, and its label is the whole answer, one class for each that
occurs in training.

Complexity: O(tokens).
"""

import gzip
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_babi(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON lines, compressed or not.

    Args:
        path: file name; `.gz` is unpacked.

    Raises:
        ValueError: a line is not JSON, lacks a field or has one that is no text, or there are no lines.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                rows.append({name: line[name] for name in ("context", "question", "answer")})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: needs context, question and answer, got {error!r}") from error
            for name, value in rows[-1].items():
                if not isinstance(value, str):
                    raise ValueError(f"{path}, line {number}: {name} must be a text, got {value!r}")
    if not rows:
        raise ValueError(f"{path}: no questions")
    return rows


def babi_vocabulary(lines: Iterable[dict[str, Any]]) -> BabiVocabulary:
    """Collect words and answers of a training set, in order of the alphabet.

    Args:
        lines: as `read_babi` returns them.
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
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    for i, row in enumerate(rows):
        ids[i, longest - len(row["input_ids"]) :] = torch.tensor(row["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
