"""`hf-lnlm align`: a language model learns from preferences, by TRL's trainers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..data.labelled import STDLIB, load_rows
from ..data.preferences import REWARDS, preference_rows
from ..data.readers import FileOptions
from ..data.tokenizers import check_vocabulary
from ..trainer.alignment import METHODS, Method, preference_trainer
from ..trainer.checkpoints import last_complete_checkpoint
from .adapters import adapter_settings_of
from .documents import source_name
from .errors import UsageProblem, unknown_name
from .models import adapter_settings, load_config, load_model, load_tokenizer
from .output import (
    check_output,
    check_unchanged,
    is_first_process,
    open_output,
    plain_when_piped,
    say,
    warn,
    write_recipe,
)
from .pretrain import require_no_head
from .recipe import RECIPE_FILE, Recipe, field_types, load_recipe, typed_section
from .run import Parts, output_folder, own_metrics, publish, save, seed_everything

TRAINING: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "logging_steps": 0.1,
    "save_steps": 0.25,
    "save_total_limit": 2,
    "seed": 0,
}
"""TrainingArguments of every method; adapters learn at ten times the rate."""

DEFAULT_SHARE = 0.05
OURS_ONLY = ("carry_state", "stop_on_nonfinite")


def align(
    recipe: str | None,
    checkpoint: str | None,
    method: str | None,
    data: str | None,
    validation: str | None,
    reward: str | None,
    lora: bool | None,
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
        "model.trust_remote_code": trust_remote_code or None,
        "objective.name": method,
        "objective.reward": reward,
        "data.source": data,
        "data.validation": validation,
        "lora.enabled": lora,
        "training.output_dir": output,
    }
    if resume and recipe is None and output is not None:
        recipe = str(Path(output) / RECIPE_FILE)
    resolved = load_recipe(recipe, flags, list(set or []))
    chosen = resolve_method(resolved)
    folder = output_folder(resolved, f"runs/{Path(str(resolved.model.checkpoint)).name}_{chosen.name}")
    check_output(folder, resume, overwrite, resolved)
    if resume:
        check_unchanged(folder, resolved)
    run(resolved, chosen, folder, resume)
    return publish(resolved)


def resolve_method(recipe: Recipe) -> Method:
    """The recipe's method, its options checked and typed; reads no data.

    Raises:
        UsageProblem: something is missing or unknown.
    """
    if recipe.model.checkpoint is None:
        raise UsageProblem("no model: give --checkpoint FOLDER (or a Hub name) of a language model")
    if adapter_settings(str(recipe.model.checkpoint)):
        raise UsageProblem(f"{recipe.model.checkpoint} is an adapter: merge it first (align … --set lora.merge=true)")
    if recipe.lora.merge and not recipe.lora.enabled:
        raise UsageProblem("lora.merge merges an adapter: give --lora too")
    require_no_head(recipe)
    if recipe.objective.name is None:
        raise UsageProblem(f"no method: give --method, one of {', '.join(METHODS)}")
    if recipe.objective.name == "ppo":
        raise UsageProblem(f"TRL has no PPO any more; on-policy methods are grpo and rloo, all: {', '.join(METHODS)}")
    if recipe.objective.name not in METHODS:
        raise unknown_name("method", recipe.objective.name, METHODS)
    method = METHODS[recipe.objective.name]
    if recipe.data.source is None:
        raise UsageProblem("no data: give --data FILE with columns prompt, chosen and rejected, or `stdlib`")
    reward = recipe.objective.options.pop("reward", None)
    recipe.objective.options = typed_section(method.classes()[1], recipe.objective.options, "objective")
    if reward is not None:
        recipe.objective.options["reward"] = str(reward)
    if method.rewarded and reward is None:
        raise UsageProblem(
            f"{method.name} draws completions and needs a reward for them: --reward FOLDER of a reward model, or one "
            f"of {', '.join(REWARDS)}"
        )
    return method


def preference_data(recipe: Recipe, method: Method) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(training rows, held-out rows) with `prompt` and whatever else the source has."""
    data = recipe.data
    source = list(preference_rows()) if data.source == STDLIB else data.source
    share = DEFAULT_SHARE if data.validation is None else data.validation
    rows = load_rows(
        source,
        ["prompt"],
        task=method.name,
        validation=share or None,
        options=FileOptions(encoding=data.encoding, errors=data.errors),
        limit=data.limit,
        seed=int(recipe.training.get("seed", 0)),
    )
    return rows.train, rows.validation


def training_fields(recipe: Recipe, method: Method) -> dict[str, Any]:
    """Fields of TRL's config from the recipe's training section and the method's options."""
    defaults = dict(TRAINING)
    if recipe.lora.enabled:
        defaults["learning_rate"] *= 10
    recipe.training = defaults | recipe.training
    known = field_types(method.classes()[1])
    refused = [name for name in recipe.training if name in OURS_ONLY or name not in known]
    if refused:
        raise UsageProblem(f"training.{refused[0]} doesn't go with {method.name}: it is trained by TRL's own Trainer")
    options = {name: value for name, value in recipe.objective.options.items() if name != "reward"}
    return {"disable_tqdm": True} | recipe.training | options


def _reward(recipe: Recipe, pad_token_id: int | None) -> Any:
    """The function of that name, or the reward model in that folder; None if no reward is named."""
    named = recipe.objective.options.get("reward")
    if named is None or named in REWARDS:
        return None if named is None else REWARDS[named]
    place = replace(recipe.model, checkpoint=named, config={}, head=None)
    return load_model(place, "AutoModelForSequenceClassification", num_labels=1, pad_token_id=pad_token_id)


def run(recipe: Recipe, method: Method, folder: Path, resume: bool = False) -> None:
    """Train, measure and save.

    Args:
        recipe: its method resolved.
        method: that method.
        folder: the output folder.
        resume: go on from the last whole checkpoint in it.
    """
    fields = training_fields(recipe, method)
    rows, held = preference_data(recipe, method)
    seed_everything(recipe)
    tokenizer = load_tokenizer(recipe.tokenizer.path or str(recipe.model.checkpoint), recipe.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_vocabulary(tokenizer, load_config(recipe.model))
    labels = {"num_labels": 1} if method.name == "reward" else {}
    if labels:  # a new head needs to know where a text ends
        labels["pad_token_id"] = tokenizer.pad_token_id
    model = load_model(recipe.model, method.auto_class, **labels)
    reward = _reward(recipe, tokenizer.pad_token_id)
    adapters = None
    if recipe.lora.enabled:
        adapters = adapter_settings_of(model, recipe.lora)
    trainer = preference_trainer(method, model, tokenizer, rows, fields, held, reward, adapters)
    open_output(folder, resume)
    if is_first_process():
        write_recipe(folder, recipe, "align")
    begun = last_complete_checkpoint(folder) if resume else None
    if resume and begun is None:
        warn(f"{folder} holds no whole checkpoint; starting at step 0")
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    say(f"model      {model.config.model_type}, {total:,} parameters")
    say(f"data       {len(trainer.train_dataset):,} rows")
    say(f"method     {method.name}: {method.title} ({method.paper})")
    trainer.train(resume_from_checkpoint=begun)
    metrics = own_metrics(trainer.evaluate()) if held else {}
    if not held:
        warn("nothing was held out, so nothing was measured")
    named = recipe.data.validation if isinstance(recipe.data.validation, str) else recipe.data.source
    goal: Any = SimpleNamespace(name=method.name)
    save(trainer, Parts(trainer.model, tokenizer, goal, rows, held, source_name(named)), recipe, metrics)
