"""LSTM with projection and clipping, equation by equation.

References:
    [1] Sak, Senior and Beaufays 2014, "Long Short-Term Memory Based Recurrent Neural Network Architectures for Large Scale
        Acoustic Modeling", eq. 8-14 without peepholes (recurrent projection).
    [2] Peters et al. 2018, "Deep contextualized word representations", section 3.4 (2 layers of 4096 cells projected to
        512); its published weights were trained with both values clipped to [-3, 3].

Glossary: `i, f, o` input, forget and output gate; `g` candidate; `c` memory cell; `h` projected output, r_t of [1].

Complexity: O(length) sequential steps of two products, `(rows, projection) x (projection, 4 cells)` and
`(rows, cells) x (cells, projection)`.
"""

import torch
from torch.nn.functional import linear


def clipped(values: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Return values limited to [-limit, limit]; None limits nothing."""
    return values if limit is None else values.clamp(-limit, limit)


def projected_lstm_cell(
    gates: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    recurrent: torch.Tensor,
    projection: torch.Tensor,
    clips: tuple[float | None, float | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step.

    Args:
        gates: `(rows, 4 * cells)`, the input's share `W x + b` of the four gates.
        h: `(rows, projection)`.
        c: `(rows, cells)`.
        recurrent: `(4 * cells, projection)`.
        projection: `(projection, cells)`.
        clips: limits of c and h.

    Returns:
        the next `h` and `c`.
    """
    i, f, g, o = (gates + linear(h, recurrent)).chunk(4, dim=-1)
    c = clipped(torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * c, clips[0])
    return clipped(linear(torch.sigmoid(o) * torch.tanh(c), projection), clips[1]), c


def projected_lstm_reference(
    tokens: torch.Tensor,
    batch_sizes: list[int],
    states: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    clips: tuple[float | None, float | None],
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Run a layer step by step; see `projected_lstm` for arguments and returns."""
    w_input, bias, recurrent, projection = weights
    gates = linear(tokens, w_input, bias)
    h, c = states
    outputs, first = [], 0
    for rows in batch_sizes:
        new_h, new_c = projected_lstm_cell(
            gates[first : first + rows], h[:rows], c[:rows], recurrent, projection, clips
        )
        outputs.append(new_h)
        h, c = torch.cat([new_h, h[rows:]]), torch.cat([new_c, c[rows:]])
        first += rows
    return torch.cat(outputs), (h, c)


def projected_lstm_traced(
    inputs: torch.Tensor,
    mask: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    clips: tuple[float | None, float | None],
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Run a layer over padded rows, for torch.compile and torch.export, which cannot sort rows by length.

    Args:
        inputs: `(batch, length, input_size)`.
        mask: `(batch, length)`; where false a step leaves both states as they were.
        states, weights, clips: as in `projected_lstm`.

    Returns:
        outputs `(batch, length, projection)` and final states.
    """
    w_input, bias, recurrent, projection = weights
    gates = linear(inputs, w_input, bias)
    h, c = states
    outputs = []
    for step in range(inputs.shape[1]):
        new_h, new_c = projected_lstm_cell(gates[:, step], h, c, recurrent, projection, clips)
        real = mask[:, step, None]
        h, c = torch.where(real, new_h, h), torch.where(real, new_c, c)
        outputs.append(h)
    return torch.stack(outputs, dim=1), (h, c)
