"""What starting costs: imports, commands, usage errors, and the first training step of each family, cold and warm.

    python -m tests.benchmarks.startup [--json] [--rounds N] [--families NAME ...]

CPU seconds of whole processes, user and system, each contender in a fresh process, in turn. First steps are counted from
the end of the imports, at the family's defaults, with an empty cache and with the one that this step has filled; wall
times mean something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile

from .harness import Row, at_most, below, run

_MAIN = "import sys; sys.argv = ['hf-lnlm', {words}]; from hf_lnlm.cli.main import main; main()"
PROGRAMS = {
    "transformers": "import transformers; transformers.PreTrainedModel",
    "hf_lnlm": "import hf_lnlm",
    "help": _MAIN.format(words="'--help'"),
    "list": _MAIN.format(words="'list'"),
    "usage error": _MAIN.format(words="'list', '--jsn'"),
    "recipe error": _MAIN.format(words="'pretrain', 'nowhere.yaml', '--output', 'runs/none'"),
}
COMMANDS = {"help": 0.6, "usage error": 0.6, "list": 6.0, "recipe error": 6.0}  # bars of CPU seconds
FAILING = {"usage error": 2, "recipe error": 2}
STEP = """
import json, sys, time, torch, hf_lnlm
from hf_lnlm.registry import family
torch.set_num_threads(1)
row = family(sys.argv[1])
head = next(name for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM", *row.models) if name in row.models)
config, kind = row.config_class(**json.loads(sys.argv[2])), row.model_class(head)
model, ids = kind(config), torch.randint(5, 60, (2, 8))
cpu, wall = time.process_time(), time.perf_counter()
out = model(input_ids=ids)
out[0].float().pow(2).mean().backward()
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]))
"""
# Bars and aims of CPU seconds, bars and aims of wall seconds, of a cold first step.
MEMORY, MIXER, OTHER = ((25.0, 8.0), (15.0, 5.0)), ((6.0, 3.0), None), ((1.0, None), None)
STEPS = {
    "lnlm_ntm": ({}, MEMORY),
    "lnlm_dnc": ({}, MEMORY),
    "lnlm_ssm mamba1": ({"mixer": "mamba1"}, MIXER),
    "lnlm_ssm mamba2": ({"mixer": "mamba2"}, MIXER),
    "lnlm_ssm mamba3": ({"mixer": "mamba3"}, MIXER),
    **{f"lnlm_{name}": ({}, OTHER) for name in ("rnn", "gated_cnn", "linformer", "sparse_transformer", "gpt3")},
}


def cpu_seconds(code: str, status: int = 0) -> float:
    """CPU seconds that a fresh interpreter spends on `code`, which must end with `status`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL if status else None}
    done = subprocess.run([sys.executable, "-c", code], env=environment, **quiet)
    if done.returncode != status:
        raise RuntimeError(f"exit status must be {status}, got {done.returncode}: {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def first_step(name: str, home: str) -> tuple[float, float]:
    """CPU and wall seconds of a first step in a fresh process that keeps compiled code under `home`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": home, "XDG_CACHE_HOME": f"{home}/.cache"}
    command = [sys.executable, "-c", STEP, name.split()[0], json.dumps(STEPS[name][0])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    cpu, wall = json.loads(done.stdout)
    return cpu, wall


def step_rows(name: str) -> list[Row]:
    """Cold and warm rows of one family."""
    (cpu_bar, cpu_aim), walls = STEPS[name][1]
    with tempfile.TemporaryDirectory() as home:
        (cold, wall), (warm, _) = first_step(name, home), first_step(name, home)
    rows = [below(f"{name}: first step, cold", cold, cpu_bar, cpu_aim, "CPU seconds")]
    if walls is not None:
        rows.append(below(f"{name}: first step, cold, wall", wall, *walls, "seconds"))
    return [*rows, below(f"{name}: first step, warm", warm, 1.0, None, "CPU seconds")]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Run every program in turn, once to warm the file cache, then `--rounds` times; then the first steps."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for turn in range(arguments.rounds + 1):
        for name, code in PROGRAMS.items():
            spent = cpu_seconds(code, FAILING.get(name, 0))
            if turn:
                times[name].append(spent)
    middle = {name: statistics.median(values) for name, values in times.items()}
    imports = "import hf_lnlm / import transformers.PreTrainedModel"
    rows = [at_most(imports, middle["hf_lnlm"], middle["transformers"], 1.05, None)]
    rows += [below(f"hf-lnlm, {name}", middle[name], bar, 0.6, "CPU seconds") for name, bar in COMMANDS.items()]
    return rows + [row for name in arguments.families for row in step_rows(name)]


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        ("--rounds", {"type": int, "default": 3, "help": "measured rounds of the commands"}),
        ("--families", {"nargs": "*", "default": [*STEPS], "choices": [*STEPS], "help": "first steps to measure"}),
    )
