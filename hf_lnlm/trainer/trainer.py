"""The Trainer: transformers' own, with what it lacks for runs that must survive a kill and be repeatable.

Added, each in its own module: checkpoints that are whole or absent (`checkpoints`), signals (`signals`).
"""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from .checkpoints import STAGING_NAME, find_fault, newest_complete, publish, rotate, seal, sweep, warn_of
from .signals import StopRequested, StopSignal


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the random generators of Python, NumPy and torch as they were found."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    devices = torch.cuda.random.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.random.set_rng_state_all(devices)


class LNLMTrainer(Trainer):
    """`transformers.Trainer` that survives a kill. Takes the same arguments and plain or LNLM `TrainingArguments`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the stock Trainer with our signal handling in the place of its own."""
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        listens = bool(arguments is not None and arguments.enable_jit_checkpoint)
        if listens:
            arguments.enable_jit_checkpoint = False
        super().__init__(*args, **kwargs)
        self.args.enable_jit_checkpoint = listens
        self._signals = StopSignal()
        self._staged_push: str | None = None
        self._staging: str | None = None
        self._damaged: set[str] = set()
        if listens:
            self.add_callback(self._signals)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the stock Trainer does; `resume_from_checkpoint=True` picks the newest *complete* checkpoint.

        Raises:
            ValueError: If the named checkpoint is damaged, or if none in the output folder is complete.
            SystemExit: With 143 or 130, after a checkpoint, when SIGTERM or SIGINT arrived.
        """
        if self.args.should_save:
            sweep(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if not self.args.enable_jit_checkpoint:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        self._signals.install()
        try:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        except StopRequested:
            if self.args.save_strategy != "no":
                self._save_checkpoint(self.model, trial)
            raise SystemExit(self._signals.exit_status) from None
        finally:
            self._signals.uninstall()

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        if wanted is True:
            found, faults = newest_complete(self.args.output_dir)
            self._damaged = set(faults)
            if self.is_world_process_zero():
                warn_of(faults, self.args.output_dir, found)
            if found is None:
                raise ValueError(f"No complete checkpoint found in output_dir {self.args.output_dir}")
            return found
        if wanted in (None, False):
            return None
        fault = find_fault(str(wanted))
        if fault is not None:
            raise ValueError(f"resume_from_checkpoint {wanted} can't be used: {fault}")
        return str(wanted)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if self._signals.received is None:
            return super()._finalize_training(trial, num_train_samples, start_time)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        raise SystemExit(self._signals.exit_status)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with kept_random_state():
            return super()._evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        final = run / name
        if self.args.should_save:
            shutil.rmtree(run / STAGING_NAME, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(run / STAGING_NAME)
        failure: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
            self._finish_staged(run / STAGING_NAME / name, final)
        except Exception as error:
            failure = error
        finally:
            self._staging = None
        self._agree_on(failure, run / STAGING_NAME)
        if self.args.should_save:
            publish(run / STAGING_NAME / name, final)
            shutil.rmtree(run / STAGING_NAME, ignore_errors=True)
            self._damaged.discard(name)
            best = self.state.best_model_checkpoint
            rotate(run, self.args.save_total_limit, self.state.global_step, best, self._damaged)
        self.accelerator.wait_for_everyone()
        if self._staged_push is not None:
            self._staged_push = None
            super()._push_from_checkpoint(str(final))

    def _finish_staged(self, staged: Path, final: Path) -> None:
        """Correct the one path that the stock code derived from the staging folder, then seal the folder."""
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(os.path.join(staged, "trainer_state.json"))
        seal(staged)

    def _agree_on(self, failure: Exception | None, staging: Path) -> None:
        """Stop every process if one of them couldn't write its part; the staged files are dropped."""
        failed = torch.tensor(float(failure is not None), device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
        if not failed:
            return
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        message = f"step {self.state.global_step}: the checkpoint couldn't be written and was dropped; the previous one is whole"
        raise OSError(f"{message} ({failure})") from failure

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload only what has been published: the stock code would upload from the staging folder."""
        if self._staging is not None:
            self._staged_push = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)
