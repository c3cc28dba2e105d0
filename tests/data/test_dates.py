"""Made dates: what is written means what is asked for, the same rows every time."""

from __future__ import annotations

from datetime import date, datetime

import pytest

from hf_lnlm.data.dates import date_rows, written
from hf_lnlm.data.labelled import load_rows

FORMATS = ["%B %d, %Y", "%d %B %Y", "%d.%m.%Y", "%d/%m/%Y", "%A, %B %d, %Y", "%A %d %b %Y", "%d of %B, %Y"]


@pytest.mark.parametrize("day", [date(1988, 5, 5), date(2099, 12, 31), date(1900, 1, 1)])
def test_every_way_to_write_a_day_is_that_day(day: date):
    for text, form in zip(written(day), FORMATS, strict=True):
        assert datetime.strptime(text, form).date() == day


def test_rows_are_the_same_every_time_and_a_source_of_that_name():
    rows = list(date_rows(50))
    assert rows == list(date_rows(50)) != list(date_rows(50, seed=1))
    assert len({len(row["target"]) for row in rows}) == 1
    loaded = load_rows("dates", ["source", "target"], task="text_to_text")
    assert [dict(row) for row in loaded.train[:50]] == rows
    with pytest.raises(ValueError, match="dates has rows for text_to_text, not for sequence_classification"):
        load_rows("dates", ["text"], task="sequence_classification")
