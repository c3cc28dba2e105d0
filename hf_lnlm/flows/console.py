"""Tables and JSON on standard output: coloured on a terminal, plain text when piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import printable
from ..hub import folder


def print_json(value: Any) -> None:
    """Print `value` as indented, strict JSON."""
    print(json_text(value, indent=2))


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON that standard output can write, whatever its encoding; see `hub.folder.json_text`.

    Args:
        value: plain values.
        indent: spaces a level; None for one line.
    """
    return folder.json_text(value, sys.stdout.encoding or "utf-8", indent=indent)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table.

    Args:
        title: its heading.
        columns: headings of the columns.
        rows: cells; shown as text.
    """
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(title, columns, rows))
        return
    cells = [list(columns), *[[printable(cell) for cell in row] for row in rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: bool = False) -> Any:
    """A table as rich draws it; with `numbers`, all but the first column flush right."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, overflow="fold", justify="right" if numbers and index else "left")
    for row in rows:
        shown.add_row(*[escape(printable(cell)) for cell in row])
    return shown


@contextmanager
def live_table(title: str, columns: Sequence[str]) -> Iterator[Callable[[Sequence[Sequence[object]]], None]]:
    """A table on a terminal that redraws itself whenever what is yielded is given its rows."""
    from rich.live import Live

    with Live(rich_table(title, columns, [], numbers=True), refresh_per_second=4) as live:
        yield lambda rows: live.update(rich_table(title, columns, rows, numbers=True))
