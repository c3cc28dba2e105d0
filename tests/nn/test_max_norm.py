"""Max-norm: the projection, under a plain loop, under a trainer that calls it, and in evaluation."""

import copy

import torch

from hf_lnlm.nn.max_norm import MaxNormLinear, apply_constraints


def long_layer() -> MaxNormLinear:
    torch.manual_seed(0)
    layer = MaxNormLinear(5, 3, max_norm=1.0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 5) * torch.tensor([[0.01], [1.0], [9.0]]))
    return layer


def test_rows_are_brought_back_and_short_ones_left_alone():
    layer = long_layer()
    before = layer.weight.detach().clone()
    apply_constraints(layer)
    assert torch.equal(layer.weight[0], before[0])
    torch.testing.assert_close(layer.weight[1:].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(layer.weight, before), torch.ones(3))


def test_evaluation_gives_what_projection_would_and_changes_nothing():
    layer, inputs = long_layer().eval(), torch.randn(2, 5)
    projected = copy.deepcopy(layer)
    projected.apply_constraint()
    weight = layer.weight.detach().clone()
    torch.testing.assert_close(layer(inputs), projected(inputs))
    assert torch.equal(layer.weight, weight)


def test_a_loop_without_the_callback_is_the_same_as_one_with_it():
    finished = []
    for called in (True, False):
        layer, inputs = long_layer().train(), torch.linspace(-1, 1, 20).view(4, 5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        for _ in range(5):
            layer(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if called:
                apply_constraints(layer)
        finished.append(layer.eval()(inputs))
    torch.testing.assert_close(*finished)


def test_two_forwards_before_one_backward():
    layer, inputs = long_layer().train(), torch.randn(2, 5)
    (layer(inputs).sum() + layer(inputs).sum()).backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_without_a_bound_it_is_a_linear_layer():
    layer = MaxNormLinear(5, 3)
    inputs = torch.randn(2, 5)
    assert torch.equal(layer(inputs), torch.nn.functional.linear(inputs, layer.weight, layer.bias))
