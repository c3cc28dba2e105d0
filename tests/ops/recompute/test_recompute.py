"""Functions that run again in the backward pass: same results, gradients, random numbers and precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lnlm.ops.recompute import recomputed
from hf_lnlm.ops.recompute.reference import recomputed_reference


def pair(again: bool, dropout: float = 0.0) -> list[torch.Tensor]:
    """Results and gradients of a small function of two tensors, one of which needs no gradient, and of a module."""
    torch.manual_seed(0)
    linear, drop = nn.Linear(3, 2), nn.Dropout(dropout)
    linear.bias.requires_grad_(False)
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = drop(linear(x) * y)
        return out, x.square(), out.detach().sign()

    run = recomputed if again else recomputed_reference
    results = run(function, (x, y), tuple(linear.parameters()), 2)
    torch.rand(7)  # what happens in between doesn't matter
    first = results[0].float().square().sum()
    (first + results[1].sum()).backward()
    assert not results[2].requires_grad and linear.bias.grad is None
    return [*results, x.grad, linear.weight.grad, torch.rand(2)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_running_again_changes_nothing(dropout, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = pair(False, dropout)
        found = pair(True, dropout)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found[0].dtype == (torch.float32 if not autocast else expected[0].dtype)


def test_results_that_nobody_uses_need_no_gradient():
    x = torch.randn(3, requires_grad=True)
    first, second = recomputed(lambda x: (x * 2, x * 3), (x,), (), 2)
    second.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 3.0)) and first.requires_grad


def test_a_second_derivative_raises():
    x = torch.randn(3, requires_grad=True)
    (result,) = recomputed(lambda x: (x**3,), (x,), (), 1)
    (first,) = torch.autograd.grad(result.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
