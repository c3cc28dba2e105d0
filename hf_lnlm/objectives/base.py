"""What an objective is: which models it fits, how rows are cut for it, how a batch is made, how it is measured.

Each objective is a frozen dataclass (its fields are its options) with

- `check(config, tokenizer)`: refuses models and tokenizers it doesn't fit, before a run starts;
- `build(config)`: a model with fresh weights, for some objectives one made of several (`composed`);
- `rows(documents, tokenizer, length)`: the dataset, mostly `PackedBlocks`/`PackedStream` with the keyword arguments that
  `packing(tokenizer, length)` gives;
- `collator(tokenizer, seed)`: rows → batch. Rows come from a dataset of `hf_lnlm.data`, which stamps them with
  `example_id` and `epoch`; randomness is a function of (seed, epoch, example_id), so a collator has no state;
- `sums(logits(outputs), batch)` and `summary(sums)`: metrics. Sums of batches and processes are *added*, never
  averaged, so the result doesn't depend on how rows were batched.

Batches hold what a stock model's `forward` takes (`input_ids`, `labels`, `attention_mask` only if a row is padded,
`position_ids` if rows have them, `shift_labels` for lanes) and, with `bookkeeping=True`, the columns `BOOKKEEPING` as
far as the rows have them, which the training and evaluation loops take out before `forward`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data.blocks import pack
from .families import Direction, direction_of, fitting_models, has_head

IGNORED = -100
"""Label of a position that is not predicted (PyTorch's `ignore_index`)."""

BOOKKEEPING = {"num_bytes": torch.int64, "reset": torch.bool}
"""Columns that are not for the model, each `[batch]`: bytes covered (bits per byte), and whether a carried state is
forgotten before the row (lanes)."""

Row = Mapping[str, Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Objective(ABC):
    """Base of the objectives; see the module's docstring."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    auto_class: ClassVar[str]
    """The Auto class of transformers whose models learn this objective."""
    direction: ClassVar[Direction]
    """How a model must read: `forward`, `both` or `encoder-decoder`."""
    shifted: ClassVar[bool] = False
    """Whether the label of a position is predicted by the position before it."""
    composed_type: ClassVar[str] = ""
    """`model_type` of the model that is made of several, for objectives that train one."""
    language: ClassVar[bool] = True
    """Whether the exponential of its loss is a perplexity."""
    logs_metrics: ClassVar[bool] = False
    """Whether its metrics are logged while training too."""

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether models of this configuration learn the objective, or were made for it."""
        if cls.composed_type and config.model_type == cls.composed_type:
            return True
        return not isinstance(getattr(config, "parts", None), dict) and cls.learns(config)

    @classmethod
    def learns(cls, config: Any) -> bool:
        """Whether models of this configuration learn the objective."""
        return direction_of(config) == cls.direction and has_head(config, cls.auto_class)

    @classmethod
    def composes(cls, config: Any) -> bool:
        """Whether a model made of several is built around this configuration, instead of one with a single head."""
        return bool(cls.composed_type) and config.model_type != cls.composed_type

    @classmethod
    def loader(cls, config: Any) -> str:
        """The Auto class that loads a trained model of this configuration."""
        return "AutoModelForPreTraining" if cls.composed_type == config.model_type else cls.auto_class

    def going_on(self, config: Any, given: Collection[str]) -> dict[str, Any]:
        """Fields of a trained model's configuration that going on from it changes; most objectives change none.

        Args:
            config: The checkpoint's.
            given: Names of the options that were asked for, not merely left at their defaults.

        Raises:
            ValueError: An option asks for another model than the checkpoint holds.
        """
        return {}

    def takes_lanes(self, model: Any) -> bool:
        """Whether a model's state is carried from batch to batch, over contiguous lanes."""
        return self.direction == "forward" and bool(getattr(model, "_is_stateful", False))

    def build(self, config: Any) -> Any:
        """A model with fresh weights that learns this objective; draws from torch's global generator.

        Args:
            config: As in `check`.
        """
        import transformers

        return getattr(transformers, self.auto_class).from_config(config)

    def check(self, config: Any, tokenizer: Any) -> None:
        """Refuses a model or a tokenizer that this objective doesn't fit.

        Args:
            config: The model's configuration.
            tokenizer: The tokenizer of the run.

        Raises:
            ValueError: Names what doesn't fit, and the objectives and models that would.
        """
        if not self.fits(config):
            raise ValueError(self._misfit(config, direction_of(config)))
        self.check_tokenizer(tokenizer)

    def _misfit(self, config: Any, reads: Direction) -> str:
        from . import OBJECTIVES

        model = config.model_type
        if has_head(config, self.auto_class) or reads != self.direction:
            why = f"needs a model that reads {READS[self.direction]}, and {model} reads {READS[reads]}"
        else:
            why = f"needs {self.auto_class}, and {model} has no such head"
        fitting = [name for name, kind in OBJECTIVES.items() if kind.fits(config)]
        return (
            f"objective {self.name!r} {why}. Objectives that fit {model}: {', '.join(fitting) or 'none'}. "
            f"Models that fit {self.name!r}: {', '.join(fitting_models(type(self)))}"
        )

    def check_tokenizer(self, tokenizer: Any) -> None:  # noqa: B027 (most objectives need no special token)
        """Refuses a tokenizer without the special tokens this objective needs.

        Raises:
            ValueError: Names the missing token.
        """

    def raw_length(self, length: int) -> int:
        """Tokens of text in a row whose model input has `length` tokens, special tokens of the row not counted."""
        return length

    def packing(self, tokenizer: Any, length: int) -> dict[str, Any]:
        """Keyword arguments for `PackedBlocks` and `PackedStream` so that the model's input has `length` tokens."""
        return {"length": self.raw_length(length)}

    def rows(self, documents: Any, tokenizer: Any, length: int, **options: Any) -> Any:
        """A dataset of the rows that `collator` takes.

        Args:
            documents: Rows with a `text`: a `datasets.Dataset`, or anything without a length to read as it comes.
            tokenizer: The run's tokenizer.
            length: Tokens of the model's input.
            options: `frame` and the like, for packing.

        Raises:
            ValueError: There is too little text for one row.
        """
        return pack(documents, tokenizer, **{**self.packing(tokenizer, length), **options})

    @abstractmethod
    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Row]], Batch]:
        """A function that makes a batch of rows.

        Args:
            tokenizer: The run's tokenizer.
            seed: The run's seed (masks and noise).
            bookkeeping: Adds the columns `BOOKKEEPING`, each `[batch]`, as far as the rows have them.
        """

    def logits(self, outputs: Any) -> Any:
        """What `sums` needs of a model's outputs: the logits, or None if there are none."""
        return outputs.get("logits")

    def sums(self, logits: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the metrics.

        Args:
            logits: `[batch, tokens, vocabulary]`.
            batch: The collator's batch: `labels` or `shift_labels` `[batch, tokens]`; `num_bytes` `[batch]` if known.

        Returns:
            float64 scalars `nll` (nats), `tokens`, `correct`, and `bytes` where known: add them over batches and
            processes, then call `summary`.
        """
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch["labels"]
            if self.shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        chosen, targets = logits[counted], labels[counted]
        nll = torch.nn.functional.cross_entropy(chosen.float(), targets, reduction="none").double().sum()
        correct = (chosen.argmax(-1) == targets).sum().double() if len(targets) else torch.zeros_like(nll)
        found = {"nll": nll, "tokens": counted.sum().double(), "correct": correct}
        return {**found, "bytes": batch["num_bytes"].sum().double()} if "num_bytes" in batch else found

    def summary(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Metrics of added-up sums: `loss` (nats per token), `perplexity`, `accuracy`, and `bits_per_byte` if known.

        Raises:
            ValueError: No token was predicted.
        """
        total = {name: float(value) for name, value in sums.items()}
        if total["tokens"] == 0:
            raise ValueError("no token was predicted (0 % of the labels count), so there is nothing to measure")
        loss = total["nll"] / total["tokens"]
        metrics = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "accuracy": total["correct"] / total["tokens"],
        }
        if self.direction == "forward" and total.get("bytes"):
            metrics["bits_per_byte"] = total["nll"] / math.log(2) / total["bytes"]
        return metrics


READS: dict[Direction, str] = {
    "forward": "left to right only",
    "both": "in both directions",
    "encoder-decoder": "with an encoder and writes with a decoder",
}


def pad_rows(rows: Sequence[Any], value: int, side: str = "right") -> np.ndarray:
    """Rows of integers `[row length]` → one int64 array `[batch, longest]`, filled up with `value` on a side."""
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, np.int64)
    for index, row in enumerate(rows):
        if side == "left":
            padded[index, longest - len(row) :] = row
        else:
            padded[index, : len(row)] = row
    return padded


def present(rows: Sequence[Row]) -> np.ndarray | None:
    """Which positions hold a token, bool `[batch, longest]`, from the rows' masks or lengths; None if all do."""
    masks = [np.asarray(row.get("attention_mask", np.ones(len(row["input_ids"]))), bool) for row in rows]
    padded = pad_rows(masks, 0).astype(bool)
    return None if padded.all() else padded


def pad_id(tokenizer: Any, needed: bool) -> int:
    """The id that fills up rows.

    Raises:
        ValueError: Rows of different lengths and a tokenizer without a pad token.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if needed:
        raise ValueError(
            "rows of different lengths need a pad token, and the tokenizer has none: set tokenizer.pad_token"
        )
    return 0


def require_labels(labels: np.ndarray, total: int, why: str) -> None:
    """Refuses a batch in which nothing is predicted: it would train on nothing, with a loss of 0 or NaN.

    Raises:
        ValueError: Names the fraction of labels that count.
    """
    if not (labels != IGNORED).any():
        raise ValueError(f"0 of {total} labels (0 %) count in a batch of {len(labels)} rows: {why}")


def bookkeeping_columns(rows: Sequence[Row], wanted: bool) -> Batch:
    """The columns `BOOKKEEPING`, each `[batch]`, if wanted and as far as every row has them."""
    names = [name for name in BOOKKEEPING if wanted and all(name in row for row in rows)]
    return {name: torch.tensor([row[name] for row in rows], dtype=BOOKKEEPING[name]) for name in names}
