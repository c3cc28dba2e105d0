"""Pre-training: from a family's name, or a checkpoint, and text to a trained language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..data.fingerprint import Fingerprint
from ..data.tokenizers import KINDS, build_tokenizer, check_vocabulary
from ..errors import UsageProblem, unknown_name
from ..models.parts import longest_input
from ..objectives import OBJECTIVES
from ..registry import family, is_ours
from ..tasks import TASKS
from .algorithm import algorithm_setup, is_algorithm, name_task_of_data, resolve_algorithm
from .defaults import learning_rate, tokenizer_kind
from .documents import Text, load_text, packed
from .history import Seen
from .models import config_to_train, load_config, load_main_part, load_model, load_tokenizer, new_config
from .recipe import Recipe, field_types, typed_section
from .request import Request, Source
from .run import Flow, Run, TrainingSetup, seed_everything, start
from .sizes import SHARED_TRAINING, SIZES

SENTINELS = 100
"""Sentinels of a new encoder-decoder tokenizer, as T5 has."""


def pretrain(recipe: Source = None, **overrides: Any) -> Run:
    """Pre-train a model from scratch, or go on pre-training a checkpoint, as `hf-lnlm pretrain` does.

    Args:
        recipe: a YAML file, or its content as nested values.
        overrides: options over it, `resume`, `overwrite` and `settings`, see `flows.request.Request`:
            `family="gpt2", data="text.txt"`, `training={"max_steps": 10}`.

    Returns:
        The Trainer's result and the output folder.

    Raises:
        ValueError: the request is wrong in itself, or its parts don't fit each other; nothing has been written then.
    """
    return start(FLOW, Request.of(recipe, **overrides))


def resolve(recipe: Recipe) -> None:
    """Complete and check a recipe, whatever its objective; reads no data.

    Raises:
        UsageProblem: something is missing or unknown.
    """
    name_task_of_data(recipe)
    (resolve_algorithm if is_algorithm(recipe) else resolve_objective)(recipe)


def prepare(recipe: Recipe) -> TrainingSetup:
    """What a resolved recipe trains; completes the recipe on the way.

    Raises:
        ValueError: the parts don't fit each other; names both.
    """
    return (algorithm_setup if is_algorithm(recipe) else pretraining_setup)(recipe)


FLOW = Flow("pretrain", resolve, prepare)


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
    config = config_to_train(recipe.model)
    for name, kind in OBJECTIVES.items():
        if kind.fits(config):
            return name
    raise UsageProblem(
        f"{config.model_type} has no head that learns from text alone; "
        f"train it on labels: hf-lnlm finetune --family {config.model_type} --task …"
    )


def pretraining_setup(recipe: Recipe) -> TrainingSetup:
    """Tokenizer, model and datasets of a recipe whose objective is resolved; completes the recipe on the way.

    Raises:
        ValueError: the parts don't fit each other; names both.
    """
    numbers = SIZES[recipe.model.size or "tiny"]
    by_epochs = {"max_steps": -1} if "num_train_epochs" in recipe.training else {}
    rate = {} if recipe.model.checkpoint else {"learning_rate": learning_rate(recipe)}
    recipe.training = SHARED_TRAINING | numbers.training | rate | by_epochs | recipe.training
    objective = OBJECTIVES[str(recipe.objective.name)](**recipe.objective.options)
    text = load_text(recipe, int(recipe.training["seed"]))
    if recipe.model.checkpoint is not None:
        config = load_config(recipe.model)
        tokenizer = load_tokenizer(recipe.tokenizer.place(recipe.model), recipe.model)
    else:
        recipe.data.block_size = recipe.data.block_size or numbers.block_size
        tokenizer = new_tokenizer(recipe, objective.direction, text.samples(), numbers.vocab_size)
        config = new_config(recipe.model, tokenizer, recipe.data.block_size, objective.direction, objective.auto_class)
    objective.check(config, tokenizer)
    check_vocabulary(tokenizer, config)
    fit_block(recipe, config, numbers.block_size)
    return on_text(recipe, objective, tokenizer, config, text)


def on_text(recipe: Recipe, objective: Any, tokenizer: Any, config: Any, text: Text) -> TrainingSetup:
    """What learns an objective from text: a new model, or the recipe's checkpoint."""
    seed_everything(recipe)
    fresh = recipe.model.checkpoint is None
    model = objective.build(config) if fresh else model_to_go_on_from(recipe, objective, config)
    datasets = packed(recipe, objective, text, tokenizer, model)

    def first(before: Fingerprint) -> Any:
        return packed(recipe, objective, text.first(before), tokenizer, model)[0]

    train, held = text.kept()
    seen = Seen(train, held, first)
    return TrainingSetup(model, tokenizer, objective, *datasets, measured_on=text.name, seen=seen)


def model_to_go_on_from(recipe: Recipe, objective: Any, config: Any) -> Any:
    """The recipe's checkpoint as the model that an objective trains: itself, or the main part of one made of several.

    Args:
        recipe: names the checkpoint.
        objective: the objective, with the recipe's options.
        config: the checkpoint's.

    Raises:
        ValueError: an option asks for another model than a checkpoint made of several holds.
    """
    if objective.composes(config):
        return load_main_part(recipe.model, objective.build(config), objective.auto_class)
    changed = objective.continuation_overrides(config, recipe.objective.options)
    return load_model(recipe.model, objective.loader(config), **changed)


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
        tokenizer = load_tokenizer(section.saved or section.path)
        tokenizer.model_max_length = VERY_LARGE_INTEGER  # the limit of another model
        return tokenizer
    own = family(str(recipe.model.family)).tokenizer if is_ours(recipe.model.family) else None
    section.kind = section.kind or own or tokenizer_kind(recipe)
    if section.kind not in KINDS:
        raise unknown_name("tokenizer", section.kind, KINDS)
    if section.kind != (own or section.kind):
        raise UsageProblem(f"{recipe.model.family} reads the tokenizer {own} and no other, got {section.kind}")
    if section.kind == "elmo":
        section.template = section.template or "causal"
    if section.kind == "bpe":
        section.vocab_size = section.vocab_size or vocab_size
    if section.template is None and direction == "both":
        section.template = "roberta" if str(recipe.model.family).startswith(("roberta", "xlm-roberta")) else "bert"
    elif section.template is None and direction == "encoder-decoder":
        section.template = "t5"
    if section.saved is not None:
        return load_tokenizer(section.saved)
    sentinels = SENTINELS if direction == "encoder-decoder" else 0
    return build_tokenizer(
        section.kind, texts, vocab_size=section.vocab_size, sentinels=sentinels, template=section.template
    )


def fit_block(recipe: Recipe, config: Any, wanted: int) -> None:
    """Give rows `wanted` tokens, or as many as the model's position table holds, unless the recipe says how many.

    Raises:
        UsageProblem: the recipe wants more than the table holds; names limit and option.
    """
    limit = longest_input(config)
    block = recipe.data.block_size = recipe.data.block_size or min(wanted, limit or wanted)
    if limit is not None and block > limit:
        raise UsageProblem(f"data.block_size is {block}, but {config.model_type} has {limit} positions: lower it")
