"""A linear layer whose rows may not grow beyond a given length (max-norm; Srebro & Shraibman 2005, Hinton et al. 2012).

The constraint is a projection after each optimiser step: a row longer than `max_norm` is scaled back to it. A trainer that
knows of it calls `apply_constraint` after the step. Under any other training loop the layer does it itself, at the next
training forward: nothing reads the weight between a step and that forward but evaluation and saving, and evaluation
scales the rows on the fly. So every output the layer ever gives is that of a projected weight.
"""

import torch
import torch.nn.functional as F
from torch import nn


class MaxNormLinear(nn.Linear):
    """`nn.Linear` with rows of at most `max_norm` in Euclidean length.

    Args:
        in_features, out_features: as in `nn.Linear`.
        max_norm: greatest length of a row of the weight, or None for a plain linear layer.
        bias: whether to add a bias, which the constraint leaves alone.
    """

    def __init__(self, in_features: int, out_features: int, max_norm: float | None = None, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.max_norm = max_norm

    def row_scale(self) -> torch.Tensor:
        """Return the factor `(out_features, 1)`, at most 1, that brings each row back to `max_norm`."""
        lengths = torch.linalg.vector_norm(self.weight.detach().float(), dim=1, keepdim=True)
        return (self.max_norm / lengths.clamp(min=1e-12)).clamp(max=1.0).to(self.weight.dtype)

    @torch.no_grad()
    def apply_constraint(self) -> None:
        """Project the weight: scale every row that is too long back to `max_norm`."""
        if self.max_norm is not None:
            self.weight.data.mul_(self.row_scale())  # .data: a graph of an earlier forward stays valid

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `(..., in_features)`; in training, project the weight first."""
        if self.max_norm is None:
            return F.linear(inputs, self.weight, self.bias)
        if self.training and not torch.compiler.is_compiling():
            self.apply_constraint()
            return F.linear(inputs, self.weight, self.bias)
        return F.linear(inputs, self.weight * self.row_scale(), self.bias)

    def extra_repr(self) -> str:
        """Describe the module in `print(model)`."""
        return f"{super().extra_repr()}, max_norm={self.max_norm}"


def apply_constraints(module: nn.Module) -> None:
    """Project every constrained weight inside a module; call it after each optimiser step."""
    for child in module.modules():
        if isinstance(child, MaxNormLinear):
            child.apply_constraint()
