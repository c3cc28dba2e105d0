"""What all ways to train have in common: from a request to a trained, measured, Hub-ready folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..data.labelled import Rows
from ..data.tokenizers import fit_length, without_length_remark
from ..errors import UsageProblem, unknown_name
from ..hub.folder import write_whole
from ..objectives.base import BaseObjective
from .chance import tell_chance
from .curves import WriteMetrics, draw_run
from .history import Seen
from .lock import FolderLock
from .manifest import RecordCheckpoints, recording
from .output import check_output, is_first_process, open_output, say, write_recipe
from .recipe import Recipe, dump_recipe, plain
from .request import Request
from .resume import Plan, Resumption, new_plan, run_steps

_BOOKKEEPING = ("runtime", "per_second", "epoch", "preparation_time", "peak", "alloc")


class Run(NamedTuple):
    """What a run leaves.

    Attributes:
        result: of a training run the Trainer's `TrainOutput`, its metrics with those of the validation data as
            `eval_…`; of an evaluation its `checkpoint`, `task`, `data` and `metrics`.
        folder: the output folder, or that of the checkpoint that was measured.
    """

    result: Any
    folder: Path


@dataclass
class TrainingSetup:
    """Everything that a Trainer needs, made from a recipe.

    Attributes:
        model: the model, perhaps wrapped by peft.
        tokenizer: saved beside the model; None for a model that reads no tokens.
        objective: what is learnt.
        train, validation: map-style or iterable datasets; validation may be None.
        measured_on: name of the validation data, for the model card.
        callbacks: of the Trainer, besides its own.
        seen: the rows behind the datasets, as they are read.
    """

    model: Any
    tokenizer: Any
    objective: Any
    train: Any
    validation: Any | None
    measured_on: str
    callbacks: list[Any] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)

    def trainer(self, recipe: Recipe) -> Any:
        """The Trainer with the recipe's arguments."""
        objective = self.objective
        arguments = training_arguments(recipe, self.validation is not None, objective.generation())
        return trainer_class(objective)(
            model=self.model,
            args=arguments,
            train_dataset=self.train,
            eval_dataset=self.validation,
            data_collator=objective.collator(self.tokenizer, arguments.seed, bookkeeping=True),
            processing_class=self.tokenizer,
            callbacks=self.callbacks,
            objective=objective,
            compute_loss_func=objective.loss_function(),
            compute_metrics=objective.rater(self.tokenizer),
        )

    def begun(self, folder: Path, trainer: Any) -> str | None:
        """The newest whole checkpoint in `folder`; None where none has been written yet."""
        from ..trainer.checkpoints import list_checkpoints

        return trainer.newest_checkpoint() if list_checkpoints(folder) else None

    def evaluation(self, trainer: Any) -> Mapping[str, float]:
        """The measurement of the trained model: the one made after the last step if there was one, else a new one."""
        last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
        best = trainer.args.load_best_model_at_end
        if last is not None and last.get("step") == trainer.state.global_step and not best:
            return {name: value for name, value in last.items() if name != "step"}
        return trainer.evaluate()

    def learnt(self) -> str:
        """A line that says what is learnt."""
        return f"objective  {self.objective.name}"


class Flow(NamedTuple):
    """A way to train.

    Attributes:
        command: its name.
        resolve: completes and checks a recipe without reading data.
        prepare: makes what the recipe says; completes the recipe on the way.
    """

    command: str
    resolve: Callable[[Recipe], Any]
    prepare: Callable[[Recipe], TrainingSetup]


def start(flow: Flow, request: Request) -> Run:
    """Train what is asked for, and publish it where the recipe says so.

    Args:
        flow: the way to train.
        request: recipe and options.

    Raises:
        ValueError: the request is wrong in itself, or its parts don't fit each other; nothing has been written then.
        RuntimeError: what was trained is not fit to be published.
        SystemExit: 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP; a checkpoint was written.
    """
    recipe = request.resolved()
    check_reporters(recipe.training.get("report_to"))
    flow.resolve(recipe)
    name = recipe.model.family or Path(str(recipe.model.checkpoint)).name
    folder = output_folder(recipe, f"runs/{name}_{recipe.objective.name}")
    if request.dry_run:
        return Run(rehearse(flow.prepare(recipe), recipe), folder)
    with FolderLock(folder) as lock:
        check_output(lock, request.resume, request.overwrite, recipe)
        resumed = Resumption.begin(folder, recipe, request.data_changed) if request.resume else None
        run = train(flow.prepare(recipe), recipe, flow.command, resumed, lock)
        if publish(recipe) != 0:
            raise RuntimeError(f"{folder} is trained but was not pushed")
    return run


def rehearse(setup: TrainingSetup, recipe: Recipe) -> dict[str, Any]:
    """Say what a run would train, and how much of it: recipe, parameters, memory, tokens per epoch and steps.

    Args:
        setup: all that would be trained.
        recipe: completed.

    Returns:
        `recipe` (nested values), `parameters`, `trained_parameters`, `memory_bytes` (weights, gradients and two moments of
        the optimizer; activations come on top), `tokens_per_epoch` (None for a stream) and `steps_per_epoch`.
    """
    arguments = training_arguments(recipe, setup.validation is not None, setup.objective.generation())
    sizes = [(value.numel(), value.element_size(), value.requires_grad) for value in setup.model.parameters()]
    trained = sum(count for count, _, learns in sizes if learns)
    memory = sum(count * (width + (width + 8 if learns else 0)) for count, width, learns in sizes)
    tokens = tokens_per_epoch(setup.train)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = -(-len(setup.train) // batch) if hasattr(setup.train, "__len__") else None
    say(dump_recipe(recipe))
    describe(setup)
    say(f"memory     {memory / 2**20:,.1f} MiB of weights, gradients and optimizer; activations come on top")
    say(f"epoch      {'endless' if tokens is None else f'{tokens:,} tokens in {steps:,} steps'}")
    found = {"recipe": plain(recipe), "parameters": sum(count for count, _, _ in sizes), "trained_parameters": trained}
    return found | {"memory_bytes": memory, "tokens_per_epoch": tokens, "steps_per_epoch": steps}


def tokens_per_epoch(rows: Any) -> int | None:
    """Tokens of all rows of a dataset, special ones included; None for one without an end."""
    if not hasattr(rows, "__len__"):
        return None
    if isinstance(rows, Rows):
        return sum(_tokens_of(row) for row in rows.rows)
    return len(rows) * _tokens_of(rows[0])


def _tokens_of(row: Mapping[str, Any]) -> int:
    if "choices" in row:
        return sum(len(choice["input_ids"]) for choice in row["choices"])
    return len(row.get("input_ids", row.get("inputs_embeds", ())))


def check_reporters(wanted: str | Sequence[str] | None) -> None:
    """Refuse reporters that are unknown or not installed, before anything is loaded.

    Args:
        wanted: `training.report_to`.

    Raises:
        UsageProblem: naming the reporter, and what to install.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("training.report_to", name, [*INTEGRATION_TO_CALLBACK, "none"])
        if name not in get_available_reporting_integrations():
            package = name.replace("_", "-")
            raise UsageProblem(
                f"training.report_to={name} needs the package {package}, which is not installed: pip install {package}"
            )


def output_folder(recipe: Recipe, default: str) -> Path:
    """The folder that the recipe names, or `default`; written back into the recipe."""
    recipe.training.setdefault("output_dir", default)
    if not recipe.training["output_dir"]:
        raise UsageProblem("--output is empty; it wants a folder")
    return Path(recipe.training["output_dir"])


def trainer_class(objective: BaseObjective) -> type:
    """The Trainer for an objective or a task: one that writes texts where they are rated."""
    if objective.generation():
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


def describe(setup: TrainingSetup) -> None:
    """Print what is about to be trained, one line each."""
    total = sum(parameter.numel() for parameter in setup.model.parameters())
    trained = sum(parameter.numel() for parameter in setup.model.parameters() if parameter.requires_grad)
    share = "" if trained == total else f", {trained:,} of them trained"
    say(f"model      {setup.model.config.model_type}, {total:,} parameters{share}")
    if setup.tokenizer is not None:
        say(f"tokenizer  {len(setup.tokenizer):,} tokens")
    rows = f"{len(setup.train):,} rows" if hasattr(setup.train, "__len__") else "a stream"
    validation: Any = setup.validation
    held = f", {len(validation):,} for validation" if hasattr(validation, "__len__") else ""
    say(f"data       {rows}{held}")
    say(setup.learnt())


def train(setup: TrainingSetup, recipe: Recipe, command: str, resumed: Resumption | None, lock: FolderLock) -> Run:
    """Train, measure and save; the folder is ready for the Hub afterwards.

    Args:
        setup: what to train.
        recipe: fully resolved; written beside the checkpoint.
        command: that made it: `pretrain`, `finetune` or `align`.
        resumed: the run that goes on from its last whole checkpoint; None for a new one.
        lock: of the output folder.

    Raises:
        SystemExit: 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP; a checkpoint was written.
    """
    folder = lock.folder
    if setup.tokenizer is not None:
        without_length_remark(fit_length(setup.tokenizer, setup.model.config))
    trainer = setup.trainer(recipe)
    check_metric(trainer, setup.validation)
    begun = setup.begun(folder, trainer) if resumed else None
    plan = resumed.plan(recipe, setup.seen, begun) if resumed else new_plan(recipe, setup.seen)
    trainer.accelerator.wait_for_everyone()  # all have read what the first one writes anew
    open_output(lock, resumed is not None)
    describe(setup)
    if is_first_process():
        _begin(setup, recipe, command, plan, folder)
        trainer.add_callback(RecordCheckpoints())
        trainer.add_callback(WriteMetrics())
    try:
        result = run_steps(trainer, plan, folder, begun)
    except SystemExit:
        if is_first_process():
            print(f"stopped; go on with: hf-lnlm {command} --resume --output {folder}", file=sys.stderr)
        raise
    metrics = {} if setup.validation is None else own_metrics(setup.evaluation(trainer))
    if is_first_process():
        tell_chance(metrics, setup)
    with recording(folder) if is_first_process() else nullcontext():
        save(trainer, setup, recipe, metrics)
        if is_first_process():
            draw_run(folder)
    measured = {f"eval_{name}": value for name, value in metrics.items()}
    return Run(result._replace(metrics=result.metrics | measured), folder)


def check_metric(trainer: Any, validation: Any) -> None:
    """Refuse a `metric_for_best_model` that no evaluation gives, by measuring one row, before anything is trained.

    Args:
        trainer: of the run.
        validation: rows to measure on; of a stream nothing is read.

    Raises:
        UsageProblem: naming the metric, the closest one and all there are.
    """
    import torch

    wanted = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted == "loss" or not hasattr(validation, "__getitem__"):
        return
    with torch.random.fork_rng():
        row = torch.utils.data.Subset(validation, range(1))
        loop = trainer.evaluation_loop(trainer.get_eval_dataloader(row), "Trying", trainer.args.prediction_loss_only)
    known = own_metrics(loop.metrics)
    if wanted not in known:
        raise unknown_name("training.metric_for_best_model", wanted, known)


def _begin(setup: TrainingSetup, recipe: Recipe, command: str, plan: Plan, folder: Path) -> None:
    """Write what a run needs to go on: recipe, tokenizer, and the record of what it is trained with."""
    with recording(folder, begun=True):
        write_recipe(folder, recipe, command)
        _save_tokenizer(setup, folder)
        plan.record(folder)


def own_metrics(metrics: Mapping[str, float], prefix: str = "eval_") -> dict[str, float]:
    """What was measured of the model, without `eval_` and without times and speeds."""
    bare = {name.removeprefix(prefix): value for name, value in metrics.items()}
    return {k: float(v) for k, v in sorted(bare.items()) if not any(word in k for word in _BOOKKEEPING)}


def save(trainer: Any, setup: TrainingSetup, recipe: Recipe, metrics: Mapping[str, float]) -> None:
    """Write model, tokenizer, evaluation and card into the output folder (first process only)."""
    from ..hub.card import write_card, write_evaluation

    trainer.accelerator.wait_for_everyone()
    if not is_first_process():
        return
    folder = Path(recipe.training["output_dir"])
    model = trainer.accelerator.unwrap_model(trainer.model)
    write_whole(model.save_pretrained, folder)
    _save_tokenizer(setup, folder)
    if metrics:
        evaluation = {"data": setup.measured_on, "task": setup.objective.name, "metrics": dict(metrics)}
        write_evaluation(folder, evaluation)
        say("\n" + "\n".join(f"{name:<14} {value:.5g}" for name, value in metrics.items()))
    write_card(folder, recipe.hub.repo_id, recipe.hub.license)
    if not recipe.lora.enabled:
        _finish_parts(model, setup.tokenizer, folder, recipe.hub.license)
    elif recipe.lora.merge:
        save_merged(model, setup.tokenizer, folder / "merged", recipe.hub.license)
    say(f"saved to {folder}")


def _finish_parts(model: Any, tokenizer: Any, folder: Path, license: str | None = None) -> None:
    """Give the parts of a model made of several, each a checkpoint of its own, tokenizer and card."""
    from ..hub.card import write_card
    from ..registry import is_composed

    for part in model.config.sub_configs if is_composed(model.config.model_type) else ():
        write_whole(tokenizer.save_pretrained, folder / part)
        write_card(folder / part, license=license)


def _save_tokenizer(setup: TrainingSetup, folder: Path) -> None:
    if setup.tokenizer is not None:
        write_whole(setup.tokenizer.save_pretrained, folder)


def save_merged(model: Any, tokenizer: Any, folder: Path, license: str | None = None) -> None:
    """Write the base model with its adapter merged into the weights, as a checkpoint of its own."""
    from ..hub.card import write_card

    merged = model.merge_and_unload()
    folder.mkdir(exist_ok=True)
    write_whole(merged.save_pretrained, folder)
    write_whole(tokenizer.save_pretrained, folder)
    write_card(folder, license=license)
    _finish_parts(merged, tokenizer, folder, license)
    say(f"saved the merged model to {folder}")


def publish(recipe: Recipe) -> int:
    """Push the output folder where the recipe says so; returns an exit status."""
    if not (recipe.hub.push and is_first_process()):
        return 0
    from .push import push

    return push(recipe.training["output_dir"], recipe.hub.repo_id, private=recipe.hub.private)
