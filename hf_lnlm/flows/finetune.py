"""Fine-tuning: any checkpoint, ours or stock, on labelled rows or on more text; fully or by LoRA.

A family without a language-model head (a text CNN, say) is trained on labels from scratch, by `--family`.
"""

from __future__ import annotations

from typing import Any

from ..data.fingerprint import Fingerprint
from ..data.labelled import LabelledRows
from ..data.tokenizers import check_vocabulary
from ..errors import UsageProblem, unknown_name
from ..hub.card import auto_class
from ..objectives import OBJECTIVES, BaseObjective
from ..registry import family as family_row
from ..registry import is_ours
from ..tasks import TASKS
from ..tasks.base import Task
from .adapters import add_adapter
from .defaults import LORA_RATE, LORA_WARM_UP, default_of, keeps_best, learning_rate
from .documents import load_text, measured_name
from .encoder_head import load_wrapped, wrapping_family
from .history import Seen
from .labelled import LONGEST_ROW, encoded, label_order, problem_type, read_rows, replaces_head
from .models import (
    adapter_settings,
    check_fields,
    load_config,
    load_model,
    load_padding_tokenizer,
    new_config,
    new_model,
    renew_head,
)
from .output import say
from .pretrain import check_options, fit_block, new_tokenizer, on_text, require_no_head
from .recipe import Recipe
from .request import Request, Source
from .run import Flow, Run, TrainingSetup, seed_everything, start
from .sizes import SIZES, stock_config_class

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
"""TrainingArguments of fine-tuning where `flows.defaults` has nothing else."""

BY_ACCURACY = ("sequence_classification", "token_classification")
"""Tasks whose best checkpoint is that of the highest accuracy; of others it is that of the lowest loss."""


def finetune(recipe: Source = None, **overrides: Any) -> Run:
    """Fine-tune a checkpoint on labels or on more text, as `hf-lnlm finetune` does.

    Args:
        recipe: a YAML file, or its content as nested values.
        overrides: options over it, `resume`, `overwrite` and `settings`, see `flows.request.Request`:
            `checkpoint="runs/x"`, `task="sequence_classification"`, `data="rows.csv"`, `lora={"enabled": True, "r": 4}`.

    Returns:
        The Trainer's result and the output folder.

    Raises:
        ValueError: the request is wrong in itself, or its parts don't fit each other; nothing has been written then.
    """
    return start(FLOW, Request.of(recipe, **overrides))


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
        recipe.objective.name = only_task(recipe)
        say(f"task       {recipe.objective.name}")
    kind = objective_class(recipe.objective.name)
    check_options(recipe, kind)


def only_task(recipe: Recipe) -> str:
    """The task of a model with one kind of head for labels, or of a checkpoint that has one already.

    Of several tasks that share the head it is the first: classes of texts, not numbers.

    Raises:
        UsageProblem: there are several kinds, or none; lists the tasks and objectives that fit.
    """
    from ..objectives.families import has_head

    if recipe.model.head:
        config: Any = wrapping_family(recipe.model).config_class()
    elif recipe.model.checkpoint is not None:
        config = load_config(recipe.model)
    elif is_ours(recipe.model.family):
        config = family_row(str(recipe.model.family)).config_class()
    else:
        config = stock_config_class(str(recipe.model.family))()
    fitting = {name: kind for name, kind in TASKS.items() if has_head(config, kind.auto_class)}
    held = auto_class((getattr(config, "architectures", None) or [""])[0])
    own = {name: kind for name, kind in fitting.items() if kind.auto_class == held}
    chosen = own or fitting
    if len({kind.auto_class for kind in chosen.values()}) == 1:
        asked = problem_type(config) if own else None
        return next((name for name, kind in chosen.items() if kind.problem_type == asked and asked), next(iter(chosen)))
    language = [name for name, kind in OBJECTIVES.items() if kind.fits(config)] if recipe.model.checkpoint else []
    raise UsageProblem(f"no task: give --task, one of {', '.join([*fitting, *language]) or 'none that fits'}")


def objective_class(name: str) -> type[Any]:
    """The class of a task or objective.

    Raises:
        UsageProblem: there is none of that name.
    """
    known: dict[str, type[BaseObjective]] = {**TASKS, **OBJECTIVES}
    if name not in known:
        raise unknown_name("task", name, known)
    return known[name]


def finetuning_setup(recipe: Recipe) -> TrainingSetup:
    """Model, tokenizer and datasets of a recipe whose task is resolved; completes the recipe on the way.

    Raises:
        ValueError: the parts don't fit each other; names both.
    """
    objective = objective_class(str(recipe.objective.name))(**recipe.objective.options)
    defaults = TRAINING | keeps_best(recipe, "accuracy" if recipe.objective.name in BY_ACCURACY else "loss")
    row = default_of(recipe)
    if row is not None:
        defaults |= {"num_train_epochs": row.epochs, "per_device_train_batch_size": row.batch_size}
    if recipe.model.checkpoint is None:
        defaults["learning_rate"] = learning_rate(recipe)
    elif recipe.lora.enabled:
        defaults |= {"learning_rate": LORA_RATE, "warmup_steps": LORA_WARM_UP}
    if "max_steps" in recipe.training:
        defaults = {key: value for key, value in defaults.items() if key != "num_train_epochs"}
    recipe.training = defaults | recipe.training
    make = setup_from_scratch if recipe.model.checkpoint is None else setup_of_checkpoint
    setup = make(recipe, objective)
    check_vocabulary(setup.tokenizer, setup.model.config)
    if recipe.lora.enabled:
        named = {"task_type": objective.lora_type} if objective.lora_type else {}
        setup.model = add_adapter(setup.model, recipe.lora, **named)
    return setup


FLOW = Flow("finetune", resolve_task, finetuning_setup)


def setup_of_checkpoint(recipe: Recipe, objective: Any) -> TrainingSetup:
    """What goes on from the recipe's checkpoint, with its tokenizer."""
    if adapter_settings(str(recipe.model.checkpoint)):
        raise UsageProblem(f"{recipe.model.checkpoint} is an adapter: merge it first (finetune … --lora --merge)")
    config = load_config(recipe.model)
    tokenizer = load_padding_tokenizer(recipe.tokenizer.place(recipe.model), recipe.model)
    make = labelled_setup if objective.labelled else text_setup
    return make(recipe, objective, tokenizer, config)


def setup_from_scratch(recipe: Recipe, objective: Any) -> TrainingSetup:
    """A family without a checkpoint, trained on labels from its first step, its tokenizer built on their text.

    Raises:
        UsageProblem: the objective needs no labels, or the family has no head for it.
    """
    if not objective.labelled:
        raise UsageProblem(f"{objective.name!r} from scratch is pre-training: use `hf-lnlm pretrain`")
    model_type = str(recipe.model.family)
    recipe.model.size = recipe.model.size or "tiny"
    numbers, data = SIZES[recipe.model.size], recipe.data
    ours = is_ours(model_type)
    require_head(family_row(model_type).config_class() if ours else stock_config_class(model_type)(), objective)
    rows = read_rows(recipe, objective)
    reads = "encoder-decoder" if objective.auto_class == "AutoModelForSeq2SeqLM" else "both"
    tokenizer = new_tokenizer(
        recipe, "forward" if ours else reads, objective.texts(rows.train, data), numbers.vocab_size
    )
    data.block_size = data.block_size or numbers.block_size
    labels = objective.head_fields(label_order(recipe, objective, rows))
    config = new_config(recipe.model, tokenizer, data.block_size, reads, objective.auto_class, **labels)
    fit_block(recipe, config, data.block_size)
    seed_everything(recipe)
    return with_rows(recipe, objective, tokenizer, new_model(config, objective.auto_class), rows)


def text_setup(recipe: Recipe, objective: Any, tokenizer: Any, config: Any) -> TrainingSetup:
    """What to train for an objective: more text, cut as in pre-training."""
    objective.check(config, tokenizer)
    require_no_head(recipe)
    if recipe.lora.enabled and objective.composes(config):
        raise UsageProblem(
            f"{objective.name!r} adds parts with fresh weights to {config.model_type}, which adapters can't learn: first "
            f"hf-lnlm pretrain --checkpoint {recipe.model.checkpoint} --objective {objective.name}, then --lora on "
            "the result"
        )
    fit_block(recipe, config, 128)
    return on_text(recipe, objective, tokenizer, config, load_text(recipe, int(recipe.training["seed"])))


def labelled_setup(recipe: Recipe, objective: Task, tokenizer: Any, config: Any) -> TrainingSetup:
    """What to train for a task: rows with labels, and a model whose head has the labels' names."""
    head: Any = wrapping_family(recipe.model).config_class() if recipe.model.head else config
    require_head(head, objective)
    rows = read_rows(recipe, objective)
    names = label_order(recipe, objective, rows, config)
    fit_block(recipe, config, LONGEST_ROW)
    check_fields(type(head), recipe.model.config)
    seed_everything(recipe)
    options = recipe.model.config | head_options(config, tokenizer, objective.head_fields(names))
    load = load_wrapped if recipe.model.head else load_model
    model = load(recipe.model, objective.auto_class, **options)
    if replaces_head(config, objective, names):
        renew_head(model)
    return with_rows(recipe, objective, tokenizer, model, rows)


def with_rows(recipe: Recipe, objective: Task, tokenizer: Any, model: Any, rows: LabelledRows) -> TrainingSetup:
    """What to train on `rows` as token ids."""
    train = encoded(objective.encode, rows.train, recipe, tokenizer, model.config)
    held = encoded(objective.encode_held, rows.validation, recipe, tokenizer, model.config)

    def first(before: Fingerprint, encode: Any = objective.encode) -> Any:
        return encoded(encode, rows.train[: before.rows], recipe, tokenizer, model.config)

    objective = objective.bound(model.config).weighted(train.rows).measuring(held.rows if held is not None else [])
    seen = Seen(rows.train, rows.validation, first)
    return TrainingSetup(model, tokenizer, objective, train, held, measured_on=measured_name(recipe.data), seen=seen)


def require_head(config: Any, objective: Any) -> None:
    """Refuse a family that has no head for the task, before any data is read.

    Raises:
        UsageProblem: naming the family, the head, and the tasks that it has heads for.
    """
    from ..objectives.families import has_head

    if not has_head(config, objective.auto_class):
        known: dict[str, Any] = {**TASKS, **OBJECTIVES}
        fitting = [name for name, kind in known.items() if has_head(config, kind.auto_class)]
        raise UsageProblem(
            f"task {objective.name!r} needs {objective.auto_class}, which {config.model_type} has not; "
            f"it has heads for {', '.join(fitting) or 'none of the tasks'}"
        )


def head_options(config: Any, tokenizer: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Config fields that a new head needs: its labels, a pad token, and room for a head of another size.

    Args:
        config: the checkpoint's.
        tokenizer: its tokenizer, with a pad token.
        fields: what the task says of its head.
    """
    options = dict(fields)
    if "num_labels" in fields:
        options["ignore_mismatched_sizes"] = True
    if getattr(config, "pad_token_id", None) is None and tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    return options
