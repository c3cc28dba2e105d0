"""Evaluation: measure checkpoints on text or on labelled rows."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..data.section import DataSection
from ..data.sources import Documents
from ..data.tokenizers import check_vocabulary
from ..errors import UsageProblem
from ..hub.card import write_evaluation
from ..hub.folder import json_text, read_text
from ..objectives import OBJECTIVES
from ..tasks import TASKS
from ..tasks.base import Task
from .coerce import MAXIMUM_RECIPE_BYTES, yaml_mapping
from .documents import Text, load_text, measured_name, packed
from .finetune import head_options, objective_class, require_head
from .labelled import LONGEST_ROW, classes_of, encoded, problem_type, read_rows, tell_strange_labels
from .manifest import recording
from .models import adapter_settings, load_config, load_padding_tokenizer, load_trained
from .output import say
from .pretrain import check_options, fit_block
from .recipe import RECIPE_FILE, Recipe, load_recipe
from .report import write_report
from .request import recipe_keys
from .run import Run, TrainingSetup, own_metrics

_COLUMNS = tuple(item.name for item in fields(DataSection) if item.name.endswith("_column"))
BESIDE: dict[str, tuple[str, ...] | None] = {
    "model": ("labels",),
    "objective": None,
    "data": (*_COLUMNS, "unit", "encoding", "errors", "frame", "mode", "block_size", "limit"),
    "training": ("seed", "per_device_eval_batch_size"),
}
"""What a recipe that lies beside a checkpoint may say of its evaluation: task, columns, limits; None for all."""
DATA_BESIDE = ("source", "validation", "streaming")
"""… and what it may say of the data where none is given."""


def evaluate(
    checkpoint: str | Path,
    *,
    report: str | Path | None = None,
    save: bool = True,
    settings: Sequence[str] = (),
    trust_remote_code: bool | None = None,
    allow_new_weights: bool = False,
    **overrides: Any,
) -> Run:
    """Measure a checkpoint, as `hf-lnlm evaluate` does.

    Args:
        checkpoint: folder or Hub repository.
        report: folder for a report by class, or None for none.
        save: write `evaluation.json` into the checkpoint's folder.
        trust_remote_code: run Python code that the checkpoint carries.
        allow_new_weights: draw a head at random where the checkpoint has none.
        settings, overrides: see `flows.request.Request`: `data="held_out.txt"`, `task="masked"`.

    Returns:
        `checkpoint`, `task`, `data` and `metrics`, and the checkpoint's folder.

    Raises:
        ValueError: checkpoint, data and task don't fit each other.
    """
    name, folder = str(checkpoint), Path(checkpoint)
    recipe = evaluation_recipe(name, dict(recipe_keys(overrides)), settings, bool(trust_remote_code))
    found = measure(recipe, None if report is None else Path(report), allow_new_weights)
    if save and folder.is_dir():
        with recording(folder):
            write_evaluation(folder, found)
    return Run({"checkpoint": name, **found}, folder)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict JSON, with the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def evaluation_recipe(
    checkpoint: str, flags: dict[str, Any], settings: Sequence[str], trust_remote_code: bool = False
) -> Recipe:
    """What to measure: what the recipe beside the checkpoint says of it, if there is one, with the flags over it.

    With `data.source` given anew all of it is measured; else the held-out part of what it was trained on, which is named.
    Of a recipe that somebody put beside a checkpoint only `BESIDE` is read.

    Raises:
        UsageProblem: nothing says what to measure on, or a name is unknown.
    """
    fresh = "data.source" in flags or any(item.startswith("data.source=") for item in settings)
    if fresh:
        # what the recipe says of its own data (limit, held-out part, way of cutting) doesn't hold for other data
        flags = {"data.validation": 0.0, **flags}
        settings = ["data.limit=null", "data.mode=blocks", "data.streaming=false", *settings]
    recipe = load_recipe(_beside(Path(checkpoint), fresh), flags, settings)
    if not fresh and recipe.data.source is not None:
        say(f"data       {recipe.data.source}, as {Path(checkpoint) / RECIPE_FILE} says", sys.stderr)
    recipe.model.trust_remote_code = trust_remote_code
    recipe.model = replace(recipe.model, family=None, checkpoint=checkpoint, config={})
    recipe.lora.enabled = False
    if recipe.data.source is None:
        raise UsageProblem(f"nothing says what to measure {checkpoint} on: give --data")
    recipe.objective.name = recipe.objective.name or objective_of_checkpoint(recipe)
    check_options(recipe, objective_class(recipe.objective.name))
    return recipe


def _beside(folder: Path, fresh: bool) -> dict[str, Any] | None:
    """What is read of the recipe beside a checkpoint.

    Args:
        folder: the checkpoint's.
        fresh: whether the data is given anew, so that the recipe's is of no interest.
    """
    if not (folder / RECIPE_FILE).exists():
        return None
    values = yaml_mapping(read_text(folder / RECIPE_FILE, MAXIMUM_RECIPE_BYTES), str(folder / RECIPE_FILE))
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}
    found = {
        name: {key: value for key, value in sections.get(name, {}).items() if keys is None or key in keys}
        for name, keys in BESIDE.items()
    }
    if not fresh:
        found["data"] |= {key: sections["data"][key] for key in DATA_BESIDE if key in sections.get("data", {})}
    return found


def objective_of_checkpoint(recipe: Recipe) -> str:
    """What a checkpoint was made for, by the name of its architecture.

    Raises:
        UsageProblem: nothing known.
    """
    from ..hub.card import auto_class

    config = load_config(recipe.model)
    auto = auto_class((getattr(config, "architectures", None) or [""])[0])
    for name, kind in OBJECTIVES.items():
        if kind.loader(config) == auto and kind.fits(config) and not kind.composes(config):
            return name
    for name, task in TASKS.items():
        if task.auto_class == auto and task.problem_type in (None, problem_type(config)):
            return name
    raise UsageProblem(f"what {recipe.model.checkpoint} was made for can't be told from its config: give --task")


def measure(recipe: Recipe, report: Path | None = None, allow_new_weights: bool = False) -> dict[str, Any]:
    """Metrics of the recipe's checkpoint: `data`, `task`, `metrics`.

    Args:
        recipe: what to measure and on what.
        report: folder for a report by class, or None for none.
        allow_new_weights: draw a head at random where the checkpoint has none.

    Raises:
        ValueError: checkpoint, data and task don't fit each other.
    """
    from transformers import PrinterCallback

    objective = objective_class(str(recipe.objective.name))(**recipe.objective.options)
    config = load_config(recipe.model)
    tokenizer = load_padding_tokenizer(str(recipe.model.checkpoint), recipe.model)
    setup = (_labelled if objective.labelled else _text)(recipe, objective, tokenizer, config, allow_new_weights)
    check_vocabulary(tokenizer, setup.model.config)
    kept = ("per_device_eval_batch_size", "seed", "bf16", "use_cpu", "carry_state")
    training = {name: recipe.training[name] for name in kept if name in recipe.training}
    with tempfile.TemporaryDirectory() as scratch:
        training |= {"output_dir": scratch, "train_sampling_strategy": "sequential", "dataloader_pin_memory": False}
        trainer = setup.trainer(replace(recipe, training=training))
        trainer.remove_callback(PrinterCallback)
        metrics = own_metrics(trainer.evaluate())
    if report is not None:
        title = f"{Path(str(recipe.model.checkpoint)).name} on {setup.measured_on}"
        write_report(report, trainer.measured_sums, getattr(setup.objective, "measured_classes", ()), title)
    return {"task": objective.name, "data": setup.measured_on, "metrics": metrics}


def _text(recipe: Recipe, objective: Any, tokenizer: Any, config: Any, allow_new: bool) -> TrainingSetup:
    """What measures an objective on text."""
    objective.check(config, tokenizer)
    fit_block(recipe, config, 128)
    text = load_text(recipe, int(recipe.training.get("seed", 0)))
    held = text.documents.validation if text.documents.validation is not None else text.documents.train
    changed = objective.continuation_overrides(config, recipe.objective.options)
    model = load_trained(recipe.model, objective.loader(config), allow_new, **changed)
    recipe.training.setdefault("per_device_train_batch_size", recipe.training.get("per_device_eval_batch_size", 8))
    recipe.training["carry_state"] = False
    _, dataset = packed(recipe, objective, Text(Documents(None, held), text.name), tokenizer, model)
    return TrainingSetup(model, tokenizer, objective, None, dataset, text.name)


def _labelled(recipe: Recipe, objective: Task, tokenizer: Any, config: Any, allow_new: bool) -> TrainingSetup:
    """What measures a task on rows with labels."""
    require_head(config, objective)
    adapter = adapter_settings(str(recipe.model.checkpoint)) is not None
    rows = read_rows(recipe, objective, recipe.model.labels or () if adapter else classes_of(config))
    held = rows.validation if rows.validation is not None else rows.train
    fit_block(recipe, config, LONGEST_ROW)
    fields = objective.head_fields(recipe.model.labels or ())
    options = head_options(config, tokenizer, fields) if adapter else {}
    model = load_trained(recipe.model, objective.auto_class, allow_new, **options)
    dataset = encoded(objective.encode_held, held, recipe, tokenizer, model.config)
    tell_strange_labels(dataset.rows, model.config)
    objective = objective.bound(model.config).measuring(dataset.rows)
    return TrainingSetup(model, tokenizer, objective, None, dataset, measured_name(recipe.data))
