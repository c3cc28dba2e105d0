"""`hf-lnlm evaluate`: measure checkpoints on text or on labelled rows, as JSON and a table."""

from __future__ import annotations

import json as json_module
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.sources import Documents
from ..data.tokenizers import check_vocabulary
from ..objectives import OBJECTIVES
from .console import print_json, table
from .documents import Text, load_text, packed, source_name
from .errors import UsageProblem
from .finetune import LONGEST_ROW, encoded, goal_class, head_options, read_rows, require_head
from .models import adapter_settings, load_config, load_model, load_tokenizer
from .output import plain_when_piped
from .pretrain import check_options, check_positions, default_block
from .recipe import RECIPE_FILE, Recipe, load_recipe
from .report import write_report
from .run import own_metrics, trainer_class
from .tasks import TASKS, Task

EVALUATION_FILE = "evaluation.json"


def evaluate(
    checkpoints: list[str],
    data: str | None,
    task: str | None,
    text_column: str | None,
    label_column: str | None,
    output: str | None,
    report: str | None,
    json: bool,
    trust_remote_code: bool,
    set: list[str] | None,
) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    flags = {
        "objective.name": task,
        "data.source": data,
        "data.text_column": text_column,
        "data.label_column": label_column,
        "model.trust_remote_code": trust_remote_code or None,
    }
    results = []
    for checkpoint in checkpoints:
        recipe = evaluation_recipe(checkpoint, flags, list(set or []))
        place = Path(checkpoint) / EVALUATION_FILE
        results.append({"checkpoint": checkpoint, **measure(recipe, _report_folder(report, checkpoint, checkpoints))})
        if output is None and place.parent.is_dir():
            _write(place, {name: value for name, value in results[-1].items() if name != "checkpoint"})
    if output is not None:
        _write(Path(output), results)
    if json:
        print_json(results)
    else:
        _print_table(results)
    return 0


def _report_folder(report: str | None, checkpoint: str, checkpoints: list[str]) -> Path | None:
    """Where the report of a checkpoint goes: one of several gets a folder of its own."""
    if report is None:
        return None
    if len(checkpoints) == 1:
        return Path(report)
    names = [Path(item).name for item in checkpoints]
    if len(set(names)) < len(names):
        names = [Path(item).as_posix().strip("/.").replace("/", "_") for item in checkpoints]
    return Path(report) / names[checkpoints.index(checkpoint)]


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_module.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _print_table(results: list[dict[str, Any]]) -> None:
    names = sorted({name for result in results for name in result["metrics"]})
    rows = [
        [result["checkpoint"], result["task"], result["data"]]
        + [f"{result['metrics'][name]:.5g}" if name in result["metrics"] else "" for name in names]
        for result in results
    ]
    table("Evaluation", ["checkpoint", "task", "data", *(name.replace("_", " ") for name in names)], rows)


def evaluation_recipe(checkpoint: str, flags: dict[str, Any], settings: list[str]) -> Recipe:
    """What to measure: the recipe beside the checkpoint, if there is one, with the flags over it.

    With `data.source` given anew all of it is measured; else the held-out part of what it was trained on.

    Raises:
        UsageProblem: nothing says what to measure on, or a name is unknown.
    """
    beside = Path(checkpoint) / RECIPE_FILE
    path = beside if beside.is_file() else None
    fresh = flags["data.source"] is not None or any(item.startswith("data.source=") for item in settings)
    if fresh:
        # what the recipe says of its own data (limit, held-out part, way of cutting) doesn't hold for other data
        flags = {"data.validation": 0.0, **flags}
        settings = ["data.limit=null", "data.mode=blocks", "data.streaming=false", *settings]
    recipe = load_recipe(path, {**flags, "model.checkpoint": None}, settings)
    recipe.model = replace(recipe.model, family=None, checkpoint=checkpoint, config={})
    recipe.lora.enabled = False
    if recipe.data.source is None:
        raise UsageProblem(f"nothing says what to measure {checkpoint} on: give --data")
    recipe.objective.name = recipe.objective.name or default_goal(recipe)
    check_options(recipe, goal_class(recipe.objective.name))
    return recipe


def default_goal(recipe: Recipe) -> str:
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
        if task.auto_class == auto:
            return name
    raise UsageProblem(f"what {recipe.model.checkpoint} was made for can't be told from its config: give --task")


def measure(recipe: Recipe, report: Path | None = None) -> dict[str, Any]:
    """Metrics of the recipe's checkpoint: `data`, `task`, `metrics`.

    Args:
        recipe: what to measure and on what.
        report: folder for a report by class, or None for none.

    Raises:
        ValueError: checkpoint, data and task don't fit each other.
    """
    from transformers import PrinterCallback

    from ..trainer.arguments import LNLMSeq2SeqTrainingArguments, LNLMTrainingArguments

    goal = goal_class(str(recipe.objective.name))(**recipe.objective.options)
    config = load_config(recipe.model)
    tokenizer = load_tokenizer(str(recipe.model.checkpoint), recipe.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    make = _labelled if isinstance(goal, Task) else _text
    model, dataset, name = make(recipe, goal, tokenizer, config)
    check_vocabulary(tokenizer, model.config)
    goal = goal.bound(model.config).measuring(dataset.rows) if isinstance(goal, Task) else goal
    kept = {k: v for k, v in recipe.training.items() if k in ("per_device_eval_batch_size", "seed", "bf16", "use_cpu")}
    generation = goal.generation() if isinstance(goal, Task) else {}
    kind = LNLMSeq2SeqTrainingArguments if generation else LNLMTrainingArguments
    with tempfile.TemporaryDirectory() as scratch:
        arguments = kind(
            output_dir=scratch,
            **{"prediction_loss_only": True, **generation},
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            carry_state=recipe.training.get("carry_state", False),
            train_sampling_strategy="sequential",
            **kept,
        )
        trainer = trainer_class(goal)(
            model=model,
            args=arguments,
            eval_dataset=dataset,
            data_collator=goal.collator(tokenizer, arguments.seed, bookkeeping=True),
            processing_class=tokenizer,
            objective=goal,
            compute_metrics=goal.rater(tokenizer) if isinstance(goal, Task) else None,
        )
        trainer.remove_callback(PrinterCallback)
        metrics = own_metrics(trainer.evaluate())
    if report is not None:
        classes = goal.classes if isinstance(goal, Task) else ()
        write_report(report, trainer.measured_sums, classes, f"{Path(str(recipe.model.checkpoint)).name} on {name}")
    return {"task": goal.name, "data": name, "metrics": metrics}


def _text(recipe: Recipe, goal: Any, tokenizer: Any, config: Any) -> tuple[Any, Any, str]:
    """(model, dataset, name of the data) for an objective."""
    goal.check(config, tokenizer)
    recipe.data.block_size = recipe.data.block_size or default_block(config, 128)
    check_positions(config, recipe.data.block_size)
    text = load_text(recipe, int(recipe.training.get("seed", 0)))
    held = text.documents.validation if text.documents.validation is not None else text.documents.train
    model = load_model(recipe.model, goal.loader(config), **goal.going_on(config, recipe.objective.options))
    recipe.training.setdefault("per_device_train_batch_size", recipe.training.get("per_device_eval_batch_size", 8))
    recipe.training["carry_state"] = False
    dataset, _ = packed(recipe, goal, Text(Documents(held, None), text.name), tokenizer, model)
    if recipe.training["carry_state"]:
        recipe.training["per_device_eval_batch_size"] = recipe.training["per_device_train_batch_size"]
    return model, dataset, text.name


def _labelled(recipe: Recipe, goal: Task, tokenizer: Any, config: Any) -> tuple[Any, Any, str]:
    """(model, dataset, name of the data) for a task."""
    require_head(config, goal)
    rows = read_rows(recipe, goal)
    held = rows.validation if rows.validation is not None else rows.train
    recipe.data.block_size = recipe.data.block_size or default_block(config, LONGEST_ROW)
    check_positions(config, recipe.data.block_size)
    options: dict[str, Any] = {}
    if adapter_settings(str(recipe.model.checkpoint)):
        options = head_options(config, tokenizer, recipe.model.labels)
    model = load_model(recipe.model, goal.auto_class, **options)
    named = recipe.data.validation if isinstance(recipe.data.validation, str) else recipe.data.source
    return model, encoded(goal.encode_held, held, recipe, tokenizer, model.config), source_name(named)
