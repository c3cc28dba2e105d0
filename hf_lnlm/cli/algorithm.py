"""`hf-lnlm pretrain` of an algorithmic task: a Turing machine or neural computer learns from rows drawn as it goes.

The recipe's objective names the task (`copy`, `repeat_copy` …); its options are the task's sizes and the curriculum's.
There is no text, no tokenizer and no end of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.algorithmic import IGNORED, TASKS, Curriculum, Row, Stream, Task, algorithmic_task, pad_rows, wrong_bits
from ..trainer.curriculum import CurriculumCallback
from .errors import UsageProblem
from .models import check_fields
from .recipe import Recipe, typed_section
from .run import Parts, seed_everything

HEAD = "ForSequenceTransduction"
BARE: dict[str, Any] = {"residual": False, "controller_size": 100, "use_cache": False}
"""Config fields of the papers' networks, for recipes that name no size."""

TRAINING: dict[str, Any] = {
    "max_steps": 10_000,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.99,
    "max_grad_norm": 10.0,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 4,
    "logging_steps": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_steps": 0.25,
    "save_total_limit": 2,
    "seed": 0,
}
"""TrainingArguments, unless the recipe says otherwise."""

MEASURED_ROWS = 64


@dataclass(frozen=True)
class CurriculumSection:
    """Options of the objective beside the task's sizes.

    Attributes:
        first: longest size at first; no curriculum if None.
        threshold: share of wrong bits below which sizes grow.
    """

    first: int | None = None
    threshold: float = 0.1


@dataclass(frozen=True)
class Algorithm:
    """What is learnt, as the run sees it.

    Attributes:
        task: draws the rows.
    """

    task: Task

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Any:
        """A function from rows to a batch; nothing in it is random."""
        return pad_rows

    def sums(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bits asked for, wrong bits and rows; `logits` is `[batch, length, bits]`."""
        labels = batch["labels"]
        return {
            "bits": (labels != IGNORED).sum().double(),
            "wrong": wrong_bits(logits, labels).sum().double(),
            "rows": torch.tensor(float(len(labels)), dtype=torch.float64),
        }

    def summary(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`wrong_bits` a row, `accuracy` of bits."""
        wrong = sums["wrong"]
        return {"wrong_bits": float(wrong / sums["rows"]), "accuracy": float(1 - wrong / sums["bits"])}


def is_algorithm(recipe: Recipe) -> bool:
    """Whether the recipe's objective is an algorithmic task."""
    return recipe.objective.name in TASKS


def resolve_algorithm(recipe: Recipe) -> None:
    """Check model and options of a recipe whose objective is an algorithmic task.

    Raises:
        UsageProblem: the family has no head for it, an option is unknown, or the recipe names data.
    """
    from ..registry import FAMILIES

    if recipe.model.family is None and recipe.model.checkpoint is None:
        raise UsageProblem("no model: give --family, --checkpoint, or a recipe with model.family")
    able = [row.model_type for row in FAMILIES if any(name.endswith(HEAD) for name in row.extra_models)]
    if recipe.model.family is not None and recipe.model.family not in able:
        raise UsageProblem(f"task {recipe.objective.name!r} needs one of {', '.join(able)}, got {recipe.model.family}")
    if recipe.data.source is not None:
        raise UsageProblem(f"task {recipe.objective.name!r} draws its own rows: data.source must be left out")
    if recipe.lora.enabled:
        raise UsageProblem(f"task {recipe.objective.name!r} is learnt in full: lora.enabled must be false, got true")
    _task_and_curriculum(recipe)


def _task_and_curriculum(recipe: Recipe) -> tuple[Task, CurriculumSection]:
    name, options = str(recipe.objective.name), recipe.objective.options
    of_curriculum: dict[str, Any] = {key: options[key] for key in ("first", "threshold") if key in options}
    sizes = {key: value for key, value in options.items() if key not in of_curriculum}
    task = algorithmic_task(name, **typed_section(TASKS[name], sizes, "objective"))
    return task, CurriculumSection(**typed_section(CurriculumSection, of_curriculum, "objective"))


def algorithm_parts(recipe: Recipe) -> Parts:
    """Model, endless rows and measured rows of a checked recipe; completes the recipe on the way.

    Raises:
        ValueError: the parts don't fit each other.
    """
    task, section = _task_and_curriculum(recipe)
    recipe.training = TRAINING | recipe.training
    seed = seed_everything(recipe)
    model = _model(recipe, task)
    stream = Stream(task, int(recipe.training["per_device_train_batch_size"]), seed, section.first)
    callbacks = [CurriculumCallback(Curriculum(stream, section.threshold))] if section.first is not None else []
    measured = f"{MEASURED_ROWS} rows of {task.name}, size {task.longest}"
    return Parts(model, None, Algorithm(task), stream, measured_rows(task), measured, callbacks)


def measured_rows(task: Task) -> list[Row]:
    """Fixed rows of the task's largest size."""
    generator = torch.Generator().manual_seed(10_000 + task.longest)
    return [task.row(generator, task.longest) for _ in range(MEASURED_ROWS)]


def _model(recipe: Recipe, task: Task) -> Any:
    """A fresh transducer of the task's widths, or the checkpoint's."""
    from ..registry import family
    from .plot import load_transducer

    if recipe.model.checkpoint is not None:
        model = load_transducer(recipe.model.checkpoint)
        found = (model.config.input_size, model.config.output_size)
        if found != (task.input_size, task.output_size):
            wanted = (task.input_size, task.output_size)
            raise UsageProblem(f"task {task.name!r} has widths {wanted}, {recipe.model.checkpoint} has {found}")
        return model.train()
    import hf_lnlm

    row = family(str(recipe.model.family))
    config_class: Any = row.config_class
    check_fields(config_class, recipe.model.config)
    fields = dict(row.sizes[recipe.model.size]) if recipe.model.size else BARE | {"hidden_size": task.output_size}
    widths = {"input_size": task.input_size, "output_size": task.output_size}
    (name,) = [name for name in row.extra_models if name.endswith(HEAD)]
    return getattr(hf_lnlm, name)(config_class(**(fields | widths | recipe.model.config)))
