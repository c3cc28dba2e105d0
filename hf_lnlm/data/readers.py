"""Files → rows: text, JSON, CSV, TSV, Parquet, FASTA and CoNLL, each also gzipped, with errors that name file and place.

One behaviour for all formats: a row knows its file, its number and, where the format has lines, its line; a column that
is there twice, a record that isn't whole and bytes that the encoding doesn't know are refused, never guessed. Rows of
published corpora (SQuAD, ARC, bAbI's own text …) come as flat rows, see `published`.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .cells import Fault, kind_of, text_cell
from .pieces import BLOCK, LONG, Utf8
from .published import babi_rows, conll_rows, flat_rows, format_of_text

READER_VERSION = 2
"""Part of the cache key: raise it when the rows of a file change."""

FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".fasta", ".fa", ".faa"), "fasta"),
    **dict.fromkeys((".conll", ".conllu", ".conll2003", ".iob", ".iob2", ".bio"), "conll"),
    ".parquet": "parquet",
}
"""Ending of a file → reader; any other ending is text."""

LARGEST_FILE = 2**30
"""Bytes of the largest file that is read as a whole: a text as one document, JSON that isn't one record a line."""
LARGEST_FIELD = 2**31 - 1
FAULT = "what is wrong with the row"
"""Column of plain rows that says so."""
_PROBE = 1 << 14


@dataclass(frozen=True)
class FileOptions:
    """How files are read.

    Args:
        encoding: Encoding of text files.
        errors: What invalid bytes do: `strict` stops, `replace` and `ignore` go on.
        unit: What one document of a text file is: `file` or `line`.
        column: The one column wanted, which becomes `text`; None keeps all columns.
        quoted: Whether fields in quotes may hold separators; None for CSV's custom (yes) and TSV's (no).
        skip_bad_rows: Keeps bad rows apart instead of stopping at the first.
    """

    encoding: str = "utf-8"
    errors: str = "strict"
    unit: str = "file"
    column: str | None = None
    quoted: bool | None = None
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        if self.errors not in ("strict", "replace", "ignore"):
            raise ValueError(f"errors must be strict, replace or ignore, got {self.errors!r}")
        if self.unit not in ("file", "line"):
            raise ValueError(f"unit must be file or line, got {self.unit!r}")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(
                f"encoding must be one that Python knows (utf-8, latin-1, …), got {self.encoding!r}"
            ) from None


class Place(NamedTuple):
    """Where a row stands: its source, its number from 1 and, where the format has lines, its first line from 1."""

    source: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        where = f"row {self.row}" if self.line is None else f"line {self.line} (row {self.row})"
        return f"{self.source}, {where}" if self.source else where


class Record(dict[str, Any]):
    """A row that knows its place; `fault` says what is wrong with it, None if nothing is."""

    __slots__ = ("fault", "place")

    def __init__(self, cells: Any, place: Place, fault: str | None = None) -> None:
        super().__init__(cells)
        self.place, self.fault = place, fault


Read = tuple[int | None, dict[str, Any] | Fault]
"""(line or None, row) as the readers of single files give them."""


def expand(source: Any) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted; empty if there is no such file.

    Raises:
        ValueError: A folder without files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        if not files:
            raise ValueError(f"no text in {source}: the folder has no file")
        return files
    if path.is_file():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_records(paths: Sequence[str], options: FileOptions) -> Iterator[Record]:
    """Rows of all files, in order; with `skip_bad_rows` bad ones too, marked by their `fault`.

    Raises:
        ValueError: A file isn't what its ending says, a row is bad, or there is none; names the file, the place and
            what to do.
    """
    empty = True
    for name in paths:
        path = Path(name)
        for number, (line, row) in enumerate(READERS[_format(path, options)](path, options), start=1):
            empty = False
            place = Place(str(path), number, line)
            record = Record({}, place, row.reason) if isinstance(row, Fault) else Record(row, place)
            if options.column is not None:
                _keep_text(record, options.column)
            if record.fault is not None and not options.skip_bad_rows:
                raise ValueError(f"{place}: {record.fault}")
            yield record
    if empty:
        raise ValueError(f"no text in {', '.join(paths[:3])}{' …' * (len(paths) > 3)}: no text and no record")


def _format(path: Path, options: FileOptions) -> str:
    """The reader of a file: by its ending, and for labelled rows in a text file by what it holds."""
    name = Path(path.stem if path.suffix == ".gz" else path.name)
    kind = FORMATS.get(name.suffix.lower(), "text")
    if options.column is not None:
        return "text" if kind == "conll" else kind
    return format_of_text(_head(path, options)) if kind == "text" else kind


def _head(path: Path, options: FileOptions) -> list[str]:
    """The first lines of a file."""
    found = []
    for line in _lines(path, options):
        found.append(line)
        if len(found) == 100:
            break
    return found


def read_files(paths: Sequence[str], options: FileOptions) -> Iterator[dict[str, Any]]:
    """Plain rows of all files, as `read_records` gives them; with `skip_bad_rows` a column FAULT, `""` for good ones."""
    for record in read_records(paths, options):
        row = {name: str(value) if isinstance(value, Utf8) else value for name, value in record.items()}
        yield row | _fault(record, options)


def read_cells(paths: Sequence[str], options: FileOptions) -> Iterator[dict[str, Any]]:
    """As `read_files`, long texts as Arrow arrays of one value."""
    for record in read_records(paths, options):
        row = {name: value.cell() if isinstance(value, Utf8) else value for name, value in record.items()}
        yield row | _fault(record, options)


def _fault(record: Record, options: FileOptions) -> dict[str, str]:
    """The column FAULT where bad rows are kept apart."""
    return {FAULT: f"{record.place}: {record.fault}" if record.fault else ""} if options.skip_bad_rows else {}


def _keep_text(record: Record, column: str) -> None:
    """Leave a record nothing but its text."""
    text: str | Utf8 = ""
    if record.fault is None and column not in record:
        listed = ", ".join(map(repr, record)) or "none"
        record.fault = f"no column {column!r}; its columns are {listed}: choose one with text_column"
    elif record.fault is None:
        try:
            text = record[column] if isinstance(record[column], Utf8) else text_cell(record[column], empty=True)
        except ValueError as error:
            record.fault = f"column {column!r} {error}"
    record.clear()
    record["text"] = text


def _text(path: Path, options: FileOptions) -> Iterator[Read]:
    if options.unit == "line":
        for number, line in enumerate(_lines(path, options), start=1):
            if line.strip():
                yield number, {"text": line}
    elif options.column is not None and (path.suffix == ".gz" or path.stat().st_size > LONG):
        text = _long(path, options)
        if not (text.blank if isinstance(text, Utf8) else text.isspace() or not text):
            yield 1, {"text": text}
    elif (text := _whole(path, options)).strip():
        yield 1, {"text": text}


def _long(path: Path, options: FileOptions) -> Utf8 | str:
    """A long file's text, decoded block by block; as `_whole` gives it if there is something wrong with it."""
    try:
        return Utf8(_decoded(path, options))
    except (UnicodeError, EOFError, OSError, zlib.error):
        return _whole(path, options)  # says what and where


def _decoded(path: Path, options: FileOptions) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(options.encoding)(options.errors)
    size = 0
    with _opened(path) as raw:
        while block := raw.read(BLOCK):
            if not size:
                _refuse_wide_characters(block[:_PROBE], path, options)
            text = decoder.decode(block)
            yield text if size else text.removeprefix("\ufeff")
            size += len(block)
            _refuse_larger(size, path)
    yield decoder.decode(b"", True)


def _lines(path: Path, options: FileOptions) -> Iterator[str]:
    """Lines of a file without their ends (`\\n`, `\\r\\n`, or `\\r` where there is no other), read as they come."""
    return (line.rstrip("\r\n") for line in _ended_lines(path, options, "\n"))


def _ended_lines(path: Path, options: FileOptions, newline: str) -> Iterator[str]:
    """Lines with their ends, without a byte order mark.

    Args:
        path: The file.
        options: Encoding and what invalid bytes do.
        newline: As `open` takes it; `\\n` becomes `\\r` in a file that has no other line end.

    Raises:
        ValueError: The file can't be read, or its bytes aren't text of that encoding; names the byte's offset.
    """
    try:
        with _opened(path) as raw:
            probe = raw.read(_PROBE)
        _refuse_wide_characters(probe, path, options)
        if newline == "\n" and b"\r" in probe and b"\n" not in probe:
            newline = "\r"
        with _opened(path) as raw:
            text = io.TextIOWrapper(raw, options.encoding, options.errors, newline)
            for number, line in enumerate(text):
                yield line if number else line.removeprefix("\ufeff")
    except UnicodeDecodeError:
        _whole(path, options)  # finds the offset in the file, not in a buffer
        raise
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _refuse_wide_characters(probe: bytes, path: Path, options: FileOptions) -> None:
    """UTF-16 without a mark is valid UTF-8 full of zeros: nobody means that."""
    if probe.count(0) * 4 > len(probe) and "16" not in options.encoding and "32" not in options.encoding:
        marked = probe[:2] in (b"\xff\xfe", b"\xfe\xff")
        likely = "utf-16" if marked else "utf-16-le" if probe[1::2].count(0) > probe[::2].count(0) else "utf-16-be"
        raise ValueError(f"{path} is full of zero bytes: name its encoding (encoding={likely}?)")


def _whole(path: Path, options: FileOptions) -> str:
    """A file's text, without a byte order mark.

    Raises:
        ValueError: A file too large to be read whole, or bytes that the encoding doesn't know, with their offset.
    """
    raw = _raw(path)
    _refuse_wide_characters(raw[:_PROBE], path, options)
    try:
        return raw.decode(options.encoding, options.errors).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        likely = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
        raise ValueError(
            f"{path} isn't valid {options.encoding}: byte 0x{raw[error.start]:02x} at offset {error.start}: name its "
            f"encoding (encoding={likely}?), or read it as it is with errors=replace or errors=ignore"
        ) from None


def _raw(path: Path) -> bytes:
    try:
        with _opened(path) as file:
            raw = file.read(LARGEST_FILE + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    _refuse_larger(len(raw), path)
    return raw


def _refuse_larger(size: int, path: Path) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"{path} is larger than {LARGEST_FILE} bytes: split it, or store it as Parquet")


def _json(path: Path, options: FileOptions) -> Iterator[Read]:
    """One record a line; a list of records; or one object whose `data` is such a list."""
    for number, value in _json_values(path, options):
        if not isinstance(value, (dict, Fault)):
            value = Fault(f"must be an object with named columns, got {kind_of(value)}")
        for row in [value] if isinstance(value, Fault) or options.column else flat_rows(value):
            yield number, row


def _json_values(path: Path, options: FileOptions) -> Iterator[tuple[int, Any]]:
    first = True
    for number, line in enumerate(_lines(path, options), start=1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _elements(_whole(path, options), path)
            return
        value = _parsed(line)
        if first and isinstance(value, Fault) and line.lstrip().startswith("{"):
            whole = _parsed(_whole(path, options))
            if isinstance(whole, dict):
                yield number, whole
                return
        first = False
        yield number, value


def _elements(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, element) of a JSON list.

    Raises:
        ValueError: It isn't one; names line and column.
    """
    at, line, counted = _skip(text, _skip(text, 0) + 1), 1, 0
    try:
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            value, at = _DECODER.raw_decode(text, at)
            yield line, value
            at = _skip(text, at)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if (end := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read ({error})") from None


def _skip(text: str, at: int) -> int:
    """Where the white space that starts there ends."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches nothing too


def _parsed(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return Fault(f"not JSON ({error.msg} at {where})")
    except (ValueError, RecursionError) as error:
        return Fault(f"not JSON that can be read ({error})")


def _unique(pairs: list[tuple[str, Any]]) -> Any:
    """An object, or what is wrong with one that has a column twice: Python would silently keep the last."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Fault(_said_twice(name for name, _ in pairs))


def _said_twice(names: Iterable[str]) -> str:
    twice = [name for name, count in Counter(names).items() if count > 1]
    return f"column {twice[0]!r} is there twice"


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_SPACE = re.compile(r"[ \t\n\r]*")


def _csv(path: Path, options: FileOptions) -> Iterator[Read]:
    tabs = ".tsv" in path.suffixes
    yield from _table(path, options, "\t" if tabs else ",", not tabs if options.quoted is None else options.quoted)


def _table(path: Path, options: FileOptions, separator: str, quoted: bool) -> Iterator[Read]:
    """Records below a line of column names."""
    cells = _quoted_cells if quoted else _plain_cells
    names: list[str] | None = None
    for line, record in cells(path, options, separator):
        if names is None:
            names = record
            if len(set(names)) < len(names):
                raise ValueError(f"{path}, line {line}: {_said_twice(names)}")
        elif len(record) == len(names):
            yield line, dict(zip(names, record))
        else:
            hint = "" if quoted else "; fields in quotes, which may span lines, need data.quoted=true"
            yield line, Fault(f"a record of {len(names)} columns wanted, as in line 1, got {len(record)}{hint}")


def _plain_cells(path: Path, options: FileOptions, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) where a quote is a character like any other and a record is a line."""
    for number, line in enumerate(_lines(path, options), start=1):
        if line:
            yield number, line.split(separator)


def _quoted_cells(path: Path, options: FileOptions, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) where cells may stand in quotes; CSV's may then span lines, those of TSV must not."""
    csv.field_size_limit(LARGEST_FIELD)
    # strict: a quote that closes in the middle of a cell was none, and all up to it would be one cell
    reader = csv.reader(_ended_lines(path, options, ""), delimiter=separator, strict=True)
    line = 1
    try:
        for record in reader:
            if separator == "\t" and reader.line_num > line:
                raise ValueError(
                    f"{path}, line {line}: the record ends in line {reader.line_num}: a quote isn't closed"
                )
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV ({error}); data.quoted=false reads quotes as text") from None


def _parquet(path: Path, options: FileOptions) -> Iterator[Read]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(_raw(path)) if path.suffix == ".gz" else path)
        if len(set(names := file.schema_arrow.names)) < len(names):
            raise ValueError(f"{path}: {_said_twice(names)}")
        wanted = [options.column] if options.column in names else None
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            yield from ((None, row) for row in batch.to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} isn't a whole Parquet file: {error}") from None


def parquet_features(path: str) -> Any:
    """The features that `datasets` wrote into a Parquet file, None if it did not."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        source = pa.BufferReader(_raw(Path(path))) if path.endswith(".gz") else path
        schema = pq.read_schema(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} isn't a whole Parquet file: {error}") from None
    return Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else None


def _fasta(path: Path, options: FileOptions) -> Iterator[Read]:
    """Records `>name` + lines of sequence; sequences in capitals, records without a sequence left out."""
    name: str | None = None
    parts: list[str] = []
    begun = 0
    for number, line in enumerate(itertools.chain(_lines(path, options), [">"]), start=1):
        if line.startswith(">"):
            if parts:
                yield begun, {"text": "".join(parts).upper(), "name": name}
            name, parts, begun = line[1:].strip(), [], number
        elif line.strip() and not line.startswith(";"):
            if name is None:
                raise ValueError(f"{path}, line {number}: a FASTA file starts with a '>' line, got {line[:40]!r}")
            parts.append("".join(line.split()))


def _conll(path: Path, options: FileOptions) -> Iterator[Read]:
    return conll_rows(_lines(path, options))


def _babi(path: Path, options: FileOptions) -> Iterator[Read]:
    return babi_rows(_lines(path, options))


def _snli(path: Path, options: FileOptions) -> Iterator[Read]:
    return _table(path, options, "\t", quoted=False)


READERS: dict[str, Callable[[Path, FileOptions], Iterator[Read]]] = {
    "text": _text,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "fasta": _fasta,
    "conll": _conll,
    "babi": _babi,
    "snli": _snli,
}
