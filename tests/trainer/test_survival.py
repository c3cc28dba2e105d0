"""Kills, signals, full disks and resumes, in processes of their own."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lnlm.trainer.signals import StopSignal

OBJECTIVES, DATA, WORKERS, ACCUMULATION = ("causal", "masked", "span"), ("map", "stream", "lanes"), (0, 2), (1, 2)
CASES = list(itertools.product(OBJECTIVES, DATA, WORKERS, ACCUMULATION))
# Objectives whose models are made of several or whose rows are pairs: once with each kind of data they take.
CASES += [
    ("replaced_token", "map", 2, 2),
    ("replaced_token", "stream", 0, 1),
    ("permutation", "map", 2, 1),
    ("permutation", "lanes", 0, 2),
    ("sentence_order", "map", 2, 1),
    ("next_sentence", "map", 0, 2),
    ("bidirectional", "stream", 0, 1),
]
# Every value of every choice once with every value of its neighbour, in six of the thirty-six cases.
FEW = [
    ("causal", "lanes", 0, 2),
    ("causal", "stream", 2, 1),
    ("masked", "map", 2, 2),
    ("masked", "stream", 0, 1),
    ("span", "map", 0, 1),
    ("span", "lanes", 2, 2),
    ("replaced_token", "map", 0, 2),
    ("permutation", "lanes", 0, 1),
]


def ask(root: Path, requests: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put requests to one process of tests.trainer.runs."""
    command = [sys.executable, "-m", "tests.trainer.runs", json.dumps(requests)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def resumes(root: Path, cases: list[tuple[str, str, int, int]]) -> None:
    """Check that runs killed in mid-epoch end as if they hadn't been."""
    names = ("objective", "data", "workers", "accumulation")
    answers = ask(root, [("resumes_exactly", {"case": dict(zip(names, case))}) for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert answer["statuses"] == [0, -9, 0], case
        assert answer["digests"][0] is not None, case
        assert answer["digests"][0] == answer["digests"][1], case


def survives(answer: dict[str, Any], kills: int) -> None:
    assert answer["hits"] == kills
    assert answer["damaged"] == 0
    assert answer["lost"] <= 2, "more than one save interval was lost"
    assert answer["statuses"] == [0, 0]
    assert answer["equal"]
    assert answer["leftovers"] == []


def test_runs_killed_in_mid_epoch_resume_bit_identically(repository: Path) -> None:
    resumes(repository, FEW)


@pytest.mark.slow
def test_every_combination_resumes_bit_identically(repository: Path) -> None:
    resumes(repository, CASES)


def test_kills_signals_and_a_full_disk(repository: Path) -> None:
    requests: list[tuple[str, dict[str, Any]]] = [
        ("survives_kills", {"number": 5, "seed": 0}),
        ("fills_the_disk", {}),
        ("stops_on", {"number": 15}),
        ("stops_on", {"number": 2, "while_evaluating": True}),
        ("stops_on", {"number": 2, "workers": 2}),
        ("stops_on", {"number": 1, "workers": 2}),
    ]
    kills, disk, term, evaluating, interrupt, hangup = ask(repository, requests)
    survives(kills, 5)
    assert disk == {"statuses": [3, 0], "left": {"checkpoint-4": None}, "last": None}
    for answer, status in ((term, 143), (evaluating, 130), (interrupt, 130), (hangup, 129)):
        assert answer["statuses"] == [status, 0, 0]
        assert len(answer["left"]) == 1 and answer["equal"]


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(ignored: bool) -> None:
    begun = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        listening = StopSignal()
        listening.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert listening.received == (None if ignored else signal.SIGHUP)
        listening.uninstall()
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, begun)


@pytest.mark.slow
def test_a_hundred_kills_of_whole_runs(repository: Path) -> None:
    """Twelve of each kind: while a run begins, goes on, trains, saves, and ends."""
    command = [sys.executable, "-m", "tests.kills", "--number", "12", "--seed", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=1500)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(answers) == 9, done.stdout + done.stderr
    for answer in answers:
        assert answer["kills"] == 12 and answer["same"] and not answer["faults"] and not answer["left"], answer
