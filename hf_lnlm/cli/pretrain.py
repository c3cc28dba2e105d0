"""`hf-lnlm pretrain`: from a family's name, or a checkpoint, and text to a trained language model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.tokenizers import KINDS, build_tokenizer, check_vocabulary
from ..objectives import OBJECTIVES, objective
from .algorithm import algorithm_parts, is_algorithm, resolve_algorithm
from .documents import load_text, packed
from .errors import UsageProblem, did_you_mean, unknown_name
from .models import load_config, load_main_part, load_model, load_tokenizer, new_config
from .output import check_output, check_unchanged, plain_when_piped
from .recipe import RECIPE_FILE, Recipe, field_types, load_recipe, typed_section
from .run import Parts, output_folder, publish, seed_everything, train
from .sizes import SHARED_TRAINING, SIZES

SENTINELS = 100
"""Sentinels of a new encoder-decoder tokenizer, as T5 has."""


def pretrain(
    recipe: str | None,
    family: str | None,
    checkpoint: str | None,
    size: str | None,
    tokenizer: str | None,
    data: str | None,
    text_column: str | None,
    validation: str | None,
    objective: str | None,
    output: str | None,
    resume: bool,
    overwrite: bool,
    set: list[str] | None,
) -> int:
    """Run the command; the arguments are its options. Returns the exit status."""
    plain_when_piped()
    flags = {
        "model.family": family,
        "model.checkpoint": checkpoint,
        "model.size": size,
        "data.source": data,
        "data.text_column": text_column,
        "data.validation": validation,
        "objective.name": objective,
        "training.output_dir": output,
        **tokenizer_flag(tokenizer),
    }
    if resume and recipe is None and output is not None:
        recipe = str(Path(output) / RECIPE_FILE)
    resolved = load_recipe(recipe, flags, list(set or []))
    drawn = is_algorithm(resolved)
    (resolve_algorithm if drawn else resolve_objective)(resolved)
    name = resolved.model.family or Path(str(resolved.model.checkpoint)).name
    folder = output_folder(resolved, f"runs/{name}_{resolved.objective.name}")
    check_output(folder, resume, overwrite, resolved)
    parts = (algorithm_parts if drawn else pretraining_parts)(resolved)
    if resume:
        check_unchanged(folder, resolved)
    train(parts, resolved, "pretrain", resume)
    return publish(resolved)


def tokenizer_flag(tokenizer: str | None) -> dict[str, str | None]:
    """The recipe key that `--tokenizer` sets: a kind, or the folder of a saved one.

    Raises:
        UsageProblem: it is neither.
    """
    if tokenizer is None or tokenizer in KINDS:
        return {"tokenizer.kind": tokenizer}
    if not Path(tokenizer).is_dir():
        raise UsageProblem(
            f"--tokenizer {tokenizer!r} is neither a kind ({', '.join(KINDS)}) nor a folder"
            + did_you_mean(tokenizer, KINDS)
        )
    return {"tokenizer.path": tokenizer}


def resolve_objective(recipe: Recipe) -> None:
    """Fill in size and objective, and check the objective's name and options; reads no data.

    Raises:
        UsageProblem: no model is named, or a name or option is unknown.
    """
    if recipe.model.family is None and recipe.model.checkpoint is None:
        raise UsageProblem("no model: give --family (see `hf-lnlm list`), --checkpoint, or a recipe with model.family")
    if recipe.data.source is None:
        raise UsageProblem("no data: give --data FILE, a glob, a dataset's name, or `stdlib`")
    if recipe.lora.enabled:
        raise UsageProblem("lora adapts a checkpoint: hf-lnlm finetune --checkpoint … --task OBJECTIVE --lora")
    require_no_head(recipe)
    if recipe.model.checkpoint is None:
        recipe.model.size = recipe.model.size or "tiny"
    if recipe.objective.name is None:
        recipe.objective.name = default_objective(recipe)
    if recipe.objective.name not in OBJECTIVES:
        from .tasks import TASKS

        if recipe.objective.name in TASKS:
            raise UsageProblem(f"{recipe.objective.name!r} needs labels: use `hf-lnlm finetune`")
        raise unknown_name("objective", recipe.objective.name, OBJECTIVES)
    check_options(recipe, OBJECTIVES[recipe.objective.name])


def require_no_head(recipe: Recipe) -> None:
    """Refuse `model.head` where nothing has labels.

    Raises:
        UsageProblem: it is given.
    """
    if recipe.model.head:
        raise UsageProblem(f"model.head={recipe.model.head} is trained on labels; this objective takes text alone")


def check_options(recipe: Recipe, kind: type) -> None:
    """Check the objective's options against the fields of its class, and give them their types."""
    known = field_types(kind)
    recipe.objective.options = typed_section(kind, recipe.objective.options, "objective") if known else {}
    if not known and recipe.objective.options:
        raise UsageProblem(f"objective {recipe.objective.name!r} has no options, got {recipe.objective.options}")


def default_objective(recipe: Recipe) -> str:
    """The first objective that fits the model: causal for a decoder, masked for an encoder, span for both.

    Raises:
        UsageProblem: none fits.
    """
    from ..registry import family, is_ours
    from .sizes import stock_config_class

    if recipe.model.checkpoint is not None:
        config = load_config(recipe.model)
    elif is_ours(recipe.model.family):
        config = family(str(recipe.model.family)).config_class(**recipe.model.config)
    else:
        config = stock_config_class(str(recipe.model.family))()
    for name, kind in OBJECTIVES.items():
        if kind.fits(config):
            return name
    raise UsageProblem(
        f"{config.model_type} has no head that learns from text alone; "
        f"train it on labels: hf-lnlm finetune --family {config.model_type} --task …"
    )


def pretraining_parts(recipe: Recipe) -> Parts:
    """Tokenizer, model and datasets of a recipe whose objective is resolved; completes the recipe on the way.

    Raises:
        ValueError: the parts don't fit each other; names both.
    """
    numbers = SIZES[recipe.model.size or "tiny"]
    by_epochs = {"max_steps": -1} if "num_train_epochs" in recipe.training else {}
    recipe.training = SHARED_TRAINING | numbers.training | by_epochs | recipe.training
    goal = objective(str(recipe.objective.name), **recipe.objective.options)
    text = load_text(recipe, int(recipe.training["seed"]))
    if recipe.model.checkpoint is not None:
        config = load_config(recipe.model)
        tokenizer = load_tokenizer(recipe.tokenizer.path or recipe.model.checkpoint, recipe.model)
        recipe.data.block_size = recipe.data.block_size or default_block(config, numbers.block_size)
    else:
        recipe.data.block_size = recipe.data.block_size or numbers.block_size
        tokenizer = new_tokenizer(recipe, goal.direction, text.samples(), numbers.vocab_size)
        config = new_config(recipe.model, tokenizer, recipe.data.block_size, goal.direction, goal.auto_class)
    goal.check(config, tokenizer)
    check_vocabulary(tokenizer, config)
    check_positions(config, recipe.data.block_size)
    seed_everything(recipe)
    model = goal.build(config) if recipe.model.checkpoint is None else model_to_go_on_from(recipe, goal, config)
    datasets = packed(recipe, goal, text, tokenizer, model)
    return Parts(model, tokenizer, goal, *datasets, measured_on=text.name)


def model_to_go_on_from(recipe: Recipe, goal: Any, config: Any) -> Any:
    """The recipe's checkpoint as the model that an objective trains: itself, or the main part of one made of several.

    Args:
        recipe: names the checkpoint.
        goal: the objective, with the recipe's options.
        config: the checkpoint's.

    Raises:
        ValueError: an option asks for another model than a checkpoint made of several holds.
    """
    if goal.composes(config):
        return load_main_part(recipe.model, goal.build(config), goal.auto_class)
    changed = goal.going_on(config, recipe.objective.options)
    return load_model(recipe.model, goal.loader(config), **changed)


def new_tokenizer(recipe: Recipe, direction: str, texts: Iterable[str], vocab_size: int) -> Any:
    """A tokenizer of the wanted kind, built from the training text; its kind and size are written into the recipe.

    Args:
        recipe: its tokenizer section says which.
        direction: how the model reads; says which special tokens go around a text.
        texts: training text.
        vocab_size: bound for a learnt vocabulary where the recipe gives none.
    """
    section = recipe.tokenizer
    if section.path is not None:
        return load_tokenizer(section.path)
    section.kind = section.kind or "bpe"
    if section.kind not in KINDS:
        raise unknown_name("tokenizer", section.kind, KINDS)
    if section.kind == "bpe":
        section.vocab_size = section.vocab_size or vocab_size
    if section.template is None and direction == "both":
        section.template = "roberta" if str(recipe.model.family).startswith(("roberta", "xlm-roberta")) else "bert"
    elif section.template is None and direction == "encoder-decoder":
        section.template = "t5"
    sentinels = SENTINELS if direction == "encoder-decoder" else 0
    return build_tokenizer(
        section.kind, texts, vocab_size=section.vocab_size, sentinels=sentinels, template=section.template
    )


def positions(config: Any) -> int | None:
    """The longest row that a model's position table holds, or None if it has no table."""
    table = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(table, int) or table < 1:
        return None
    # RoBERTa and its kin number positions from the pad id + 1
    offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
    return table - offset


def default_block(config: Any, wanted: int) -> int:
    """`wanted`, or fewer if the model's position table is shorter."""
    return min(wanted, positions(config) or wanted)


def check_positions(config: Any, block_size: int) -> None:
    """Refuse rows that are longer than the model's position table.

    Raises:
        UsageProblem: naming limit and option.
    """
    limit = positions(config)
    if limit is not None and block_size > limit:
        raise UsageProblem(f"data.block_size is {block_size}, but {config.model_type} has {limit} positions: lower it")
