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
`position_ids` if rows have them, `shift_labels` for streams) and, with `bookkeeping=True`, the columns `BOOKKEEPING` as
far as the rows have them, which the training and evaluation loops take out before `forward`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data.blocks import pack
from ..errors import did_you_mean
from ..models.parts import router_losses
from ..nn.loss_heads import IGNORED
from ..registry import is_composed
from .families import Direction, direction_of, fitting_models, has_head
from .randomness import generator

BOOKKEEPING = {"num_bytes": torch.int64, "reset": torch.bool}
"""Columns that are not for the model, each `(batch,)`: bytes covered (bits per byte), and whether a carried state is
forgotten before the row (streams)."""

Row = Mapping[str, Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class BaseObjective(ABC):
    """What a run needs of anything that is learnt: from text alone (`Objective`) or from labels (`hf_lnlm.tasks.Task`)."""

    name: ClassVar[str]
    title: ClassVar[str]
    auto_class: ClassVar[str]
    """The Auto class of transformers whose models learn this objective."""
    labelled: ClassVar[bool] = False
    """Whether it is learnt from rows with labels, not from text alone."""
    lora_type: ClassVar[str | None] = None
    """peft's name for it, if it has one."""
    language: ClassVar[bool] = True
    """Whether the exponential of its loss is a perplexity."""
    logs_metrics: ClassVar[bool] = False
    """Whether its metrics are logged while training too."""

    @abstractmethod
    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Callable[[Sequence[Any]], Batch]:
        """A function that makes a batch of rows.

        Args:
            tokenizer: The run's tokenizer.
            seed: The run's seed (masks and noise).
            bookkeeping: Adds the columns `BOOKKEEPING`, each `(batch,)`, as far as the rows have them.
        """

    def logits(self, outputs: Any) -> Any:
        """What `sums` needs of a model's outputs: the logits, or None if there are none."""
        return outputs.get("logits")

    @abstractmethod
    def sums(self, logits: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the metrics: tensors that are added over batches and processes.

        Args:
            logits: What `logits` gave: `(batch, classes)`, `(batch, tokens, classes)` or `(batch, tokens, vocabulary)`.
            batch: The collator's.
        """

    @abstractmethod
    def summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of added-up sums."""

    def loss_function(self) -> Callable[..., Tensor] | None:
        """What replaces the model's own loss, as Trainer's `compute_loss_func`; None keeps the model's."""
        return None

    def generation(self) -> dict[str, Any]:
        """Arguments of Seq2SeqTrainer where evaluation writes texts; empty where it does not."""
        return {}

    def rater(self, tokenizer: Any) -> Callable[[Any], dict[str, float]] | None:
        """Trainer's `compute_metrics` for what was written; None where nothing is."""
        return None


@dataclass
class Collator(ABC):
    """Rows → batch; a subclass says by `arrays` what is in it.

    Args:
        objective: The options.
        tokenizer: Gives special tokens.
        seed: The run's seed.
        bookkeeping: Adds `num_bytes` and `reset` `(batch,)`, as far as rows have them.
    """

    objective: Any
    tokenizer: Any
    seed: int = 0
    bookkeeping: bool = False

    @abstractmethod
    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """What the model is given of some rows.

        Raises:
            ValueError: There is nothing to predict, or a row lacks what the objective needs.
        """

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Make a batch; see `arrays`."""
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.arrays(rows).items()}
        return {**batch, **bookkeeping_columns(rows, self.bookkeeping)}

    def padded(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
        """Ids `(batch, longest)`, which of them are real (None if all are), and `attention_mask` unless all are."""
        mask = present(rows)
        ids = pad_rows([row["input_ids"] for row in rows], pad_id(self.tokenizer, mask is not None))
        return ids, mask, {} if mask is None else {"attention_mask": mask.astype(np.int64)}

    def random(self, row: Row, purpose: str, epochs: int | None = None) -> np.random.Generator:
        """A row's own generator; with `epochs` its numbers come again after so many."""
        epoch = int(row.get("epoch", 0))
        return generator(self.seed, epoch % epochs if epochs else epoch, int(row["example_id"]), purpose)


class RewritingCollator(Collator):
    """Rows → `input_ids` `(batch, tokens)` and `labels` `(batch, targets)` of a decoder that writes what was hidden.

    A subclass says by `rewritten` what becomes of a row.
    """

    @abstractmethod
    def rewritten(self, row: Row, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of a row.

        Args:
            row: it names its place in the noise.
            ids: its tokens without padding, `(tokens,)`.
        """

    def arrays(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Inputs and targets; refused is a row that is too short to hide anything of it."""
        pairs = [self.rewritten(row, _unpadded(row)) for row in rows]
        ids, _, extra = self.padded([{"input_ids": inputs} for inputs, _ in pairs])
        return {"input_ids": ids, "labels": pad_rows([targets for _, targets in pairs], IGNORED), **extra}


def _unpadded(row: Row) -> np.ndarray:
    ids = np.asarray(row["input_ids"], np.int64)
    return ids[np.asarray(row["attention_mask"], bool)] if "attention_mask" in row else ids


@dataclass(frozen=True)
class Objective(BaseObjective):
    """Base of the objectives that need no labels; see the module's docstring."""

    paper: ClassVar[str]
    direction: ClassVar[Direction]
    """How a model must read: `forward`, `both` or `encoder-decoder`."""
    shifted: ClassVar[bool] = False
    """Whether the label of a position is predicted by the position before it."""
    composed_type: ClassVar[str] = ""
    """`model_type` of the model that is made of several, for objectives that train one."""
    batches: ClassVar[type[Collator]]
    """What makes its batches."""

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether models of this configuration learn the objective, or were made for it."""
        if cls.composed_type and config.model_type == cls.composed_type:
            return True
        if is_composed(config.model_type) or (cls.composes(config) and router_losses(config)):
            return False
        return cls.learns(config)

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

    def continuation_overrides(self, config: Any, given: Collection[str]) -> dict[str, Any]:
        """Fields of a trained model's configuration that going on from it changes; most objectives change none.

        Args:
            config: The checkpoint's.
            given: Names of the options that were asked for, not merely left at their defaults.

        Raises:
            ValueError: An option asks for another model than the checkpoint holds.
        """
        return {}

    def takes_streams(self, model: Any) -> bool:
        """Whether a model's state is carried from batch to batch, over contiguous streams."""
        return self.direction == "forward" and bool(getattr(model, "_is_stateful", False))

    def build(self, config: Any) -> Any:
        """A model with fresh weights that learns this objective; draws from torch's global generator.

        Args:
            config: As in `check`.
        """
        import transformers

        return getattr(transformers, self.auto_class).from_config(config)

    def check(self, config: Any, tokenizer: Any) -> None:
        """Refuse a model or a tokenizer that this objective doesn't fit.

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

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without the special tokens this objective needs.

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

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Collator:
        """Make batches; what is random in them is keyed by (seed, epoch, example_id)."""
        self.check_tokenizer(tokenizer)
        return self.batches(self, tokenizer, seed, bookkeeping)

    def sums(self, logits: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the metrics.

        Args:
            logits: `(batch, tokens, vocabulary)`.
            batch: The collator's batch: `labels` or `shift_labels` `(batch, tokens)`; `num_bytes` `(batch,)` if known.

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
        found = token_sums(logits[counted], labels[counted])
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


def token_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What predicted tokens add to the metrics, float64 scalars `nll` (nats), `tokens` and `correct`.

    Args:
        logits: `(items, vocabulary)`.
        labels: `(items,)`, all of them predicted.
    """
    nll = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()
    correct = (logits.argmax(-1) == labels).sum().double() if len(labels) else torch.zeros_like(nll)
    return {"nll": nll, "tokens": torch.full_like(nll, len(labels)), "correct": correct}


def built(kinds: Mapping[str, type], what: str, name: str, options: Mapping[str, Any]) -> Any:
    """An objective or task by name.

    Args:
        kinds: Name to class.
        what: What they are called, for the message.
        name: A key of `kinds`.
        options: Fields of the class.

    Raises:
        ValueError: An unknown name or option; names the known ones.
    """
    if name not in kinds:
        raise ValueError(f"{what} must be one of {', '.join(kinds)}, got {name!r}{_hint(name, kinds)}")
    known = [field.name for field in fields(kinds[name]) if field.init]
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "no options"
            raise ValueError(f"{what} {name!r} has {listed}, got {option!r}{_hint(option, known)}")
    return kinds[name](**options)


def _hint(word: str, known: Iterable[str]) -> str:
    return did_you_mean(word, known).replace(" (", "; ").rstrip(")")


READS: dict[Direction, str] = {
    "forward": "left to right only",
    "both": "in both directions",
    "encoder-decoder": "with an encoder and writes with a decoder",
}


def pad_rows(rows: Sequence[Any], value: int, side: str = "right") -> np.ndarray:
    """Rows of integers `(row length,)` → one int64 array `(batch, longest)`, filled up with `value` on a side."""
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, np.int64)
    for index, row in enumerate(rows):
        if side == "left":
            padded[index, longest - len(row) :] = row
        else:
            padded[index, : len(row)] = row
    return padded


def present(rows: Sequence[Row]) -> np.ndarray | None:
    """Which positions hold a token, bool `(batch, longest)`, from the rows' masks or lengths; None if all do."""
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
    """Refuse a batch in which nothing is predicted: it would train on nothing, with a loss of 0 or NaN.

    Raises:
        ValueError: Names the fraction of labels that count.
    """
    if not (labels != IGNORED).any():
        raise ValueError(f"0 of {total} labels (0 %) count in a batch of {len(labels)} rows: {why}")


def bookkeeping_columns(rows: Sequence[Row], wanted: bool) -> Batch:
    """The columns `BOOKKEEPING`, each `(batch,)`, if wanted and as far as every row has them."""
    names = [name for name in BOOKKEEPING if wanted and all(name in row for row in rows)]
    return {name: torch.tensor([row[name] for row in rows], dtype=BOOKKEEPING[name]) for name in names}
