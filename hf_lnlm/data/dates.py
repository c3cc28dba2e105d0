"""Dates as people write them and as ISO 8601 does: made rows for a first run of any encoder-decoder, offline.

The target says in another order what stands in the source, and asks for what a month is called and for nothing by heart:
attention learns where to look, and a picture of it shows so.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from random import Random

ROWS = 8000
FIRST, DAYS = date(1900, 1, 1), 73_000
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def date_rows(count: int = ROWS, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows `source`, such as `Thursday, May 5, 1988`, and `target`, `1988-05-05`; the same ones every time.

    Args:
        count: how many.
        seed: of days and ways to write them.
    """
    draw = Random(seed)
    for _ in range(count):
        day = FIRST + timedelta(draw.randrange(DAYS))
        yield {"source": draw.choice(written(day)), "target": day.isoformat()}


def written(day: date) -> list[str]:
    """The ways to write a day.

    >>> written(date(1988, 5, 5))[:3]
    ['May 5, 1988', '5 May 1988', '5.5.1988']
    """
    month, number = _MONTHS[day.month - 1], day.day
    weekday = _WEEKDAYS[day.weekday()]
    return [
        f"{month} {number}, {day.year}",
        f"{number} {month} {day.year}",
        f"{number}.{day.month}.{day.year}",
        f"{number:02}/{day.month:02}/{day.year}",
        f"{weekday}, {month} {number}, {day.year}",
        f"{weekday.lower()} {number} {month[:3].lower()} {day.year}",
        f"{number} of {month}, {day.year}",
    ]
