"""LSTM and GRU by torch's fused kernels, called on explicit weights.

The functions behind `nn.LSTM` and `nn.GRU` take their weights as arguments, so that weight drop, adapters and offloaded
weights reach them as they are, with the same oneDNN or cuDNN kernel. One step without gradients goes through the cell
functions, which spare the sequence set-up. Final states of unequal rows come from a packed call, which is slower (it has
no oneDNN path) and so is made only when they are asked for.
"""

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
States = tuple[torch.Tensor, ...]


def recurrence_eager(
    cell_type: str, inputs: torch.Tensor, states: States, weights: Weights, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, States]:
    """Run a layer by fused kernels; see `recurrence` for arguments and returns."""
    if inputs.shape[0] == 0:
        return inputs.new_zeros((*inputs.shape[:2], states[0].shape[-1])), states
    if inputs.shape[1] == 1 and not torch.is_grad_enabled():
        states = _one_step(cell_type, inputs[:, 0], states, weights)
        return states[0].unsqueeze(1), states
    if lengths is not None and int(lengths.min()) < inputs.shape[1]:
        return _packed(cell_type, inputs, states, weights, lengths)
    hidden = tuple(state.unsqueeze(0) for state in states)
    flat = [weight for weight in weights if weight is not None]
    common = (flat, weights[2] is not None, 1, 0.0, False, False, True)
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


def _packed(
    cell_type: str, inputs: torch.Tensor, states: States, weights: Weights, lengths: torch.Tensor
) -> tuple[torch.Tensor, States]:
    packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    hidden = tuple(state.index_select(0, order).unsqueeze(0) for state in states)
    flat = [weight for weight in weights if weight is not None]
    common = (flat, weights[2] is not None, 1, 0.0, False, False)
    if cell_type == "lstm":
        data, *final = torch.lstm(packed.data, packed.batch_sizes, hidden, *common)
    else:
        data, *final = torch.gru(packed.data, packed.batch_sizes, hidden[0], *common)
    outputs, _ = pad_packed_sequence(
        PackedSequence(data, packed.batch_sizes, order, back), batch_first=True, total_length=inputs.shape[1]
    )
    return outputs, tuple(state[0].index_select(0, back) for state in final)
