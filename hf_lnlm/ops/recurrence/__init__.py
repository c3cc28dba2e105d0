"""LSTM and GRU recurrences over a batch of sequences.

`recurrence` runs one layer in one direction. Backends: `reference`, the equations as a loop over time, which
torch.compile and torch.export can trace, and `eager`, torch's fused kernels (oneDNN on a CPU, cuDNN on a GPU).
"""

import torch

from ..backend import pick_backend
from .eager import recurrence_eager
from .reference import STATES, recurrence_reference

GateWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
NUM_GATES = {"lstm": 4, "gru": 3}

__all__ = ["NUM_GATES", "STATES", "GateWeights", "recurrence"]


def recurrence(
    cell_type: str,
    inputs: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    weights: GateWeights,
    lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run one recurrent layer over left-aligned sequences.

    Args:
        cell_type: `lstm` or `gru`.
        inputs: `(batch, length, input_size)`.
        states: `(h, c)` for an LSTM, `(h,)` for a GRU, each `(batch, hidden_size)`.
        weights: input weight `(gates * hidden_size, input_size)`, recurrent weight `(gates * hidden_size,
            hidden_size)` and their biases, rows ordered i, f, g, o (LSTM) or r, z, n (GRU) as in torch.
        lengths: `(batch,)` real tokens of each row, at least 1, if the final states must be those after the last real
            token; None if all rows are full or the final states do not matter.
        backend: `auto`, `reference` or `eager`.

    Returns:
        outputs `(batch, length, hidden_size)` and the final states, as `states`.
    """
    if pick_backend(backend, inputs.device, ("reference", "eager")) == "reference":
        return recurrence_reference(cell_type, inputs, states, weights, lengths)
    return recurrence_eager(cell_type, inputs, states, weights, lengths)
