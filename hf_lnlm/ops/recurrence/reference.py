"""LSTM and GRU, equation by equation.

References:
    [1] Hochreiter and Schmidhuber 1997, with the forget gate of Gers, Schmidhuber and Cummins 2000.
    [2] Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", eq. 5-8.

Glossary: `i, f, o` input, forget and output gate; `g` candidate; `r, z` reset and update gate; `n` new state;
`c` memory cell; `h` output.

Deviation from [2]: the reset gate acts on the recurrent product (`r * (W_hn h + b_hn)`), as in torch and cuDNN, not on the
state before it. Weights for one cannot be used with the other.

Complexity: O(length) sequential steps of one `(batch, hidden) x (hidden, gates * hidden)` product.
"""

import torch
from torch.nn.functional import linear

STATES = {"lstm": ("h", "c"), "gru": ("h",)}


def lstm_cell(
    gates: torch.Tensor, h: torch.Tensor, c: torch.Tensor, w_hh: torch.Tensor, b_hh: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One LSTM step, [1].

    Args:
        gates: `(batch, 4 * hidden)`, the input's share `W_ih x + b_ih` of the four gates.
        h, c: `(batch, hidden)`.
        w_hh, b_hh: recurrent weight `(4 * hidden, hidden)` and bias.

    Returns:
        the next `h` and `c`.
    """
    i, f, g, o = (gates + linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_cell(gates: torch.Tensor, h: torch.Tensor, w_hh: torch.Tensor, b_hh: torch.Tensor | None) -> torch.Tensor:
    """One GRU step, [2] with torch's reset; arguments as in `lstm_cell`, three gates. Returns the next `h`."""
    input_r, input_z, input_n = gates.chunk(3, dim=-1)
    hidden_r, hidden_z, hidden_n = linear(h, w_hh, b_hh).chunk(3, dim=-1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return (1 - z) * n + z * h


def recurrence_reference(
    cell_type: str,
    inputs: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    mask: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run a layer step by step; see `recurrence` for the arguments.

    Args:
        mask: `(batch, length)`; where false a step leaves every state as it was. For tracing, where positions cannot
            be gathered.
        starts: `(batch, length)`; where true the state is reset to zero before the step.

    Returns:
        outputs `(batch, length, hidden)` and final states.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    gates = linear(inputs, w_ih, b_ih)
    outputs = []
    for t in range(inputs.shape[1]):
        if starts is not None:
            states = tuple(torch.where(starts[:, t, None], 0.0, state) for state in states)
        new = _step(cell_type, gates[:, t], states, w_hh, b_hh)
        if mask is not None:
            new = tuple(torch.where(mask[:, t, None], a, b) for a, b in zip(new, states, strict=True))
        states = new
        outputs.append(states[0])
    return torch.stack(outputs, dim=1), states


def _step(
    cell_type: str,
    gates: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    w_hh: torch.Tensor,
    b_hh: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    if cell_type == "lstm":
        return lstm_cell(gates, states[0], states[1], w_hh, b_hh)
    return (gru_cell(gates, states[0], w_hh, b_hh),)
