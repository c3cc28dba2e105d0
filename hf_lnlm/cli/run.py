"""What `pretrain` and `finetune` have in common: from prepared parts to a trained, measured, Hub-ready folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageProblem
from .output import is_first_process, open_output, say, warn, write_recipe
from .recipe import Recipe
from .task import Task

_BOOKKEEPING = ("runtime", "per_second", "epoch", "preparation_time", "peak", "alloc")


@dataclass
class Parts:
    """Everything that a Trainer needs, made from a recipe.

    Attributes:
        model: the model, perhaps wrapped by peft.
        tokenizer: saved beside the model; None for a model that reads no tokens.
        goal: an objective or a task: has `collator`, `sums`, `summary`.
        train, validation: map-style or iterable datasets; validation may be None.
        measured_on: name of the validation data, for the model card.
        callbacks: of the Trainer, besides its own.
    """

    model: Any
    tokenizer: Any
    goal: Any
    train: Any
    validation: Any | None
    measured_on: str
    callbacks: list[Any] = field(default_factory=list)


def output_folder(recipe: Recipe, default: str) -> Path:
    """The folder that the recipe names, or `default`; written back into the recipe."""
    recipe.training.setdefault("output_dir", default)
    if not recipe.training["output_dir"]:
        raise UsageProblem("--output is empty; it wants a folder")
    return Path(recipe.training["output_dir"])


def trainer_class(goal: Any) -> type:
    """The Trainer for an objective or a task: one that writes texts where they are rated."""
    if isinstance(goal, Task) and goal.generation():
        from ..trainer.seq2seq import LNLMSeq2SeqTrainer

        return LNLMSeq2SeqTrainer
    from ..trainer.trainer import LNLMTrainer

    return LNLMTrainer


def training_arguments(recipe: Recipe, has_validation: bool, generation: Mapping[str, Any] | None = None) -> Any:
    """TrainingArguments of the recipe; evaluation during training is left out where there is nothing to evaluate on.

    Args:
        recipe: its training section.
        has_validation: whether there is something to evaluate on.
        generation: arguments of Seq2SeqTrainer, if evaluation writes texts.

    Raises:
        ValueError: transformers refuses a combination of arguments.
    """
    import torch

    from ..trainer.arguments import LNLMSeq2SeqTrainingArguments, LNLMTrainingArguments

    values = dict(recipe.training) | dict(generation or {})
    if not has_validation:
        values |= {"eval_strategy": "no"}
        values.pop("eval_steps", None)
    # the objective's own sums make the metrics; gathering logits of a whole set would fill the memory
    values.setdefault("prediction_loss_only", True)
    values.setdefault("remove_unused_columns", False)
    values.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    return (LNLMSeq2SeqTrainingArguments if generation else LNLMTrainingArguments)(**values)


def seed_everything(recipe: Recipe) -> int:
    """Seed every generator for building the model; returns the seed."""
    from transformers import set_seed

    seed = int(recipe.training.get("seed", 0))
    set_seed(seed)
    return seed


def describe(parts: Parts) -> None:
    """Print what is about to be trained, one line each."""
    total = sum(parameter.numel() for parameter in parts.model.parameters())
    trained = sum(parameter.numel() for parameter in parts.model.parameters() if parameter.requires_grad)
    share = "" if trained == total else f", {trained:,} of them trained"
    say(f"model      {parts.model.config.model_type}, {total:,} parameters{share}")
    if parts.tokenizer is not None:
        say(f"tokenizer  {len(parts.tokenizer):,} tokens")
    rows = f"{len(parts.train):,} rows" if hasattr(parts.train, "__len__") else "a stream"
    validation: Any = parts.validation
    held = f", {len(validation):,} for validation" if hasattr(validation, "__len__") else ""
    say(f"data       {rows}{held}")
    say(f"objective  {parts.goal.name}")


def train(parts: Parts, recipe: Recipe, command: str, resume: bool) -> dict[str, float]:
    """Train, measure and save; the folder is ready for the Hub afterwards.

    Args:
        parts: what to train.
        recipe: fully resolved; written beside the checkpoint.
        command: `pretrain` or `finetune`.
        resume: go on from the last whole checkpoint.

    Returns:
        Metrics on the validation data; empty without any.

    Raises:
        SystemExit: 130 or 143 after SIGINT or SIGTERM; a checkpoint was written.
    """
    from ..trainer.checkpoints import list_checkpoints

    folder = Path(recipe.training["output_dir"])
    generation = parts.goal.generation() if isinstance(parts.goal, Task) else {}
    arguments = training_arguments(recipe, parts.validation is not None, generation)
    trainer = trainer_class(parts.goal)(
        model=parts.model,
        args=arguments,
        train_dataset=parts.train,
        eval_dataset=parts.validation,
        data_collator=parts.goal.collator(parts.tokenizer, arguments.seed, bookkeeping=True),
        processing_class=parts.tokenizer,
        callbacks=parts.callbacks,
        objective=parts.goal,
        compute_loss_func=parts.goal.loss_function() if isinstance(parts.goal, Task) else None,
        compute_metrics=parts.goal.rater(parts.tokenizer) if isinstance(parts.goal, Task) else None,
    )
    open_output(folder, resume)
    describe(parts)
    if is_first_process():
        write_recipe(folder, recipe, command)
        _save_tokenizer(parts, folder)
    begun = resume and bool(list_checkpoints(folder))
    if resume and not begun:
        warn(f"{folder} holds no checkpoint yet; starting at step 0")
    try:
        trainer.train(resume_from_checkpoint=True if begun else None)
    except SystemExit:
        if is_first_process():
            print(f"stopped; go on with: hf-lnlm {command} --resume --output {folder}", file=sys.stderr)
        raise
    metrics = {} if parts.validation is None else own_metrics(final_evaluation(trainer))
    save(trainer, parts, recipe, metrics)
    return metrics


def final_evaluation(trainer: Any) -> Mapping[str, float]:
    """The evaluation of the trained model: the one made after the last step if there was one, else a new one."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last is not None and last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in last.items() if name != "step"}
    return trainer.evaluate()


def own_metrics(metrics: Mapping[str, float], prefix: str = "eval_") -> dict[str, float]:
    """What was measured of the model, without `eval_` and without times and speeds."""
    bare = {name.removeprefix(prefix): value for name, value in metrics.items()}
    return {k: float(v) for k, v in sorted(bare.items()) if not any(word in k for word in _BOOKKEEPING)}


def save(trainer: Any, parts: Parts, recipe: Recipe, metrics: Mapping[str, float]) -> None:
    """Write model, tokenizer, evaluation and card into the output folder (first process only)."""
    from ..hub.card import write_card, write_evaluation

    trainer.accelerator.wait_for_everyone()
    if not is_first_process():
        return
    folder = Path(recipe.training["output_dir"])
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder)
    _save_tokenizer(parts, folder)
    if metrics:
        evaluation = {"data": parts.measured_on, "task": parts.goal.name, "metrics": dict(metrics)}
        write_evaluation(folder, evaluation)
        say("\n" + "\n".join(f"{name:<14} {value:.5g}" for name, value in metrics.items()))
    write_card(folder, recipe.hub.repo_id, recipe.hub.license)
    if not recipe.lora.enabled:
        _finish_parts(model, parts.tokenizer, folder, recipe.hub.license)
    elif recipe.lora.merge:
        save_merged(model, parts.tokenizer, folder / "merged")
    say(f"saved to {folder}")


def _finish_parts(model: Any, tokenizer: Any, folder: Path, license: str | None = None) -> None:
    """Give the parts of a model made of several, each a checkpoint of its own, tokenizer and card."""
    from ..hub.card import write_card

    for part in getattr(model, "part_names", ()):
        tokenizer.save_pretrained(folder / part)
        write_card(folder / part, license=license)


def _save_tokenizer(parts: Parts, folder: Path) -> None:
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(folder)


def save_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the base model with its adapter merged into the weights, as a checkpoint of its own."""
    from ..hub.card import write_card

    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder)
    _finish_parts(merged, tokenizer, folder)
    say(f"saved the merged model to {folder}")


def publish(recipe: Recipe) -> int:
    """Push the output folder where the recipe says so; returns an exit status."""
    if not (recipe.hub.push and is_first_process()):
        return 0
    from .push import push

    return push(recipe.training["output_dir"], recipe.hub.repo_id, private=recipe.hub.private)
