"""Text for the objectives that need no labels: loading it once, and cutting it into rows or contiguous streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.fingerprint import Fingerprint, last_text
from ..data.pieces import PIECE, document_blocks, split_blocks
from ..data.section import DataSection
from ..data.sources import Documents, load_documents
from ..errors import UsageProblem
from .output import tell_skipped
from .recipe import Recipe

DEFAULT_SHARE = 0.05
"""Share of the documents set aside where neither the recipe nor the source has validation text."""


@dataclass(frozen=True)
class Texts:
    """The texts of rows, each in blocks, as often as they are asked for."""

    rows: Any

    def __iter__(self) -> Iterator[Iterator[str]]:
        return document_blocks(self.rows)


@dataclass
class Text:
    """Documents of a run.

    Attributes:
        documents: training and validation documents.
        name: what they are, for the model card: no folder of this machine.
    """

    documents: Documents
    name: str

    def samples(self) -> Iterator[str]:
        """The training texts in pieces, for building a tokenizer."""
        return (piece for blocks in document_blocks(self.documents.train) for piece in split_blocks(blocks, PIECE))

    def kept(self) -> list[Texts | None]:
        """The training and the validation texts; None for those that there aren't, or that are read as they come."""
        sides = (self.documents.train, self.documents.validation)
        return [Texts(side) if hasattr(side, "__len__") else None for side in sides]

    def first(self, before: Fingerprint) -> Text:
        """The training texts that an earlier fingerprint was taken of."""
        import datasets

        last = before.rows - 1
        text = last_text(Texts(self.documents.train), before)
        parts = [self.documents.train.select(range(last))] if last else []
        parts.append(datasets.Dataset.from_list([{"text": text}], features=self.documents.train.features))
        return Text(Documents(datasets.concatenate_datasets(parts)), self.name)


def source_name(source: Any) -> str:
    """A source without the folders it lies in."""
    if source == "stdlib":
        return "Python's standard library"
    names = source if isinstance(source, list) else [source]
    return ", ".join(Path(str(name)).name for name in names)


def measured_name(data: DataSection) -> str:
    """Name of what a run is measured on."""
    return source_name(data.validation if isinstance(data.validation, str) else data.source)


def _documents(data: DataSection, validation: Any, seed: int) -> Documents:
    """The documents, and whether any were held out; says which rows were left out."""
    found = load_documents(
        _one_source(data.source),
        text_column=data.text_column,
        validation=validation,
        encoding=data.encoding,
        errors=data.errors,
        unit=data.unit,
        streaming=data.streaming,
        limit=data.limit,
        seed=seed,
        quoted=data.quoted,
        skip_bad_rows=data.skip_bad_rows,
    )
    if found.skipped and (found.validation is not None or data.validation == 0):
        tell_skipped(found.skipped, sum(len(side) for side in (found.train, found.validation) if side is not None))
    return found


def _one_source(source: Any) -> Any:
    if not isinstance(source, list):
        return source
    if len(source) != 1:
        raise UsageProblem(f"data.source wants one file, glob, folder or name here, got {len(source)}")
    return source[0]


def load_text(recipe: Recipe, seed: int) -> Text:
    """The recipe's documents; where nothing says what validates, five in a hundred are set aside.

    Raises:
        FileNotFoundError: nothing has the source's name.
        ValueError: the source holds no text, or not the wanted column.
    """
    data = recipe.data
    if data.validation == 0:
        train = _documents(data, None, seed).train
        return Text(Documents(train, None), source_name(data.source))
    documents = _documents(data, data.validation, seed)
    if documents.validation is None:
        data.validation = DEFAULT_SHARE
        documents = _documents(data, data.validation, seed)
    return Text(_limited(documents, data), measured_name(data))


def _limited(documents: Documents, data: DataSection) -> Documents:
    """With `data.limit`, a tenth as many validation documents: a trial run shouldn't spend its time on evaluation."""
    if data.limit is None or documents.validation is None:
        return documents
    most = max(1, data.limit // 10)
    held = documents.validation
    held = held.select(range(min(most, len(held)))) if hasattr(held, "__len__") else held.take(most)
    return Documents(documents.train, held)


def packed(recipe: Recipe, objective: Any, text: Text, tokenizer: Any, model: Any) -> tuple[Any, Any | None]:
    """Training and validation datasets: contiguous streams for a model that carries its state, else packed blocks.

    Args:
        recipe: `data.mode` says which; `auto` becomes what is used.
        objective: the objective; knows how its rows are cut.
        text: documents; no training ones where a model is only measured.
        tokenizer: the run's.
        model: tells whether it carries state.

    Raises:
        ValueError: the text is too short, or the mode doesn't fit.
    """
    data = recipe.data
    if data.mode == "auto":
        carries = objective.takes_streams(model) and not data.streaming
        data.mode = (
            "lanes" if carries and (objective.direction != "forward" or _is_purely_recurrent(model)) else "blocks"
        )
    if getattr(objective, "memory", False) and data.mode != "lanes":
        raise UsageProblem("objective.memory=true needs data.mode=lanes, without data.streaming")
    if data.mode == "lanes":
        return _streams(recipe, objective, text, tokenizer, model)
    options = {"length": data.block_size, "frame": data.frame}
    train, held = text.documents.train, text.documents.validation
    trained = None if train is None else objective.rows(train, tokenizer, **options)
    return trained, None if held is None else _validation(text, lambda: objective.rows(held, tokenizer, **options))


def _validation(text: Text, make: Callable[[], Any]) -> Any:
    """What `make` gives; beside training text, its error says that it is the validation text that doesn't do."""
    try:
        return make()
    except ValueError as error:
        if text.documents.train is None:
            raise
        raise ValueError(f"validation: {error} (data.validation=0 goes without)") from None


def _is_purely_recurrent(model: Any) -> bool:
    """Whether all that the model remembers is recurrent state (the tokens that attention remembers aren't carried)."""
    from ..nn.state import RECURRENT_LAYER_TYPE

    kinds = getattr(model.config, "layer_types", None) or []
    return bool(kinds) and all(kind == RECURRENT_LAYER_TYPE for kind in kinds)


def _streams(recipe: Recipe, objective: Any, text: Text, tokenizer: Any, model: Any) -> tuple[Any, Any | None]:
    """Contiguous streams, one for each row of a step, and the TrainingArguments that go with them."""
    from ..data.bptt_streams import BPTTStreams

    data, arguments = recipe.data, recipe.training
    if data.streaming:
        raise UsageProblem("data.mode=lanes goes without data.streaming")
    if not objective.takes_streams(model):
        raise UsageProblem(
            f"data.mode=lanes needs an objective and a model that carries state; {objective.name} with "
            f"{model.config.model_type} has none"
        )
    arguments |= {"carry_state": True, "train_sampling_strategy": "sequential", "dataloader_drop_last": True}
    processes = world_size()
    options: dict[str, Any] = {"frame": data.frame}
    if hasattr(objective, "boundaries"):
        options["boundaries"] = objective.boundaries
    rows = int(arguments.get("per_device_train_batch_size", 8))
    length, held = data.block_size or 0, text.documents.validation
    train = text.documents.train
    if train is not None:
        train = BPTTStreams(train, tokenizer, length, rows * processes, **options)
    if held is None:
        return train, None
    # as many streams as the validation text fills; it may be short
    windows = len(_validation(text, lambda: BPTTStreams(held, tokenizer, length, 1, **options)))
    rows = max(1, min(rows, windows // processes))
    arguments["per_device_eval_batch_size"] = rows
    return train, _validation(text, lambda: BPTTStreams(held, tokenizer, length, rows * processes, **options))


def world_size() -> int:
    """Processes that train together, as torchrun announces them."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))
