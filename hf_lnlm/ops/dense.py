"""Products of float32 rows with a weight matrix on a CPU, by oneDNN's kernel in place of the BLAS that torch has.

torch multiplies float32 matrices by its BLAS, MKL as a rule, which leaves half of what some processors can do unused (on
an AMD EPYC with AVX-512, one thread: 448 rows, 512 to 1,024 features, 4.8 ms by MKL and 2.2 ms by oneDNN). oneDNN comes
with torch and is what its LSTM layers and convolutions run on. Everywhere else, and for few rows, this is torch's own
`linear`: other devices and types, autocast, tracing, tensors of other kinds.

Complexity: O(rows · inputs · outputs).
"""

from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.functional import linear
from transformers.utils.import_utils import is_torchdynamo_compiling

FEWEST_ROWS = 16
"""With fewer, the call costs more than the product saves."""
_PLAIN = (torch.Tensor, Parameter)
_KNOWN = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not public: another torch may lack it


def dense(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `inputs @ weight.T + bias`, as `torch.nn.functional.linear` does, of which sums may differ by rounding.

    Args:
        inputs: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
    """
    if not pays(inputs, weight):
        return linear(inputs, weight, bias)
    product: torch.Tensor = _Dense.apply(inputs, weight)
    return product if bias is None else product + bias


def pays(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tell whether oneDNN's kernel can take these tensors and is worth its call."""
    return bool(
        _KNOWN
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and type(inputs) in _PLAIN
        and type(weight) in _PLAIN
        and inputs.numel() >= FEWEST_ROWS * inputs.shape[-1] > 0
        and weight.shape[0] > 0
        and not torch.is_autocast_enabled("cpu")
        and not is_torchdynamo_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `inputs @ weight.T` of tensors that `pays` has looked at, without a graph."""
    return torch.ops.mkldnn._linear_pointwise(in_order(inputs), in_order(weight), None, "none", [], "")


def in_order(matrix: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose rows or columns lie one behind the other; of a part of one oneDNN's kernel is very slow."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


class _Dense(torch.autograd.Function):
    """The product with its gradients, which are such products too, so that they can be derived again."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        of_inputs = dense(grad_output, weight.mT) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = dense(grad_output.flatten(0, -2).mT, inputs.flatten(0, -2).mT)
        return of_inputs, of_weight


class Dense(torch.nn.Linear):
    """`torch.nn.Linear` whose product is `dense`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `(..., out)` of `(..., in)`."""
        return dense(input, self.weight, self.bias)
