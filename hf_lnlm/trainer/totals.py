"""Sums behind the figures that are logged: added over batches and processes, divided once.

A mean of batch means isn't the mean over items when batches differ in length; perplexity and bits per byte would be off
by as much. Units: nats, tokens, UTF-8 bytes, seconds.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def input_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return how many positions of a batch are attended, 0-dimensional."""
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].sum()
    first, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if torch.is_tensor(embedded):
        return torch.tensor(embedded.shape[:-1].numel())
    return torch.tensor(first.numel() if torch.is_tensor(first) else 0)


def _precise(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, where the device has it: counts beyond 2**24 must not lose their units."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


class Measured:
    """Sums of whatever the objective measures, by name."""

    def __init__(self) -> None:
        self.measured: dict[str, torch.Tensor] = {}

    def add_measured(self, measured: Mapping[str, torch.Tensor]) -> None:
        """Add what the objective measured of a batch."""
        for name, value in measured.items():
            self.measured[name] = self.measured[name] + value if name in self.measured else value

    def all_measured(self, reduce: Reduce) -> dict[str, torch.Tensor]:
        """Return the sums over the processes."""
        return {name: reduce(value) for name, value in sorted(self.measured.items())}


class TrainingTotals(Measured):
    """What was trained since the last log entry: nats, items, bytes, tokens and the time it took."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Begin again, now."""
        self._sums: torch.Tensor | None = None
        self.measured = {}
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Start the clock if nothing has been added yet."""
        if self._sums is None:
            self.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of something that isn't training."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - since

    def add_loss(self, sums: torch.Tensor, items: torch.Tensor) -> None:
        """Add the loss of a micro-batch: of its first term, summed `sums` `(terms,)`, nats, over `items` `(terms,)`.

        Args:
            sums: `(terms,)`, nats; the first term counts.
            items: `(terms,)`.
        """
        self._add(sums.detach()[0], items[0], None, None)

    def add_batch(self, tokens: torch.Tensor, num_bytes: torch.Tensor | None) -> None:
        """Add the size of a micro-batch: attended positions, 0-dimensional, and bytes of each row `(rows,)` if known.

        Args:
            tokens: Attended positions, 0-dimensional.
            num_bytes: Bytes of each row `(rows,)`, if known.
        """
        self._add(None, None, None if num_bytes is None else num_bytes.sum(), tokens)

    def _add(self, *values: torch.Tensor | None) -> None:
        device = next(value.device for value in values if value is not None)
        zero = torch.zeros((), device=device)
        found = torch.stack([_precise(zero if value is None else value.to(device)) for value in values])
        self._sums = found if self._sums is None else self._sums + found.to(self._sums.device)

    def summary(self, reduce: Reduce, language: bool, per_byte: bool) -> dict[str, float]:
        """Return the figures since the last call and begin again.

        Args:
            reduce: Sums a tensor over the processes.
            language: Whether the loss is a mean over tokens, so that its exponential is a perplexity.
            per_byte: Whether every byte of the text was predicted, so that bits per byte mean something.
        """
        if self._sums is None:
            return {}
        nats, items, num_bytes, tokens = reduce(self._sums).tolist()
        seconds = max(time.perf_counter() - self._started, 1e-9)
        self.clear()
        found = {"tokens_per_second": tokens / seconds}
        if language and items:
            found["perplexity"] = math.exp(min(nats / items, 700.0))
        if language and per_byte and num_bytes:
            found["bits_per_byte"] = nats / math.log(2) / num_bytes
        return found


class EvaluationTotals(Measured):
    """Sums over an evaluation: of the loss by term, and of whatever the objective measures."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: torch.Tensor | None = None
        self.items: torch.Tensor | None = None

    def add_loss(self, sums: torch.Tensor, items: torch.Tensor) -> None:
        """Add the loss of a batch: each term's sum and its items, both `(terms,)`.

        Args:
            sums: `(terms,)`, nats.
            items: `(terms,)`.
        """
        sums, items = _precise(sums.detach()), _precise(items.to(sums.device))
        self.sums = sums if self.sums is None else self.sums + sums
        self.items = items if self.items is None else self.items + items

    def loss(self, reduce: Reduce) -> float | None:
        """Return the mean over all items, summed over the terms of the loss; None if nothing was added."""
        if self.sums is None or self.items is None:
            return None
        return float((reduce(self.sums) / reduce(self.items).clamp(min=1)).sum())
