"""What goes into and comes out of the Turing machine's operation: weights, state, options, and the order of the
interface vector.

References:
    [1] Graves, Wayne, Danihelka 2014, Neural Turing Machines, arXiv 1410.5401
    [2] Collier, Beel 2018, Implementing Neural Turing Machines, arXiv 1807.08518

Interface vector, `num_interface(options, M)` numbers, one linear map of the controller's h_t, clipped to
±`interface_clip`:
    for each head, the R read heads first, then the W write heads: key k (M), strength β, gate g, sharpening γ, shift
    s (2·shift_range+1);
    then for each write head: erase e (M), add a (M).
Activations ([2]): k and a tanh, β softplus, g and e logistic, γ 1 + softplus, s softmax.
"""

from typing import NamedTuple

import torch

CONTROLLERS = ("lstm", "feedforward")


class NTMOptions(NamedTuple):
    """Settings that change the equations."""

    num_read_heads: int = 1
    num_write_heads: int = 1
    shift_range: int = 1
    controller: str = "lstm"
    read_before_write: bool = True
    interface_clip: float = 20.0


class NTMWeights(NamedTuple):
    """Effective weights of one memory layer; G is 4·H (input, forget, candidate, output) for an LSTM controller and
    H for feed-forward."""

    inputs: torch.Tensor  # `(G, D)`
    inputs_bias: torch.Tensor  # `(G,)`
    recurrent: torch.Tensor  # `(G, H + R·M)` on [h_{t-1} ; r_{t-1}], or `(H, R·M)` on r_{t-1} for feed-forward
    interface: torch.Tensor  # `(num_interface, H)`
    interface_bias: torch.Tensor  # `(num_interface,)`


class NTMState(NamedTuple):
    """Everything that one step hands to the next, float32."""

    hidden: torch.Tensor  # `(B, H)`
    cells: torch.Tensor  # `(B, H)`, `(B, 0)` for a feed-forward controller
    reads: torch.Tensor  # `(B, R·M)`
    weightings: torch.Tensor  # `(B, R+W, N)`, each row sums to 1
    memory: torch.Tensor  # `(B, N, M)`


class NTMOutputs(NamedTuple):
    """Results of the operation."""

    outputs: torch.Tensor  # `(B, T, H + R·M)`: [h_t ; r_t], zero at masked steps
    state: NTMState
    weightings: torch.Tensor  # `(B, T, R+W, N)`, for looking at: without gradient


def head_size(options: NTMOptions, width: int) -> int:
    """Numbers of one head in the interface vector.

    Args:
        options: settings.
        width: M, numbers in a memory slot.
    """
    return width + 3 + 2 * options.shift_range + 1


def num_interface(options: NTMOptions, width: int) -> int:
    """Length of the interface vector.

    Args:
        options: settings.
        width: M, numbers in a memory slot.
    """
    heads = options.num_read_heads + options.num_write_heads
    return heads * head_size(options, width) + 2 * width * options.num_write_heads


def check_arguments(
    inputs: torch.Tensor, weights: NTMWeights, state: NTMState, options: NTMOptions, mask: torch.Tensor | None
) -> None:
    """Compare all shapes with each other.

    Args:
        inputs: `(B, T, D)`.
        weights: see `NTMWeights`.
        state: see `NTMState`.
        options: see `NTMOptions`.
        mask: `(B, T)` or None.

    Raises:
        ValueError: a shape or option does not fit.
    """
    if inputs.dim() != 3 or inputs.shape[0] < 1 or inputs.shape[1] < 1:
        raise ValueError(f"inputs must be (batch, time, features) with at least one of each, got {tuple(inputs.shape)}")
    if options.controller not in CONTROLLERS:
        raise ValueError(f"controller must be one of {CONTROLLERS}, got {options.controller!r}")
    batch, steps, features = inputs.shape
    slots, width = state.memory.shape[1:]
    hidden = state.hidden.shape[1]
    heads = options.num_read_heads + options.num_write_heads
    lstm = options.controller == "lstm"
    gates, reads = (4 * hidden if lstm else hidden), options.num_read_heads * width
    expected = {
        "state.hidden": (state.hidden, (batch, hidden)),
        "state.cells": (state.cells, (batch, hidden if lstm else 0)),
        "state.reads": (state.reads, (batch, reads)),
        "state.weightings": (state.weightings, (batch, heads, slots)),
        "state.memory": (state.memory, (batch, slots, width)),
        "weights.inputs": (weights.inputs, (gates, features)),
        "weights.recurrent": (weights.recurrent, (gates, (hidden if lstm else 0) + reads)),
        "weights.interface": (weights.interface, (num_interface(options, width), hidden)),
    }
    if mask is not None:
        expected["mask"] = (mask, (batch, steps))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if 2 * options.shift_range + 1 > slots:
        raise ValueError(f"shift_range must be at most {(slots - 1) // 2} for {slots} slots, got {options.shift_range}")
