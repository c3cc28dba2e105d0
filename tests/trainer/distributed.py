"""What two processes do under `torchrun -m tests.trainer.distributed FOLDER HEADS`; process 0 writes JSON."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as T

from tests.trainer import families, runs, scale

LANES = {"objective": "causal", "data": "lanes", "workers": 0, "accumulation": 1, "dropout": 0.0}
DROPPING = {"objective": "causal", "data": "map", "workers": 0, "accumulation": 1}


class StopAt(T.TrainerCallback):
    """Ends training at a step, without a checkpoint; or has one process get SIGTERM there."""

    def __init__(self, step: int, signalled: int | None = None) -> None:
        self.step, self.signalled = step, signalled

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.signalled is None:
            control.should_training_stop = True
        elif state.global_step == self.step and args.process_index == self.signalled:
            os.kill(os.getpid(), signal.SIGTERM)


def loss_scale(folder: str, heads: list[str]) -> dict[str, Any]:
    """Return loss and gradient norm of some heads, four rows a process."""
    return {head: scale.loss_and_norm(head, folder, batch=4, accumulation=1) for head in heads}


def sharing(folder: str) -> dict[str, Any]:
    """Return what two processes have to agree on besides the loss."""
    return {
        "evaluated": evaluated(os.path.join(folder, "evaluated")),
        "answered": answered(os.path.join(folder, "answered"), 2),
        "terminated": terminated(os.path.join(folder, "terminated")),
        "lanes": lanes(os.path.join(folder, "lanes")),
        "resumed": resumed(DROPPING, os.path.join(folder, "map")),
        "resumed_stream": resumed({**DROPPING, "data": "stream"}, os.path.join(folder, "stream")),
        "resumed_lanes": resumed({**LANES, "dropout": 0.2}, os.path.join(folder, "carried")),
    }


def lanes(folder: str) -> list[float]:
    """Return the losses of a run that carries state, lanes split over the processes."""
    trainer = runs.trainer_of(LANES, folder, logging_steps=1, max_steps=6, save_strategy="no")
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def resumed(case: dict[str, Any], folder: str) -> list[str]:
    """Return digests of a straight run and of one that ended early and was resumed in its third epoch."""
    found = []
    for name, stop in (("straight", None), ("resumed", runs.STEPS - 3)):
        run = os.path.join(folder, name)
        trainer = runs.trainer_of(case, run)
        if stop is not None:
            trainer.add_callback(StopAt(stop))
            trainer.train()
            trainer = runs.trainer_of(case, run)
        trainer.train(resume_from_checkpoint=stop is not None)
        found.append(runs.digest(Path(run) / f"checkpoint-{runs.STEPS}"))
    return found


def terminated(folder: str) -> list[Any]:
    """Return exit status and checkpoints after SIGTERM reached one process only."""
    trainer = runs.trainer_of(DROPPING, folder, save_steps=100)
    trainer.callback_handler.callbacks.insert(0, StopAt(3, signalled=1))
    status: Any = None
    try:
        trainer.train()
    except SystemExit as leaving:
        status = leaving.code
    return [status, sorted(os.listdir(folder))]


def evaluated(folder: str) -> float:
    """Return the loss of seven rows of unequal length: the last batch of the second process repeats rows."""
    model, rows = families.build("BertForMaskedLM")
    trainer = scale.step(model, rows, folder, 4, 1, per_device_eval_batch_size=2, learning_rate=0.0)
    return trainer.evaluate(rows[:7])["eval_loss"]


def answered(folder: str, batch: int) -> dict[str, float]:
    """Return what is measured of five questions, whose texts make one to several windows each."""
    model, rows = families.build("BertForQuestionAnswering")
    task, held = families.questions()
    arguments = {"per_device_eval_batch_size": batch, "learning_rate": 0.0}
    trainer = scale.step(model, rows, folder, 4, 1, **arguments)
    trainer.objective, trainer.data_collator = task, task.collator(families.tokenizer(), bookkeeping=True)
    found = trainer.evaluate(held)
    return {name: found[f"eval_{name}"] for name in ("loss", "exact_match", "f1")}


def main() -> None:
    """Run everything and write the answers of process 0."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    T.logging.set_verbosity_error()
    T.logging.disable_progress_bar()
    folder, heads = sys.argv[1], json.loads(sys.argv[2])
    found = {"loss_scale": loss_scale(os.path.join(folder, "scale"), heads)}
    if "--sharing" in sys.argv:
        found |= sharing(folder)
    if int(os.environ["RANK"]) == 0:
        (Path(folder) / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
