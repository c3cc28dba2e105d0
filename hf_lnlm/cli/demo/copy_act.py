"""The demo's first act on the screen and on disk: `copy_task` with a moving table, its result kept for a resume."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...flows.console import live_table
from ...flows.output import say
from .report import Claim

RESULT_FILE = "copy.json"
PICTURES = ("copy-ntm.png", "copy-dnc.png")


@dataclass
class CopyAct:
    """What came of the first act.

    Attributes:
        table: header and rows; empty if the act was left out.
        claims: what was tested.
        pictures: files in the demo's folder.
    """

    table: list[list[str]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it down, whole or not at all."""
        draft = folder / f".{RESULT_FILE}"
        draft.write_text(json.dumps(asdict(self)))
        os.replace(draft, folder / RESULT_FILE)

    @classmethod
    def load(cls, folder: Path) -> CopyAct | None:
        """Read what `save` wrote; None if the act was not finished."""
        path = folder / RESULT_FILE
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        return cls(found["table"], [Claim(**claim) for claim in found["claims"]], found["pictures"])


def copy_act(folder: Path, seconds: float | None, seed: int, wait: Callable[[str], None] | None = None) -> CopyAct:
    """Run the first act, or read the result of the run that is being resumed.

    Args:
        folder: the demo's.
        seconds: CPU seconds of training of each model; 0 leaves the act out, None is the default.
        seed: of weights and rows.
        wait: see `copy_race`.
    """
    if seconds == 0:
        return CopyAct()
    earlier = CopyAct.load(folder)
    if earlier is not None:
        return earlier
    from .copy_task import HEADER, SECONDS, copy_claims, copy_race, copy_table, draw_copy

    with moving_table(HEADER, copy_table) as show:
        rows = copy_race(SECONDS if seconds is None else seconds, seed, show, wait)
    drawn = [name for row, name in zip(rows, PICTURES, strict=False) if draw_copy(row, folder / name)]
    act = CopyAct([HEADER, *copy_table(rows)], copy_claims(rows), drawn)
    act.save(folder)
    return act


@contextmanager
def moving_table(
    header: list[str], cells: Callable[[Sequence[Any]], list[list[str]]]
) -> Iterator[Callable[[Sequence[Any]], None]]:
    """A table that redraws itself on a terminal; elsewhere one plain line a model and tenth of its time.

    Args:
        header: names of the columns.
        cells: makes the table's rows of what is being trained.
    """
    if not sys.stdout.isatty():
        shown: dict[str, list[str]] = {}

        def lines(rows: Sequence[Any]) -> None:
            for row in cells(rows):
                if row != shown.get(row[0]) and float(row[2]) > 0:
                    say(f"{row[0]}, {row[2]} CPU s, wrong bits: {'; '.join(row[3:])}")
                shown[row[0]] = row

        yield lines
        return
    with live_table("Learning to copy", header) as update:
        yield lambda rows: update(cells(rows))
