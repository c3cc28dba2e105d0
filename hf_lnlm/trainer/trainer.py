"""The Trainer: transformers' own, with what it lacks for runs that must survive a kill and be repeatable.

Added, each in its own module: checkpoints that are whole or absent (`checkpoints`), signals (`signals`).
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from .checkpoints import STAGING_NAME, find_fault, newest_complete, publish, rotate, seal, sweep, warn_of
from .loss_scale import LossProbe, LossRule
from .randomness import kept_random_state
from .signals import StopRequested, StopSignal


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
        self._loss_rule: LossRule | None = None
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
        step = self.state.global_step
        raise OSError(
            f"the checkpoint of step {step} couldn't be written; older ones are whole ({failure})"
        ) from failure

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload only what has been published: the stock code would upload from the staging folder."""
        if self._staging is not None:
            self._staged_push = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    # ---- loss scale -------------------------------------------------------------------------------------------------

    @property
    def _scales_loss(self) -> bool:
        """Whether losses are ours to scale: not with a loss function, smoothing or engine that does it itself."""
        return self.label_smoother is None and self.compute_loss_func is None and not self.is_deepspeed_enabled

    def _find_loss_rule(self, inputs: dict[str, Any]) -> LossRule:
        """Measure on the first batch how the model's loss is normalised; every process takes process 0's answer."""
        probe = LossProbe(
            self.model, self._prepare_inputs(inputs), self.model_accepts_loss_kwargs, self._loss_shifts_labels
        )
        with self.compute_loss_context_manager():
            rule = probe.rule()
        self.model_accepts_loss_kwargs = rule.passes_num_items
        self.loss_is_scaled_for_ga = True
        return rule

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the items of all micro-batches of a step on all processes, `(terms,)`."""
        if not self._scales_loss or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        if self._loss_rule is None:
            self._loss_rule = self._find_loss_rule(batch_samples[0])
        total = sum(self._loss_rule.count(batch).to(device) for batch in batch_samples)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.reduce(total, "sum") / self.get_tp_size()
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, as its share in the mean over all items of the step.

        Args:
            model: The wrapped model.
            inputs: The micro-batch.
            return_outputs: Return the model's outputs too.
            num_items_in_batch: Items of the step for each term of the loss, `(terms,)`.
        """
        rule = self._loss_rule
        if rule is None or not torch.is_tensor(num_items_in_batch) or not num_items_in_batch.dim():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scalar = num_items_in_batch[0] if rule.passes_num_items else None
        loss, outputs = super().compute_loss(model, inputs, True, scalar)
        if not rule.passes_num_items:
            sums = rule.sums(loss, outputs, inputs, num_items_in_batch)
            loss = (sums / num_items_in_batch.to(sums.device).clamp(min=1)).sum().to(loss.dtype)
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss
