"""Training arguments: transformers' own, under their own names, plus the few switches that stock training lacks."""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments, get_scheduler

_SHARE, _COUNT, _AMOUNT = (0.0, 1.0), (1, math.inf), (0.0, math.inf)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), _COUNT
    ),
    **dict.fromkeys(("save_total_limit", "eval_accumulation_steps", "dataloader_prefetch_factor"), _COUNT),
    **dict.fromkeys(("torch_empty_cache_steps", "early_stopping_patience", "generation_max_length"), _COUNT),
    **dict.fromkeys(("generation_num_beams",), _COUNT),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), _AMOUNT),
    **dict.fromkeys(("eval_delay", "neftune_noise_alpha", "early_stopping_threshold"), _AMOUNT),
    **dict.fromkeys(("dataloader_num_workers", "ddp_timeout"), _AMOUNT),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
}
"""Argument → its lowest and highest value; infinity itself is refused everywhere."""

ABOVE_ZERO = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
"""Arguments that are a number above 0: epochs, or steps (a fraction below 1 is a share of all steps)."""

INERT = {
    "do_train": "each command trains or measures by itself",
    "do_eval": "data.validation says what is held out",
    "do_predict": "each command trains or measures by itself",
    "resume_from_checkpoint": "--resume goes on from the last whole checkpoint",
    "overwrite_output_dir": "--overwrite starts anew",
}
"""Arguments that nothing here reads, each with what to use."""

ACCELERATOR_ONLY = ("fp16", "fp16_full_eval", "tf32")
"""Switches that a CPU has no use for."""


def check_values(values: Mapping[str, Any], section: str = "") -> None:
    """Refuse training arguments that are out of range, or that something else says.

    Args:
        values: argument → value, of the right types; those that are missing or None are not looked at.
        section: put before a name in messages, such as "training.".

    Raises:
        ValueError: naming the argument, its range and its value.
    """
    for name, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{section}{name} must be a finite number, got {value}")
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if not low <= value <= high:
            span = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise ValueError(f"{section}{name} must be {span}, got {value}")
        if name in ABOVE_ZERO and value <= 0:
            raise ValueError(f"{section}{name} must be above 0, got {value}")
    steps = values.get("max_steps")
    if isinstance(steps, int) and steps < 1 and steps != -1:
        raise ValueError(f"{section}max_steps must be at least 1, or -1 to count epochs, got {steps}")


def check_together(values: Mapping[str, Any]) -> None:
    """Refuse training arguments that have no effect beside the others, or on this machine.

    Args:
        values: argument → value, as far as they are given.

    Raises:
        ValueError: naming the argument and what it needs.
    """
    for name in ACCELERATOR_ONLY:
        if values.get(name) and (values.get("use_cpu") or not torch.accelerator.is_available()):
            raise ValueError(f"{name} needs an accelerator, and this run is on a CPU (which can do bf16), got true")
    if values.get("early_stopping_patience") is None:
        if values.get("early_stopping_threshold"):
            given = values["early_stopping_threshold"]
            raise ValueError(f"early_stopping_threshold needs early_stopping_patience, got {given} alone")
    elif not values.get("load_best_model_at_end"):
        raise ValueError("early_stopping_patience needs load_best_model_at_end=true: the best model is kept, got false")


def check_schedule(name: Any, options: Any, warmup: float) -> None:
    """Refuse a learning rate's schedule that can't be built, before anything is loaded.

    Args:
        name: `lr_scheduler_type`.
        options: `lr_scheduler_kwargs`, a mapping or None.
        warmup: steps of warm-up, or their share.

    Raises:
        ValueError: an option is missing, unknown or out of range; names the schedule.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = str(getattr(name, "value", name))
    try:
        get_scheduler(name, optimizer, int(warmup > 0), 10, dict(options or {}) or None)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        given = ", ".join(sorted(map(str, options or {}))) or "none"
        line = " ".join(str(error).split()).replace("()", "")
        raise ValueError(f"lr_scheduler_type={name!r} can't take its lr_scheduler_kwargs ({given}): {line}") from None


@dataclass
class LNLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with a few additions and three safer defaults.

    Changed defaults: `enable_jit_checkpoint` is on (SIGTERM, SIGINT and SIGHUP save and leave with their status),
    `disable_tqdm` follows the terminal (no bars in a pipe or a log file), and `data_seed` is `seed` unless given, so
    that the order of the examples never depends on what drew random numbers before the data loader was built.

    Args:
        carry_state (`bool`): Truncated back-propagation through time: the recurrent state left by one batch starts the
            next one. Needs a stateful model and a dataset of contiguous streams.
        early_stopping_patience (`int`, *optional*): Stop after so many evaluations without a better
            `metric_for_best_model`; needs `load_best_model_at_end`.
        early_stopping_threshold (`float`): By how much a better one must be better.
        stop_on_nonfinite (`bool`): Stop at the first loss or gradient norm that isn't finite and name the parameter.
    """

    enable_jit_checkpoint: bool = field(
        default=True, metadata={"help": "Save a checkpoint on SIGTERM, SIGINT or SIGHUP; exit with 128 + its number."}
    )
    carry_state: bool = field(
        default=False, metadata={"help": "Carry recurrent state from batch to batch (needs a dataset of streams)."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much a better evaluation must be better to count."}
    )
    stop_on_nonfinite: bool = field(
        default=True, metadata={"help": "Stop with the step and the first bad parameter at a non-finite loss or norm."}
    )

    def __post_init__(self) -> None:
        """Fill what depends on the terminal and on the seed, and check ranges and what fits together.

        Raises:
            ValueError: naming the argument.
        """
        check_values(vars(self))
        check_together(vars(self))
        launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)  # by torchrun
        if launched and os.environ["WORLD_SIZE"] != "1" and not torch.accelerator.is_available():
            self.use_cpu = True  # or accelerate starts no process group, and each process would train alone
        if getattr(self, "disable_tqdm", None) is None and not sys.stderr.isatty():
            self.disable_tqdm = True
        super().__post_init__()
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs, self.warmup_steps)
        if getattr(self, "data_seed", None) is None:
            self.data_seed = self.seed


@dataclass
class LNLMSeq2SeqTrainingArguments(LNLMTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the same additions: for encoder-decoders that are measured by what they write."""
