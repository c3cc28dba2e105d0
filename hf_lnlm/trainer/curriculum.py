"""A curriculum that Trainer follows: sequences grow once the model gets them right.

The callback looks at every training batch's logits by a hook on the model, so that stock Trainer works too. Its state is
part of a checkpoint: a resumed run goes on with sequences as long as they were.
"""

from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data.algorithmic import Curriculum


class CurriculumCallback(TrainerCallback, ExportableState):
    """Tells a curriculum how well training goes.

    Args:
        curriculum: of the stream that is trained on.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self._hook: Any = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        kept = {"longest": self.curriculum.stream.longest, "average": self.curriculum.average}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take up the state of the checkpoint that is resumed from, and begin to look.

        Raises:
            ValueError: rows are drawn by other processes, which sequences would never grow in.
        """
        workers = getattr(args, "dataloader_num_workers", 0)
        if workers:
            raise ValueError(f"a curriculum changes the stream: dataloader_num_workers must be 0, got {workers}")
        kept = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if kept is not None:
            self.curriculum.stream.longest = int(kept["attributes"]["longest"])
            self.curriculum.average = kept["attributes"]["average"]
        self._hook = model.register_forward_hook(self._look, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop looking."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, model: Any, inputs: Any, named: dict[str, Any], outputs: Any) -> None:
        # without gradients it is an evaluation, or Trainer measuring the loss: not a step of training
        if model.training and torch.is_grad_enabled() and named.get("labels") is not None:
            self.curriculum.observe(outputs["logits"].detach(), named["labels"])
