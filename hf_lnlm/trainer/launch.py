"""Launches that would quietly do something else than asked are refused, with the command that does it.

- `accelerate launch --cpu --num_processes 2` uses accelerate's simple launcher, which starts *one* process.
- `srun -n 2 python …` starts two processes that know nothing of each other and write over one another's files.
- `fsdp` on a CPU silently becomes plain data parallelism: accelerate shards on accelerators only.
- Several visible GPUs and one process silently become `nn.DataParallel`, whose loss scale and state can't be exact.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

_SHARDED = (
    "from_pretrained(…, distributed_config=DistributedConfig(fsdp_size={n})) with save_only_model=True, "
    "under torchrun --nproc_per_node {n}"
)


def _command(processes: int | str) -> str:
    script = os.path.basename(sys.argv[0] or "train.py")
    return f"torchrun --nproc_per_node {processes} {' '.join([script, *sys.argv[1:]])}"


def _size(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 1


def launch_fault(args: Any, environment: Mapping[str, str]) -> str | None:
    """Return what is wrong with how this process was started and the right command, None if nothing is.

    Args:
        args: The training arguments (`world_size`, `n_gpu`, `device`, `fsdp`).
        environment: The environment variables of the process.
    """
    on_cpu = args.device.type == "cpu"
    if on_cpu and (args.fsdp or environment.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")):
        processes = max(args.world_size, 2)
        return f"fsdp on a CPU would silently become plain data parallelism; use {_SHARDED.format(n=processes)}"
    if args.n_gpu > 1:
        return f"{args.n_gpu} GPUs in one process would silently become nn.DataParallel; use {_command(args.n_gpu)}"
    if args.world_size > 1:
        return None
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and "RANK" not in environment:
        return f"accelerate's simple launcher started one process instead of several; use {_command('<processes>')}"
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if _size(environment, name) > 1:
            wanted = _size(environment, name)
            return f"{name}={wanted}, but this process would train alone; use {_command(wanted)}"
    return None


def check_launch(args: Any) -> None:
    """Refuse a launch that would silently do something else.

    Raises:
        ValueError: Names what would happen and the command to use.
    """
    fault = launch_fault(args, os.environ)
    if fault is not None:
        raise ValueError(fault)
