"""What starting costs: `import hf_lnlm` against transformers alone, `hf-lnlm --help` against `import hf_lnlm`.

    python -m tests.benchmarks.startup [--json]

CPU seconds of whole processes, user and system, each contender in a fresh process, in turn.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

from .harness import Row, at_most, run

PROGRAMS = {
    "transformers": "import transformers; transformers.PreTrainedModel",
    "hf_lnlm": "import hf_lnlm",
    "help": "import sys; sys.argv = ['hf-lnlm', '--help']; from hf_lnlm.cli.main import main; main()",
}


def cpu_seconds(code: str) -> float:
    """CPU seconds that a fresh interpreter spends on `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Run every program in turn, once to warm the file cache, then `--rounds` times."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(arguments.rounds + 1):
        for name, code in PROGRAMS.items():
            spent = cpu_seconds(code)
            if turn:
                times[name].append(spent)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return [
        at_most(
            "import hf_lnlm / import transformers.PreTrainedModel",
            middle["hf_lnlm"],
            middle["transformers"],
            1.05,
            None,
        ),
        at_most("hf-lnlm --help / import hf_lnlm", middle["help"], middle["hf_lnlm"], 1.1, None),
    ]


if __name__ == "__main__":
    run(__doc__, measure, ("--rounds", {"type": int, "default": 7, "help": "measured rounds"}))
