"""Long texts in pieces, so that no document need fit into memory: read, hashed, cut and given out block by block.

A *block* is any part of a text as it is read; a *piece* is a part of bounded length that begins where white space
begins, so that what a tokenizer makes of the pieces is what it makes of the whole. A document of a `datasets.Dataset`
lies in a memory-mapped Arrow file: its blocks are decoded from there, one at a time.
"""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .progress import datasets_at_work

PIECE = 1 << 16
"""Characters of a document tokenised at a time: bounds the memory of one very long line."""
BLOCK = 1 << 20
"""Bytes of a long text read at a time."""
LONG = 4 * BLOCK
"""Bytes from which on a text is handled in blocks and what is made of texts is kept on disk."""
_LARGEST_TEXT = 2**31 - 1


class Utf8:
    """A long text as UTF-8 in memory, which takes a quarter of what a `str` may."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self._bytes, self.blank = io.BytesIO(), True
        for block in blocks:
            self.blank = self.blank and (not block or block.isspace())
            self._bytes.write(block.encode())

    def __str__(self) -> str:
        return str(self._bytes.getbuffer(), "utf-8")

    def cell(self) -> Any:
        """A `pyarrow` array of this one text, without a copy.

        Raises:
            ValueError: It is larger than a text in Arrow can be.
        """
        return text_cell_of(self._bytes.getbuffer())


def text_cell_of(raw: Any) -> Any:
    """A `pyarrow` array of one text.

    Args:
        raw: Buffer of its UTF-8.

    Raises:
        ValueError: It is larger than a text in Arrow can be.
    """
    import pyarrow as pa

    size = memoryview(raw).nbytes
    if size > _LARGEST_TEXT:
        raise ValueError(f"a document may have {_LARGEST_TEXT} bytes of UTF-8, got {size}: split it")
    return pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, size], np.int32)), pa.py_buffer(raw))


def split_text(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of about `size` characters, where white space follows something else if possible.

    Args:
        text: Of any length.
        size: Characters of a piece, about.
    """
    return split_blocks([text], size)


def split_blocks(blocks: Iterable[str], size: int) -> Iterator[str]:
    """As `split_text`, of a text that comes in blocks.

    Args:
        blocks: Of any lengths.
        size: Characters of a piece, about.
    """
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > size:
            cut = start + size
            while cut > start + size // 2 and not (text[cut].isspace() and not text[cut - 1].isspace()):
                cut -= 1
            cut = cut if cut > start + size // 2 else start + size
            yield text[start:cut]
            start = cut
        text = text[start:]
    yield text


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in blocks, without their ends, as `str.splitlines` gives them."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).splitlines(keepends=True) or [""]
        yield from (line.splitlines()[0] for line in lines)
    if rest:
        yield rest.splitlines()[0]


def document_blocks(documents: Any) -> Iterator[Iterator[Any]]:
    """The blocks of each document; what is no text comes as it is.

    Args:
        documents: `datasets.Dataset` with a `text` column, or any iterable of rows with a `text`.
    """
    if not hasattr(documents, "data"):
        yield from (iter([row["text"]]) for row in documents)
        return
    size = documents.data.nbytes // max(1, len(documents.data))
    for table in documents.with_format("arrow").iter(max(1, min(1000, LONG // max(1, size)))):
        yield from map(blocks_of, table.column("text"))


def blocks_of(cell: Any) -> Iterator[Any]:
    """The blocks of an Arrow scalar."""
    raw = cell.as_buffer() if hasattr(cell, "as_buffer") else None
    if raw is None or raw.size <= BLOCK:
        yield cell.as_py()
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, raw.size, BLOCK):
        part = raw.slice(start, min(BLOCK, raw.size - start)).to_pybytes()
        yield decoder.decode(part, start + BLOCK >= raw.size)


def digest(start: str, blocks: Iterable[str]) -> bytes:
    """Six bytes that depend on `start` and a text only."""
    found = hashlib.blake2b(start.encode(), digest_size=6)
    for block in blocks:
        found.update(block.encode("utf-8", "surrogatepass"))
    return found.digest()


def halves(cell: Any, share: float) -> list[Any]:
    """A text cut in two at the start of a line, if it has more than one; both as Arrow arrays of one value.

    Args:
        cell: Arrow scalar.
        share: Of the characters that the first part may have.
    """
    import pyarrow as pa

    raw = cell.as_buffer()
    if raw.size > LONG:
        cut = _line_border(raw, share)
        return [text_cell_of(raw.slice(0, cut)), text_cell_of(raw.slice(cut))]
    text = cell.as_py()
    cut = int(len(text) * share)
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return [pa.array([text[:cut]]), pa.array([text[cut:]])]


def _line_border(raw: Any, share: float) -> int:
    """Byte of UTF-8 where the last line begins that begins in the first `share` of the characters, or where they end."""
    values = np.frombuffer(raw, np.uint8)
    counts = [int(_begins(values[at : at + BLOCK]).sum()) for at in range(0, len(values), BLOCK)]
    left, at = int(sum(counts) * share), 0
    for count in counts:
        if left < count:
            break
        left, at = left - count, at + BLOCK
    else:
        return len(values)
    cut = at + int(np.flatnonzero(_begins(values[at : at + BLOCK]))[left])
    for end in range(cut, 0, -BLOCK):
        begin = max(0, end - BLOCK)
        if len(ends := np.flatnonzero(values[begin:end] == ord("\n"))):
            return begin + int(ends[-1]) + 1
    return cut


def _begins(values: np.ndarray) -> np.ndarray:
    """Which bytes of UTF-8 begin a character."""
    return (values & 0xC0) != 0x80


def kept(
    generator: Callable[..., Iterator[dict[str, Any]]], arguments: dict[str, Any], key: str, what: str, **options: Any
) -> Any:
    """A `datasets.Dataset` of what a generator yields, written once into the cache of `datasets` and memory-mapped.

    Args:
        generator: Yields rows whose cells may be `pyarrow` arrays of one value.
        arguments: Of the generator; no lists, which `datasets` takes for shards.
        key: All that the rows depend on.
        what: The rows, in an error's words.
        options: `cache_dir` and `writer_batch_size`, as `Dataset.from_generator` takes them.

    Raises:
        ValueError: The generator's own, or rows that don't fit together.
        OSError: The cache can't be written.
    """
    import datasets

    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        with datasets_at_work():
            return datasets.Dataset.from_generator(generator, gen_kwargs=arguments, fingerprint=name, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise ValueError(f"{what} don't fit together: {error.__cause__ or error}") from None
