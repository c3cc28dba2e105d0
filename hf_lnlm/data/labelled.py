"""Labelled rows for fine-tuning: from files that `readers` knows, `datasets`, or the standard library; kept in memory.

`load_rows` reads and splits; `read_cells` then turns cells into what they mean and keeps bad rows apart, each by its
place. Names of classes that a dataset keeps (`ClassLabel`, in Parquet files too) stand in the rows instead of numbers.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .readers import FileOptions, Place, Record, expand, parquet_features, read_records

Row = dict[str, Any]
STDLIB, DATES = "stdlib", "dates"
SHOWN = 3
"""Bad rows that are shown where they are skipped."""


@dataclass(frozen=True)
class LabelledRows:
    """Training and validation rows, each a dict of the source's columns.

    Attributes:
        train: Training rows.
        validation: Validation rows, or None.
        names: Column → names of its classes in the order of their numbers, where the source keeps them.
        skipped: What was wrong with each bad row that was left out, with its place.
    """

    train: list[Row]
    validation: list[Row] | None = None
    names: Mapping[str, list[str]] = field(default_factory=dict, compare=False)
    skipped: tuple[str, ...] = ()


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
        source: a file or glob that `data.readers` knows, a saved dataset, a name on the Hub, `stdlib`, or rows.
        columns: columns that must be there.
        task: which rows `stdlib` gives; a key of `stdlib_tasks.ROWS`.
        validation: share to set aside, another source, or None for the source's own validation split.
        options: how files are read.
        limit: at most so many rows, training and validation together, spread evenly over the source.
        seed: changes which rows are set aside.

    Raises:
        FileNotFoundError: nothing has that name.
        ValueError: a row is bad or lacks a column (names its place and the columns there are), or there is no row.
    """
    options = options or FileOptions()
    found = _read(source, task, options)
    train, held = _spread(found.train, limit), found.validation
    if isinstance(validation, float):
        train, held = _split(train, validation, seed, source)
    names = found.names
    if validation is not None and not isinstance(validation, float):
        other = _read(validation, task, options)
        held, names = other.train, other.names
    rows = LabelledRows(_named(train, found.names), None if held is None else _named(held, names), found.names)
    return read_cells(rows, lambda row: _with_columns(row, columns), options.skip_bad_rows)


def _spread(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def _split(rows: list[Row], share: float, seed: int, source: Any) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows by hash, duplicates together; few rows still give one of each."""
    places = [_position(row, seed) for row in rows]
    if len(set(places)) < 2:
        raise ValueError(f"{source}: too few rows to set aside a share of {share:g} for validation")
    border = min(max(share, min(places) + 2**-64), max(places))
    sides = [[row for row, place in zip(rows, places) if (place < border) is held] for held in (False, True)]
    return sides[0], sides[1]


def _position(row: Row, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and a row's file, if it has one, else its content."""
    key = row.get("path") or repr(sorted((k, v) for k, v in row.items()))
    digest = hashlib.blake2b(f"{seed}|{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


Outliers = Callable[[Sequence[Row]], Mapping[int, str]]
"""Rows → what is wrong with those that are bad only beside the others, by their index."""


def read_cells(
    rows: LabelledRows, read: Callable[[Row], Row], skip: bool = False, outliers: Outliers = lambda rows: {}
) -> LabelledRows:
    """Rows as `read` gives them.

    Args:
        rows: as loaded.
        read: one row → the same with its cells as what they mean; raises `ValueError` for a bad one.
        skip: leave bad rows out and list them, instead of stopping at the first.
        outliers: finds rows that are bad beside the others.

    Raises:
        ValueError: a row is bad, or none is good; names its place.
    """
    skipped: list[str] = []

    def refuse(row: Row, number: int, fault: str) -> None:
        said = f"{row.place if isinstance(row, Record) else Place('', number)}: {fault}"
        if not skip:
            raise ValueError(said)
        skipped.append(said)

    def good(side: Sequence[Row]) -> Iterator[Row]:
        for number, row in enumerate(side, start=1):
            place = row.place if isinstance(row, Record) else Place("", number)
            if isinstance(row, Record) and row.fault is not None:
                refuse(row, number, row.fault)
                continue
            try:
                yield Record(read(row), place)
            except ValueError as error:
                refuse(row, number, str(error))

    sides = [None if side is None else list(good(side)) for side in (rows.train, rows.validation)]
    together = [row for side in sides for row in side or ()]
    odd = {id(together[index]): fault for index, fault in outliers(together).items()}
    for row in together:
        if id(row) in odd:
            refuse(row, 0, odd[id(row)])
    train, held = (None if side is None else [row for row in side if id(row) not in odd] for side in sides)
    for before, after in ((rows.train, train), (rows.validation, held)):
        if before and not after:
            raise ValueError(f"all {len(before)} rows are bad: {'; '.join(skipped[:SHOWN])}")
    return replace(rows, train=train or [], validation=held, skipped=(*rows.skipped, *skipped))


def _with_columns(row: Row, columns: Iterable[str]) -> Row:
    for column in columns:
        if column not in row:
            raise ValueError(f"no column {column!r}; its columns are {', '.join(map(str, row)) or 'none'}")
    return row


def _read(source: Any, task: str, options: FileOptions) -> LabelledRows:
    """Rows of a source, all in `train` unless it has a validation split of its own.

    Raises:
        ValueError: there is no row.
    """
    if isinstance(source, list) and source and isinstance(source[0], dict):
        return LabelledRows(_placed(source, ""))
    if source == STDLIB:
        from .stdlib_tasks import ROWS

        if task not in ROWS:
            raise ValueError(f"stdlib has rows for {', '.join(ROWS)}, not for {task}: give data with --data")
        return LabelledRows(_placed(ROWS[task](), STDLIB))
    if source == DATES and not Path(DATES).exists():
        from .dates import date_rows

        if task != "text_to_text":
            raise ValueError(f"dates has rows for text_to_text, not for {task}: give data with --data")
        return LabelledRows(_placed(date_rows(), DATES))
    sources = source if isinstance(source, list) else [source]
    path = Path(str(sources[0])).expanduser()
    if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        files = list(itertools.chain.from_iterable(expand(item) for item in sources))
        if files:
            return _rows_of_files([str(file) for file in files], options)
    from .sources import open_source

    train, held = open_source(str(sources[0]), options)
    names = class_names_of(train.features)
    rows = _placed(train, str(sources[0]))
    if not rows:
        raise ValueError(f"no row in {sources[0]}")
    return LabelledRows(rows, None if held is None else _placed(held, f"{sources[0]} (validation)"), names)


def _placed(rows: Iterable[Row], source: str) -> list[Row]:
    """Rows that know their place."""
    return [Record(row, Place(source, number)) for number, row in enumerate(rows, start=1)]


def _rows_of_files(files: list[str], options: FileOptions) -> LabelledRows:
    names: dict[str, list[str]] = {}
    for file in files:
        if ".parquet" in Path(file).suffixes:
            names |= class_names_of(parquet_features(file))
    return LabelledRows(list(read_records(files, options)), None, names)


def class_names_of(features: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Names of classes that a dataset's features keep, by column: of one class a row, or of a list of them."""
    found = {}
    for column, feature in (features or {}).items():
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names:
            found[column] = list(names)
    return found


def _named(rows: list[Row], names: Mapping[str, list[str]]) -> list[Row]:
    """Rows with the names of their classes instead of numbers; a number that has none (−1) stays."""
    for row in rows if names else ():
        for column in names.keys() & row.keys():
            value = row[column]
            many = isinstance(value, list)
            found = [_name(item, names[column]) for item in (value if many else [value])]
            row[column] = found if many else found[0]
    return rows


def _name(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
