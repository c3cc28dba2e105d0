"""Where text comes from: files, folders, globs, `datasets` names and saved datasets, and Python's own sources.

`load_documents` gives one row a document, a document being a whole file for text and one record otherwise; `load_rows`
gives all columns. Rows come as a `datasets.Dataset`, cached where `datasets` caches, or as an `IterableDataset` with
`streaming=True`. A document goes to the validation side if the hash of its text (its path, for the standard library)
falls below the wanted share: the same document always lands on the same side, duplicates included, in any order.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .readers import READER_VERSION, FileOptions, expand, read_files

STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")
Source = str | Path | Any


@dataclass(frozen=True)
class Documents:
    """Training and validation rows of a source: `datasets.Dataset`, or `IterableDataset` when streaming."""

    train: Any
    validation: Any | None = None


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
) -> Documents:
    """Loads documents: rows with a column `text`.

    Args:
        source: `stdlib` (the `.py` files of Python's standard library, one document each, tests left out); a file,
            folder or glob of text, `.jsonl .ndjson .json .csv .tsv .parquet .fasta .fa .faa` (any other ending is read as
            text; each may end in `.gz`); a folder written by `Dataset.save_to_disk`; a name on the Hub, `name` or
            `name:configuration`; or a `datasets` object.
        text_column: Column of a record that holds the text; for FASTA `text` is the sequence.
        validation: Share of the documents to set aside (0 … 1, exclusive), another source, or None: then the source's
            own validation split, if it has one.
        encoding: Encoding of text files.
        errors: What to do with bytes that aren't valid: `strict` stops, `replace` and `ignore` go on.
        unit: `file` or `line`: what one document of a text file is. Empty lines are no documents.
        streaming: Reads as it goes instead of caching.
        limit: At most so many training documents.
        seed: Changes which documents are set aside.

    Returns:
        The training and, where asked for or there, the validation documents.

    Raises:
        FileNotFoundError: Nothing has that name.
        ValueError: Bad input; the message names the file, the place and the option to use.
    """
    options = FileOptions(encoding=encoding, errors=errors, unit=unit)
    share = _share(validation)
    train, held = _open(source, options, streaming)
    train = _text_only(train, text_column, source)
    if share is not None:
        return _finish(*_split(train, share, seed, streaming, source), limit, source)
    if validation is not None:
        held = _open(validation, options, streaming)[0]
    return _finish(train, None if held is None else _text_only(held, text_column, source), limit, source)


def _share(validation: Any) -> float | None:
    """The validation share if `validation` is a number."""
    if isinstance(validation, bool) or not isinstance(validation, (int, float)):
        return None
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1 (exclusive) or be a source, got {validation}")
    return float(validation)


def _open(source: Source, options: FileOptions, streaming: bool) -> tuple[Any, Any | None]:
    """(training rows, validation rows or None) of a source, with all columns."""
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict)):
        return _sides(source)
    if str(source) == "stdlib":
        rows = _stdlib_rows()
        table = datasets.Dataset.from_list(rows)
        return (table.to_iterable_dataset() if streaming else table), None
    path = Path(source).expanduser()
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _sides(datasets.load_from_disk(str(path)))
    files = expand(source)
    if files:
        return _file_rows(files, options, streaming), None
    return _hub_rows(str(source), streaming)


def _sides(found: Any) -> tuple[Any, Any | None]:
    """(training, validation) of a `datasets` object."""
    if not hasattr(found, "keys"):
        return found, None
    if not found:
        raise ValueError("the saved dataset has no split")
    train = "train" if "train" in found else next(iter(found))
    held = next((name for name in VALIDATION_SPLITS if name in found and name != train), None)
    return found[train], None if held is None else found[held]


def _stdlib_rows() -> list[dict[str, str]]:
    """The standard library's `.py` files, in the order of their relative paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if STDLIB_SKIPPED.isdisjoint(relative.parts[:-1]):
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            if text.strip():
                rows.append({"text": text, "path": relative.as_posix()})
    if not rows:
        raise FileNotFoundError(f"this Python has no library sources in {root}: give text files instead of stdlib")
    return rows


def _file_rows(files: list[Path], options: FileOptions, streaming: bool) -> Any:
    """Rows of files; the cache is keyed by the files' names, sizes and times, so a changed file is read again."""
    import datasets

    stamps = [f"{path}|{path.stat().st_size}|{path.stat().st_mtime_ns}" for path in files]
    arguments = {"paths": [str(path) for path in files], "options": options}
    if streaming:
        return datasets.IterableDataset.from_generator(read_files, gen_kwargs=arguments)
    key = hashlib.sha256("\n".join([str(READER_VERSION), repr(options), *stamps]).encode()).hexdigest()[:32]
    try:
        return datasets.Dataset.from_generator(read_files, gen_kwargs=arguments, fingerprint=key, writer_batch_size=64)
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _hub_rows(name: str, streaming: bool) -> tuple[Any, Any | None]:
    """Rows of a dataset on the Hub, or in the cache of an earlier run."""
    import datasets

    path, _, configuration = name.partition(":")
    try:
        return _sides(datasets.load_dataset(path, configuration or None, streaming=streaming))
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"no file, folder, glob or dataset called {name!r} ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None


def _text_only(rows: Any, column: str, source: Source) -> Any:
    """Rows with the one column `text`."""
    names = rows.column_names
    if names is None:
        names = list(next(iter(rows), {}))
    if column not in names:
        raise ValueError(
            f"{source} has no column {column!r}; its columns are {', '.join(names)}: choose with text_column"
        )
    rows = rows.remove_columns([name for name in names if name not in (column, "path")])
    return rows if column == "text" else rows.rename_column(column, "text")


def _held_back(row: dict[str, Any], share: float, seed: int) -> bool:
    """Whether a row belongs to the validation side."""
    key = row.get("path") or row["text"]
    digest = hashlib.blake2b(f"{seed}|{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _split(rows: Any, share: float, seed: int, streaming: bool, source: Source) -> tuple[Any, Any]:
    """(training, validation) rows by hash; a single document is cut in two at a line."""
    if streaming:
        return rows.filter(lambda row: not _held_back(row, share, seed)), rows.filter(
            lambda row: _held_back(row, share, seed)
        )
    if len(rows) == 1:
        return _cut(rows, share)
    held = [_held_back(row, share, seed) for row in rows]
    if len(rows) and (not any(held) or all(held)):
        raise ValueError(
            f"{source} has too few documents ({len(rows)}) to set aside {share:.3g} of them for validation"
        )
    return (rows.select([i for i, h in enumerate(held) if not h]), rows.select([i for i, h in enumerate(held) if h]))


def _cut(rows: Any, share: float) -> tuple[Any, Any]:
    """Sets aside the end of a single document, from the start of a line if it has more than one."""
    import datasets

    text = rows[0]["text"]
    at = int(len(text) * (1 - share))
    line = text.rfind("\n", 0, at) + 1
    at = line if line else at
    return datasets.Dataset.from_list([{"text": text[:at]}]), datasets.Dataset.from_list([{"text": text[at:]}])


def _finish(train: Any, validation: Any | None, limit: int | None, source: Source) -> Documents:
    """Applies the limit and refuses a source without documents."""
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be 1 or more, got {limit}")
        train = train.take(limit) if not hasattr(train, "__len__") else train.select(range(min(limit, len(train))))
    if hasattr(train, "__len__") and len(train) == 0:
        raise ValueError(f"no text in {source}")
    drop = [
        side.remove_columns("path") if side is not None and "path" in (side.column_names or []) else side
        for side in (train, validation)
    ]
    return Documents(*drop)


def stdlib_texts() -> Iterator[str]:
    """The texts of Python's standard library, file by file, for building a tokenizer."""
    return (row["text"] for row in _stdlib_rows())
