"""Alignment: a language model learns from preferences, by TRL's trainers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.fingerprint import Fingerprint
from ..data.labelled import STDLIB, load_rows, read_cells
from ..data.preferences import REWARDS, conversation_row, preference_rows
from ..data.readers import FileOptions
from ..data.tokenizers import check_vocabulary
from ..errors import UsageProblem, unknown_name
from ..trainer.alignment import METHODS, Method, preference_trainer, rows_for
from ..trainer.checkpoints import last_complete_checkpoint
from .adapters import adapter_settings_of
from .documents import measured_name
from .history import Seen
from .models import adapter_settings, load_config, load_model, load_padding_tokenizer
from .output import tell_skipped, warn
from .pretrain import require_no_head
from .recipe import Recipe, field_types, typed_section
from .request import Request, Source
from .run import Flow, Run, TrainingSetup, seed_everything, start

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


def align(recipe: Source = None, **overrides: Any) -> Run:
    """Let a language model learn from preferences, as `hf-lnlm align` does.

    Args:
        recipe: a YAML file, or its content as nested values.
        overrides: options over it, `resume`, `overwrite` and `settings`, see `flows.request.Request`:
            `checkpoint="runs/x", method="dpo"`, `data="preferences.jsonl"`.

    Returns:
        The Trainer's result and the output folder.

    Raises:
        ValueError: the request is wrong in itself, or its parts don't fit each other; nothing has been written then.
    """
    return start(FLOW, Request.of(recipe, **overrides))


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
        options=FileOptions(data.encoding, data.errors, quoted=data.quoted, skip_bad_rows=data.skip_bad_rows),
        limit=data.limit,
        seed=int(recipe.training.get("seed", 0)),
    )
    rows = read_cells(rows, conversation_row, data.skip_bad_rows)
    tell_skipped(rows.skipped, len(rows.train) + len(rows.validation or []))
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


@dataclass
class AlignmentSetup(TrainingSetup):
    """What a method of TRL trains: its Trainer is made already, and `objective` is the method."""

    made: Any = None

    def trainer(self, recipe: Recipe) -> Any:
        """TRL's Trainer."""
        return self.made

    def begun(self, folder: Path, trainer: Any) -> str | None:
        """The newest whole checkpoint: TRL's Trainer would take the newest, whole or not."""
        return last_complete_checkpoint(folder)

    def evaluation(self, trainer: Any) -> Mapping[str, float]:
        """A new measurement: what TRL logs while it trains holds more."""
        return trainer.evaluate()

    def learnt(self) -> str:
        """The method, in words."""
        return f"method     {self.objective.name}: {self.objective.title} ({self.objective.paper})"


def alignment_setup(recipe: Recipe) -> AlignmentSetup:
    """Model, rows and TRL's Trainer of a recipe whose method is resolved.

    Raises:
        ValueError: the parts don't fit each other.
    """
    method = METHODS[str(recipe.objective.name)]
    fields = training_fields(recipe, method)
    rows, held = preference_data(recipe, method)
    seed_everything(recipe)
    tokenizer = load_padding_tokenizer(recipe.tokenizer.place(recipe.model), recipe.model)
    check_vocabulary(tokenizer, load_config(recipe.model))
    labels = {"num_labels": 1} if method.name == "reward" else {}
    if labels:  # a new head needs to know where a text ends
        labels["pad_token_id"] = tokenizer.pad_token_id
    model = load_model(recipe.model, method.auto_class, **labels)
    reward = _reward(recipe, tokenizer.pad_token_id)
    adapters = adapter_settings_of(model, recipe.lora) if recipe.lora.enabled else None
    made = preference_trainer(method, model, tokenizer, rows, fields, held, reward, adapters)
    if not held:
        warn("nothing is held out, so nothing will be measured")
    measured_on = measured_name(recipe.data)

    def first(before: Fingerprint) -> Any:
        whole, wanted = (len(rows_for(method, part)) for part in (rows, rows[: before.rows]))
        if len(made.train_dataset) != whole:
            raise UsageProblem(
                "rows were added to the data, but packed ones can't enter with the next epoch: --data-changed"
            )
        return made.train_dataset.select(range(wanted))

    seen, data = Seen(rows, held, first), made.train_dataset
    return AlignmentSetup(made.model, tokenizer, method, data, held or None, measured_on, seen=seen, made=made)


FLOW = Flow("align", resolve_method, alignment_setup)
