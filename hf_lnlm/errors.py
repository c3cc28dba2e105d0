"""The error for a request that is wrong in itself, and what it says of names that are not known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UsageProblem(ValueError):
    """The request itself is wrong (a flag, a recipe key, an output folder in use); the exit status is 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UsageProblem:
    """The error for a name that is not in a table: what it is, what was given, the closest match and all choices."""
    names = list(known)
    return UsageProblem(f"unknown {what} {name!r}{did_you_mean(name, names)}; choose from: {', '.join(names)}")


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` as it may be printed: what would steer a terminal, or can't be encoded, is escaped (`\\x1b`).

    Line feeds and tabs stay. Escaped are the other control characters, those that turn the direction of writing, and
    surrogates.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))
