"""A recurrent decoder whose steps read what the step before wrote: input feeding, and attention of the previous state.

Such a decoder can't run a layer over a whole sequence at once. What can be taken out of the loop is: the tokens' share of
the first layer's gates is one product before it, an LSTM's input and recurrent products are one a step, and the gradients
of all weights used in the loop are one product after it (`LoopWeight`), in place of one a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...ops.dense import dense

States = tuple[torch.Tensor, ...]


class _Gather(torch.autograd.Function):
    """One zero `(rows, outputs)` a step, to be added to that step's product; their gradients make the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, inputs: list[torch.Tensor], steps: int, rows: int) -> Any:
        ctx.inputs, ctx.dtype = inputs, weight.dtype
        zero = weight.new_zeros(())
        return tuple(zero.expand(rows, weight.shape[0]) for _ in range(steps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_products: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return dense(torch.cat(of_products).mT, torch.cat(ctx.inputs).mT).to(ctx.dtype), None, None, None


class _Product(torch.autograd.Function):
    """`inputs @ weight.T + addend` for a weight whose gradient is left to `_Gather`."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, addend: Any, weight: torch.Tensor, zero: Any) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.broadcast = addend is not None and addend.dim() == 1
        return added(dense(inputs, weight), addend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_output = grad_output.contiguous()
        of_addend = None
        if ctx.needs_input_grad[1]:
            of_addend = grad_output.sum(0) if ctx.broadcast else grad_output
        return dense(grad_output, ctx.saved_tensors[0].mT), of_addend, None, grad_output


def added(product: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
    """Return a sum in which an addend may be missing."""
    return product if addend is None else product + addend


class LoopWeight:
    """A weight `(outputs, inputs)` that every step of a loop multiplies by.

    Args:
        weight: with its graph.
        steps: how often it is called.
        rows: of each call's inputs.
    """

    def __init__(self, weight: torch.Tensor, steps: int, rows: int) -> None:
        self.weight = weight
        self.inputs: list[torch.Tensor] = []
        self.zeros: Any = None
        if torch.is_grad_enabled() and weight.requires_grad and by_hand(weight):
            self.zeros = _Gather.apply(weight, self.inputs, steps, rows)

    def __call__(self, inputs: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """Return `inputs @ weight.T + addend` of `(batch, inputs)` and `(batch, outputs)` or `(outputs,)`, if any."""
        if self.zeros is None:
            return added(dense(inputs, self.weight), addend)
        zero = self.zeros[len(self.inputs)]
        self.inputs.append(inputs.detach())
        return _Product.apply(inputs, addend, self.weight.detach(), zero)


def by_hand(tensor: torch.Tensor) -> bool:
    """Tell whether gradients written out here fit: neither a tracer nor autocast is at work."""
    return not is_torchdynamo_compiling() and not torch.is_autocast_enabled(tensor.device.type)


class _LSTMGates(torch.autograd.Function):
    """An LSTM's step after its products: `(batch, 4 * hidden)` gates and `c` to the next `h` and `c`."""

    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        i, f, g, o = gates.chunk(4, dim=-1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        new = torch.addcmul(f * c, i, g)
        squashed = torch.tanh(new)
        ctx.save_for_backward(i, f, g, o, c, squashed)
        return o * squashed, new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_h: torch.Tensor, of_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        i, f, g, o, c, squashed = ctx.saved_tensors
        total = torch.addcmul(of_c, of_h * o, 1 - squashed * squashed)
        of_gates = torch.cat(
            [
                total * g * i * (1 - i),
                total * c * f * (1 - f),
                total * i * (1 - g * g),
                of_h * squashed * o * (1 - o),
            ],
            dim=-1,
        )
        return of_gates, total * f


class LoopCell:
    """One layer of the decoder inside the loop.

    Args:
        direction: an `RNNDirection`.
        inputs: any tensor of the type and device that it reads.
        steps: of the loop.
        outside: how many of its first inputs are multiplied before the loop; 0 for all inside.
    """

    def __init__(self, direction: Any, inputs: torch.Tensor, steps: int, outside: int = 0) -> None:
        w_ih, w_hh, b_ih, b_hh = direction.weights(inputs)
        self.lstm = direction.cell_type == "lstm"
        self.fused, size = by_hand(inputs), (steps, inputs.shape[0])
        self.before, inside = w_ih[:, :outside], w_ih[:, outside:]
        zero = inputs.new_zeros(w_ih.shape[0])
        b_ih, b_hh = (zero if bias is None else bias for bias in (b_ih, b_hh))
        if self.lstm:
            self.bias, self.step_weight = b_ih + b_hh, LoopWeight(torch.cat([inside, w_hh], dim=1), *size)
        else:
            self.bias, self.step_weight = b_ih, LoopWeight(inside, *size)
            self.recurrent, self.recurrent_bias = LoopWeight(w_hh, *size), b_hh

    def gates(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens' share of the gates, `(batch, length, gates)`, of `(batch, length, outside)`."""
        return dense(tokens, self.before, self.bias)

    def __call__(self, inputs: torch.Tensor, states: States, gates: torch.Tensor | None = None) -> States:
        """Return the next states.

        Args:
            inputs: `(batch, inside)`; what is multiplied in the loop, perhaps nothing wide.
            states: `(batch, hidden)` each.
            gates: `(batch, gates)`, the share computed before the loop; None for the bias alone.
        """
        given = self.bias if gates is None else gates
        if not self.lstm:
            return (self._gru(self.step_weight(inputs, given), states[0]),)
        summed = self.step_weight(torch.cat([inputs, states[0]], dim=-1), given)
        if self.fused:
            return _LSTMGates.apply(summed, states[1])
        i, f, g, o = summed.chunk(4, dim=-1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def _gru(self, gates: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """A GRU's step of its inputs' share of the gates, `(batch, 3 * hidden)`."""
        input_r, input_z, input_n = gates.chunk(3, dim=-1)
        hidden_r, hidden_z, hidden_n = self.recurrent(h, self.recurrent_bias).chunk(3, dim=-1)
        r, z = torch.sigmoid(input_r + hidden_r), torch.sigmoid(input_z + hidden_z)
        return torch.lerp(torch.tanh(input_n + r * hidden_n), h, z)


def chosen(keep: torch.Tensor | None, new: Sequence[torch.Tensor], old: Sequence[torch.Tensor]) -> States:
    """Return the new states where a step is real, `keep` `(batch, 1)`, and the old ones elsewhere; None: all real."""
    if keep is None:
        return tuple(new)
    return tuple(torch.where(keep, a, b) for a, b in zip(new, old, strict=True))
