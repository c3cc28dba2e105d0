"""Files → rows: text, JSON Lines, CSV, Parquet and FASTA, each also gzipped, with errors that name file and place."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READER_VERSION = 1
"""Part of the cache key: raise it when the rows of a file change."""

FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".fasta": "fasta", ".fa": "fasta", ".faa": "fasta",
}  # fmt: skip
LARGEST_TEXT = 2**30


@dataclass(frozen=True)
class FileOptions:
    """How text is read.

    Args:
        encoding: Encoding of text files.
        errors: What invalid bytes do: `strict` stops, `replace` and `ignore` go on.
        unit: What one document of a text file is: `file` or `line`.
    """

    encoding: str = "utf-8"
    errors: str = "strict"
    unit: str = "file"

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
            raise ValueError(f"no file in the folder {source}")
        return files
    if path.is_file():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_files(paths: list[str], options: FileOptions) -> Iterator[dict[str, Any]]:
    """Rows of all files, in order.

    Raises:
        ValueError: A file that is empty or isn't what its ending says; names the file, the place and what to do.
    """
    for name in paths:
        path = Path(name)
        kind = FORMATS.get(Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower(), "text")
        empty = True
        for row in READERS[kind](path, options):
            empty = False
            yield row
        if empty:
            raise ValueError(f"no text in {path}: the file has no {'text' if kind == 'text' else 'record'}")


def _text(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    text = _decoded(path, options)
    if options.unit == "line":
        yield from ({"text": line} for line in text.split("\n") if line.strip())
    elif text.strip():
        yield {"text": text}


def _decoded(path: Path, options: FileOptions) -> str:
    """A file's text.

    Raises:
        ValueError: Bytes that the encoding doesn't know, with their offset.
    """
    with _opened(path) as file:
        raw = _read(file, path)
    if len(raw) > LARGEST_TEXT:
        raise ValueError(f"{path} holds {len(raw)} bytes, more than {LARGEST_TEXT} for one document: split the file")
    try:
        return raw.decode(options.encoding, options.errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} isn't valid {options.encoding}: byte 0x{raw[error.start]:02x} at offset {error.start}: "
            "name its encoding (encoding=latin-1, …) or take it as it is with errors=replace"
        ) from None


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _read(file: Any, path: Path) -> bytes:
    try:
        return file.read()
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _json(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_decoded(path, options).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON record ({error.msg} at column {error.colno})"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: a record must be an object with named columns, got {type(row).__name__}"
            )
        yield row


def _csv(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    separator = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.DictReader(io.StringIO(_decoded(path, options), newline=""), delimiter=separator)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num}: {len(reader.fieldnames or [])} columns wanted, got another number"
            )
        yield dict(row)


def _parquet(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} isn't a whole Parquet file: {error}") from None


def _fasta(path: Path, options: FileOptions) -> Iterator[dict[str, Any]]:
    name: str | None = None
    parts: list[str] = []
    for number, line in enumerate(_decoded(path, options).splitlines(), start=1):
        if line.startswith(">"):
            if name is not None:
                yield {"text": "".join(parts).upper(), "name": name}
            name, parts = line[1:].strip(), []
        elif line.strip() and not line.startswith(";"):
            if name is None:
                raise ValueError(f"{path}, line {number}: a FASTA file starts with a '>' line, got {line[:40]!r}")
            parts.append("".join(line.split()))
    if name is not None:
        yield {"text": "".join(parts).upper(), "name": name}


READERS = {"text": _text, "json": _json, "csv": _csv, "parquet": _parquet, "fasta": _fasta}
