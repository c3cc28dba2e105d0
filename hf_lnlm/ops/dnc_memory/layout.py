"""What goes into and comes out of the Differentiable Neural Computer's operation: weights, state, options, order of
the interface vector.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods
    [2] Csordás, Schmidhuber 2019, Improving Differentiable Neural Computers Through Memory Masking, De-allocation,
    and Link
        Distribution Sharpness Control, arXiv 1904.10278
    [3] Franke, Niehues, Waibel 2018, Robust and Scalable Differentiable Neural Computer for Question Answering,
    arXiv 1807.02658

Interface vector, one linear map of the controller's h_t, clipped to ±`interface_clip`, for R read heads, K write
heads and word width W:
    read keys (R·W) · read strengths (R) · write keys (K·W) · write strengths (K) · erase vectors (K·W) · write
    vectors (K·W)
    · free gates (R) · allocation gates (K) · write gates (K) · read modes (R·(1+2K), only with temporal links)
    · read masks (R·W) · write masks (K·W) (only with `masking`) · sharpness (R·2K, only with `sharpness`).
For one write head and no extras that is the vector of [1], `W·R + 3W + 5R + 3` numbers, in its order.
The modes of one read head are: backward along each write head's links, content, forward along each write head's links.
"""

from typing import NamedTuple

import torch

CONTROLLERS = ("lstm", "feedforward")


class DNCOptions(NamedTuple):
    """Settings that change the equations."""

    num_read_heads: int = 1
    num_write_heads: int = 1
    controller: str = "lstm"
    temporal_links: bool = True
    masking: bool = False
    deallocation: bool = False
    sharpness: bool = False
    mask_min: float = 0.0
    interface_clip: float = 20.0


class DNCWeights(NamedTuple):
    """Effective weights of one memory layer; G is 4·H (input, forget, candidate, output) for an LSTM controller and
    H for feed-forward."""

    inputs: torch.Tensor  # `(G, D)`
    inputs_bias: torch.Tensor  # `(G,)`
    recurrent: torch.Tensor  # `(G, H + R·W)` on [h_{t-1} ; r_{t-1}], or `(H, R·W)` on r_{t-1} for feed-forward
    interface: torch.Tensor  # `(num_interface, H)`
    interface_bias: torch.Tensor  # `(num_interface,)`


class DNCState(NamedTuple):
    """Everything that one step hands to the next, float32; K is 0 in `precedence` and `link` without temporal
    links."""

    hidden: torch.Tensor  # `(B, H)`
    cells: torch.Tensor  # `(B, H)`, `(B, 0)` for a feed-forward controller
    reads: torch.Tensor  # `(B, R·W)`
    memory: torch.Tensor  # `(B, N, W)`
    usage: torch.Tensor  # `(B, N)`, in [0, 1]
    precedence: torch.Tensor  # `(B, K, N)`, sums to at most 1
    link: torch.Tensor  # `(B, K, N, N)`: [i, j] is how far slot i was written right after slot j
    write_weightings: torch.Tensor  # `(B, K, N)`, each sums to at most 1
    read_weightings: torch.Tensor  # `(B, R, N)`, each sums to at most 1


class DNCAddressing(NamedTuple):
    """For looking at, without gradient."""

    read_weightings: torch.Tensor  # `(B, T, R, N)`
    write_weightings: torch.Tensor  # `(B, T, K, N)`
    usage: torch.Tensor  # `(B, T, N)`
    free_gates: torch.Tensor  # `(B, T, R)`
    allocation_gates: torch.Tensor  # `(B, T, K)`
    write_gates: torch.Tensor  # `(B, T, K)`
    read_modes: torch.Tensor  # `(B, T, R, 1+2K)`, or all ones `(B, T, R, 1)` without temporal links


class DNCOutputs(NamedTuple):
    """Results of the operation."""

    outputs: torch.Tensor  # `(B, T, H + R·W)`: [h_t ; r_t], zero at masked steps
    state: DNCState
    addressing: DNCAddressing


class Places(NamedTuple):
    """Where each part of the interface vector begins; `end` is its length."""

    read_keys: int
    read_strengths: int
    write_keys: int
    write_strengths: int
    erases: int
    adds: int
    free_gates: int
    allocation_gates: int
    write_gates: int
    modes: int
    read_masks: int
    write_masks: int
    sharpness: int
    end: int


def num_modes(options: DNCOptions) -> int:
    """Read modes of one read head: 1 + 2·K with temporal links, else 1.

    Args:
        options: settings.
    """
    return 1 + 2 * options.num_write_heads if options.temporal_links else 1


def places(options: DNCOptions, width: int) -> Places:
    """The layout of the interface vector.

    Args:
        options: settings.
        width: W, numbers in a memory slot.
    """
    reads, writes = options.num_read_heads, options.num_write_heads
    modes = reads * num_modes(options) if options.temporal_links else 0
    masks = width if options.masking else 0
    sharpness = 2 * reads * writes if options.sharpness else 0
    sizes = [
        reads * width, reads, writes * width, writes, writes * width, writes * width, reads, writes, writes, modes,
        reads * masks, writes * masks, sharpness,
    ]  # fmt: skip
    return Places(0, *[sum(sizes[: i + 1]) for i in range(len(sizes))])


def num_interface(options: DNCOptions, width: int) -> int:
    """Length of the interface vector.

    Args:
        options: settings.
        width: W, numbers in a memory slot.
    """
    return places(options, width).end


def _expected_shapes(inputs: torch.Tensor, state: DNCState, options: DNCOptions) -> dict[str, tuple[int, ...]]:
    """Name → shape of all tensors, from the sizes of the inputs and of the memory."""
    batch, _, features = inputs.shape
    slots, width = state.memory.shape[1:]
    hidden, lstm = state.hidden.shape[1], options.controller == "lstm"
    reads, writes = options.num_read_heads, options.num_write_heads
    linked = writes if options.temporal_links else 0
    gates = 4 * hidden if lstm else hidden
    return {
        "state.hidden": (batch, hidden),
        "state.cells": (batch, hidden if lstm else 0),
        "state.reads": (batch, reads * width),
        "state.memory": (batch, slots, width),
        "state.usage": (batch, slots),
        "state.precedence": (batch, linked, slots),
        "state.link": (batch, linked, slots, slots),
        "state.write_weightings": (batch, writes, slots),
        "state.read_weightings": (batch, reads, slots),
        "weights.inputs": (gates, features),
        "weights.recurrent": (gates, (hidden if lstm else 0) + reads * width),
        "weights.interface": (num_interface(options, width), hidden),
    }


def check_arguments(
    inputs: torch.Tensor, weights: DNCWeights, state: DNCState, options: DNCOptions, mask: torch.Tensor | None
) -> None:
    """Compare all shapes with each other.

    Args:
        inputs: `(B, T, D)`.
        weights: see `DNCWeights`.
        state: see `DNCState`.
        options: see `DNCOptions`.
        mask: `(B, T)` or None.

    Raises:
        ValueError: a shape or option does not fit.
    """
    if inputs.dim() != 3 or inputs.shape[0] < 1 or inputs.shape[1] < 1:
        raise ValueError(f"inputs must be (batch, time, features) with at least one of each, got {tuple(inputs.shape)}")
    if options.controller not in CONTROLLERS:
        raise ValueError(f"controller must be one of {CONTROLLERS}, got {options.controller!r}")
    if options.sharpness and not options.temporal_links:
        raise ValueError("sharpness works on temporal links, got temporal_links=False")
    for name, shape in _expected_shapes(inputs, state, options).items():
        where, field = name.split(".")
        tensor = getattr(state if where == "state" else weights, field)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if mask is not None and tuple(mask.shape) != tuple(inputs.shape[:2]):
        raise ValueError(f"mask must have shape {tuple(inputs.shape[:2])}, got {tuple(mask.shape)}")


def gate_history(
    interface: torch.Tensor, options: DNCOptions, width: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Free, allocation and write gates and read modes from raw interface vectors.

    Args:
        interface: `(..., num_interface)`.
        options: settings.
        width: W, numbers in a memory slot.
        mask: `(...)`; gates of masked steps are zero, since nothing happens there.

    Returns:
        `(..., R)`, `(..., K)`, `(..., K)` and `(..., R, modes)`.
    """
    at = places(options, width)
    bound = options.interface_clip
    gates = interface[..., at.free_gates : at.modes].clamp(-bound, bound).sigmoid()
    if mask is not None:
        gates = gates * mask[..., None]
    reads, writes = options.num_read_heads, options.num_write_heads
    free, allocation, write = gates.split([reads, writes, writes], -1)
    if not options.temporal_links:
        return free, allocation, write, torch.ones_like(free)[..., None]
    modes = interface[..., at.modes : at.read_masks].clamp(-bound, bound).unflatten(-1, (reads, num_modes(options)))
    chosen = modes.softmax(-1)
    return free, allocation, write, chosen if mask is None else chosen * mask[..., None, None]
