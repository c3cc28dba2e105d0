"""LSTM and GRU by torch's fused kernels, called on explicit weights.

The functions behind `nn.LSTM` and `nn.GRU` take their weights as arguments, so that weight drop, adapters and offloaded
weights reach them as they are, with the same oneDNN or cuDNN kernel. One step without gradients goes through the cell
functions, which spare the sequence set-up. Ragged batches come cut into rectangular blocks, because the packed variant of
the kernels has no oneDNN path; only where there would be very many blocks is it the faster one.
"""

import torch

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
States = tuple[torch.Tensor, ...]


def recurrence_eager(
    cell_type: str, inputs: torch.Tensor, states: States, weights: Weights
) -> tuple[torch.Tensor, States]:
    """Run a layer by fused kernels; see `recurrence` for arguments and returns."""
    if inputs.shape[1] == 1 and not torch.is_grad_enabled():
        states = _one_step(cell_type, inputs[:, 0], states, weights)
        return states[0].unsqueeze(1), states
    hidden = tuple(state.unsqueeze(0) for state in states)
    flat = [weight for weight in weights if weight is not None]
    training = torch.is_grad_enabled()  # else cuDNN keeps nothing for the backward pass, and refuses it
    common = (flat, weights[2] is not None, 1, 0.0, training, False, True)
    if cell_type == "lstm":
        outputs, h, c = torch.lstm(inputs, hidden, *common)
        return outputs, (h[0], c[0])
    outputs, h = torch.gru(inputs, hidden[0], *common)
    return outputs, (h[0],)


def _one_step(cell_type: str, inputs: torch.Tensor, states: States, weights: Weights) -> States:
    w_ih, w_hh, b_ih, b_hh = weights
    if cell_type == "lstm":
        return torch.lstm_cell(inputs, states, w_ih, w_hh, b_ih, b_hh)
    return (torch.gru_cell(inputs, states[0], w_ih, w_hh, b_ih, b_hh),)


def packed_eager(
    cell_type: str, tokens: torch.Tensor, batch_sizes: torch.Tensor, states: States, weights: Weights
) -> tuple[torch.Tensor, States]:
    """Run a layer over tokens that lie step by step.

    Args:
        tokens: `(total, input_size)`, as the data of torch's `PackedSequence`.
        batch_sizes: `(steps,)` rows of each step, on the CPU.
        states: `(rows, hidden_size)` each, longest row first.

    Returns:
        outputs `(total, hidden_size)` and final states.
    """
    hidden = tuple(state.unsqueeze(0) for state in states)
    flat = [weight for weight in weights if weight is not None]
    training = torch.is_grad_enabled()  # else cuDNN keeps nothing for the backward pass, and refuses it
    common = (flat, weights[2] is not None, 1, 0.0, training, False)
    if cell_type == "lstm":
        outputs, h, c = torch.lstm(tokens, batch_sizes, hidden, *common)
        return outputs, (h[0], c[0])
    outputs, h = torch.gru(tokens, batch_sizes, hidden[0], *common)
    return outputs, (h[0],)
