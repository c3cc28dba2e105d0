"""Hundreds of wrong requests and damaged checkpoints: none ends in a traceback, is accepted, or hangs."""

from __future__ import annotations

import pytest

from .mutations import DAMAGES, figures, outcomes


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the fork, which is the point
def test_nothing_wrong_is_accepted_and_nothing_ends_in_a_traceback(tmp_path, capsys):
    assert len(DAMAGES) >= 12
    found = list(outcomes(300, 200, tmp_path))
    report = figures(found)
    with capsys.disabled():
        print(f"\n{report}")
    assert len(found) == 500
    assert not [outcome.mutation for outcome in found if outcome.faults], report
