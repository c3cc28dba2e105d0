"""What the compiled loops of both memories share around them: blocks of a sequence, and gradients of the weights."""

from typing import Any

import torch


def arrays(tensors: Any) -> Any:
    """Return the same named tuple with numpy views.

    Args:
        tensors: a named tuple of tensors on the CPU.
    """
    return type(tensors)(*[tensor.numpy() for tensor in tensors])


def put_block(whole: torch.Tensor | None, block: torch.Tensor, part: slice, steps: int) -> torch.Tensor:
    """Put a block in its place in the tensor of all steps, which the first block makes; a single block is the whole.

    Args:
        whole: `(B, T, ...)`, or None before the first block.
        block: `(B, steps of the block, ...)`.
        part: which steps they are.
        steps: T.

    Returns:
        the tensor of all steps.
    """
    if block.shape[1] == steps:
        return block
    if whole is None:
        whole = block.new_empty(block.shape[0], steps, *block.shape[2:])
    whole[:, part] = block
    return whole


def weight_gradients(
    x: torch.Tensor, hidden: torch.Tensor, gradients: Any, size: int, lstm: bool
) -> list[torch.Tensor]:
    """Return the gradients of a layer's five weights over a block, each one matrix product or sum over all steps.

    Args:
        x: `(B, T, D)`, the inputs.
        hidden: `(B, T + 1, H + R·W)`: [h ; r] before the block and after each step.
        gradients: has those of `gates` `(B, T, G)` and of the `interface` `(B, T, I)`.
        size: H, of the controller.
        lstm: whether the gates read h too, which a feed-forward controller's don't.
    """
    d_gates, d_interface = gradients.gates.flatten(0, 1), gradients.interface.flatten(0, 1)
    return [
        d_gates.t() @ x.reshape(d_gates.shape[0], -1),
        d_gates.sum(0),
        d_gates.t() @ hidden[:, :-1, 0 if lstm else size :].flatten(0, 1),
        d_interface.t() @ hidden[:, 1:, :size].flatten(0, 1),
        d_interface.sum(0),
    ]
