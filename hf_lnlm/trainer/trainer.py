"""The Trainer: transformers' own, with what it lacks for runs that must survive a kill and be repeatable.

Added, each in a module of its own: checkpoints that are whole or absent (`checkpoints`), signals (`signals`), one loss
for one global batch (`loss_scale`), epochs and random state that a resumed run repeats (`epochs`, `randomness`), state
carried across batches (`recurrent_state`), a stop at the first non-finite value (`nonfinite`), figures from exact sums
(`totals`) and the refusal of launches that would silently do something else (`launch`). Everything else is stock.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerControl
from transformers.trainer import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from ..models.base import give_umask_mode, realign
from . import checkpoints
from .arguments import LNLMTrainingArguments
from .callbacks import Constraints, UseCache, no_bars
from .epochs import EndlessEpochs, set_epoch_everywhere
from .launch import check_launch
from .loss_scale import IGNORED, DeclaredParts, LossProbe, LossRule, labels_that_count
from .nonfinite import stop
from .randomness import preserve_rng_state
from .recurrent_state import CarriedMemory, CarriedState, carried_by, state_file, stream_fault
from .resumed import ResumedRun
from .routing import RouterFigures, check_mixture, expects_load, load_ahead
from .signals import StopRequested, StopSignal, ignore_signals_in_worker
from .totals import EvaluationTotals, TrainingTotals, input_tokens

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_ASIDE = ("num_bytes", "reset", "example", "row", "strange")


class LNLMTrainer(ResumedRun, Trainer):
    """`transformers.Trainer` for runs that survive a kill, whatever they are cut into.

    Args:
        args: The stock positional arguments (model, training arguments …).
        objective: What is learnt, for metrics: has `sums(logits, batch)` and `summary(sums)`; see `hf_lnlm.objectives`.
        kwargs: The stock keyword arguments. Plain `TrainingArguments` work too, without the additions that need ours.

    Raises:
        ValueError: If the launch would silently do something else, or `carry_state` doesn't fit model or dataset.
    """

    # declared here because stock Trainer declares less than it takes
    model: Any
    train_dataset: Any
    label_smoother: Any
    model_accepts_loss_kwargs: bool
    control: TrainerControl

    def __init__(self, *args: Any, objective: Any = None, **kwargs: Any) -> None:
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        if arguments is None:
            kwargs["args"] = arguments = LNLMTrainingArguments(output_dir="tmp_trainer")
        check_launch(arguments)
        check_mixture(kwargs.get("model", args[0] if args else None))
        self._use_cache = UseCache(kwargs.get("model", args[0] if args else None))
        listens, arguments.enable_jit_checkpoint = arguments.enable_jit_checkpoint, False
        try:
            super().__init__(*args, **kwargs)
        finally:
            arguments.enable_jit_checkpoint = listens
        realign(self.model)  # a stock model's, too, or a run that goes on from another file computes other bits
        self.objective: Any = objective
        self._name_pair_labels()
        self._signals = StopSignal()
        self._staging: str | None = None
        self._held_push = False
        self._damaged: set[str] = set()
        self._loss_rule: LossRule | None = None  # once measured
        self._current_rule: LossRule | None = None  # of this step; provisional until a step has labels
        self._takes_loss_kwargs = self.model_accepts_loss_kwargs
        if self.label_smoother is not None and self._loss_shifts_labels:
            # transformers shifts for the causal models that it knows by name; others would learn to copy the input
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        self._aside: dict[str, Any] = {}
        self.measured_sums: dict[str, torch.Tensor] = {}  # what the objective measured in the last evaluation
        self._carried: CarriedState | CarriedMemory | None = None
        self._training_totals = TrainingTotals()
        self._router_figures = RouterFigures()
        self._evaluation_totals: EvaluationTotals | None = None
        self.add_callback(Constraints())
        if (patience := getattr(arguments, "early_stopping_patience", None)) is not None:
            self.add_callback(EarlyStoppingCallback(patience, arguments.early_stopping_threshold))
        if listens:
            self.add_callback(self._signals)
        self._check_carry_state()

    def _check_carry_state(self) -> None:
        self._carries = bool(getattr(self.args, "carry_state", False))
        if not self._carries:
            return
        if self._nothing_carried() is None:
            raise ValueError(f"carry_state needs a stateful model, got {type(self.model).__name__}")
        if self.args.auto_find_batch_size:
            raise ValueError("carry_state needs a fixed number of rows a batch, got auto_find_batch_size=True")
        fault = stream_fault(self.train_dataset, self._train_batch_size, self.args.world_size)
        if self.train_dataset is not None and fault is not None:
            raise ValueError(fault)
        if self.args.train_sampling_strategy != "sequential":
            raise ValueError(
                "carry_state needs train_sampling_strategy='sequential', so that windows follow each other, got "
                f"{self.args.train_sampling_strategy!r}"
            )
        self._carried = self._nothing_carried()

    def _nothing_carried(self) -> CarriedState | CarriedMemory | None:
        """An empty holder of what the model can carry from batch to batch, None if it can't."""
        return carried_by(self.accelerator.unwrap_model(self.model))

    # ---- start, resume, stop ----------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as the stock Trainer does; `resume_from_checkpoint=True` picks the newest *complete* checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True.
            trial, ignore_keys_for_eval: As in the stock Trainer.

        Raises:
            ValueError: If the named checkpoint is damaged, or if none in the output folder is complete.
            SystemExit: With 143, 130 or 129, after a checkpoint, when SIGTERM, SIGINT or SIGHUP arrived.
            NonFiniteError: If the loss or the gradient norm isn't finite.
        """
        if self.args.should_save:
            checkpoints.remove_staging(str(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        with self._listening(trial):
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    @contextmanager
    def _listening(self, trial: Any) -> Iterator[None]:
        """Turn SIGTERM, SIGINT and SIGHUP into a checkpoint and an exit status while training runs."""
        if self.args.enable_jit_checkpoint:
            self._signals.install()
        try:
            yield
        except StopRequested:
            if self.args.save_strategy != "no":
                self._save_checkpoint(self.model, trial)
            raise SystemExit(self._signals.exit_status) from None
        finally:
            self._signals.uninstall()
            self._use_cache.restore()
            getattr(self.accelerator.unwrap_model(self.model), "set_global_load", lambda load: None)(None)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if not (self.args.enable_jit_checkpoint and self._signals.agreed(self.args)):
            return super()._finalize_training(trial, num_train_samples, start_time)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        raise SystemExit(self._signals.exit_status)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Don't report tied weights as missing: they are saved once, under the name of what they are tied to."""
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    # ---- data and epochs --------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return the training loader; a stream without a length is repeated without an end."""
        dataset = self.train_dataset
        if not isinstance(dataset, IterableDataset) or has_length(dataset):
            return super().get_train_dataloader()
        self.train_dataset = EndlessEpochs(dataset)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Set the epoch wherever it matters and, unless a checkpoint brought its own, begin with no carried state."""
        epoch, loader = kwargs["epoch"], kwargs["train_dataloader"]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        set_epoch_everywhere(loader, epoch, seed)
        if self._carries:
            self._carried = carried = carried_by(self.accelerator.unwrap_model(self.model))
            resumed = kwargs["resume_from_checkpoint"] if epoch == kwargs["epochs_trained"] else None
            if carried is not None and resumed is not None and kwargs["steps_trained_in_current_epoch"]:
                path = state_file(resumed, self.args.process_index, self.args.world_size)
                carried.load(path, self.accelerator.unwrap_model(self.model), self.args.device)
        self._training_totals.begin()
        super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        """Keep the signals of a process group from the loader's workers."""
        loader = super()._get_dataloader(*args, **kwargs)
        base = getattr(loader, "base_dataloader", loader)
        base.worker_init_fn = partial(ignore_signals_in_worker, then=base.worker_init_fn)
        return loader

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Leave an objective's collator all columns: it reads some that the model doesn't take, and removes them."""
        if hasattr(data_collator, "bookkeeping"):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if hasattr(self.data_collator, "bookkeeping"):
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take out of a batch what is about the batch and not for the model."""
        self._aside = {name: inputs[name] for name in _ASIDE if name in inputs}
        return super()._prepare_inputs(_for_the_model(inputs))

    # ---- optimizer --------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of parameters with weight decay: the stock ones less those that a model excludes.

        A model excludes parameters by `_no_weight_decay`, regular expressions searched in their names.
        """
        excluded = set()
        for prefix, module in model.named_modules():
            patterns = [re.compile(pattern) for pattern in getattr(module, "_no_weight_decay", ())]
            for name, _ in module.named_parameters() if patterns else ():
                if any(pattern.search(name) for pattern in patterns):
                    excluded.add(f"{prefix}.{name}" if prefix else name)
        return [name for name in super().get_decay_parameter_names(model) if name not in excluded]

    @property
    def _checks_gradients(self) -> bool:
        """Not with a loss scaler, which meets infinities on purpose, nor where an engine owns the gradients."""
        plain = self.accelerator.distributed_type in _PLAIN and getattr(self.accelerator, "scaler", None) is None
        return plain and getattr(self.args, "stop_on_nonfinite", True)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | float:
        if not self._checks_gradients or self._has_mixed_mesh_grads(model):
            return super()._clip_grad_norm(model)
        norm = self._finite_norm(model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._checks_gradients and not self._has_mixed_mesh_grads(model):
            return self._finite_norm(model)
        return super()._get_grad_norm(model, grad_norm)

    def _finite_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Return the norm of all gradients; raises NonFiniteError before clipping could spread a NaN."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            inner = self.accelerator.unwrap_model(self.model)
            stop("the gradient norm", float(norm), self.state.global_step + 1, inner)
        return norm

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Run forward and backward on a micro-batch.

        Args:
            model: The wrapped model.
            inputs: The micro-batch.
            num_items_in_batch: Items of the whole step for each term of the loss, `(terms,)`.

        Returns:
            The micro-batch's share of the loss, detached.

        Raises:
            NonFiniteError: If it isn't finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if getattr(self.args, "stop_on_nonfinite", True) and not bool(torch.isfinite(loss).all()):
            stop("the loss", float(loss), self.state.global_step + 1, self.accelerator.unwrap_model(self.model))
        return loss

    # ---- loss -------------------------------------------------------------------------------------------------------

    @property
    def _scales_loss(self) -> bool:
        """Whether losses are ours to scale: not with a loss function, smoothing or engine that does it itself."""
        whole = self.get_cp_size() * self.get_sp_size() == 1 and not self.is_deepspeed_enabled
        return whole and self.label_smoother is None and self.compute_loss_func is None

    def _find_loss_rule(self, batches: list[dict[str, Any]]) -> LossRule:
        """Measure on a first step how the model's loss is normalised; every process takes process 0's answer.

        Raises:
            ValueError: No label of the first step of a training run counts.
        """
        inputs = super()._prepare_inputs(_for_the_model(max(batches, key=labels_that_count)))
        counted = labels_that_count(inputs)
        if counted == 0 and self._evaluation_totals is None and self.args.world_size == 1:
            raise ValueError(f"0 of {inputs['labels'].numel()} labels (0 %) of the first step count: all are {IGNORED}")
        model = self.accelerator.unwrap_model(self.model)
        probe = LossProbe(model, inputs, self._takes_loss_kwargs, self._loss_shifts_labels)
        with self.compute_loss_context_manager():
            rule = probe.rule()
        if self.args.world_size > 1 and not isinstance(rule, DeclaredParts):
            rule, counted = broadcast_object_list([rule, counted])
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        self._loss_rule = rule if counted else None
        return rule

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the items of all micro-batches of a step on all processes, `(terms,)`."""
        if not self._scales_loss or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        self._current_rule = rule = self._loss_rule or self._find_loss_rule(batch_samples)
        total = torch.stack([rule.count(batch).to(device) for batch in batch_samples]).sum(0)
        if self.args.average_tokens_across_devices:
            total = self._reduce(total) // self.get_tp_size()
        return total

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        """Collect a step's micro-batches, as the stock Trainer does; a mixture is told the load of all of them."""
        batches, total = super().get_batch_samples(*args, **kwargs)
        inner = self.accelerator.unwrap_model(self.model)
        if batches and expects_load(inner, len(batches) * self.args.world_size):
            if self._carries:
                raise ValueError("carry_state needs router_aux_loss_coef=0 where a step has several micro-batches")
            with self.compute_loss_context_manager():
                prepared = (super(LNLMTrainer, self)._prepare_inputs(_for_the_model(batch)) for batch in batches)
                inner.set_global_load(self._reduce(load_ahead(inner, prepared)))
        return batches, total

    def _reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes."""
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

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
        inputs = self._with_state(inputs)
        rule, total = self._current_rule, num_items_in_batch
        if rule is None or not torch.is_tensor(total) or not total.dim():
            loss, outputs = super().compute_loss(model, dict(inputs), True, total)
        else:
            total = total.clamp(min=1)
            passed = {**inputs, "num_items_in_batch": total[0]} if rule.passes_num_items else dict(inputs)
            loss, outputs = super().compute_loss(model, passed, True)
            sums = rule.sums(loss, outputs, inputs, total)
            self._totals.add_loss(sums, rule.count(inputs))
            if not rule.passes_num_items:
                loss = (sums / total.to(sums.device, sums.dtype)).sum()
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._measure(inputs, outputs)
        self._router_figures.add(self.accelerator.unwrap_model(self.model), outputs)
        if self._carried is not None:
            self._carried.keep_from(outputs)
        return (loss, outputs) if return_outputs else loss

    def _with_state(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Hand the state of the streams to the model."""
        if self._carried is None:
            return inputs
        inner, reset = self.accelerator.unwrap_model(self.model), self._aside.get("reset")
        reset = None if reset is None else reset.to(self.args.device).bool().reshape(-1)
        return {**inputs, **self._carried.arguments(inner, inputs["input_ids"].shape[0], reset)}

    @property
    def _totals(self) -> TrainingTotals | EvaluationTotals:
        return self._training_totals if self._evaluation_totals is None else self._evaluation_totals

    def _measure(self, inputs: dict[str, Any], outputs: Any) -> None:
        """Add what is measured of a batch besides its loss."""
        trains = self._evaluation_totals is None
        if trains:
            self._training_totals.add_batch(input_tokens(inputs), self._aside.get("num_bytes"))
        if self.objective is None or (trains and not getattr(self.objective, "logs_metrics", False)):
            return
        if (logits := self._measured_logits(outputs)) is not None:
            with torch.no_grad():
                self._totals.add_measured(self.objective.sums(logits, {**inputs, **self._aside}))

    def _name_pair_labels(self) -> None:
        """Wait for the one label of pairs that the model was made for; transformers would wait for both."""
        label = getattr(getattr(self.accelerator.unwrap_model(self.model), "config", None), "label", None)
        if self.args.label_names is None and label in ("next_sentence_label", "sentence_order_label"):
            self.label_names = ["labels", label]

    def _measured_logits(self, outputs: Any) -> torch.Tensor | None:
        """What the objective measures of the outputs: the logits, unless it says otherwise."""
        return self.objective.logits(outputs) if hasattr(self.objective, "logits") else outputs.get("logits")

    # ---- evaluation and logs ----------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate without a trace in the training run: random state and carried state are kept.

        The loss is the mean over all items (the stock loop averages batch means), and the objective's metrics come from
        sums added up batch by batch: logits of the whole set are never gathered for them.
        """
        held = self._carried, self._evaluation_totals
        self._carried = self._state_for_evaluation(getattr(dataloader, "dataset", None))
        self._evaluation_totals = totals = EvaluationTotals()
        try:
            with preserve_rng_state(), self._training_totals.paused():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self._carried, self._evaluation_totals = held
        exact = {f"{metric_key_prefix}_{name}": value for name, value in self._exact_metrics(totals).items()}
        return output._replace(metrics={**(output.metrics or {}), **exact})

    def _state_for_evaluation(self, dataset: Any) -> CarriedState | CarriedMemory | None:
        if not self._carries or not hasattr(dataset, "num_streams"):
            return None
        fault = stream_fault(dataset, self.args.eval_batch_size, self.args.world_size)
        if fault is not None:
            raise ValueError(f"evaluation: {fault}")
        return self._nothing_carried()

    def _exact_metrics(self, totals: EvaluationTotals) -> dict[str, float]:
        measured = self.measured_sums = totals.all_measured(self._reduce)
        metrics = dict(self.objective.summary(measured)) if measured else {}
        loss = totals.loss(self._reduce)
        return metrics if loss is None else {**metrics, "loss": loss}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Any, Any, Any]:
        """Evaluate a batch; rows that only fill up the last batch of several processes don't count."""
        keep = self._rows_that_count(inputs)
        if keep is not None:
            inputs = {name: _without_rows(name, value, keep) for name, value in inputs.items()}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **generation)

    def _rows_that_count(self, inputs: dict[str, Any]) -> int | None:
        """Return how many rows of this process's last batch aren't repetitions, None if all count.

        accelerate fills up the last batch with rows from the start. Their labels are ignored here; terms that count
        rows or attended tokens instead of labels still see them. Where a collator makes several rows of one of the data
        set (the windows of a question), `row` says which.
        """
        gradient_state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not gradient_state.end_of_dataloader or gradient_state.remainder <= 0:
            return None
        made_of = inputs.get("row")
        rows = next(iter(inputs.values())).shape[0] if made_of is None else int(made_of.max()) + 1
        kept = min(max(gradient_state.remainder - self.args.process_index * rows, 0), rows)
        return kept if made_of is None else int((made_of < kept).sum())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with tokens per second and, for a language-modelling objective, perplexity and bits per byte."""
        if "loss" in logs:
            # an objective predicts tokens; a task (a classifier's) says so itself
            language = getattr(self.objective, "language", hasattr(self.objective, "direction"))
            per_byte = language and getattr(self.objective, "direction", "") == "forward"
            measured = self._training_totals.all_measured(self._reduce)
            logs.update(self._training_totals.summary(self._reduce, language, per_byte))
            logs.update(self.objective.summary(measured) if measured else {})
            logs.update(self._router_figures.summary(self.accelerator.unwrap_model(self.model), self._reduce))
        super().log(logs, start_time)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save, without the Hub's token in `training_args.bin`."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            with self._use_cache:
                super()._save(output_dir, state_dict)
            give_umask_mode(str(output_dir or self.args.output_dir))
        finally:
            self.args.hub_token = token

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint into the staging folder with its manifest, put it in its place, then delete surplus ones."""
        run = Path(super()._get_output_dir(trial))
        staging, name = run / checkpoints.STAGING_NAME, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        failure = self._write_staged(model, trial, staging, run / name)
        self._finish_or_stop(failure, staging)
        if self.args.should_save:
            checkpoints.publish(staging / name, run / name)
            shutil.rmtree(staging, ignore_errors=True)
            self._damaged.discard(name)
            best = self.state.best_model_checkpoint
            checkpoints.rotate(run, self.args.save_total_limit, self.state.global_step, best, self._damaged)
        self.accelerator.wait_for_everyone()
        if self._held_push:
            self._held_push = False
            super()._push_from_checkpoint(str(run / name))

    def _write_staged(self, model: torch.nn.Module, trial: Any, staging: Path, final: Path) -> Exception | None:
        """Write this process's part; return what went wrong instead of raising it, so that no process waits for ever."""
        self._staging = str(staging)
        try:
            with no_bars() if self.args.disable_tqdm else nullcontext(), self._training_totals.paused():
                super()._save_checkpoint(model, trial)
            if self._carried is not None:
                self._carried.save(state_file(staging / final.name, self.args.process_index, self.args.world_size))
        except Exception as error:
            return error
        finally:
            self._staging = None
        return None

    def _finish_or_stop(self, failure: Exception | None, staging: Path) -> None:
        """Finish the staged folder if every process could write its part, else drop it and stop all of them."""
        if not self._any(failure) and self.args.should_save:
            try:
                self._finish(staging)
            except OSError as error:
                failure = error
        if not self._any(failure):
            return
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        what = f"the checkpoint of step {self.state.global_step} couldn't be written; older ones are whole"
        raise OSError(f"{what} ({failure or 'another process failed'})") from failure

    def _any(self, failure: Exception | None) -> bool:
        """Whether something failed on any process."""
        return bool(self._reduce(torch.tensor(float(failure is not None), device=self.args.device)))

    def _finish(self, staging: Path) -> None:
        """Correct the one path that the stock code derived from the staging folder, then write the manifest."""
        staged = next(staging.iterdir())
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(staging.parent / staged.name)
            self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
        checkpoints.write_manifest(staged)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload only what has been published: the stock code would upload from the staging folder."""
        if self._staging is not None:
            self._held_push = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)


def _for_the_model(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a batch without what is about the batch."""
    return {name: value for name, value in inputs.items() if name not in _ASIDE}


def _without_rows(name: str, value: Any, keep: int) -> Any:
    """Make the rows from `keep` on count for nothing in a batch: no labels, no bytes, positions out of reach."""
    labels = name in ("labels", "shift_labels") or name.endswith("_label")
    if not torch.is_tensor(value) or not value.dim() or value.is_floating_point():
        return value
    fillers = {"num_bytes": 0, "example": -1, "strange": IGNORED}
    if not (labels or name in ("start_positions", "end_positions", *fillers)):
        return value
    value = value.clone()
    value[keep:] = IGNORED if labels else fillers.get(name, torch.iinfo(value.dtype).max)
    return value
