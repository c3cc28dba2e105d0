"""Text for the objectives that need no labels: loading it once, and cutting it into rows or lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.sources import Documents, load_documents
from .errors import UsageProblem
from .recipe import DataSection, Recipe

DEFAULT_SHARE = 0.05
"""Share of the documents set aside where neither the recipe nor the source has validation text."""


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
        """The training texts, for building a tokenizer."""
        return (row["text"] for row in self.documents.train)


def source_name(source: Any) -> str:
    """A source without the folders it lies in."""
    if source == "stdlib":
        return "Python's standard library"
    names = source if isinstance(source, list) else [source]
    return ", ".join(Path(str(name)).name for name in names)


def _documents(data: DataSection, validation: Any, seed: int) -> Documents:
    return load_documents(
        _one_source(data.source),
        text_column=data.text_column,
        validation=validation,
        encoding=data.encoding,
        errors=data.errors,
        unit=data.unit,
        streaming=data.streaming,
        limit=data.limit,
        seed=seed,
    )


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
    named = data.validation if isinstance(data.validation, str) else data.source
    return Text(_limited(documents, data), source_name(named))


def _limited(documents: Documents, data: DataSection) -> Documents:
    """With `data.limit`, a tenth as many validation documents: a trial run shouldn't spend its time on evaluation."""
    if data.limit is None or documents.validation is None:
        return documents
    most = max(1, data.limit // 10)
    held = documents.validation
    held = held.select(range(min(most, len(held)))) if hasattr(held, "__len__") else held.take(most)
    return Documents(documents.train, held)


def packed(recipe: Recipe, goal: Any, text: Text, tokenizer: Any, model: Any) -> tuple[Any, Any | None]:
    """Training and validation datasets: lanes for a model that carries its state, else packed blocks.

    Args:
        recipe: `data.mode` says which; `auto` becomes what is used.
        goal: the objective; knows how its rows are cut.
        text: documents.
        tokenizer: the run's.
        model: tells whether it carries state.

    Raises:
        ValueError: the text is too short, or the mode doesn't fit.
    """
    data = recipe.data
    if data.mode == "auto":
        carries = goal.takes_lanes(model) and not data.streaming
        data.mode = "lanes" if carries and (goal.direction != "forward" or _is_purely_recurrent(model)) else "blocks"
    if getattr(goal, "memory", False) and data.mode != "lanes":
        raise UsageProblem("objective.memory=true needs data.mode=lanes, without data.streaming")
    if data.mode == "lanes":
        return _lanes(recipe, goal, text, tokenizer, model)
    options = {"length": data.block_size, "frame": data.frame}
    held = text.documents.validation
    train = goal.rows(text.documents.train, tokenizer, **options)
    return train, None if held is None else _validation(lambda: goal.rows(held, tokenizer, **options))


def _validation(make: Callable[[], Any]) -> Any:
    """What `make` gives; its error says that it is the validation text that doesn't do."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"validation: {error} (data.validation=0 goes without)") from None


def _is_purely_recurrent(model: Any) -> bool:
    """Whether all that the model remembers is recurrent state (the tokens that attention remembers aren't carried)."""
    from ..nn.state import RECURRENT_LAYER_TYPE

    kinds = getattr(model.config, "layer_types", None) or []
    return bool(kinds) and all(kind == RECURRENT_LAYER_TYPE for kind in kinds)


def _lanes(recipe: Recipe, goal: Any, text: Text, tokenizer: Any, model: Any) -> tuple[Any, Any | None]:
    """Contiguous lanes, one for each row of a step, and the TrainingArguments that go with them."""
    from ..data.lanes import Lanes

    data, arguments = recipe.data, recipe.training
    if data.streaming:
        raise UsageProblem("data.mode=lanes goes without data.streaming")
    if not goal.takes_lanes(model):
        raise UsageProblem(
            f"data.mode=lanes needs an objective and a model that carries state; {goal.name} with "
            f"{model.config.model_type} has none"
        )
    arguments |= {"carry_state": True, "train_sampling_strategy": "sequential", "dataloader_drop_last": True}
    processes = world_size()
    options: dict[str, Any] = {"frame": data.frame}
    if hasattr(goal, "boundaries"):
        options["boundaries"] = goal.boundaries
    rows = int(arguments.get("per_device_train_batch_size", 8))
    length, held = data.block_size or 0, text.documents.validation
    train = Lanes(text.documents.train, tokenizer, length, rows * processes, **options)
    if held is None:
        return train, None
    # as many lanes as the validation text fills; it may be short
    windows = len(_validation(lambda: Lanes(held, tokenizer, length, 1, **options)))
    rows = max(1, min(rows, windows // processes))
    arguments["per_device_eval_batch_size"] = rows
    return train, _validation(lambda: Lanes(held, tokenizer, length, rows * processes, **options))


def world_size() -> int:
    """Processes that train together, as torchrun announces them."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))
