"""Going on with a run: from a checkpoint that was read whole, where the present data began, as the arguments say.

The stock loop tells a resumed run's epoch by dividing its steps by those of an epoch, as if its data had always been
these, takes the cadence of logs, evaluations and checkpoints from the checkpoint, whatever the arguments say, and makes
one step more where the checkpoint is of the last one.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from . import checkpoints


@contextmanager
def _without_remark() -> Iterator[None]:
    """Leave out the stock remark that arguments differ from the checkpoint's: here they count."""
    logger = logging.getLogger("transformers.trainer_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "arguments do not match the ones in the `trainer_state.json`" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class ResumedRun:
    """For a Trainer: goes on where the present data began, and at the cadence of its arguments."""

    args: Any
    state: Any
    control: Any
    lr_scheduler: Any
    accelerator: Any
    is_world_process_zero: Callable[[], bool]
    _damaged: set[str]
    _examined: str | None = None
    data_since = (0, 0)
    """Step and epoch at which the present data began: what came before was trained on other data."""

    def newest_checkpoint(self) -> str | None:
        """The newest complete checkpoint in the output folder, on all processes; warns of newer ones that are damaged.

        Raises:
            ValueError: None is complete.
        """
        if self.args.should_save:
            checkpoints.remove_staging(str(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        self._examined = self._checkpoint_to_resume(True)
        return self._examined

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """Examine checkpoints on process 0 (every byte is read) and tell the others."""
        if not wanted or wanted == self._examined:
            return self._examined if wanted else None
        if wanted is True:
            folder = str(self.args.output_dir)
            found, faults = self._broadcast_from_main(checkpoints.newest_complete, folder)
            self._damaged = set(faults)
            if self.is_world_process_zero():
                checkpoints.warn_of(faults, folder, found)
            if found is None:
                raise ValueError(f"no complete checkpoint found in output_dir {folder}")
            return found
        fault = self._broadcast_from_main(checkpoints.find_fault, str(wanted))
        if fault is not None:
            raise ValueError(f"resume_from_checkpoint {wanted} can't be used: {fault}")
        return str(wanted)

    def _broadcast_from_main(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what a function gives on process 0."""
        found = [function(*args) if self.is_world_process_zero() else None]
        return (broadcast_object_list(found) if self.args.world_size > 1 else found)[0]

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Return the stock values, with steps and epochs counted from where the present data began."""
        epochs, steps, examples, samples, rows, length, most = super().set_initial_training_values(args, dataloader)  # type: ignore[misc]
        since, epoch = self.data_since
        if since and hasattr(dataloader, "__len__"):
            if args.max_steps <= 0:
                most = since + max(0, math.ceil((args.num_train_epochs - epoch) * steps))
            epochs = epoch + math.ceil(max(0, most - since) / steps)
        return epochs, steps, examples, samples, rows, length, most

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *more: Any) -> tuple[int, int]:
        """Return epochs trained and batches of the next one, counted alike; the cadence is that of the arguments.

        Raises:
            ValueError: fewer steps are asked for than have been made.
        """
        with _without_remark():
            epochs, batches = super()._init_training_state(max_steps, num_update_steps_per_epoch, *more)  # type: ignore[misc]
        self.state.compute_steps(self.args, max_steps)
        since, epoch = self.data_since
        done = self.state.global_step - since
        if self.state.global_step > max_steps:
            raise ValueError(f"training ends at step {max_steps}, but step {self.state.global_step} has been reached")
        if since:
            epochs = epoch + done // num_update_steps_per_epoch
            skipped = done % num_update_steps_per_epoch * self.args.gradient_accumulation_steps
            batches = 0 if self.args.ignore_data_skip else skipped
        return epochs, batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, but nothing beyond the last step: the stock loop looks only after a step, so makes one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both; a run whose length has changed has, from its next step on, the learning rate of the new length."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        scheduler = self.lr_scheduler
        if checkpoint is not None and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            rates = [base * rule(scheduler.last_epoch) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates


class EndOfEpoch(TrainerCallback):
    """Stops training at the end of an epoch, with a checkpoint."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop, unless training was stopped in the middle of the epoch."""
        if state.epoch == int(state.epoch):
            control.should_save = control.should_training_stop = True
        return control
