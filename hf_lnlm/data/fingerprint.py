"""What rows and files were, in a few kilobytes: enough to say later whether they are the same, and where they differ.

Rows are hashed one after the other; the hash so far is noted after every row, of long data after every 2nd, 4th … row.
Files are told apart by their size and by samples spread over them, so that large ones cost no more than small ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MOST_MARKS = 4096
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
_DIGITS = 8
_BETWEEN = b"\x1e"
_PIECE = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """What rows were.

    Attributes:
        rows: how many.
        bytes: of all rows one after the other, with one byte between two.
        digest: BLAKE2 of those bytes, hexadecimal.
        every: a mark stands after so many rows each.
        marks: the first 8 digits of the digest so far, one after the other.
    """

    rows: int
    bytes: int
    digest: str
    every: int
    marks: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint that was written as `plain` gives it."""
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """As values for JSON."""
        return asdict(self)

    def mark(self, place: int) -> str:
        """A mark by its number from 0; empty where there is none."""
        return self.marks[_DIGITS * place : _DIGITS * (place + 1)]


@dataclass(frozen=True)
class Comparison:
    """What became of rows.

    Attributes:
        now: their fingerprint.
        same: nothing has changed.
        grew: all that was there still comes first, and more follows it.
        differs: the first and the last number, from 1, of the rows among which the first difference lies; None if `same`.
    """

    now: Fingerprint
    same: bool = True
    grew: bool = False
    differs: tuple[int, int] | None = None


def compare(rows: Iterable[Any], before: Fingerprint | None = None) -> Comparison:
    """Fingerprint of rows, and what became of them since an earlier one was taken.

    Args:
        rows: texts (documents), each whole or in blocks, or rows as mappings.
        before: the earlier fingerprint; None to compare with nothing.
    """
    running, length, count = hashlib.blake2b(digest_size=16), 0, 0
    every, marks = 1, list[str]()
    begins = False
    differs: tuple[int, int] | None = None
    for number, row in enumerate(rows, start=1):
        for piece in _pieces(row, number > 1):
            if before is not None and length < before.bytes <= length + len(piece):
                copy = running.copy()
                copy.update(piece[: before.bytes - length])
                begins = copy.hexdigest() == before.digest
            running.update(piece)
            length += len(piece)
        count = number
        wanted = [number % step == 0 for step in (every, before.every if before else every)]
        mark = running.copy().hexdigest()[:_DIGITS] if any(wanted) else ""
        if wanted[0]:
            marks.append(mark)
        if len(marks) > MOST_MARKS:
            every, marks = 2 * every, marks[1::2]
        if before is not None and differs is None and wanted[1]:
            place = number // before.every - 1
            if before.mark(place) != mark:
                differs = (number - before.every + 1, number)
    now = Fingerprint(count, length, running.hexdigest(), every, "".join(marks))
    if before is None or (count, length, now.digest) == (before.rows, before.bytes, before.digest):
        return Comparison(now)
    last = min(count, before.rows) + 1
    return Comparison(now, False, begins and count >= before.rows, differs or (last - last % before.every or 1, last))


def _pieces(row: Any, follows: bool) -> Iterator[bytes]:
    """A row's bytes in pieces, behind the byte that parts it from the row before."""
    if follows:
        yield _BETWEEN
    if isinstance(row, Mapping):
        row = json.dumps(row, sort_keys=True, default=repr, ensure_ascii=False)
    for block in [row] if isinstance(row, str) else row:
        for start in range(0, len(block), _PIECE):
            yield block[start : start + _PIECE].encode("utf-8", "surrogatepass")


def last_text(texts: Iterable[Any], before: Fingerprint) -> str:
    """The last of the texts that a fingerprint was taken of, from those that now begin with them: it may have grown.

    Args:
        texts: documents, each whole or in blocks.
        before: the earlier fingerprint.
    """
    left, found = before.bytes, list[bytes]()
    for number, text in enumerate(texts, start=1):
        left -= len(_BETWEEN) * (number > 1)
        for piece in _pieces(text, False):
            if number == before.rows:
                found.append(piece[: max(0, left)])
            left -= len(piece)
        if number == before.rows:
            break
    return b"".join(found).decode("utf-8", "surrogatepass")


def file_print(path: Path, size: int | None = None) -> dict[str, Any]:
    """Size of a file and digest of 64 samples of 64 KiB spread over it; smaller files are read whole.

    Args:
        path: the file.
        size: count its first bytes only.
    """
    size = path.stat().st_size if size is None else size
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    whole = size <= SAMPLES * SAMPLE_BYTES
    with path.open("rb") as stream:
        for index in range(1 if whole else SAMPLES):
            stream.seek(0 if whole else index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            found.update(stream.read(size if whole else SAMPLE_BYTES))
    return {"bytes": size, "digest": found.hexdigest()}
