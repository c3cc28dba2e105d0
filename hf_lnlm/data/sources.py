"""Where text comes from: files, folders, globs, `datasets` names and saved datasets, and Python's own sources.

`load_documents` gives one row a document, a document being a whole file for text and one record otherwise. Rows come as
a `datasets.Dataset`, cached where `datasets` caches, or as an `IterableDataset` with `streaming=True`. A document goes to
the validation side if the hash of its text (its path, for the standard library) falls below the wanted share: the same
document always lands on the same side, duplicates included, in any order.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..hub.connection import knock
from .cells import text_cell
from .pieces import LONG, blocks_of, digest, document_blocks, halves, kept
from .progress import datasets_at_work
from .readers import FAULT, FORMATS, READER_VERSION, FileOptions, Place, expand, read_cells, read_files

STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
Source = str | Path | Any


@dataclass(frozen=True)
class Documents:
    """Training and validation rows of a source: `datasets.Dataset`, or `IterableDataset` when streaming."""

    train: Any
    validation: Any | None = None
    skipped: tuple[str, ...] = ()
    """What was wrong with each bad row that was left out, with its place."""


def load_documents(
    source: Source,
    *,
    text_column: str = "text",
    validation: float | Source | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    unit: str = "file",
    streaming: bool = False,
    limit: int | None = None,
    seed: int = 0,
    quoted: bool | None = None,
    skip_bad_rows: bool = False,
) -> Documents:
    """Load documents: rows with the one column `text`.

    Args:
        source: `stdlib` (the `.py` files of Python's standard library, one document each, tests left out); a file,
            folder or glob of text, `.jsonl .ndjson .json .csv .tsv .parquet .fasta .fa .faa` (any other ending is
            text; each may end in `.gz`); a folder written by `Dataset.save_to_disk`; a name on the Hub, `name` or
            `name:configuration`; a `datasets` object; or a list of files, folders and globs.
        text_column: Column of a record that holds the text; for FASTA `text` is the sequence.
        validation: Share of the documents to set aside (0 … 1, exclusive), another source, or None: then the source's
            own validation split, if it has one. A single document is cut in two instead.
        encoding: Encoding of text files.
        errors: What to do with bytes that aren't valid: `strict` stops, `replace` and `ignore` go on.
        unit: `file` or `line`: what one document of a text file is. Empty lines are no documents.
        streaming: Reads as it goes instead of caching.
        limit: At most so many training documents.
        seed: Changes which documents are set aside.
        quoted: Whether fields of `.csv` and `.tsv` may stand in quotes; None for CSV yes, TSV no.
        skip_bad_rows: Leaves out rows that hold no text instead of stopping at the first; not with `streaming`.

    Returns:
        The training and, where asked for or there, the validation documents.

    Raises:
        FileNotFoundError: Nothing has that name.
        ValueError: Bad input; the message names the file, the place and the option to use.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}")
    if skip_bad_rows and streaming:
        raise ValueError("skip_bad_rows counts rows before they are used: streaming must be False with it, got True")
    options = FileOptions(encoding, errors, unit, text_column, quoted, skip_bad_rows)
    share = _share(validation)
    train, held = open_source(source, options, streaming)
    if validation is not None:
        held = None if share is not None else open_source(validation, options, streaming)[0]
    skipped: list[str] = []
    train, held = (_good(rows, skipped) for rows in (train, held))
    name = source if isinstance(source, (str, Path)) else "the data"
    if share is not None:
        train, held = _split(train, share, seed, name)
    for rows in (train, held):
        _refuse_empty(rows, name)
    if limit is not None:
        train = train.select(range(min(limit, len(train)))) if hasattr(train, "__len__") else train.take(limit)
    return Documents(_without_path(train), _without_path(held), tuple(skipped))


def _share(validation: Any) -> float | None:
    """The validation share if `validation` is a number."""
    if isinstance(validation, bool) or not isinstance(validation, (int, float)):
        return None
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1 (exclusive) or be a source, got {validation}")
    return float(validation)


def _good(rows: Any, skipped: list[str]) -> Any:
    """Rows without the bad ones, which are added to `skipped`; rows that were read without skipping as they are."""
    if rows is None or FAULT not in (rows.column_names or []):
        return rows
    faults = rows[FAULT]
    skipped.extend(fault for fault in faults if fault)
    return rows.select([index for index, fault in enumerate(faults) if not fault]).remove_columns(FAULT)


def _refuse_empty(rows: Any, source: Source) -> None:
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError(f"no text in {source}: it has no record")


def _without_path(rows: Any) -> Any:
    """The standard library's paths serve for splitting only."""
    return rows.remove_columns(PATH) if rows is not None and PATH in (rows.column_names or []) else rows


def open_source(source: Source, options: FileOptions, streaming: bool = False) -> tuple[Any, Any | None]:
    """(training rows, validation rows or None) of a source; arguments and errors as in `load_documents`.

    Args:
        source: See `load_documents`.
        options: How files are read; `column=None` keeps all columns.
        streaming: Reads as it goes.
    """
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset, dict)):
        return _sides(source, options, "the data")
    if isinstance(source, (list, tuple)):
        return _file_rows([file for item in source for file in _files(item)], options, streaming), None
    if str(source) == "stdlib":
        table = datasets.Dataset.from_list(stdlib_rows())
        return (table.to_iterable_dataset() if streaming else table), None
    path = Path(source).expanduser()
    if ((path / "state.json").exists() and (path / "dataset_info.json").exists()) or (
        path / "dataset_dict.json"
    ).exists():
        return _sides(_saved(path), options, source, streaming)
    if files := expand(source):
        return _file_rows(files, options, streaming), None
    return _sides(_hub_rows(str(source), streaming), options, source)


def _files(source: str | Path) -> list[Path]:
    """The files of one item of a list."""
    if files := expand(source):
        return files
    raise FileNotFoundError(f"no such file, folder or glob: {str(source)!r} (looked in {Path.cwd()})")


def _sides(found: Any, options: FileOptions, source: Source, streaming: bool = False) -> tuple[Any, Any | None]:
    """(training, validation) rows of a `datasets` object."""
    if isinstance(found, dict):
        if not found:
            raise ValueError(f"no text in {source}: the dataset has no split")
        train = "train" if "train" in found else next(iter(found))
        held = next((name for name in VALIDATION_SPLITS if name in found and name != train), None)
        sides = [found[train], None if held is None else found[held]]
    else:
        sides = [found, None]
    if streaming:
        sides = [side.to_iterable_dataset() if hasattr(side, "to_iterable_dataset") else side for side in sides]
    first, second = (None if side is None else _text_only(side, options, source) for side in sides)
    return first, second


def _saved(path: Path) -> Any:
    """A dataset written by `save_to_disk`."""
    import datasets
    import pyarrow as pa

    try:
        return datasets.load_from_disk(str(path))
    except (pa.ArrowInvalid, json.JSONDecodeError, KeyError, OSError) as error:
        raise ValueError(f"{path} isn't a whole saved dataset: {type(error).__name__}: {error}") from None


PATH = "path in the library"
"""Column of `stdlib_rows` with a file's path."""


def stdlib_rows() -> list[dict[str, str]]:
    """Rows `text` and PATH of the standard library's `.py` files, in the order of their relative paths.

    Raises:
        FileNotFoundError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPPED]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            if (text := _source_text(path)).strip():
                rows.append({"text": text, PATH: path.relative_to(root).as_posix()})
    if not rows:
        raise FileNotFoundError(f"this Python has no library sources in {root}: give text files instead of stdlib")
    return sorted(rows, key=lambda row: row[PATH])


def _source_text(path: Path) -> str:
    """A Python file's text, read in the encoding it declares; empty if it has no valid one."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def stdlib_texts() -> Iterator[str]:
    """The texts of Python's standard library, file by file, for building a tokenizer."""
    return (row["text"] for row in stdlib_rows())


def _file_rows(files: list[Path], options: FileOptions, streaming: bool) -> Any:
    """Rows of files; the cache is keyed by the files' names, sizes and times, so a changed file is read again."""
    import datasets

    stamps = [f"{path.resolve()}|{path.stat().st_size}|{path.stat().st_mtime_ns}" for path in files]
    # A tuple, since `datasets` takes a list for shards and reads each by itself.
    arguments = {"paths": tuple(map(str, files)), "options": options}
    if streaming:
        return datasets.IterableDataset.from_generator(read_files, gen_kwargs=arguments)
    key = "\n".join([str(READER_VERSION), repr(options), *stamps])
    rows = 1000 if options.unit == "line" else max(1, min(64, 64 * LONG // max(1, _mean_size(files))))
    return kept(read_cells, arguments, key, f"the records of {files[0]} …", writer_batch_size=rows)


def _mean_size(files: list[Path]) -> int:
    """Bytes of a file, on average."""
    return sum(path.stat().st_size for path in files) // len(files)


def _hub_rows(name: str, streaming: bool) -> Any:
    """A dataset of the Hub, or of the cache of an earlier run."""
    import datasets

    path, _, configuration = name.partition(":")
    if not HUB_NAME.fullmatch(path) or Path(path).suffix.lower() in (*FORMATS, ".gz"):
        raise FileNotFoundError(f"no such file, folder or glob: {name!r} (looked in {Path.cwd()})")
    knock(path)
    try:
        with datasets_at_work():
            return datasets.load_dataset(path, configuration or None, streaming=streaming)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FileNotFoundError(
            f"no file, folder, glob or dataset called {name!r} ({type(error).__name__}: {reason})"
        ) from None


def _text_only(rows: Any, options: FileOptions, source: Source) -> Any:
    """Rows with the one column `text`, perhaps FAULT too; all columns if none is named."""
    column = options.column
    if column is None:
        return rows
    names = list(rows.column_names or next(iter(rows), {}))
    if column not in names:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"{source}: no column {column!r}; its columns are {listed}: choose one with text_column")
    rows = rows.remove_columns([name for name in names if name != column])
    rows = rows if column == "text" else rows.rename_column(column, "text")
    kind = (rows.features or {}).get("text")
    if getattr(kind, "dtype", "string") not in ("string", "large_string", "null"):
        raise ValueError(f"{source}: column {column!r} must hold text, got {kind}")
    marked = partial(_mark, source=str(source), column=column, skip=options.skip_bad_rows)
    if not hasattr(rows, "__len__"):
        return rows.map(marked, with_indices=True)
    if not rows.data.column("text").null_count:
        return rows
    with datasets_at_work():
        return rows.map(marked, with_indices=True)


def _mark(row: dict[str, Any], index: int, source: str, column: str, skip: bool) -> dict[str, Any]:
    """A row whose text is text; with `skip` any row, with what is wrong with it as FAULT."""
    fault = ""
    try:
        text_cell(row["text"], empty=True)
    except ValueError as error:
        fault = f"{Place(source, index + 1)}: column {column!r} {error}"
    if fault and not skip:
        raise ValueError(fault)
    return {"text": "" if fault else row["text"], **({FAULT: fault} if skip else {})}


def _position(blocks: Iterable[str], seed: int) -> float:
    """A number in [0, 1) that depends on a document's text, or on its path, and the seed only."""
    blocks = iter(blocks)
    first = next(blocks, "") or '{"text": ""}'
    return int.from_bytes(digest(f"{seed}|", itertools.chain([first], blocks))) / 2**48


def _is_aside(row: dict[str, Any], share: float, seed: int, wanted: bool) -> bool:
    """Whether a row is set aside, or is not if that is what is wanted."""
    return (_position([row.get(PATH) or row["text"]], seed) < share) == wanted


def _split(rows: Any, share: float, seed: int, source: Source) -> tuple[Any, Any]:
    """(training, validation) rows by hash, one of each at least; a single document is cut in two."""
    if not hasattr(rows, "__len__"):
        sides = (rows.filter(_is_aside, fn_kwargs={"share": share, "seed": seed, "wanted": w}) for w in (False, True))
        train, held = sides
        return train, held
    if len(rows) == 1 and rows.column_names == ["text"]:
        return _cut(rows, share, source)
    if len(rows) == 1:
        raise ValueError(f"{source} has one record: there is nothing to set aside for validation")
    keys = ([path] for path in rows[PATH]) if PATH in rows.column_names else document_blocks(rows)
    positions = np.array([_position(blocks, seed) for blocks in keys])
    aside = positions < max(share, positions.min(initial=1.0) + 2**-48)
    if len(rows) and aside.all():
        aside[positions.argmax()] = False
    train, held = (rows.select(np.flatnonzero(aside == side)) for side in (False, True))
    return train, held


def _cut(rows: Any, share: float, source: Source) -> tuple[Any, Any]:
    """Set aside the end of a single document, from the start of a line if it has more than one."""
    import datasets
    import pyarrow as pa

    cell = rows.with_format("arrow")[0].column("text")[0]
    parts = halves(cell, 1 - share)
    if any(all(block.isspace() or not block for block in blocks_of(part[0])) for part in parts):
        size = len(cell.as_py())
        raise ValueError(f"{source} has too little text ({size} characters) to set {share:.3g} of it aside")
    if len(cell.as_buffer()) <= LONG:
        train, held = (datasets.Dataset(pa.table({"text": part})) for part in parts)
    else:
        key = f"{rows._fingerprint}|{share}|"
        train, held = (kept(_row, {"text": part}, key + str(n), "the text") for n, part in enumerate(parts))
    return train, held


def _row(text: Any) -> Iterator[dict[str, Any]]:
    yield {"text": text}
