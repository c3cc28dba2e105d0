"""Files → rows: text, JSON Lines, CSV, Parquet and FASTA, each also gzipped, with errors that name file and place."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READER_VERSION = 1
"""Part of the cache key: raise it when the rows of a file change."""

FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".fasta", ".fa", ".faa"), "fasta"),
    ".parquet": "parquet",
}
"""Ending of a file → reader; any other ending is text."""

LARGEST_FILE = 2**30
"""Bytes of the largest file that is read as a whole (everything but Parquet)."""
LARGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class FileOptions:
    """How files are read.

    Args:
        encoding: Encoding of text files.
        errors: What invalid bytes do: `strict` stops, `replace` and `ignore` go on.
        unit: What one document of a text file is: `file` or `line`.
        column: The one column wanted, which becomes `text`; None keeps all columns.
    """

    encoding: str = "utf-8"
    errors: str = "strict"
    unit: str = "file"
    column: str | None = None

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


def read_files(paths: Sequence[str], options: FileOptions) -> Iterator[dict[str, Any]]:
    """Rows of all files, in order.

    Raises:
        ValueError: A file isn't what its ending says, or none of them holds anything; names the file, the place and
            what to do.
    """
    empty = True
    for name in paths:
        path = Path(name)
        kind = FORMATS.get(Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower(), "text")
        for number, row in enumerate(READERS[kind](path, options), start=1):
            empty = False
            yield row if options.column is None else _one_column(row, options.column, f"{path}, record {number}")
    if empty:
        raise ValueError(f"no text in {', '.join(paths[:3])}{' …' * (len(paths) > 3)}: no text and no record")


def _one_column(row: dict[str, Any], column: str, place: str) -> dict[str, str]:
    """The text of a record."""
    if column not in row:
        columns = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{place}: no column {column!r}; its columns are {columns}: choose one with text_column")
    if not isinstance(row[column], str):
        raise ValueError(f"{place}: column {column!r} must hold text, got {type(row[column]).__name__}")
    return {"text": row[column]}


def _text(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    text = _decoded(path, options)
    if options.unit == "line":
        yield from ({"text": line.rstrip("\r")} for line in text.split("\n") if line.strip())
    elif text.strip():
        yield {"text": text}


def _decoded(path: Path, options: FileOptions) -> str:
    """A file's text, without a byte order mark.

    Raises:
        ValueError: A file too large to be read whole, or bytes that the encoding doesn't know, with their offset.
    """
    raw = _raw(path)
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
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if len(raw) > LARGEST_FILE:
        raise ValueError(f"{path} is larger than {LARGEST_FILE} bytes: split it, or store it as Parquet")
    return raw


def _json(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    text = _decoded(path, options)
    if text.lstrip().startswith("["):
        records: Iterable[tuple[int, Any]] = enumerate(_parsed(text, f"{path}"), start=1)
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        records = ((number, _parsed(line, f"{path}, line {number}")) for number, line in lines)
    for number, row in records:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, record {number}: must be an object with named columns, got {type(row).__name__}")
        yield row


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{place}: not JSON ({error.msg} at {where})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON that can be read ({error})") from None


def _csv(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LARGEST_FIELD)
    separator = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.DictReader(io.StringIO(_decoded(path, options), newline=""), delimiter=separator)
    try:
        for row in reader:
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or [])
                raise ValueError(f"{path}, line {reader.line_num}: a record of {wanted} columns wanted, as in line 1")
            yield dict(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(_raw(path)) if path.suffix == ".gz" else path)
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} isn't a whole Parquet file: {error}") from None


def _fasta(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    """Records `>name` + lines of sequence; sequences in capitals, records without a sequence left out."""
    name: str | None = None
    parts: list[str] = []
    for number, line in enumerate([*_decoded(path, options).split("\n"), ">"], start=1):
        if line.startswith(">"):
            if parts:
                yield {"text": "".join(parts).upper(), "name": name}
            name, parts = line[1:].strip(), []
        elif line.strip() and not line.startswith(";"):
            if name is None:
                raise ValueError(f"{path}, line {number}: a FASTA file starts with a '>' line, got {line[:40]!r}")
            parts.append("".join(line.split()))


READERS = {"text": _text, "json": _json, "csv": _csv, "parquet": _parquet, "fasta": _fasta}
