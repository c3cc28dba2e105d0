"""Preference data made of Python's own standard library, and rewards that are computed from a completion alone.

A prompt is the head of a function; the better answer is the first line of its docstring, the worse one the first line of
another function's with its words shuffled. Everything is a function of the rows, so two runs see the same data.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import Any

from .cells import text_cell
from .stdlib_tasks import summary_rows

LETTERS = frozenset(string.ascii_lowercase + " ")
WORDS_OF_AN_ANSWER = 12


def preference_rows() -> Iterator[dict[str, Any]]:
    """Rows `prompt`, `chosen`, `rejected`, `path`."""
    rows = list(summary_rows())
    for number, row in enumerate(rows):
        other = rows[(number * 7 + len(rows) // 2) % len(rows)]["target"].split()
        random.Random(number).shuffle(other)
        head = row["source"].split("\n", 1)[0]
        wrong = " ".join(other)
        if wrong and wrong != row["target"]:
            yield {"prompt": f"{head}\n# ", "chosen": row["target"], "rejected": wrong, "path": row["path"]}


def conversation_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose `prompt`, `chosen`, `rejected` and `completion` are texts, or lists of messages as TRL takes them.

    Raises:
        ValueError: one of them is something else; names it.
    """
    for column in row.keys() & {"prompt", "chosen", "rejected", "completion"}:
        messages = row[column] if isinstance(row[column], list) else []
        try:
            for text in [item.get("content") for item in messages if isinstance(item, dict)] or [row[column]]:
                text_cell(text)
        except ValueError as error:
            raise ValueError(f"column {column!r} {error}") from None
    return row


def letters(completions: list[str], **_: Any) -> list[float]:
    """Share of lower-case letters and spaces in each completion; 0 for an empty one."""
    return [sum(char in LETTERS for char in text) / max(len(text), 1) for text in completions]


def brevity(completions: list[str], **_: Any) -> list[float]:
    """1 for an answer of at most twelve words, falling towards 0 with its length; 0 for an empty one."""
    return [min(1.0, WORDS_OF_AN_ANSWER / len(text.split())) if text.split() else 0.0 for text in completions]


REWARDS: dict[str, Callable[..., list[float]]] = {"letters": letters, "brevity": brevity}
"""Name → a reward that needs no model."""
