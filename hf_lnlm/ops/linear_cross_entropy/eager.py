"""Chunked cross-entropy of a linear projection, its gradients computed on the way forward.

The gradient of the summed loss by the logits is `softmax(z) - onehot(y)`, known as soon as the logits are. Computing it
chunk by chunk in the forward pass means that no logits are kept for the backward pass: O(chunk * vocab_size) memory in
place of O(tokens * vocab_size), at the same number of products. The backward pass only multiplies by the incoming scalar.
Double backward is refused.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`; arguments as in `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the loss and keep the gradients of hidden, weight and bias."""
        kept = labels >= 0
        needs = ctx.needs_input_grad
        gradients = (
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=_at_least_float32(weight)) if needs[1] else None,
            torch.zeros_like(bias, dtype=_at_least_float32(bias)) if needs[2] and bias is not None else None,
        )
        total = hidden.new_zeros((), dtype=torch.float32 if hidden.dtype != torch.float64 else torch.float64)
        narrow = weight.to(dtype) if weight.dtype != torch.float64 else weight
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            total += _chunk(hidden, narrow, bias, labels, kept, rows, gradients)
        given: Any = zip(gradients, (hidden, weight, bias))
        ctx.save_for_backward(*(None if g is None else g.to(t.dtype) for g, t in given))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the kept gradients; the scale, a scalar, is not rounded to a narrower type of theirs."""
        scaled = [None if g is None else g * grad_output for g in ctx.saved_tensors]
        return *scaled, None, None, None


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    """Type in which sums over chunks are kept."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    kept: torch.Tensor,
    rows: slice,
    gradients: tuple[torch.Tensor | None, ...],
) -> torch.Tensor:
    """Loss of one chunk; adds its share to the gradients."""
    inputs = hidden[rows].to(weight.dtype)
    logits = (inputs @ weight.mT).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if bias is not None:
        logits += bias
    target, valid = labels[rows].clamp(min=0).unsqueeze(1), kept[rows]
    logits -= logits.amax(dim=1, keepdim=True)
    at_target = logits.gather(1, target)
    normaliser = logits.exp_().sum(dim=1, keepdim=True)
    loss = ((normaliser.log() - at_target).squeeze(1) * valid).sum()
    if any(gradient is not None for gradient in gradients):
        logits *= valid.unsqueeze(1) / normaliser
        logits.scatter_add_(1, target, -valid.unsqueeze(1).to(logits.dtype))
        _accumulate(logits, inputs, weight, rows, gradients)
    return loss


def _accumulate(
    logit_gradient: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    rows: slice,
    gradients: tuple[torch.Tensor | None, ...],
) -> None:
    of_hidden, of_weight, of_bias = gradients
    narrow = logit_gradient.to(weight.dtype)
    if of_hidden is not None:
        of_hidden[rows] = (narrow @ weight).to(of_hidden.dtype)
    if of_weight is not None and weight.dtype == of_weight.dtype:
        of_weight.addmm_(narrow.mT, inputs)
    elif of_weight is not None:
        of_weight += narrow.mT @ inputs
    if of_bias is not None:
        of_bias += logit_gradient.sum(dim=0)
