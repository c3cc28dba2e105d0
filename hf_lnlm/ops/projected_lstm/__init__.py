"""LSTM with a projected output and clipped values (LSTMP, as in ELMo) over rows of unequal lengths.

torch's own `nn.LSTM(proj_size=…)` has no clipping, and no oneDNN kernel that would pay for leaving it out. Backends:
`reference`, the equations as a loop over time, and `eager`, the same loop without copies or autograd records, with its
gradient written out: every weight's gradient is one product over all steps.
"""

import torch

from ..backend import Operation
from .eager import projected_lstm_eager
from .reference import projected_lstm_reference

__all__ = ["PROJECTED_LSTM", "projected_lstm"]

PROJECTED_LSTM = Operation("projected_lstm", reference=projected_lstm_reference, eager=projected_lstm_eager)

States = tuple[torch.Tensor, torch.Tensor]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def projected_lstm(
    tokens: torch.Tensor,
    batch_sizes: list[int],
    states: States,
    weights: Weights,
    clips: tuple[float | None, float | None],
    backend: str = "auto",
) -> tuple[torch.Tensor, States]:
    """Run one layer in one direction.

    Args:
        tokens: `(total, input_size)`, step after step, as the data of torch's `PackedSequence`.
        batch_sizes: rows of each step, which never grow: longest row first.
        states: projected output h `(rows, projection)` and cell c `(rows, cells)` before the first step.
        weights: input weight `(4 * cells, input_size)` and bias `(4 * cells,)`, recurrent weight `(4 * cells, projection)`,
            rows ordered i, f, g, o; projection `(projection, cells)`.
        clips: greatest absolute value of c and of h; None for no limit.
        backend: `auto`, `reference` or `eager`.

    Returns:
        outputs `(total, projection)`, in the order of `tokens`, and each row's states after its last step.
    """
    if not batch_sizes:
        return tokens.new_empty(0, weights[3].shape[0]), states
    run = PROJECTED_LSTM.load(PROJECTED_LSTM.pick(backend, tokens.device))
    outputs, final = run(tokens, batch_sizes, states, weights, clips)
    return outputs, final
