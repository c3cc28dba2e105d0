"""Going on with a run: the same tokenizer, the same data or data that grew at the end, and nothing that is ignored.

Rows that came to the end enter with the next epoch: the present one is finished on the rows that it began with, then a
checkpoint is written and the rest of the run is trained on all of them. Other data, if they are announced, begin with an
epoch of their own at once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.fingerprint import Comparison, Fingerprint
from ..errors import UsageProblem
from ..trainer.checkpoints import remove_staging, step_of
from ..trainer.resumed import EndOfEpoch
from .history import (
    RECORD_FILE,
    History,
    Seen,
    check_batches,
    check_overrides,
    describe_data,
    describe_part,
    saved_tokenizer,
    say_versions,
    tokenizer_digest,
    what_changed,
)
from .output import is_first_process, say, warn
from .recipe import RECIPE_FILE, Recipe, read_recipe


@dataclass
class Plan:
    """How a run begins or goes on.

    Attributes:
        history: what it was trained with before.
        part: what it is trained with from here on.
        since: step and epoch at which the data of the next steps began.
        first: the dataset to finish the present epoch on, where rows have been added; None to train on all at once.
    """

    history: History
    part: dict[str, Any]
    since: tuple[int, int] = (0, 0)
    first: Any = None

    def record(self, folder: Path) -> None:
        """Write down what the run is trained with; comes after the tokenizer was saved.

        While an epoch is finished on the rows that it began with, these are what it is trained with.
        """
        part = {**self.part, "tokenizer": tokenizer_digest(folder)}
        if self.first is not None:
            before = self.history.parts[-1]
            part |= {"data": before["data"], "data_since": before["data_since"]}
        self.history.go_on(part)
        self.history.write(folder)


@dataclass
class Resumption:
    """A run that goes on in its folder.

    Attributes:
        folder: the run's.
        data_changed: whether other data were announced.
        history: what it was trained with.
    """

    folder: Path
    data_changed: bool = False
    history: History = field(default_factory=History)

    @classmethod
    def begin(cls, folder: Path, recipe: Recipe, data_changed: bool) -> Resumption:
        """Refuse what can't be changed, and let the recipe take the tokenizer that was saved; reads no data.

        Raises:
            UsageProblem: an override that would be ignored; names key and values.
        """
        if is_first_process():
            remove_staging(folder)
        history = History.read(folder)
        check_overrides(folder, recipe, data_changed, complete=False)
        recipe.tokenizer.saved = saved_tokenizer(folder, history)
        return cls(folder, data_changed, history)

    def plan(self, recipe: Recipe, seen: Seen, checkpoint: str | None) -> Plan:
        """How the run goes on from a checkpoint; says what has changed.

        Args:
            recipe: resolved.
            seen: the rows.
            checkpoint: the newest whole one, or None.

        Raises:
            UsageProblem: the data, the base or the rows a step have changed, or the end lies behind.
        """
        check_overrides(self.folder, recipe, self.data_changed, complete=True)
        if checkpoint is None:
            warn(f"{self.folder} holds no checkpoint yet; starting at step 0")
            return new_plan(recipe, seen)
        step, epoch = step_of(checkpoint) or 0, _epoch(checkpoint)
        self._check_end(recipe, step, epoch)
        before = self.history.at(step)
        data, found = describe_data(recipe, seen, before and before["data"])
        if before is None:
            self._tell_length(recipe, step)
            warn(
                f"{self.folder} has no {RECORD_FILE}: whether data, tokenizer, base and number of processes are those that "
                "the run was begun with can't be checked"
            )
            return Plan(self.history, describe_part(recipe, data, step, (0, 0)))
        self._check_base(recipe, before, described := describe_part(recipe, data, step, tuple(before["data_since"])))
        check_batches(self.folder, recipe, before)
        say_versions(before["versions"], described["versions"])
        plan = Plan(self.history, described, tuple(before["data_since"]))
        if not _same(before["data"], data, found):
            self._take_changed(plan, seen, found, step, epoch)
        elif before["data"]["validation"] != data["validation"]:
            warn("the validation data have changed: figures from before and from now on don't compare")
        self._tell_length(recipe, step)
        return plan

    def _check_end(self, recipe: Recipe, step: int, epoch: float) -> None:
        now = recipe.training
        steps = now.get("max_steps", -1)
        if 0 < steps < step:
            raise UsageProblem(f"training.max_steps={steps} lies behind step {step}, which {self.folder} has reached")
        if steps <= 0 and now.get("num_train_epochs", 3.0) < epoch - 1e-6:
            raise UsageProblem(
                f"training.num_train_epochs={now['num_train_epochs']} lies behind {epoch:.3g}, which {self.folder} "
                "has reached"
            )

    def _tell_length(self, recipe: Recipe, step: int) -> None:
        """Say what a new length does to the learning rate."""
        begun, now = read_recipe(self.folder / RECIPE_FILE).training, recipe.training
        for key in ("max_steps", "num_train_epochs"):
            if begun.get(key) != now.get(key):
                kind = now.get("lr_scheduler_type", "linear")
                say(
                    f"length     training.{key} {begun.get(key)} → {now.get(key)}: from step {step} on the learning rate "
                    f"is that of a run of the new length ({kind})"
                )

    def _check_base(self, recipe: Recipe, before: dict[str, Any], now: dict[str, Any]) -> None:
        if recipe.lora.enabled and before["base"] != now["base"]:
            raise UsageProblem(
                f"the weights in {recipe.model.checkpoint} have changed since {self.folder} was begun on them: adapters "
                "learnt for others are worth nothing"
            )

    def _take_changed(self, plan: Plan, seen: Seen, found: Comparison | None, step: int, epoch: float) -> None:
        """Let added rows enter with the next epoch, and announced ones at once.

        Raises:
            UsageProblem: the data have changed otherwise.
        """
        before, now = self.history.parts[-1]["data"], plan.part["data"]
        whole = epoch == int(epoch)
        told = what_changed(before, now, found, seen.train)
        if found is not None and found.grew:
            added = f"data       {found.now.rows:,} rows (were {before['rows']['rows']:,}): "
            say(f"{added}what came to the end enters with epoch {int(epoch) + 1 + (not whole)}")
            if not whole:
                plan.first = seen.first(Fingerprint.of(before["rows"]))
                return
        elif not self.data_changed:
            raise UsageProblem(
                f"the data of {self.folder} have changed: {told}. --data-changed goes on with them all the same, "
                "from a new epoch on"
            )
        else:
            warn(f"the data have changed: {told}; they begin with a new epoch at step {step}")
        plan.since = (step, math.ceil(epoch))
        plan.part["data_since"] = list(plan.since)


def new_plan(recipe: Recipe, seen: Seen) -> Plan:
    """The plan of a run that begins."""
    return Plan(History(), describe_part(recipe, describe_data(recipe, seen, None)[0], 0, (0, 0)))


def _epoch(checkpoint: str) -> float:
    return float(json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["epoch"] or 0.0)


def _same(before: dict[str, Any], now: dict[str, Any], found: Comparison | None) -> bool:
    """Whether training data are what they were: by their rows, or by their files where rows aren't read before."""
    if found is not None and before["rows"] is not None:
        return found.same
    return [file["digest"] for file in before["files"]] == [file["digest"] for file in now["files"]]


def run_steps(trainer: Any, plan: Plan, folder: Path, checkpoint: str | None) -> Any:
    """Train as planned, from a checkpoint if there is one; returns the Trainer's result."""
    trainer.data_since = plan.since
    if plan.first is None:
        return trainer.train(resume_from_checkpoint=checkpoint)
    result = _finish_epoch(trainer, plan.first, checkpoint)
    step, epoch = trainer.state.global_step, trainer.state.epoch
    if epoch != int(epoch) or step >= trainer.state.max_steps:
        warn("training ended with the epoch that was under way: what was added to the data has not been learnt")
        return result
    plan.since, plan.first = (step, int(epoch)), None
    plan.part |= {"step": step, "data_since": list(plan.since)}
    if is_first_process():
        plan.record(folder)
    trainer.data_since = plan.since
    return trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))


def _finish_epoch(trainer: Any, rows: Any, checkpoint: str | None) -> Any:
    """Train to the end of the epoch on the rows that it began with; its last step has a checkpoint then."""
    whole, trainer.train_dataset = trainer.train_dataset, rows
    limit, stop = trainer.args.save_total_limit, EndOfEpoch()
    if limit == 1:  # with the best model elsewhere, the one of the epoch's end would be deleted
        trainer.args.save_total_limit = 2
    trainer.add_callback(stop)
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.remove_callback(stop)
        trainer.train_dataset, trainer.args.save_total_limit = whole, limit
