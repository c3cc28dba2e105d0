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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .progress import progress_on_terminals
from .tokenizers import byte_symbols

PIECE = 1 << 16
"""Characters of a document tokenised at a time: bounds the memory of one very long line."""

FRAMES = ("both", "start", "end", "none")
SPACE_BYTES = np.frombuffer(b" \t\n\v\f\r", np.uint8)


class Tokens(NamedTuple):
    """Tokens of one document: `ids` int32 `[tokens]`, `num_bytes` uint32 `[tokens]`, `words` int32 `[tokens]`.

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
        state = f"{self.tokenizer.backend_tokenizer.to_str()}|{self.borders}|{self.words}|{PIECE}|1"
        return hashlib.sha256(state.encode()).hexdigest()[:32]

    @cached_property
    def _byte_offset(self) -> int | None:
        return byte_offset(self.tokenizer)

    def encode(self, text: str) -> Tokens:
        """Tokenises one document.

        Raises:
            ValueError: The text is no string, or holds a lone surrogate, which has no UTF-8 form.
        """
        if not isinstance(text, str):
            raise ValueError(f"a document must be a string, got {type(text).__name__}")
        offset = self._byte_offset
        pieces = list(self._pieces(text)) if offset is None else [self._bytes(text, offset)]
        before, behind = self.borders
        ids = np.concatenate([np.array(before, np.int32), *(piece.ids for piece in pieces), np.array(behind, np.int32)])
        width = (len(before), len(behind))
        num_bytes = np.pad(_join([piece.num_bytes for piece in pieces], np.uint32), width)
        if len(num_bytes):
            num_bytes[-1] += len(_utf8(text)) - int(num_bytes.sum())
        words = _join([piece.words for piece in pieces], np.int32)
        words = np.pad(words, width, constant_values=-1) if self.words else words
        return Tokens(ids, num_bytes, words)

    def _bytes(self, text: str, offset: int) -> Tokens:
        """The fast path of a byte tokenizer: id = offset + byte."""
        raw = np.frombuffer(_utf8(text), np.uint8)
        words = _words_from_space(np.isin(raw, SPACE_BYTES)) if self.words else np.zeros(0, np.int32)
        return Tokens(raw.astype(np.int32) + offset, np.ones(len(raw), np.uint32), words)

    def _pieces(self, text: str) -> Iterator[Tokens]:
        """Tokens of each piece of a long text; word numbers go on from piece to piece."""
        first_word = 0
        for piece in split_text(text, PIECE):
            tokens = self._encode_piece(piece)
            if len(tokens.words):
                tokens = tokens._replace(words=np.where(tokens.words < 0, -1, tokens.words + first_word))
                first_word = max(first_word, int(tokens.words.max()) + 1)
            yield tokens

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


def split_text(text: str, size: int) -> Iterator[str]:
    """Cuts a text into pieces of about `size` characters, where white space follows something else if possible."""
    start = 0
    while len(text) - start > size:
        cut = start + size
        while cut > start + size // 2 and not (text[cut].isspace() and not text[cut - 1].isspace()):
            cut -= 1
        cut = cut if cut > start + size // 2 else start + size
        yield text[start:cut]
        start = cut
    yield text[start:]


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}, which has no "
            "UTF-8 form: read its file with errors='replace'"
        ) from None


def _char_widths(text: str) -> np.ndarray:
    """UTF-8 bytes of each character, `[characters]`."""
    if text.isascii():
        return np.ones(len(text), np.int64)
    _utf8(text)
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return (1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)).astype(np.int64)


def _covered_bytes(spans: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Bytes of each token `[tokens]` from its character spans `[tokens, 2]`; the last one also gets what follows it."""
    if not len(spans):
        return np.zeros(0, np.uint32)
    total = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(total[spans[:, 1]])
    ends[-1] = total[-1]
    return np.diff(ends, prepend=0).clip(0, np.iinfo(np.uint32).max).astype(np.uint32)


def _word_numbers(word_ids: Sequence[int | None], spans: np.ndarray, text: str) -> np.ndarray:
    """Word of each token, `[tokens]`: the pre-tokenizer's words, or white space where that makes one word of all."""
    numbers = np.array([-1 if word is None else word for word in word_ids], np.int32)
    if not len(numbers) or numbers.max() > 0 or len(text.split()) < 2:
        return numbers
    space = np.array([character.isspace() for character in text])
    return _words_from_space(space)[spans[:, 0].clip(max=len(text) - 1)]


def _words_from_space(space: np.ndarray) -> np.ndarray:
    """Word of each character `[characters]`: a word is a run of white space and the run of others behind it."""
    if not len(space):
        return np.zeros(0, np.int32)
    begins = space & ~np.concatenate([[False], space[:-1]])
    return (np.cumsum(begins) - int(begins[0])).astype(np.int32)


def _join(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


class TokenStream:
    """All documents' tokens as one long array, kept in the Arrow cache of `datasets` (memory-mapped, not in memory).

    Args:
        documents: `datasets.Dataset` with a `text` column.
        encoder: How a document becomes tokens.

    Attributes:
        starts: Where each document begins, `[documents + 1]`; the last entry is the length of the stream.

    Raises:
        ValueError: There is no document, or one of them is no text; names it by number.
    """

    def __init__(self, documents: Any, encoder: Encoder) -> None:
        if not hasattr(documents, "__len__"):
            raise ValueError(f"these rows need a datasets.Dataset, got {type(documents).__name__}: stream or load it")
        if len(documents) == 0:
            raise ValueError("no text to train on: the source has no document")
        state = f"{documents._fingerprint}|{encoder.fingerprint}"
        with progress_on_terminals():
            self._table = documents.map(
                _encode_batch,
                batched=True,
                with_indices=True,
                batch_size=16,
                writer_batch_size=64,
                remove_columns=documents.column_names,
                features=_features(encoder.words),
                fn_kwargs={"encoder": encoder},
                new_fingerprint=hashlib.sha256(state.encode()).hexdigest()[:16],
                desc="Tokenising",
            )
        self._open()

    def _open(self) -> None:
        columns = {name: self._table.data.column(name) for name in self._table.column_names}
        self.ids, self.num_bytes = _FlatColumn(columns["input_ids"]), _FlatColumn(columns["num_bytes"])
        self.words = _FlatColumn(columns["words"]) if "words" in columns else None
        self.starts = self.ids.starts

    def __getstate__(self) -> dict[str, Any]:
        return {"_table": self._table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Distance of tokens `start … stop` from the beginning of their document, int64 `[stop − start]`."""
        index = np.arange(start, stop)
        return index - self.starts[np.searchsorted(self.starts, index, side="right") - 1]


def _features(words: bool) -> Any:
    from datasets import Features, List, Value

    columns = {"input_ids": List(Value("int32")), "num_bytes": List(Value("uint32"))}
    return Features({**columns, "words": List(Value("int32"))} if words else columns)


def _encode_batch(batch: dict[str, list[str]], indices: list[int], encoder: Encoder) -> dict[str, list[np.ndarray]]:
    tokens = []
    for index, text in zip(indices, batch["text"], strict=True):
        try:
            tokens.append(encoder.encode(text))
        except ValueError as error:
            raise ValueError(f"document {index}: {error}") from None
    columns = {"input_ids": [t.ids for t in tokens], "num_bytes": [t.num_bytes for t in tokens]}
    return {**columns, "words": [t.words for t in tokens]} if encoder.words else columns


class _FlatColumn:
    """The values of a list column as one array that is read by slices, chunk by chunk and without a copy in memory."""

    def __init__(self, column: Any) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
        self._values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        self._borders = np.concatenate([[0], np.cumsum([len(values) for values in self._values])]).astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(np.concatenate([[], *lengths]))]).astype(np.int64)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Values `start … stop`, `[stop − start]`."""
        chunk = int(np.searchsorted(self._borders, start, side="right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(self._borders[chunk + 1]))
            offset = int(self._borders[chunk])
            parts.append(self._values[chunk][start - offset : end - offset])
            start, chunk = end, chunk + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, np.int32)
