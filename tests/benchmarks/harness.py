"""What every benchmark shares: interleaved CPU times, one thread, rows of ratios, a table or JSON.

A benchmark is a program, never a timed test: `python -m tests.benchmarks.<name> [--json]`. A row compares our figure with
the peer's in the sense of its bar: `ratio = peer / ours` where higher is better (how many times faster), `ours / peer`
where lower is better (how much of the peer's time or memory).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass
class Row:
    """One line of a benchmark; `passed` says whether `ratio` keeps the bar."""

    name: str
    ours: float
    peer: float
    ratio: float
    bar: float
    aim: float | None
    higher_is_better: bool
    unit: str

    @property
    def passed(self) -> bool:
        return self.ratio >= self.bar if self.higher_is_better else self.ratio <= self.bar


def cpu_times(contenders: dict[str, Callable[[], object]], rounds: int = 7, calls: int = 1) -> dict[str, float]:
    """Median CPU seconds of a call of each contender, run in turn on one thread, one warm-up round first."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, function in contenders.items():
            gc.collect()
            gc.disable()
            begin = time.process_time()
            for _ in range(calls):
                function()
            spent = (time.process_time() - begin) / calls
            gc.enable()
            if turn:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def faster(
    name: str, times: dict[str, float], bar: float, aim: float | None, ours: str = "ours", peer: str = "peer"
) -> Row:
    """Row for "at least `bar` times as fast as the peer"."""
    return Row(name, times[ours], times[peer], times[peer] / times[ours], bar, aim, True, "CPU seconds")


def at_most(name: str, ours: float, peer: float, bar: float, aim: float | None, unit: str = "CPU seconds") -> Row:
    """Row for "at most `bar` times the peer's time, memory or error"."""
    return Row(name, ours, peer, ours / peer, bar, aim, False, unit)


def below(name: str, value: float, bar: float, aim: float | None = None, unit: str = "relative error") -> Row:
    """Row for an absolute bound: the ratio is the value itself."""
    return Row(name, value, 1.0, value, bar, aim, False, unit)


def forget_peak() -> None:
    """Let the peak begin anew from what is in use (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Largest resident memory of this process in bytes, from Linux' status: `ru_maxrss` begins with the parent's peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024.0 * float(line.split()[1])


def peak_growth(module: str, *arguments: str) -> float:
    """Peak memory growth in bytes that a fresh process `python -m module arguments` reports as its last line."""
    run = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return float(run.stdout.strip().splitlines()[-1])


def run(description: str, measure: Callable[[argparse.Namespace], list[Row]], *options: tuple[str, dict]) -> None:
    """Parse the command line, measure, print a table or JSON; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    for flag, settings in options:
        parser.add_argument(flag, **settings)
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(f"{'':2}{'name':58} {'ours':>11} {'peer':>11} {'ratio':>8} {'bar':>7} {'aim':>7}  unit")
        for row in rows:
            bar = (">=" if row.higher_is_better else "<=") + f"{row.bar:g}"
            aim = "" if row.aim is None else f"{row.aim:g}"
            figures = f"{row.ours:11.5g} {row.peer:11.5g} {row.ratio:8.3g} {bar:>7} {aim:>7}"
            print(f"{' ' if row.passed else '!':2}{row.name:58} {figures}  {row.unit}")
    sys.exit(0 if all(row.passed for row in rows) else 1)
