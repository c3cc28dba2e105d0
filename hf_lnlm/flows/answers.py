"""What a model says of rows: labels, tags, answers, choices and texts of the tasks, and how likely texts are.

An asker turns rows into items of its own (a row may be several: windows of a long text), gives batches of them to the
model and joins what comes back to one answer a row.

References:
    [1] Salazar, Liang, Nguyen and Kirchhoff 2020, Masked Language Model Scoring, arXiv 1910.14659 (pseudo-perplexity)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.blocks import Layout
from ..data.cells import text_cell
from ..data.labelled import Row
from ..data.tokens import Encoder
from ..errors import UsageProblem
from ..objectives.base import IGNORED, pad_id, pad_rows, present
from ..objectives.masked import framed, require_mask_token, special_ids
from ..tasks.base import Task, padded_inputs
from .recipe import Recipe

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Item(NamedTuple):
    """What the model is given of a row.

    Attributes:
        row: its place among the rows that are asked together.
        size: how long it is; items of like size go together.
        kind: only items of one kind go together.
        content: what the asker knows it by.
    """

    row: int
    size: int
    kind: int
    content: Any


class Asker(ABC):
    """Asks a model about rows.

    Args:
        objective: a task, or a language model's objective.
        tokenizer: the model's.
        model: ready for evaluation, on the device that it runs on.
        recipe: columns, longest row and precision.
    """

    def __init__(self, objective: Any, tokenizer: Any, model: Any, recipe: Recipe) -> None:
        self.objective, self.tokenizer, self.model = objective, tokenizer, model
        self.data, self.length = recipe.data, int(recipe.data.block_size or 0)
        self.bf16 = bool(recipe.training.get("bf16"))
        self.cut = 0

    @abstractmethod
    def read(self, row: Row) -> Row:
        """A row with its cells as what they mean.

        Raises:
            ValueError: a column is missing or holds something else; names it.
        """

    @abstractmethod
    def items(self, rows: Sequence[Row]) -> list[Item]:
        """The items of rows.

        Raises:
            ValueError: a row can't be asked about; names its place.
        """

    @abstractmethod
    def ask(self, contents: Sequence[Any]) -> list[Any]:
        """What the model says of a batch of items, one for each."""

    def joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        """The answer of a row from what was said of its items, in their order."""
        return parts[0]

    def outputs(self, batch: dict[str, Tensor]) -> Any:
        """The model's outputs for a batch, of which nothing but its inputs is handed on."""
        inputs = {name: batch[name].to(self.model.device) for name in _INPUTS if name in batch}
        if bool(inputs["attention_mask"].all()):
            del inputs["attention_mask"]
        mixed = torch.autocast(self.model.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with torch.no_grad(), mixed:
            return self.model(**inputs)


class TaskAsker(Asker):
    """Labels, tags, answers and choices."""

    objective: Task

    def read(self, row: Row) -> Row:
        """A row without its answer."""
        return self.objective.read_inputs(row, self.data)

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """One item a row, which may hold several windows or choices."""
        found, cut = self.objective.encode_inputs(rows, self.data, self.tokenizer, self.model.config, self.length)
        self.cut += cut
        return [Item(index, *_extent(row), row) for index, row in enumerate(found)]

    def ask(self, contents: Sequence[Any]) -> list[Any]:
        """What the task reads from the logits."""
        batch = self.objective.collator(self.tokenizer)(contents)
        logits = self.objective.logits(self.outputs(batch))
        return self.objective.predictions(logits, contents)


def _extent(row: Row) -> tuple[int, int]:
    """(tokens, kind) of an encoded row; those with as many choices are of one kind."""
    if "choices" in row:
        return max(len(choice["input_ids"]) for choice in row["choices"]), len(row["choices"])
    if "windows" in row:
        return len(row["windows"]) * max(len(window.inputs["input_ids"]) for window in row["windows"]), 0
    return len(row["input_ids"]), 0


class Writer(TaskAsker):
    """Target texts."""

    def ask(self, contents: Sequence[Any]) -> list[Any]:
        """`text`: what the model writes, by the task's `num_beams` and `max_new_tokens`."""
        batch = {name: value.to(self.model.device) for name, value in padded_inputs(contents, self.tokenizer).items()}
        options = {"num_beams": self.objective.num_beams, "max_new_tokens": self.objective.max_new_tokens}  # type: ignore[attr-defined]
        with torch.no_grad():
            ids = self.model.generate(**batch, pad_token_id=self.tokenizer.pad_token_id, do_sample=False, **options)
        return [{"text": text} for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class TextAsker(Asker):
    """How likely texts are, each token given those before it: `tokens`, `loss`, `perplexity`, `bits_per_byte`.

    A text longer than a row is cut into windows that share one token, so that each token is predicted once; a window
    knows nothing of those before it, as in evaluation.
    """

    def read(self, row: Row) -> Row:
        """A row with text in its text column."""
        column = self.data.text_column
        if column not in row:
            raise ValueError(f"no column {column!r}; its columns are {', '.join(map(str, row)) or 'none'}")
        try:
            return {**row, column: text_cell(row[column])}
        except ValueError as error:
            raise ValueError(f"column {column!r} {error}") from None

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """One item a window: its ids and the bytes of the text in it."""
        encoder, layout = Encoder(self.tokenizer, self.data.frame), Layout(self.length, 1)
        found = []
        for index, row in enumerate(rows):
            tokens = encoder.encode(row[self.data.text_column])
            for at in range(0, max(1, len(tokens.ids) - 1), layout.stride):
                ids = tokens.ids[at : at + layout.body]
                fresh = tokens.num_bytes[at + (at > 0) : at + layout.body]
                found.append(Item(index, len(ids), 0, {"input_ids": ids, "bytes": int(fresh.sum())}))
        return found

    def ask(self, contents: Sequence[Any]) -> list[Any]:
        """(nats, predicted tokens, bytes) of windows."""
        mask = present(contents)
        ids = pad_rows([row["input_ids"] for row in contents], pad_id(self.tokenizer, mask is not None))
        seen = np.ones(ids.shape, bool) if mask is None else mask
        logits = self.outputs(
            {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(seen.astype(np.int64))}
        ).logits[:, :-1]
        labels = torch.from_numpy(np.where(seen, ids, IGNORED)[:, 1:]).to(logits.device)
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums = nats.view(labels.shape).double().sum(1).tolist()
        return list(zip(sums, (labels != IGNORED).sum(1).tolist(), [row["bytes"] for row in contents]))

    def joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        """Sums over the windows, divided once; None for a text without a predicted token."""
        nats, tokens, size = (sum(values) for values in zip(*parts))
        loss = nats / tokens if tokens else None
        found = {"tokens": tokens, "loss": loss, "perplexity": None if loss is None else math.exp(min(loss, 700.0))}
        return found | ({"bits_per_byte": nats / math.log(2) / size if tokens else None} if self.per_byte else {})

    per_byte = True
    """Whether every byte of a text is predicted given what stands before it, so that bits per byte mean something."""


class MaskedAsker(TextAsker):
    """How likely each token is given all others (pseudo-perplexity [1]); one pass a token."""

    per_byte = False

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """One item a token: its window with cls and sep, and where in it the token stands."""
        require_mask_token(self.objective.name, self.tokenizer)
        frame = framed(self.tokenizer)
        layout = Layout(self.length, head=frame["head"], tail=frame["tail"])
        encoder = Encoder(self.tokenizer, "none")
        unasked = set(special_ids(self.tokenizer))
        found = []
        for index, row in enumerate(rows):
            ids = encoder.encode(row[self.data.text_column]).ids
            asked = 0
            for at in range(0, len(ids), layout.stride):
                window = np.concatenate([frame["head"], ids[at : at + layout.body], frame["tail"]]).astype(np.int64)
                places = [place for place, token in enumerate(window.tolist()) if token not in unasked]
                found += [Item(index, len(window), 0, {"input_ids": window, "place": place}) for place in places]
                asked += len(places)
            if not asked:
                raise ValueError(f"{getattr(row, 'place', f'row {index + 1}')}: no token that can be masked")
        return found

    def ask(self, contents: Sequence[Any]) -> list[Any]:
        """(nats, 1, 0) of tokens."""
        batch = padded_inputs(contents, self.tokenizer)
        rows, places = torch.arange(len(contents)), torch.tensor([row["place"] for row in contents])
        labels = batch["input_ids"][rows, places]
        batch["input_ids"][rows, places] = self.tokenizer.mask_token_id
        logits = self.outputs(batch).logits
        chosen = logits[rows.to(logits.device), places.to(logits.device)].float()
        nats = torch.nn.functional.cross_entropy(chosen, labels.to(logits.device), reduction="none").double().tolist()
        return [(value, 1, 0) for value in nats]


def asker_class(objective: Any) -> type[Asker]:
    """What asks a model of an objective.

    Raises:
        UsageProblem: it has no answer for a single row.
    """
    if objective.labelled:
        return Writer if objective.auto_class == "AutoModelForSeq2SeqLM" else TaskAsker
    kinds: dict[str, type[Asker]] = {"causal": TextAsker, "masked": MaskedAsker}
    if objective.name not in kinds:
        raise UsageProblem(
            f"objective {objective.name!r} has no answer for a single row: predict takes the tasks with labels, "
            f"{' and '.join(kinds)} (--task)"
        )
    return kinds[objective.name]
