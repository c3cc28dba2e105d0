"""What goes into and comes out of the Turing machine's operation: weights, state, options, and the order of the interface
vector.

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

from ..driver import Loop
from ..layer import MemoryWeights, check_layer


class NTMOptions(NamedTuple):
    """Settings that change the equations."""

    num_read_heads: int = 1
    num_write_heads: int = 1
    shift_range: int = 1
    controller: str = "lstm"
    read_before_write: bool = True
    interface_clip: float = 20.0


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
    weightings: torch.Tensor  # `(B, T, R+W, N)`, addressing, without gradient


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
    inputs: torch.Tensor, weights: MemoryWeights, state: NTMState, options: NTMOptions, mask: torch.Tensor | None
) -> None:
    """Compare all shapes with each other.

    Args:
        inputs: `(B, T, D)`.
        weights: see `MemoryWeights`.
        state: see `NTMState`.
        options: see `NTMOptions`.
        mask: `(B, T)` or None.

    Raises:
        ValueError: a shape or option does not fit.
    """
    slots, width = state.memory.shape[1:]
    heads = options.num_read_heads + options.num_write_heads
    shapes = {"weightings": (heads, slots), "memory": (slots, width)}
    check_layer(inputs, weights, state, options, mask, shapes, num_interface(options, width))
    if 2 * options.shift_range + 1 > slots:
        raise ValueError(f"shift_range must be at most {(slots - 1) // 2} for {slots} slots, got {options.shift_range}")


class NTMLoop(Loop):
    """What the compiled loops of both devices share; see `Loop`."""

    followed, in_place, seen = ("weightings",), ("memory",), ("weightings",)

    def outputs(
        self, outputs: torch.Tensor, state: NTMState, seen: list[torch.Tensor], mask: torch.Tensor | None
    ) -> NTMOutputs:
        """The operation's named results; see `Loop`."""
        return NTMOutputs(outputs, state, seen[0])
