"""`hf-lnlm finetune`: any checkpoint, ours or stock, on labelled rows or on more text; fully or by LoRA.

A family without a language-model head (a text CNN, say) is trained on labels from scratch, by `--family`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.labelled import LabelledRows, Rows, load_rows
from ..data.readers import FileOptions
from ..data.tokenizers import check_vocabulary
from ..objectives import OBJECTIVES, objective
from ..registry import family as family_row
from ..registry import is_ours
from .adapters import add_adapter
from .documents import load_text, packed, source_name
from .errors import UsageProblem, unknown_name
from .models import (
    adapter_settings,
    check_fields,
    load_config,
    load_model,
    load_tokenizer,
    new_config,
    new_model,
)
from .output import check_output, check_unchanged, plain_when_piped, warn
from .pretrain import (
    check_options,
    check_positions,
    default_block,
    model_to_go_on_from,
    new_tokenizer,
    require_no_head,
    tokenizer_flag,
)
from .recipe import RECIPE_FILE, Recipe, load_recipe
from .run import Parts, output_folder, publish, seed_everything, train
from .sizes import SIZES, stock_config_class
from .tasks import TASKS, Task
from .wrapped import load_wrapped, wrapping_family

DEFAULT_SHARE = 0.1
"""Share of labelled rows set aside where the recipe says nothing."""

LONGEST_ROW = 256
"""Tokens of a labelled row, unless data.block_size says otherwise or the model holds fewer."""

TRAINING: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "logging_steps": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 0.25,
    "save_steps": 0.25,
    "save_total_limit": 2,
    "seed": 0,
}
"""TrainingArguments of fine-tuning; adapters learn at ten times the rate."""


def finetune(
    recipe: str | None,
    checkpoint: str | None,
    family: str | None,
    size: str | None,
    tokenizer: str | None,
    task: str | None,
    data: str | None,
    text_column: str | None,
    label_column: str | None,
    validation: str | None,
    lora: bool | None,
    merge: bool | None,
    output: str | None,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    set: list[str] | None,
) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    flags = {
        "model.checkpoint": checkpoint,
        "model.family": family,
        "model.size": size,
        **tokenizer_flag(tokenizer),
        "model.trust_remote_code": trust_remote_code or None,
        "objective.name": task,
        "data.source": data,
        "data.text_column": text_column,
        "data.label_column": label_column,
        "data.validation": validation,
        "lora.enabled": lora,
        "lora.merge": merge,
        "training.output_dir": output,
    }
    if resume and recipe is None and output is not None:
        recipe = str(Path(output) / RECIPE_FILE)
    resolved = load_recipe(recipe, flags, list(set or []))
    resolve_task(resolved)
    name = resolved.model.family or Path(str(resolved.model.checkpoint)).name
    folder = output_folder(resolved, f"runs/{name}_{resolved.objective.name}")
    check_output(folder, resume, overwrite, resolved)
    parts = finetuning_parts(resolved)
    if resume:
        check_unchanged(folder, resolved)
    train(parts, resolved, "finetune", resume)
    return publish(resolved)


def resolve_task(recipe: Recipe) -> None:
    """Fill in the task and check its name and options; reads no data.

    Raises:
        UsageProblem: something is missing or unknown.
    """
    if recipe.model.checkpoint is None and recipe.model.family is None:
        raise UsageProblem("no model: give --checkpoint FOLDER (or a Hub name), or --family for one from scratch")
    if recipe.data.source is None:
        raise UsageProblem("no data: give --data FILE, a dataset's name, or `stdlib`")
    if recipe.lora.merge and not recipe.lora.enabled:
        raise UsageProblem("--merge merges an adapter: give --lora too")
    if recipe.objective.name is None:
        raise UsageProblem(f"no task: give --task, one of {', '.join([*TASKS, *OBJECTIVES])}")
    kind = goal_class(recipe.objective.name)
    check_options(recipe, kind)


def goal_class(name: str) -> type:
    """The class of a task or objective.

    Raises:
        UsageProblem: there is none of that name.
    """
    known: dict[str, type] = {**TASKS, **OBJECTIVES}
    if name not in known:
        raise unknown_name("task", name, known)
    return known[name]


def finetuning_parts(recipe: Recipe) -> Parts:
    """Model, tokenizer and datasets of a recipe whose task is resolved; completes the recipe on the way.

    Raises:
        ValueError: the parts don't fit each other; names both.
    """
    defaults = dict(TRAINING)
    if recipe.model.checkpoint is None:
        defaults["learning_rate"] = SIZES[recipe.model.size or "tiny"].training["learning_rate"]
    elif recipe.lora.enabled:
        defaults["learning_rate"] *= 10
    if "max_steps" in recipe.training:
        defaults = {key: value for key, value in defaults.items() if key != "num_train_epochs"}
    recipe.training = defaults | recipe.training
    goal = goal_class(str(recipe.objective.name))(**recipe.objective.options)
    make = parts_from_scratch if recipe.model.checkpoint is None else parts_of_checkpoint
    parts = make(recipe, goal)
    check_vocabulary(parts.tokenizer, parts.model.config)
    if recipe.lora.enabled:
        named = {"task_type": goal.lora_type} if isinstance(goal, Task) else {}
        parts.model = add_adapter(parts.model, recipe.lora, **named)
    return parts


def parts_of_checkpoint(recipe: Recipe, goal: Any) -> Parts:
    """Parts that go on from the recipe's checkpoint, with its tokenizer."""
    if adapter_settings(str(recipe.model.checkpoint)):
        raise UsageProblem(f"{recipe.model.checkpoint} is an adapter: merge it first (finetune … --lora --merge)")
    config = load_config(recipe.model)
    tokenizer = load_tokenizer(recipe.tokenizer.path or str(recipe.model.checkpoint), recipe.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    make = labelled_parts if isinstance(goal, Task) else text_parts
    return make(recipe, goal, tokenizer, config)


def parts_from_scratch(recipe: Recipe, goal: Any) -> Parts:
    """Parts for a family without a checkpoint, trained on labels from its first step, its tokenizer built on their text.

    Raises:
        UsageProblem: the goal needs no labels, or the family has no head for it.
    """
    if not isinstance(goal, Task):
        raise UsageProblem(f"{goal.name!r} from scratch is pre-training: use `hf-lnlm pretrain`")
    model_type = str(recipe.model.family)
    recipe.model.size = recipe.model.size or "tiny"
    numbers, data = SIZES[recipe.model.size], recipe.data
    ours = is_ours(model_type)
    require_head(family_row(model_type).config_class() if ours else stock_config_class(model_type)(), goal)
    rows = read_rows(recipe, goal)
    reads = "encoder-decoder" if goal.auto_class == "AutoModelForSeq2SeqLM" else "both"
    tokenizer = new_tokenizer(recipe, "forward" if ours else reads, goal.texts(rows.train, data), numbers.vocab_size)
    data.block_size = data.block_size or numbers.block_size
    labels = label_fields(label_order(recipe, goal, rows))
    config = new_config(recipe.model, tokenizer, data.block_size, reads, goal.auto_class, **labels)
    check_positions(config, data.block_size)
    seed_everything(recipe)
    return with_rows(recipe, goal, tokenizer, new_model(config, goal.auto_class), rows)


def text_parts(recipe: Recipe, goal: Any, tokenizer: Any, config: Any) -> Parts:
    """Parts for an objective: more text, cut as in pre-training."""
    goal = objective(goal.name, **recipe.objective.options)
    goal.check(config, tokenizer)
    require_no_head(recipe)
    if recipe.lora.enabled and goal.composes(config):
        raise UsageProblem(
            f"{goal.name!r} adds parts with fresh weights to {config.model_type}, which adapters can't learn: first "
            f"hf-lnlm pretrain --checkpoint {recipe.model.checkpoint} --objective {goal.name}, then --lora on the result"
        )
    recipe.data.block_size = recipe.data.block_size or default_block(config, 128)
    check_positions(config, recipe.data.block_size)
    text = load_text(recipe, int(recipe.training["seed"]))
    seed_everything(recipe)
    model = model_to_go_on_from(recipe, goal, config)
    datasets = packed(recipe, goal, text, tokenizer, model)
    return Parts(model, tokenizer, goal, *datasets, measured_on=text.name)


def labelled_parts(recipe: Recipe, goal: Task, tokenizer: Any, config: Any) -> Parts:
    """Parts for a task: rows with labels, and a model whose head has the labels' names."""
    head: Any = wrapping_family(recipe.model).config_class() if recipe.model.head else config
    require_head(head, goal)
    rows = read_rows(recipe, goal)
    names = label_order(recipe, goal, rows)
    recipe.data.block_size = recipe.data.block_size or default_block(config, LONGEST_ROW)
    check_positions(config, recipe.data.block_size)
    check_fields(type(head), recipe.model.config)
    seed_everything(recipe)
    options = recipe.model.config | head_options(config, tokenizer, names)
    load = load_wrapped if recipe.model.head else load_model
    return with_rows(recipe, goal, tokenizer, load(recipe.model, goal.auto_class, **options), rows)


def label_order(recipe: Recipe, goal: Task, rows: LabelledRows) -> list[str]:
    """Names of the classes in the order of their ids, written into the recipe; empty for a task without classes.

    Raises:
        UsageProblem: there is one class only.
    """
    names = recipe.model.labels or goal.labels(rows.train, recipe.data)
    if len(names) == 1:
        raise UsageProblem(f"the training rows have one label only: {names[0]!r}")
    recipe.model.labels = names or None
    return names


def with_rows(recipe: Recipe, goal: Task, tokenizer: Any, model: Any, rows: LabelledRows) -> Parts:
    """Parts with `rows` as token ids."""
    data = recipe.data
    train = encoded(goal.encode, rows.train, recipe, tokenizer, model.config)
    held = encoded(goal.encode_held, rows.validation, recipe, tokenizer, model.config)
    goal = goal.bound(model.config).weighted(train.rows).measuring(held.rows if held is not None else [])
    named = data.validation if isinstance(data.validation, str) else data.source
    return Parts(model, tokenizer, goal, train, held, measured_on=source_name(named))


def require_head(config: Any, goal: Any) -> None:
    """Refuse a family that has no head for the task, before any data is read.

    Raises:
        UsageProblem: naming the family, the head, and the tasks that it has heads for.
    """
    from ..objectives.families import has_head

    if not has_head(config, goal.auto_class):
        known: dict[str, Any] = {**TASKS, **OBJECTIVES}
        fitting = [name for name, kind in known.items() if has_head(config, kind.auto_class)]
        raise UsageProblem(
            f"task {goal.name!r} needs {goal.auto_class}, which {config.model_type} has not; "
            f"it has heads for {', '.join(fitting) or 'none of the tasks'}"
        )


def head_options(config: Any, tokenizer: Any, names: list[str] | None) -> dict[str, Any]:
    """Config fields that a new head needs: its labels, a pad token, and room for a head of another size.

    Args:
        config: the checkpoint's.
        tokenizer: its tokenizer, with a pad token.
        names: the classes in the order of their ids; empty for a head without classes.
    """
    options = label_fields(names)
    if names:
        options["ignore_mismatched_sizes"] = True
    if getattr(config, "pad_token_id", None) is None and tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    return options


def label_fields(names: list[str] | None) -> dict[str, Any]:
    """The config fields that name the classes of a head; empty for a head without classes."""
    if not names:
        return {}
    ids = dict(enumerate(names))
    return {"num_labels": len(names), "id2label": ids, "label2id": {name: number for number, name in ids.items()}}


def read_rows(recipe: Recipe, goal: Task) -> LabelledRows:
    """The recipe's labelled rows; where nothing says what validates, a tenth is set aside."""
    data = recipe.data
    columns = goal.columns(data)
    options = FileOptions(encoding=data.encoding, errors=data.errors)
    common: dict[str, Any] = {"task": goal.name, "options": options, "limit": data.limit}
    common["seed"] = int(recipe.training.get("seed", 0))
    if data.validation == 0:
        return LabelledRows(load_rows(data.source, columns, **common).train, None)
    rows = load_rows(data.source, columns, validation=data.validation, **common)
    if rows.validation is None:
        data.validation = DEFAULT_SHARE
        rows = load_rows(data.source, columns, validation=data.validation, **common)
    return rows


def encoded(
    encode: Callable[..., Any], rows: list[dict[str, Any]] | None, recipe: Recipe, tokenizer: Any, config: Any
) -> Any:
    """`rows` as a dataset of token ids, or None for None; says how many were cut.

    Args:
        encode: the task's `encode` or `encode_held`.
        rows: as read.
        recipe: names columns and the longest row.
        tokenizer, config: of the model.
    """
    if rows is None:
        return None
    length = int(recipe.data.block_size or LONGEST_ROW)
    found, cut = encode(rows, recipe.data, tokenizer, config, length)
    if cut:
        warn(f"{cut} of {len(rows)} rows are longer than data.block_size={length} tokens and were cut")
    return Rows(found)
