"""LSTM and GRU recurrences over a batch of sequences.

`recurrence` runs one layer in one direction. Backends: `reference`, the equations as a loop over time, which
torch.compile and torch.export can trace, and `eager`, torch's fused kernels (oneDNN on a CPU, cuDNN on a GPU).
"""

import torch

from ..backend import Operation
from .eager import packed_eager, recurrence_eager
from .reference import STATES, recurrence_reference

GateWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
NUM_GATES = {"lstm": 4, "gru": 3}

__all__ = ["NUM_GATES", "RECURRENCE", "STATES", "GateWeights", "recurrence", "recurrence_blocks"]

RECURRENCE = Operation("recurrence", reference=recurrence_reference, eager=recurrence_eager)


def recurrence(
    cell_type: str,
    inputs: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    weights: GateWeights,
    backend: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run one recurrent layer over full sequences.

    Args:
        cell_type: `lstm` or `gru`.
        inputs: `(batch, length, input_size)`.
        states: `(h, c)` for an LSTM, `(h,)` for a GRU, each `(batch, hidden_size)`.
        weights: input weight `(gates * hidden_size, input_size)`, recurrent weight `(gates * hidden_size,
            hidden_size)` and their biases, rows ordered i, f, g, o (LSTM) or r, z, n (GRU) as in torch.
        backend: `auto`, `reference` or `eager`.

    Returns:
        outputs `(batch, length, hidden_size)` and the final states, as `states`.
    """
    run = RECURRENCE.load(RECURRENCE.pick(backend, inputs.device))
    outputs, states = run(cell_type, inputs, states, weights)
    return outputs, states


def recurrence_blocks(
    cell_type: str,
    tokens: torch.Tensor,
    sizes: tuple[tuple[int, int], ...],
    batch_sizes: torch.Tensor | None,
    states: tuple[torch.Tensor, ...],
    weights: GateWeights,
    backend: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run one recurrent layer over rows of unequal lengths, cut into blocks (see nn/ragged.py).

    Args:
        tokens: `(total, input_size)`, block after block, each `(rows, steps)`.
        sizes: (rows, steps) of each block; rows never grow.
        batch_sizes: rows of each step if the tokens lie step by step, else None.
        states: `(rows, hidden_size)` each, in the order of the blocks' rows: longest first.
        cell_type, weights, backend: as in `recurrence`.

    Returns:
        outputs `(total + 1, hidden_size)`, the last row zero (masked positions read it), and the states
        `(rows, hidden_size)` after the last block that each row is in.
    """
    zero = tokens.new_zeros(1, states[0].shape[-1])
    if not sizes:
        return zero, states
    if batch_sizes is not None and RECURRENCE.pick(backend, tokens.device) == "eager":
        hidden, states = packed_eager(cell_type, tokens, batch_sizes, states, weights)
        return torch.cat([hidden, zero]), states
    outputs, ended, offset = [], [], 0
    for number, (rows, steps) in enumerate(sizes):
        inputs = tokens[offset : offset + rows * steps].view(rows, steps, -1)
        hidden, states = recurrence(cell_type, inputs, states, weights, backend)
        outputs.append(hidden.reshape(rows * steps, -1))
        staying = sizes[number + 1][0] if number + 1 < len(sizes) else 0
        ended.append(tuple(state[staying:] for state in states))
        states = tuple(state[:staying] for state in states)
        offset += rows * steps
    final = tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True))
    return torch.cat([*outputs, zero]), final
