"""Documents → one long stream of token ids, with the UTF-8 bytes and the word that each token covers.

Glossary: *document* a row with a `text`; *stream* all documents' tokens one after the other, each document framed by
the tokenizer's bos and eos; *bytes of a token* the UTF-8 bytes of the text from the end of the token before it to its
own end, so that the bytes of a document's tokens sum to the bytes of the document whatever the tokenizer skips.

Special tokens that are merely written in a document (`"<eos>"` in a source file) are read as text, never as ids.
Long documents are tokenised in pieces of `PIECE` characters, cut where white space starts: a border of every tokenizer
that splits at white space, so the pieces' tokens are the whole's (but for a metaspace prefix at the start of a piece).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .pieces import LONG, PIECE, document_blocks, kept, split_blocks
from .tokenizers import byte_symbols

SLAB = 1 << 18
"""Tokens kept in memory at a time while documents are tokenised."""

FRAMES = ("both", "start", "end", "none")
_SPACES = tuple(bytes([byte]) for byte in b" \t\n\v\f\r")
SPACE_BYTES = np.frombuffer(b"".join(_SPACES), np.uint8)


class Tokens(NamedTuple):
    """Tokens of one document: `ids` int32 `(tokens,)`, `num_bytes` uint32 `(tokens,)`, `words` int32 `(tokens,)`.

    `words` numbers the document's words from 0; −1 is a token outside every word (bos, eos). It is empty
    if not asked for.
    """

    ids: np.ndarray
    num_bytes: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """Turns a text into `Tokens`.

    Args:
        tokenizer: A fast tokenizer (one with a `tokenizers` backend).
        frame: What is put around each document: `both` bos and eos, `start` or `end` one of them (`end` is the
            convention of PTB and WikiText, whose perplexities count no bos), or `none`. BERT's tokenizer, which has
            neither, puts sep behind a document. Where bos and eos are one token (GPT-2's `<|endoftext|>`) `both` puts
            it before the document only, unless `close` is set.
        close: Puts eos behind the document even when it equals bos.
        words: Whether word numbers are computed; otherwise `words` is empty.
    """

    tokenizer: Any
    frame: str = "both"
    close: bool = False
    words: bool = False

    def __post_init__(self) -> None:
        if self.frame not in FRAMES:
            raise ValueError(f"frame must be one of {', '.join(FRAMES)}, got {self.frame!r}")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"packing needs a fast tokenizer (`tokenizers` backend), got {type(self.tokenizer).__name__}"
            )

    @property
    def borders(self) -> tuple[list[int], list[int]]:
        """Ids put before and behind each document."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            eos = self.tokenizer.sep_token_id
        before = [bos] if bos is not None and self.frame in ("both", "start") else []
        behind = [eos] if eos is not None and self.frame in ("both", "end") else []
        return before, [] if before == behind and not self.close else behind

    @property
    def fingerprint(self) -> str:
        """Names everything that the tokens depend on, for the cache of `datasets`."""
        state = f"{self.tokenizer.backend_tokenizer.to_str()}|{self.borders}|{self.words}|{PIECE}|2"
        return hashlib.sha256(state.encode()).hexdigest()[:32]

    @property
    def nothing(self) -> Tokens:
        """No token."""
        return self._border([])

    def columns(self, parts: list[Tokens]) -> dict[str, np.ndarray]:
        """Tokens one after the other, by the names of a row's columns: `words` only where they are wanted."""
        ids, num_bytes, words = _joined(parts)
        return {"input_ids": ids, "num_bytes": num_bytes, **({"words": words} if self.words else {})}

    @cached_property
    def _byte_offset(self) -> int | None:
        return byte_offset(self.tokenizer)

    def encode(self, text: str) -> Tokens:
        """Tokenise one document.

        Raises:
            ValueError: The text is no string, or holds a lone surrogate, which has no UTF-8 form.
        """
        return _joined(list(self.pieces([text])))

    def pieces(self, blocks: Iterable[Any]) -> Iterator[Tokens]:
        """Tokenise one document piece by piece.

        Args:
            blocks: Its text, in any parts.

        Raises:
            ValueError: As in `encode`.
        """
        before, behind = (self._border(ids) for ids in self.borders)
        waiting, owed, begun = [before], 0, False
        for tokens, size in self._encoded(split_blocks(_strings(blocks), PIECE)):
            if begun and len(tokens.ids):
                yield _joined(waiting)
                waiting = []
            begun = begun or len(tokens.ids) > 0
            waiting.append(tokens)
            owed += size - int(tokens.num_bytes.sum())
        last = _joined([*waiting, behind])
        last.num_bytes[-1:] += np.uint32(owed)
        yield last

    def _border(self, ids: list[int]) -> Tokens:
        """What stands before or behind a document: it covers nothing."""
        words = np.full(len(ids), -1, np.int32) if self.words else np.zeros(0, np.int32)
        return Tokens(np.array(ids, np.int32), np.zeros(len(ids), np.uint32), words)

    def _encoded(self, pieces: Iterable[str]) -> Iterator[tuple[Tokens, int]]:
        """(tokens, UTF-8 bytes) of each piece; word numbers go on from piece to piece."""
        read, last_word, within, ended = 0, -1, False, b""
        for piece in pieces:
            raw = _utf8(piece, read)
            if self._byte_offset is None:
                tokens = self._encode_piece(piece)
            else:
                tokens = self._bytes(raw, self._byte_offset)
                # a piece that had to be cut where no white space begins goes on with a word
                within = read > 0 and (raw[:1] not in _SPACES or ended in _SPACES)
            if len(tokens.words):
                words = np.where(tokens.words < 0, -1, tokens.words + last_word + (not within))
                tokens = tokens._replace(words=words.astype(np.int32))
                last_word = max(last_word, int(words.max()))
            read, ended = read + len(piece), raw[-1:]
            yield tokens, len(raw)

    def _bytes(self, text: bytes, offset: int) -> Tokens:
        """The fast path of a byte tokenizer: id = offset + byte."""
        raw = np.frombuffer(text, np.uint8)
        words = _words_from_space(np.isin(raw, SPACE_BYTES)) if self.words else np.zeros(0, np.int32)
        return Tokens(raw.astype(np.int32) + offset, np.ones(len(raw), np.uint32), words)

    def _encode_piece(self, text: str) -> Tokens:
        widths = _char_widths(text)
        batch = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        encoding = batch.encodings[0]
        ids = np.array(encoding.ids, np.int32)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        num_bytes = _covered_bytes(spans, widths)
        words = _word_numbers(encoding.word_ids, spans, text) if self.words else np.zeros(0, np.int32)
        return Tokens(ids, num_bytes, words)


def byte_offset(tokenizer: Any) -> int | None:
    """The id of byte 0 if a tokenizer maps each byte b to id offset + b and does nothing else, or None."""
    vocabulary = tokenizer.get_vocab()
    symbols = byte_symbols()
    first = vocabulary.get(symbols[0])
    if first is None or len(vocabulary) - len(set(tokenizer.all_special_tokens)) != len(symbols):
        return None
    if any(vocabulary.get(symbol) != first + byte for byte, symbol in enumerate(symbols)):
        return None
    probe = " a\tB\u00e9  <eos>\r\n\u4e00 "
    ids = tokenizer(probe, add_special_tokens=False, split_special_tokens=True).input_ids
    return first if ids == [first + byte for byte in probe.encode()] else None


def _strings(blocks: Iterable[Any]) -> Iterator[str]:
    """Blocks as they are, if they are text.

    Raises:
        ValueError: One isn't.
    """
    for block in blocks:
        if not isinstance(block, str):
            raise ValueError(f"a document must be a string, got {type(block).__name__}")
        yield block


def _utf8(text: str, start: int = 0) -> bytes:
    """UTF-8 of a piece that begins at character `start` of its document."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X} at character {start + error.start}, which "
            "has no UTF-8 form: read its file with errors='replace'"
        ) from None


def _char_widths(text: str) -> np.ndarray:
    """UTF-8 bytes of each character, `(characters,)`."""
    if text.isascii():
        return np.ones(len(text), np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return (1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)).astype(np.int64)


def _covered_bytes(spans: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Bytes of each token `(tokens,)` from its character spans `(tokens, 2)`; the last one also gets what follows it."""
    if not len(spans):
        return np.zeros(0, np.uint32)
    total = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(total[spans[:, 1]])
    ends[-1] = total[-1]
    return np.diff(ends, prepend=0).clip(0, np.iinfo(np.uint32).max).astype(np.uint32)


def _word_numbers(word_ids: Sequence[int | None], spans: np.ndarray, text: str) -> np.ndarray:
    """Word of each token, `(tokens,)`: the pre-tokenizer's words, or white space where that makes one word of all."""
    numbers = np.array([-1 if word is None else word for word in word_ids], np.int32)
    if not len(numbers) or numbers.max() > 0 or len(text.split()) < 2:
        return numbers
    space = np.array([character.isspace() for character in text])
    return _words_from_space(space)[spans[:, 0].clip(max=len(text) - 1)]


def _words_from_space(space: np.ndarray) -> np.ndarray:
    """Word of each character `(characters,)`: a word is a run of white space and the run of others behind it."""
    if not len(space):
        return np.zeros(0, np.int32)
    begins = space & ~np.concatenate([[False], space[:-1]])
    return (np.cumsum(begins) - int(begins[0])).astype(np.int32)


def _joined(parts: list[Tokens]) -> Tokens:
    """Tokens one after the other."""
    return Tokens(*(np.concatenate(column) for column in zip(*parts)))


class TokenStream:
    """All documents' tokens as one long array, kept in the Arrow cache of `datasets` (memory-mapped, not in memory).

    Args:
        documents: `datasets.Dataset` with a `text` column.
        encoder: How a document becomes tokens.

    Attributes:
        starts: Where each document begins, `(documents + 1,)`; the last entry is the length of the stream.

    Raises:
        ValueError: There is no document, or one of them is no text; names it by number.
    """

    def __init__(self, documents: Any, encoder: Encoder) -> None:
        if not hasattr(documents, "__len__"):
            raise ValueError(f"these rows need a datasets.Dataset, got {type(documents).__name__}: stream or load it")
        if len(documents) == 0:
            raise ValueError("no text to train on: the source has no document")
        self._table = tokenised(documents, encoder, _slabs)
        self._open()

    def _open(self) -> None:
        columns = flat_columns(self._table)
        self.ids, self.num_bytes, self.words = columns["input_ids"], columns["num_bytes"], columns.get("words")
        self.starts = np.append(columns["starts"].all(), len(self.ids))

    def __getstate__(self) -> dict[str, Any]:
        return {"_table": self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Distance of tokens `start … stop` from the beginning of their document, int64 `(stop − start,)`.

        Args:
            start: First token of the stream.
            stop: Behind the last one.
        """
        index = np.arange(start, stop)
        return index - self.starts[np.searchsorted(self.starts, index, side="right") - 1]


def tokenised(documents: Any, encoder: Encoder, slabs: Any, **options: Any) -> Any:
    """A `datasets.Dataset` of slabs of tokens; of long texts cached under all that its values depend on.

    Args:
        documents: `datasets.Dataset` with a `text` column.
        encoder: How a document becomes tokens.
        slabs: Takes documents, encoder and `options`; yields columns, each an array, whose values make one long column.
        options: More arguments of `slabs`.
    """
    import datasets
    import pyarrow as pa

    arguments = {"documents": documents, "encoder": encoder, **options, "slabs": slabs}
    if documents.data.nbytes < LONG:
        rows = list(_slab_rows(**arguments))
        return datasets.Dataset(pa.table({name: pa.concat_arrays([row[name] for row in rows]) for name in rows[0]}))
    state = (documents._fingerprint, encoder.fingerprint, slabs.__module__, *options.items())
    # as `datasets` itself does: what is made of rows in memory isn't kept for later runs
    folder = None if documents.cache_files else datasets.fingerprint.get_temporary_cache_files_directory()
    return kept(_slab_rows, arguments, "|".join(map(str, state)), "the tokens", cache_dir=folder, writer_batch_size=4)


def _slab_rows(slabs: Any, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Each slab as a row of Arrow lists."""
    import pyarrow as pa

    for slab in slabs(**arguments):
        yield {name: pa.ListArray.from_arrays([0, len(values)], pa.array(values)) for name, values in slab.items()}


def _slabs(documents: Any, encoder: Encoder) -> Iterator[dict[str, np.ndarray]]:
    """Slabs of about `SLAB` tokens: their columns, and `starts`, the tokens at which documents begin in it."""
    parts: list[Tokens] = [encoder.nothing]
    starts: list[int] = []
    read = given = 0
    for number, blocks in enumerate(document_blocks(documents)):
        starts.append(read)
        try:
            for tokens in encoder.pieces(blocks):
                parts.append(tokens)
                read += len(tokens.ids)
                if read - given >= SLAB:
                    yield encoder.columns(parts) | {"starts": np.array(starts, np.int64)}
                    parts, starts, given = [encoder.nothing], [], read
        except ValueError as error:
            raise ValueError(f"document {number}: {error}") from None
    yield encoder.columns(parts) | {"starts": np.array(starts, np.int64)}


class FlatColumn:
    """The values of a list column as one array that is read by slices, chunk by chunk and without a copy in memory."""

    def __init__(self, column: Any) -> None:
        self._values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks if len(chunk)]
        self._borders = np.concatenate([[0], np.cumsum([len(values) for values in self._values])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._borders[-1])

    def all(self) -> np.ndarray:
        """Every value, `(values,)`."""
        return self.slice(0, len(self))

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Values `start … stop`, `(stop − start,)`.

        Args:
            start: First value.
            stop: Behind the last one.
        """
        chunk = int(np.searchsorted(self._borders, start, side="right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(self._borders[chunk + 1]))
            offset = int(self._borders[chunk])
            parts.append(self._values[chunk][start - offset : end - offset])
            start, chunk = end, chunk + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, np.int32)


def flat_columns(table: Any) -> dict[str, FlatColumn]:
    """The columns of what `tokenised` gives, by name."""
    return {name: FlatColumn(table.data.column(name)) for name in table.column_names}
