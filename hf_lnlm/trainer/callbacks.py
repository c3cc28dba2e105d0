"""Callbacks: constraints that a model puts on its weights; progress bars that go quiet when piped.

What is logged while training (perplexity, bits per byte, tokens per second) needs the batches, which callbacks don't
see; it is in `totals` and written by `LNLMTrainer.log`. Progress bars are the stock ones; `LNLMTrainingArguments` turns
them off where no terminal is listening.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep the progress bars of saving and loading quiet, where no terminal is listening."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class UseCache:
    """A model's `config.use_cache` as it was: Trainer switches it off for good, for training and in what it saves.

    Args:
        model: before Trainer has it; None where Trainer makes it.
    """

    def __init__(self, model: Any) -> None:
        config = getattr(model, "config", None)
        self._config = config if hasattr(config, "use_cache") else None
        self._own = getattr(config, "use_cache", None)

    def restore(self) -> None:
        """Set it as it was."""
        if self._config is not None:
            self._config.use_cache = self._own

    def __enter__(self) -> None:
        self._trained = getattr(self._config, "use_cache", None)
        self.restore()

    def __exit__(self, *_: object) -> None:
        if self._config is not None:
            self._config.use_cache = self._trained


class Constraints(TrainerCallback):
    """Projects weights back after each optimizer step, by the `apply_constraints()` that a model offers.

    A max-norm constraint is an example: after the step every row longer than the norm is scaled back to it.
    """

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Apply the constraints of the model, or of any model inside it (an adapter wraps it, a hybrid contains it)."""
        inner = getattr(model, "module", model)
        for module in [] if inner is None else inner.modules():
            if hasattr(module, "apply_constraints") and hasattr(module, "config"):
                module.apply_constraints()  # type: ignore[operator]
                return
