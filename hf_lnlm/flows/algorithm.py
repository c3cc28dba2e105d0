"""Pre-training on a synthetic task: a model learns from rows drawn as it goes.

Turing machines and neural computers learn the tasks on bits (`copy`, `repeat_copy` …), every causal language model those on
tokens (`induction_heads` …). The recipe's objective names the task, or its data does: `synthetic:copy`. The objective's
options are the task's sizes and the curriculum's. There is no text, no tokenizer and no end of data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..data.algorithmic import TASKS, Curriculum, Row, Stream, Task, pad_rows, wrong_bits
from ..data.token_tasks import TOKEN_TASKS, TokenTask, wrong_tokens
from ..errors import UsageProblem, unknown_name
from ..nn.loss_heads import IGNORED
from ..objectives import OBJECTIVES
from ..objectives.base import BaseObjective
from ..objectives.families import fitting_models
from ..registry import family, is_ours
from ..trainer.curriculum import CurriculumCallback
from .models import check_fields, config_to_train, load_config, load_model, load_trained, new_config, new_model
from .recipe import ModelSection, Recipe, field_types, typed_section
from .run import TrainingSetup, seed_everything

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
SYNTHETIC = "synthetic:"
"""What `data.source` begins with to name a task."""
ALL_TASKS: dict[str, type[Task]] = {**TASKS, **TOKEN_TASKS}


@dataclass(frozen=True)
class CurriculumSection:
    """Options of the objective beside the task's sizes.

    Attributes:
        first: longest size at first; no curriculum if None.
        threshold: share of wrong bits or tokens below which sizes grow.
        tested: size of the measured rows; the longest of training if None.
    """

    first: int | None = None
    threshold: float = 0.1
    tested: int | None = None


@dataclass(frozen=True)
class Algorithm(BaseObjective):
    """What is learnt, as the run sees it.

    Attributes:
        task: draws the rows.
    """

    language: ClassVar[bool] = False

    task: Task

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task's name."""
        return self.task.name

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Any:
        """A function from rows to a batch; nothing in it is random."""
        return pad_rows

    def sums(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bits asked for, wrong bits and rows; `logits` is `(batch, length, bits)`."""
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


@dataclass(frozen=True)
class TokenAlgorithm(Algorithm):
    """What is learnt of a task on tokens."""

    def collator(self, tokenizer: Any, seed: int = 0, *, bookkeeping: bool = False) -> Any:
        """A function from rows of one length to a batch; nothing in it is random."""
        return lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def sums(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokens asked for, wrong ones and rows; `logits` is `(batch, tokens, vocabulary)`."""
        labels = batch["labels"]
        return {
            "bits": (labels != IGNORED).sum().double(),
            "wrong": wrong_tokens(logits, labels).sum().double(),
            "rows": torch.tensor(float(len(labels)), dtype=torch.float64),
        }

    def summary(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`wrong_tokens` a row, `accuracy` of answers."""
        found = super().summary(sums)
        return {"wrong_tokens": found["wrong_bits"], "accuracy": found["accuracy"]}


def name_task_of_data(recipe: Recipe) -> None:
    """Let data named `synthetic:NAME` say the objective, as `objective.name=NAME` would.

    Raises:
        UsageProblem: there is no such task, or the objective is another.
    """
    source = recipe.data.source
    if not isinstance(source, str) or not source.startswith(SYNTHETIC):
        return
    name = source.removeprefix(SYNTHETIC)
    if name not in ALL_TASKS:
        raise unknown_name("synthetic task", name, ALL_TASKS)
    if recipe.objective.name not in (None, name, *(("causal",) if name in TOKEN_TASKS else ())):
        raise UsageProblem(f"{source} is learnt as objective {name!r}, got {recipe.objective.name!r}")
    recipe.objective.name, recipe.data.source = name, None


def is_algorithm(recipe: Recipe) -> bool:
    """Whether the recipe's objective is a synthetic task."""
    return recipe.objective.name in ALL_TASKS


def resolve_algorithm(recipe: Recipe) -> None:
    """Check model and options of a recipe whose objective is an algorithmic task.

    Raises:
        UsageProblem: the family has no head for it, an option is unknown, or the recipe names data.
    """
    from ..registry import FAMILIES

    if recipe.model.family is None and recipe.model.checkpoint is None:
        raise UsageProblem("no model: give --family, --checkpoint, or a recipe with model.family")
    able = [row.model_type for row in FAMILIES if any(name.endswith(HEAD) for name in row.extra_models)]
    if recipe.objective.name in TOKEN_TASKS:
        _require_causal(recipe)
    elif recipe.model.family is not None and recipe.model.family not in able:
        raise UsageProblem(f"task {recipe.objective.name!r} needs one of {', '.join(able)}, got {recipe.model.family}")
    if recipe.data.source is not None:
        raise UsageProblem(f"task {recipe.objective.name!r} draws its own rows: data.source must be left out")
    if recipe.lora.enabled:
        raise UsageProblem(f"task {recipe.objective.name!r} is learnt in full: lora.enabled must be false, got true")
    _task_and_curriculum(recipe)


def _require_causal(recipe: Recipe) -> None:
    """Refuse what isn't a language model that reads left to right.

    Raises:
        UsageProblem: naming the families of ours that are.
    """
    config = config_to_train(recipe.model)
    if not OBJECTIVES["causal"].fits(config):
        able = ", ".join(fitting_models(OBJECTIVES["causal"]))
        raise UsageProblem(
            f"task {recipe.objective.name!r} needs a causal language model ({able}), got {config.model_type}"
        )


def _task_and_curriculum(recipe: Recipe) -> tuple[Task, CurriculumSection]:
    name, options = str(recipe.objective.name), recipe.objective.options
    of_curriculum: dict[str, Any] = {key: options[key] for key in field_types(CurriculumSection) if key in options}
    sizes = {key: value for key, value in options.items() if key not in of_curriculum}
    task = ALL_TASKS[name](**typed_section(ALL_TASKS[name], sizes, "objective"))
    return task, CurriculumSection(**typed_section(CurriculumSection, of_curriculum, "objective"))


def algorithm_setup(recipe: Recipe) -> TrainingSetup:
    """Model, endless rows and measured rows of a checked recipe; completes the recipe on the way.

    Raises:
        ValueError: the parts don't fit each other.
    """
    task, section = _task_and_curriculum(recipe)
    recipe.training = TRAINING | recipe.training
    seed = seed_everything(recipe)
    tested = section.tested or task.longest
    model = _language_model(recipe, task, tested) if isinstance(task, TokenTask) else _model(recipe, task)
    kind = TokenAlgorithm if isinstance(task, TokenTask) else Algorithm
    stream = Stream(task, int(recipe.training["per_device_train_batch_size"]), seed, section.first)
    callbacks = [CurriculumCallback(Curriculum(stream, section.threshold))] if section.first is not None else []
    measured = f"{MEASURED_ROWS} rows of {task.name}, size {tested}"
    return TrainingSetup(model, None, kind(task), stream, measured_rows(task, tested), measured, callbacks)


def measured_rows(task: Task, size: int | None = None) -> list[Row]:
    """Fixed rows of a size, the task's largest unless given."""
    size = size or task.longest
    generator = torch.Generator().manual_seed(10_000 + size)
    return [task.row(generator, size) for _ in range(MEASURED_ROWS)]


@dataclass(frozen=True)
class _Alphabet:
    """What a config asks of a tokenizer, of a task's tokens."""

    size: int
    pad_token_id: None = None
    bos_token_id: None = None
    eos_token_id: None = None

    def __len__(self) -> int:
        return self.size


_NO_SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def _language_model(recipe: Recipe, task: TokenTask, tested: int) -> Any:
    """A fresh causal language model over the task's tokens, or the checkpoint."""
    if recipe.model.checkpoint is not None:
        model = load_model(recipe.model, "AutoModelForCausalLM")
        if model.config.vocab_size < task.vocab_size:
            found = f"{recipe.model.checkpoint} knows {model.config.vocab_size}"
            raise UsageProblem(f"task {task.name!r} has {task.vocab_size} tokens, {found}")
        return model.train()
    recipe.model.size = recipe.model.size or "tiny"
    length = max(task.longest, tested) + 16
    config_class: Any = family(str(recipe.model.family)).config_class if is_ours(recipe.model.family) else None
    table = {"max_position_embeddings": length} if hasattr(config_class, "max_position_embeddings") else {}
    section = replace(recipe.model, config={**_NO_SPECIAL, **table, **recipe.model.config})
    return new_model(
        new_config(section, _Alphabet(task.vocab_size), length, "forward", "AutoModelForCausalLM"),
        "AutoModelForCausalLM",
    )


def _model(recipe: Recipe, task: Task) -> Any:
    """A fresh transducer of the task's widths, or the checkpoint's."""
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


def load_transducer(checkpoint: str) -> Any:
    """Return the sequence transducer of a checkpoint, ready for evaluation.

    Args:
        checkpoint: folder or Hub repository.

    Raises:
        ValueError: the checkpoint is of another kind.
    """
    from .. import registry

    section = ModelSection(checkpoint=checkpoint)
    config = load_config(section)
    names = [name for name in (config.architectures or []) if name.endswith("ForSequenceTransduction")]
    if not names or not registry.is_ours(config.model_type):
        given = ", ".join(config.architectures or [config.model_type])
        raise UsageProblem(f"{checkpoint} must hold a Turing machine or neural computer for sequences, got {given}")
    import hf_lnlm

    return load_trained(section, getattr(hf_lnlm, names[0])).eval()
