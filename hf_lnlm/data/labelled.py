"""Labelled rows for fine-tuning: from JSON Lines, CSV, Parquet, `datasets`, or the standard library; kept in memory."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .readers import FileOptions, expand, read_files

Row = dict[str, Any]
STDLIB = "stdlib"


@dataclass(frozen=True)
class LabelledRows:
    """Training and validation rows, each a dict of the source's columns; `validation` may be None."""

    train: list[Row]
    validation: list[Row] | None = None


class Rows(Dataset[Row]):
    """A list of encoded rows as a map-style dataset."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Keep `rows` as they are."""
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def load_rows(
    source: Any,
    columns: Sequence[str],
    *,
    task: str,
    validation: float | str | None = None,
    options: FileOptions | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LabelledRows:
    """Rows that have all of `columns`.

    Args:
        source: a file or glob that `data.readers` knows, a saved dataset, a name on the Hub, or `stdlib`.
        columns: columns that must be there.
        task: which rows `stdlib` gives; a key of `stdlib_tasks.ROWS`.
        validation: share to set aside, another source, or None for the source's own validation split.
        options: how files are read.
        limit: at most so many rows, training and validation together, spread evenly over the source.
        seed: changes which rows are set aside.

    Raises:
        FileNotFoundError: nothing has that name.
        ValueError: a column is missing (names those there are), or there is no row.
    """
    train, held = _read(source, task, options or FileOptions())
    _require_columns(train, columns, source)
    train = _spread(train, limit)
    if isinstance(validation, float):
        held = [row for row in train if _held_back(row, validation, seed)]
        train = [row for row in train if not _held_back(row, validation, seed)]
        if not held or not train:
            raise ValueError(f"{source}: too few rows to set aside a share of {validation:g} for validation")
    elif validation is not None:
        held = _read(validation, task, options or FileOptions())[0]
    if held is not None:
        _require_columns(held, columns, source if isinstance(validation, float) else validation or source)
    return LabelledRows(train, held)


def _spread(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def _held_back(row: Row, share: float, seed: int) -> bool:
    """Whether a row is set aside: by its file if it has one, else by its content, so duplicates stay together."""
    key = row.get("path") or repr(sorted((k, v) for k, v in row.items()))
    digest = hashlib.blake2b(f"{seed}|{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _read(source: Any, task: str, options: FileOptions) -> tuple[list[Row], list[Row] | None]:
    """(training rows, validation rows or None) of a source."""
    if isinstance(source, list) and source and isinstance(source[0], dict):
        return source, None
    if source == STDLIB:
        from .stdlib_tasks import ROWS

        if task not in ROWS:
            raise ValueError(f"stdlib has rows for {', '.join(ROWS)}, not for {task}: give data with --data")
        return list(ROWS[task]()), None
    sources = source if isinstance(source, list) else [source]
    path = Path(str(sources[0])).expanduser()
    if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        files = list(itertools.chain.from_iterable(expand(item) for item in sources))
        if files:
            return list(read_files([str(file) for file in files], options)), None
    from .sources import open_source

    train, held = open_source(str(sources[0]), options)
    return list(train), None if held is None else list(held)


def _require_columns(rows: list[Row], columns: Iterable[str], source: Any) -> None:
    if not rows:
        raise ValueError(f"no row in {source}")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                there = ", ".join(map(str, row)) or "none"
                raise ValueError(f"{source}, row {number}: no column {column!r}; its columns are {there}")


def label_names(values: Iterable[Any]) -> list[str]:
    """The classes among label values, in order: numbers by value, names by alphabet with `O` (no entity) first.

    Raises:
        ValueError: a value that is no class: null, a fraction, a list.
    """
    found: set[str] = set()
    for value in values:
        if value is None or value == "" or isinstance(value, (float, list, dict)):
            raise ValueError(f"a label must be a name or a whole number, got {value!r}")
        found.add(str(value))
    if all(name.lstrip("-").isdigit() for name in found):
        return sorted(found, key=int)
    return sorted(found, key=lambda name: (name != "O", name))
