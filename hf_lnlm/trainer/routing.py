"""Mixtures of experts in training: the load of a whole global batch, the routers' figures, and what is refused.

The load-balancing loss of a step multiplies each expert's share of the tokens by its mean probability. Both are means
over the whole global batch. The second is a sum over micro-batches and processes; the first has to be known before the
first of them is differentiated. So where a step has several parts, each is run once ahead without gradients and with the
random numbers that it will be trained with, and the loads are added up: one more forward pass a step, none where a step
is one batch of one process or the loss isn't wanted (`router_aux_loss_coef=0`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .randomness import preserve_rng_state
from .totals import Measured, Reduce

REFUSED = {
    "switch_transformers": "its experts fill up with padding, tokens are dropped by their place in the batch, its router "
    "losses count padding and its loss ignores num_items_in_batch; train T5, or a mixture of this package, SparseMoE…"
}
"""Stock model type → why training it here would be wrong."""


def check_mixture(model: Any) -> None:
    """Refuse a stock mixture whose losses can't be made right from outside.

    Args:
        model: to be trained, or anything without a config.

    Raises:
        ValueError: naming the model type and the reason.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in REFUSED:
        raise ValueError(f"{kind} can't be trained here: {REFUSED[kind]}")


def expects_load(model: Any, parts: int) -> bool:
    """Tell whether a model's loss on one of several parts of a step depends on the others' load.

    Args:
        model: the unwrapped model.
        parts: micro-batches of all processes.
    """
    return parts > 1 and hasattr(model, "counts_load") and bool(model.counts_load())


@torch.no_grad()
def load_ahead(model: Any, batches: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """Return how many choices will fall on each expert, `(sparse layers, experts)`; leaves random state as it was.

    Args:
        model: the unwrapped model.
        batches: on its device, in the order in which it will be trained on them.
    """
    loads = []
    model.train()
    with preserve_rng_state():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
            loads.append(model(**inputs, **model.load_options).router_totals.load.double())
    return torch.stack(loads).sum(0)


class RouterFigures(Measured):
    """Sums of what the routers did since the last log entry."""

    def add(self, model: Any, outputs: Any) -> None:
        """Add a micro-batch's, if the model has routers.

        Args:
            model: the unwrapped model.
            outputs: its outputs.
        """
        if hasattr(model, "measured_summary"):
            self.add_measured(model.measured_sums(outputs))

    def summary(self, model: Any, reduce: Reduce) -> dict[str, float]:
        """Return the figures over all processes and begin again; nothing for a model without routers.

        Args:
            model: the unwrapped model.
            reduce: sums a tensor over the processes.
        """
        sums, self.measured = self.all_measured(reduce), {}
        summarise: Callable[..., dict[str, float]] | None = getattr(model, "measured_summary", None)
        return summarise(sums) if sums and summarise is not None else {}
