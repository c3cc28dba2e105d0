"""Training arguments: transformers' own, under their own names, plus the few switches that stock training lacks."""

import sys
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class LNLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with two additions and three safer defaults.

    Changed defaults: `enable_jit_checkpoint` is on (SIGTERM and SIGINT save and leave with status 143 or 130),
    `disable_tqdm` follows the terminal (no bars in a pipe or a log file), and `data_seed` is `seed` unless given, so
    that the order of the examples never depends on what drew random numbers before the data loader was built.

    Args:
        carry_state (`bool`): Truncated back-propagation through time: the recurrent state left by one batch starts the
            next one. Needs a stateful model and a dataset of contiguous lanes.
        stop_on_nonfinite (`bool`): Stop at the first loss or gradient norm that isn't finite and name the parameter.
    """

    enable_jit_checkpoint: bool = field(
        default=True, metadata={"help": "Save a checkpoint on SIGTERM or SIGINT and exit with status 143 or 130."}
    )
    carry_state: bool = field(
        default=False, metadata={"help": "Carry recurrent state from batch to batch (needs a dataset of lanes)."}
    )
    stop_on_nonfinite: bool = field(
        default=True, metadata={"help": "Stop with the step and the first bad parameter at a non-finite loss or norm."}
    )

    def __post_init__(self) -> None:
        """Fill what depends on the terminal and on the seed."""
        if getattr(self, "disable_tqdm", None) is None and not sys.stderr.isatty():
            self.disable_tqdm = True
        super().__post_init__()
        if getattr(self, "data_seed", None) is None:
            self.data_seed = self.seed
