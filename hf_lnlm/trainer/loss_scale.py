"""One loss for one global batch, however it is cut into micro-batches and processes.

A step sees micro-batches b on several processes. What it must minimise is the mean over all their items (predicted
tokens, classified rows …), sum_b S_b / sum_b n_b, with S_b a micro-batch's summed loss and n_b its items. Models return
S_b / n_b, or S_b / N if they honour `num_items_in_batch` = N. Many stock heads accept that argument (`**kwargs`) and
ignore it; the stock Trainer then adds up means, and loss and gradient grow with accumulation and processes.

Which of the two a model does, and what it counts, is measured once on two rows of the first batch (no gradients, random
state and buffers restored), because neither class names nor signatures tell:

- `loss(N)` and `loss(2N)` with equal dropout differ by exactly 2: the model honours N. It keeps doing so.
- otherwise N isn't passed and the mean is multiplied by n_b / N. n_b is the candidate count (labels, labels after the
  causal shift, rows, attended tokens) that explains how the losses of the two rows combine into the loss of both:
  L01 = (n0 L0 + n1 L1) / (n0 + n1).

Heads with several terms are means over different items, so no single factor is right. They are computed by parts from
the logits: question answering (start, end; positions beyond the row are ignored), and masked LM + sentence
pair (…ForPreTraining of BERT, ALBERT and their kin). A model with other terms declares them by two methods:

    loss_items(inputs) -> dict[str, Tensor]           items of each term, 0-dimensional, from the batch alone
    loss_sums(outputs, inputs) -> dict[str, Tensor]   weighted *sums* of each term (0 for no items), same keys

and its training loss is then the sum over terms of sums / items.

What can't be invariant: models whose rows influence each other (batch normalisation, load balancing of stock models'
experts; the package's own is told the load of the whole step, see `routing`), whose loss is weighted by n_b / N like any
other; and dropout, which draws other masks for other batches.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import logging

from ..nn.loss_heads import IGNORED
from .randomness import preserve_rng_state

logger = logging.get_logger(__name__)

Inputs = Mapping[str, Any]
Counter = Callable[[Inputs], torch.Tensor]


def _labels_given(inputs: Inputs) -> torch.Tensor:
    return inputs["labels"].ne(IGNORED).sum()


def _labels_after_shift(inputs: Inputs) -> torch.Tensor:
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"].ne(IGNORED).sum()
    labels = inputs["labels"]
    return (labels[..., 1:] if labels.dim() > 1 else labels).ne(IGNORED).sum()


def _rows(inputs: Inputs) -> torch.Tensor:
    return torch.tensor(find_batch_size(dict(inputs)) or 0)


def _attended(inputs: Inputs) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()


COUNTERS: dict[str, Counter] = {
    "labels": _labels_given,
    "labels after the shift": _labels_after_shift,
    "rows": _rows,
    "attended tokens": _attended,
}


@dataclass(frozen=True)
class Part:
    """One cross-entropy term of a head with several.

    Args:
        logits: Name of the output, `(..., classes)`; for positions `(rows, length)`.
        labels: Name of the input, `(...)`.
        weight: Factor of the term's mean in the loss.
        position: Labels are positions in the row; those at or beyond its length are ignored.
    """

    logits: str
    labels: str
    weight: float = 1.0
    position: bool = False

    def target(self, inputs: Inputs) -> torch.Tensor:
        """Return the labels, flat, with -100 where nothing is predicted."""
        labels = inputs[self.labels]
        if self.position:
            labels = labels.clamp(min=0).masked_fill(labels >= inputs["input_ids"].shape[-1], IGNORED)
        return labels.reshape(-1)

    def total(self, outputs: Any, inputs: Inputs) -> torch.Tensor:
        """Return the weighted sum of the term over its items.

        Args:
            outputs: The model's.
            inputs: The micro-batch.
        """
        logits = outputs[self.logits]
        target = self.target(inputs).to(logits.device)
        logits = logits.reshape(target.numel(), -1).float()
        return self.weight * functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")


_SPAN = (
    Part("start_logits", "start_positions", 0.5, position=True),
    Part("end_logits", "end_positions", 0.5, position=True),
)
KNOWN_PARTS: tuple[tuple[Part, ...], ...] = (
    _SPAN,
    (Part("prediction_logits", "labels"), Part("seq_relationship_logits", "next_sentence_label")),
    (Part("prediction_logits", "labels"), Part("sop_logits", "sentence_order_label")),
)


def labels_that_count(inputs: Inputs) -> int:
    """Return how many labels of a batch aren't ignored, -1 if it has no tensor of labels."""
    labels = inputs.get("labels")
    return int(labels.ne(IGNORED).sum()) if torch.is_tensor(labels) else -1


class LossRule:
    """How a model's loss relates to the items of a batch.

    `count(inputs)` gives the items of each term, shape `(terms,)`; `sums(...)` the summed loss of each term.
    """

    passes_num_items = False

    def count(self, inputs: Inputs) -> torch.Tensor:
        """Return the number of items of each term of the loss, `(terms,)`, int64."""
        raise NotImplementedError

    def sums(self, loss: torch.Tensor, outputs: Any, inputs: Inputs, total: torch.Tensor) -> torch.Tensor:
        """Return each term's weighted sum over the items of this micro-batch, `(terms,)`.

        Args:
            loss: What the model returned.
            outputs: The model's outputs.
            inputs: The micro-batch.
            total: Items of the whole step, `(terms,)`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CountedItems(LossRule):
    """A loss of one term, whose items are one of `COUNTERS`."""

    counter: str

    def count(self, inputs: Inputs) -> torch.Tensor:
        """Return the items that the model counts, `(1,)`."""
        return COUNTERS[self.counter](inputs).long().reshape(1)


class HonoursItems(CountedItems):
    """The model divides its summed loss by `num_items_in_batch`."""

    passes_num_items = True

    def sums(self, loss: torch.Tensor, outputs: Any, inputs: Inputs, total: torch.Tensor) -> torch.Tensor:
        """Return the loss times the items of the step, `(1,)`."""
        return (loss * total.to(loss.device, loss.dtype)).reshape(1)


class MeanOfItems(CountedItems):
    """The model returns the mean over the items of the micro-batch."""

    def sums(self, loss: torch.Tensor, outputs: Any, inputs: Inputs, total: torch.Tensor) -> torch.Tensor:
        """Return the mean times its items, `(1,)`; a connected zero when there are none."""
        items = self.count(inputs).to(loss.device, loss.dtype)
        if not items.any():
            return _nothing(outputs).reshape(1)
        return loss * items


@dataclass(frozen=True)
class SumOfParts(LossRule):
    """Known heads with several cross-entropy terms, computed from their logits."""

    parts: tuple[Part, ...]

    def count(self, inputs: Inputs) -> torch.Tensor:
        """Return the labels of each part, `(parts,)`."""
        return torch.stack([part.target(inputs).ne(IGNORED).sum() for part in self.parts])

    def sums(self, loss: torch.Tensor, outputs: Any, inputs: Inputs, total: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy of each part, `(parts,)`."""
        return torch.stack([part.total(outputs, inputs) for part in self.parts])


@dataclass(frozen=True)
class DeclaredParts(LossRule):
    """A model that declares its terms by `loss_items` and `loss_sums`."""

    model: nn.Module

    def count(self, inputs: Inputs) -> torch.Tensor:
        """Return the items of each declared term, `(terms,)`."""
        return torch.stack([items.long().reshape(()) for items in self.model.loss_items(inputs).values()])  # type: ignore[operator]

    def sums(self, loss: torch.Tensor, outputs: Any, inputs: Inputs, total: torch.Tensor) -> torch.Tensor:
        """Return the declared sums, `(terms,)`."""
        return torch.stack(list(self.model.loss_sums(outputs, inputs).values()))  # type: ignore[operator]


def _nothing(outputs: Any) -> torch.Tensor:
    """Return a zero that is connected to the outputs, for a micro-batch without a single label."""
    tensors = [value for name, value in outputs.items() if name != "loss" and torch.is_tensor(value)]
    return sum((tensor.float().sum() * 0 for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


def _known_parts(inputs: Inputs) -> tuple[Part, ...] | None:
    for parts in KNOWN_PARTS:
        if all(inputs.get(part.labels) is not None for part in parts):
            return parts
    return None


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave modes, buffers and random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad(), preserve_rng_state():
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                buffer.copy_(value)


def _row(inputs: Inputs, index: int, size: int) -> dict[str, Any]:
    """Return row `index` of every tensor; each must have `size` rows, as padded batches have."""
    row = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    if len(row) < len(inputs) or any(not value.dim() or value.shape[0] != size for value in row.values()):
        raise ValueError("the batch can't be taken apart into rows")
    return {name: value[index : index + 1] for name, value in row.items()}


def _batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rows[0] if len(rows) == 1 else {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _only_first_labels(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Ignore all token labels of a row but its first `number`, so that candidate counts differ from row to row."""
    changed = dict(row)
    for name in ("labels", "shift_labels"):
        labels = row.get(name)
        if torch.is_tensor(labels) and labels.dim() > 1 and not labels.is_floating_point():
            given = labels.ne(IGNORED)
            keep = given & (given.reshape(1, -1).cumsum(-1).reshape(labels.shape) <= number)
            changed[name] = labels.masked_fill(~keep, IGNORED)
    return changed


class LossProbe:
    """Finds the rule of a model by looking at two rows of a batch.

    Args:
        model: The unwrapped model.
        inputs: The first batch, on the model's device.
        passes_kwargs: Whether forward accepts `num_items_in_batch`.
        shifts: Whether the model is expected to shift labels; only the order in which counts are tried.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, passes_kwargs: bool, shifts: bool) -> None:
        self.model = model
        self.inputs = inputs
        self.passes_kwargs = passes_kwargs
        self.has_labels = torch.is_tensor(inputs.get("labels"))
        self.preferred = "rows" if not self.has_labels else "labels after the shift" if shifts else "labels"

    def rule(self) -> LossRule:
        """Return the rule; when the measurement decides nothing, the one that the model's kind suggests."""
        if hasattr(self.model, "loss_items") and hasattr(self.model, "loss_sums"):
            return DeclaredParts(self.model)
        with _undisturbed(self.model):
            try:
                return self._measured(self._two_rows())
            except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                # a batch that isn't a stack of rows, such as one flat row of documents: measure what can be
                logger.info(f"the loss of two rows couldn't be measured ({error}); measuring the batch as it is")
                return self._measured([dict(self.inputs)])

    def _measured(self, rows: list[dict[str, Any]]) -> LossRule:
        """Return the rule by some rows; of the batch as it is only whether the number of items is honoured."""
        parts = _known_parts(self.inputs)
        if len(rows) > 1 and parts is not None and self._explains(parts, rows):
            return SumOfParts(parts)
        counted = self._items_honoured(rows) if self.passes_kwargs and self.has_labels else None
        if counted is not None:
            return HonoursItems(counted)
        return MeanOfItems(self._items_of_mean(rows) if len(rows) > 1 else self.preferred)

    def _two_rows(self) -> list[dict[str, Any]]:
        """Return the two rows with most labels (one row twice if there is no other), with 2 and 3 labels left."""
        size = find_batch_size(dict(self.inputs)) or 1
        order = list(range(size))
        labels = self.inputs.get("labels")
        if torch.is_tensor(labels) and labels.dim() and labels.shape[0] == size:
            order = labels.reshape(size, -1).ne(IGNORED).sum(-1).sort(descending=True, stable=True).indices.tolist()
        first, second = _row(self.inputs, order[0], size), _row(self.inputs, order[min(1, size - 1)], size)
        return [_only_first_labels(first, 2), _only_first_labels(second, 3)]

    def _loss(self, rows: list[dict[str, Any]], training: bool, **extra: Any) -> tuple[float, Any]:
        """Return the model's loss for some rows and its outputs, with the same dropout every time."""
        batch = _batch(rows)
        self.model.train(training)
        torch.manual_seed(0)
        outputs = self.model(**batch, **extra)
        return float(outputs["loss"] if isinstance(outputs, dict) else outputs[0]), outputs

    def _explains(self, parts: tuple[Part, ...], rows: list[dict[str, Any]]) -> bool:
        batch = _batch(rows)
        loss, outputs = self._loss(rows, training=False)
        if any(part.logits not in outputs for part in parts):
            return False
        rule = SumOfParts(parts)
        sums, items = rule.sums(torch.tensor(loss), outputs, batch, rule.count(batch)), rule.count(batch)
        return abs(float((sums.cpu() / items.cpu().clamp(min=1)).sum()) - loss) <= 1e-2 * max(abs(loss), 1e-6)

    def _candidates(self) -> list[str]:
        known = [name for name in COUNTERS if name in ("rows", "attended tokens") or self.has_labels]
        if "input_ids" not in self.inputs:
            known = [name for name in known if name != "attended tokens"]
        return sorted(known, key=lambda name: name != self.preferred)

    def _items_honoured(self, rows: list[dict[str, Any]]) -> str | None:
        """Return what the model counts if its loss is its sum / num_items_in_batch, None if it isn't."""
        mean, _ = self._loss(rows, training=True)
        once, _ = self._loss(rows, training=True, num_items_in_batch=torch.tensor(7))
        twice, _ = self._loss(rows, training=True, num_items_in_batch=torch.tensor(14))
        if not abs(once - 2 * twice) <= 1e-3 * abs(once) or abs(once - twice) < 1e-9:
            return None
        found = once * 7 / mean if mean else 0.0
        errors = {name: abs(sum(float(COUNTERS[name](row)) for row in rows) - found) for name in self._candidates()}
        return min(errors, key=lambda name: (round(errors[name], 1), name != self.preferred))

    def _items_of_mean(self, rows: list[dict[str, Any]]) -> str:
        """Return the count whose weighted mean of the two rows' losses is the loss of both."""
        both = self._loss(rows, training=False)[0]
        first, second = (self._loss([row], training=False)[0] for row in rows)
        if abs(first - second) <= 1e-4 * abs(both):
            return self.preferred
        share = (both - second) / (first - second)
        errors = {}
        for name in self._candidates():
            zero, one = (float(COUNTERS[name](row)) for row in rows)
            errors[name] = abs(zero / max(zero + one, 1.0) - share)
        return min(errors, key=lambda name: (round(errors[name], 2), name != self.preferred))
