"""`hf-lnlm evaluate`: checkpoints measured one after the other, as JSON and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..flows.console import print_json, table
from ..flows.evaluate import evaluate as measured
from ..flows.evaluate import write_json
from ..flows.output import plain_when_piped


def evaluate(checkpoints: list[str], output: str | None, report: str | None, json: bool, **options: Any) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    results = []
    for checkpoint in checkpoints:
        folder = _report_folder(report, checkpoint, checkpoints)
        results.append(measured(checkpoint, report=folder, save=output is None, **options).result)
    if output is not None:
        write_json(Path(output), results)
    if json:
        print_json(results)
    else:
        _print_table(results)
    return 0


def _report_folder(report: str | None, checkpoint: str, checkpoints: list[str]) -> Path | None:
    """Where the report of a checkpoint goes: one of several gets a folder of its own."""
    if report is None:
        return None
    if len(checkpoints) == 1:
        return Path(report)
    names = [Path(item).name for item in checkpoints]
    if len(set(names)) < len(names):
        names = [Path(item).as_posix().strip("/.").replace("/", "_") for item in checkpoints]
    return Path(report) / names[checkpoints.index(checkpoint)]


def _print_table(results: list[dict[str, Any]]) -> None:
    names = sorted({name for result in results for name in result["metrics"]})
    rows = [
        [result["checkpoint"], result["task"], result["data"]]
        + [f"{result['metrics'][name]:.5g}" if name in result["metrics"] else "" for name in names]
        for result in results
    ]
    table("Evaluation", ["checkpoint", "task", "data", *(name.replace("_", " ") for name in names)], rows)
