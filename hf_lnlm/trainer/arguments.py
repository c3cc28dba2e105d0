"""Training arguments: transformers' own, under their own names, plus the few switches that stock training lacks."""

import sys
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments


@dataclass
class LNLMTrainingArguments(TrainingArguments):
    """`TrainingArguments` with a few additions and three safer defaults.

    Changed defaults: `enable_jit_checkpoint` is on (SIGTERM and SIGINT save and leave with status 143 or 130),
    `disable_tqdm` follows the terminal (no bars in a pipe or a log file), and `data_seed` is `seed` unless given, so
    that the order of the examples never depends on what drew random numbers before the data loader was built.

    Args:
        carry_state (`bool`): Truncated back-propagation through time: the recurrent state left by one batch starts the
            next one. Needs a stateful model and a dataset of contiguous lanes.
        early_stopping_patience (`int`, *optional*): Stop after so many evaluations without a better
            `metric_for_best_model`; needs `load_best_model_at_end`.
        early_stopping_threshold (`float`): By how much a better one must be better.
        stop_on_nonfinite (`bool`): Stop at the first loss or gradient norm that isn't finite and name the parameter.
    """

    enable_jit_checkpoint: bool = field(
        default=True, metadata={"help": "Save a checkpoint on SIGTERM or SIGINT and exit with status 143 or 130."}
    )
    carry_state: bool = field(
        default=False, metadata={"help": "Carry recurrent state from batch to batch (needs a dataset of lanes)."}
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
        """Fill what depends on the terminal and on the seed."""
        if getattr(self, "disable_tqdm", None) is None and not sys.stderr.isatty():
            self.disable_tqdm = True
        super().__post_init__()
        if self.early_stopping_patience is not None:
            self._check_early_stopping(self.early_stopping_patience)
        if getattr(self, "data_seed", None) is None:
            self.data_seed = self.seed

    def _check_early_stopping(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1, got {patience}")
        if not self.load_best_model_at_end:
            raise ValueError(
                "early_stopping_patience needs load_best_model_at_end=true: the best model is kept, got false"
            )


@dataclass
class LNLMSeq2SeqTrainingArguments(LNLMTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the same additions: for encoder-decoders that are measured by what they write."""
