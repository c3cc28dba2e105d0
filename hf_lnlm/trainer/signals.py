"""SIGTERM, SIGINT, SIGHUP: finish the step, save a checkpoint, leave with the status a shell expects (143, 130, 129).

The stock callback behind `enable_jit_checkpoint` knows SIGTERM only, waits three seconds on a timer, and may save
between backward and optimizer step, when the random state is already past the forward pass that the resumed run will
repeat; such a resume isn't exact. This one keeps its switch and its place and acts only when a step is complete.
A second signal of the same kind ends the process at once, as without a handler. An evaluation that is due at that step
or already running is left out: a scheduler's patience (30 seconds under torchrun) is for the checkpoint. A SIGHUP that
was ignored when the process started (`nohup`) stays ignored.

Ctrl-C and schedulers signal whole groups of processes, the workers of a data loader included; a loader that loses a worker
raises wherever the main process happens to be, in the middle of a step. So workers heed their parent only.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


def ignore_signals_in_worker(worker: int, then: Callable[[int], None] | None = None) -> None:
    """Let a worker of a data loader end on its parent's SIGTERM only; to be its `worker_init_fn`.

    Args:
        worker: The worker's number.
        then: What was to initialise the worker otherwise.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_exit_on_parent_sigterm, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _exit_on_parent_sigterm(parent: int) -> None:
    """Wait for a SIGTERM from the parent, then leave."""
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        continue
    os._exit(0)


class StopRequested(BaseException):
    """Raised inside an evaluation to leave it when a signal has arrived; never seen outside the Trainer."""


class StopSignal(TrainerCallback):
    """Turns a signal into "save, then stop" at the end of the current step, on all processes at the same step."""

    def __init__(self) -> None:
        """Listen for nothing until `install`."""
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; does nothing outside the main thread, where Python has no handlers."""
        self.received = None
        taken = [number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]
        try:
            self._previous = {number: signal.signal(number, self._handle) for number in taken}
        except ValueError:
            self._previous = {}

    def uninstall(self) -> None:
        """Give the handlers back to whom they belonged."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        previous = self._previous.get(number)
        signal.signal(number, previous if previous is not None else signal.SIG_DFL)

    @property
    def exit_status(self) -> int:
        """128 plus the signal's number, as a shell reports it."""
        return 128 + (self.received or 0)

    def agreed(self, args: TrainingArguments) -> bool:
        """Return whether any process has received a signal; the same answer on every process."""
        if args.world_size > 1:
            flag = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.received = int(flag) or None
        return self.received is not None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of training when a signal has come."""
        if self.agreed(args):
            control.should_evaluate = False
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a long evaluation in the middle of training: the step before it is complete.

        Raises:
            StopRequested: a signal has come, on any process.
        """
        if self._previous and self.agreed(args):
            raise StopRequested
