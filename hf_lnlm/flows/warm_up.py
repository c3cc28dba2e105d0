"""Compile the families' kernels ahead: for an image, for CI, or to have it behind one.

Compiled code depends on what a kernel is and on the processor, not on sizes, so that one training step of a small model
and a few decoded tokens make all that a family needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from ..ops.backend import numba_reason
from ..registry import FAMILIES, Family, family

_TOKENS = 12


def compiled_families() -> list[str]:
    """Model types of the families that have compiled loops for the processor."""
    return [row.model_type for row in FAMILIES if any("cpu" in it.backends for it in row.config_class._operations)]


def _jobs(names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Families with the fields of each of their variants.

    Raises:
        ValueError: there is no such family, or nothing of it is compiled.
    """
    able = compiled_families()
    for name in names:
        family(name)
        if name not in able:
            raise ValueError(f"nothing of {name} is compiled: warm-up is for {', '.join(able)}")
    return [(name, fields) for name in names or able for fields in family(name).config_class._compiled_variants]


def warm_up(families: Sequence[str] = (), tell: Callable[[str], None] = print) -> int:
    """Compile all kernels of families, each variant in a process of its own, as many at once as there are cores.

    Args:
        families: model types; all that have compiled loops by default.
        tell: takes each line of progress.

    Returns:
        How many variants failed.

    Raises:
        ValueError: no such family, one without compiled loops, or numba cannot run.
    """
    jobs, began, failed = _jobs(families), time.monotonic(), 0
    reason = numba_reason()
    if reason is not None:
        raise ValueError(f"nothing can be compiled: {reason}")
    from ..ops.kernels.kept import folder

    tell(f"compiling the loops of {len(jobs)} kinds of model into {folder()}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(_in_process, *job): job for job in jobs}
        for done, future in enumerate(as_completed(running), 1):
            name, fields = running[future]
            label = " ".join([name, *map(str, fields.values())])
            seconds, fault = future.result()
            failed += fault is not None
            tell(f"{done}/{len(jobs)} {label}: {f'failed: {fault}' if fault else f'{seconds:.1f} s'}")
    tell(f"ready in {time.monotonic() - began:.1f} s")
    return failed


def command(name: str, fields: dict[str, Any]) -> list[str]:
    """Words of a process that compiles one variant of a family.

    Args:
        name: model type.
        fields: of its config, which name the variant.
    """
    return [sys.executable, "-m", __name__, name, json.dumps(fields)]


def _in_process(name: str, fields: dict[str, Any]) -> tuple[float, str | None]:
    """Seconds, and the last line of what went wrong, or None."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(name, fields), capture_output=True, text=True, env=environment)
    fault = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1] if done.returncode else None
    return time.monotonic() - began, fault


def compile_family(row: Family, fields: dict[str, Any]) -> None:
    """Run one training step and decode some tokens of a small model.

    Args:
        row: the family.
        fields: of its config, which name the variant.
    """
    config = row.config_class(**row.sizes.get("tiny", {}), **fields, vocab_size=16, backend="auto")
    model: Any = row.model_class("AutoModelForCausalLM")(config)
    ids = torch.randint(0, 16, (4, _TOKENS))
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


if __name__ == "__main__":
    compile_family(family(sys.argv[1]), json.loads(sys.argv[2]))
