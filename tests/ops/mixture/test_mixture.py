"""Routing and experts: hand-worked cases, and the fast path equals the reference in outputs and gradients."""

import math

import pytest
import torch
from torch.nn.functional import gelu, relu

from hf_lnlm.ops.mixture import experts as grouped
from hf_lnlm.ops.mixture.experts import mix
from hf_lnlm.ops.mixture.routing import route, router_loss, router_totals, stacked
from tests.ops.mixture import reference

PACKED = [0, 0, None, 0, 1, 1, 1, None, 1, 2, 2, 2]
WHOLE = [0] * 12
CASES = [
    (1, False, None, WHOLE),
    (1, False, 0.5, WHOLE),
    (2, True, None, PACKED),
    (2, False, 0.6, PACKED),
    (3, True, 1.25, PACKED),
    (4, True, None, WHOLE),
]


def of_logits(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def groups_of(groups):
    return torch.tensor([-1 if group is None else group for group in groups])


def weights(dtype=torch.float64, tokens=12, width=8, inner=12, experts=4):
    torch.manual_seed(0)
    shapes = (tokens, width), (tokens, experts), (experts, width, inner), (experts, inner, width)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("of", ["reference", "routing"])
def test_gates_by_hand(of):
    logits = of_logits([0.1, 0.6, 0.3], [0.5, 0.2, 0.3])
    for normalize, wanted in ((False, [[0.6, 0.3], [0.5, 0.3]]), (True, [[2 / 3, 1 / 3], [0.625, 0.375]])):
        if of == "reference":
            found = reference.chosen_experts(logits, 2, normalize)
            assert [[expert for expert, _ in row] for row in found] == [[1, 2], [0, 2]]
            gates = [[float(gate) for _, gate in row] for row in found]
        else:
            routing = route(logits, 2, normalize)
            assert routing.experts.tolist() == [[1, 2], [0, 2]]
            gates = routing.gates.tolist()
        torch.testing.assert_close(torch.tensor(gates), torch.tensor(wanted))


def test_a_mixture_by_hand():
    # expert 0 doubles what is positive, expert 1 triples it
    x, logits = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), of_logits([0.75, 0.25], [0.4, 0.6]).float()
    w_in, w_out = torch.eye(2).expand(2, 2, 2), torch.stack([2 * torch.eye(2), 3 * torch.eye(2)])
    wanted = torch.tensor([[0.75 * 2, 0.0], [0.6 * 1.5, 0.6 * 6.0]])
    torch.testing.assert_close(reference.mixture(x, logits, w_in, w_out, relu, [0, 0], 1, False), wanted)
    torch.testing.assert_close(mix(x, route(logits, 1, False), w_in, w_out, relu), wanted)
    both = torch.tensor([[0.75 * 2 + 0.25 * 3, 0.0], [(0.4 * 2 + 0.6 * 3) * 0.5, (0.4 * 2 + 0.6 * 3) * 2.0]])
    torch.testing.assert_close(mix(x, route(logits, 2, True), w_in, w_out, relu), both)


def test_a_full_expert_keeps_the_most_probable_by_hand():
    # four real tokens want expert 0, which has room for ceil(1 * 1 * 4 / 2) = 2; padding is the most probable of all
    logits = of_logits([0.6, 0.4], [0.99, 0.01], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2])
    groups = [0, None, 0, 0, 0]
    assert reference.kept_choices(logits, groups, 1, 1.0) == {(2, 0), (4, 0)}
    routing = route(logits, 1, False, groups_of(groups), 1.0)
    assert routing.kept.flatten().tolist() == [False, False, True, False, True]
    torch.testing.assert_close(routing.gates.flatten(), torch.tensor([0, 0, 0.9, 0, 0.8], dtype=torch.float64))
    # the first two are another document: there expert 0 has room for one, and the later two fill the other's
    apart = [0, 0, 1, 1, 1]
    assert reference.kept_choices(logits, apart, 1, 1.0) == {(1, 0), (2, 0), (4, 0)}
    assert route(logits, 1, False, groups_of(apart), 1.0).kept.flatten().tolist() == [False, True, True, False, True]


def test_losses_by_hand():
    even, uneven = of_logits([0.5, 0.5], [0.5, 0.5]), of_logits([0.9, 0.1], [0.8, 0.2])
    # shares (1, 0), mean probabilities (0.85, 0.15): 2 * 0.85; even probabilities give 2 * 0.5
    assert float(reference.balance_loss(uneven, [0, 0], 1)) == pytest.approx(1.7)
    assert float(reference.balance_loss(even, [0, 0], 2)) == pytest.approx(1.0)
    shifted = uneven + torch.tensor([[1.0], [3.0]], dtype=torch.float64)  # log partition functions 1 and 3
    assert float(reference.z_loss(shifted, [0, 0])) == pytest.approx(5.0)
    assert float(reference.z_loss(shifted, [0, None])) == pytest.approx(1.0)
    totals = stacked([router_totals(shifted, route(shifted, 1, False), None)])
    assert float(router_loss(totals, None, 1.0, 0.0)) == pytest.approx(1.7)
    assert float(router_loss(totals, None, 0.0, 2.0)) == pytest.approx(10.0)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert float(totals.entropy) == pytest.approx(entropy)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["grouped", "one_by_one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("k", "normalize", "factor", "groups"), CASES)
def test_equals_the_reference(k, normalize, factor, groups, dtype, one_by_one, monkeypatch):
    if one_by_one:
        monkeypatch.setattr(grouped, "GROUPED", None)
    x, logits, w_in, w_out = given = weights(dtype)
    wanted = reference.mixture(x, logits, w_in, w_out, gelu, groups, k, normalize, factor)
    routing = route(logits, k, normalize, groups_of(groups), factor)
    found = mix(x, routing, w_in, w_out, gelu)
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, wanted, **close)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(out, given, weight) for out in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize(("k", "normalize", "factor", "groups"), CASES)
def test_losses_equal_the_reference(k, normalize, factor, groups):
    logits = weights()[1]
    routing = route(logits, k, normalize, groups_of(groups), factor)
    totals = stacked([router_totals(logits, routing, groups_of(groups) >= 0)])
    kept = reference.kept_choices(logits, groups, k, factor)
    assert int(totals.dropped) == k * int(totals.tokens) - len(kept)
    for weights_of, wanted in (
        ((1.0, 0.0), reference.balance_loss(logits, groups, k)),
        ((0.0, 1.0), reference.z_loss(logits, groups)),
    ):
        found = router_loss(totals, None, *weights_of)
        torch.testing.assert_close(found, wanted)
        ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, wanted))
        torch.testing.assert_close(ours, theirs)


def test_parts_of_a_batch_add_up_to_the_loss_of_all():
    logits = weights()[1]
    whole = stacked([router_totals(logits, route(logits, 2, True), None)])
    parts = [stacked([router_totals(part, route(part, 2, True), None)]) for part in logits.split([5, 7])]
    load = torch.stack([part.load for part in parts]).sum(0)
    shares = [router_loss(part, load, 1.0, 0.5) * part.tokens / 12 for part in parts]
    torch.testing.assert_close(sum(shares), router_loss(whole, None, 1.0, 0.5))


def test_twice_differentiable():
    x, logits, w_in, w_out = weights(tokens=3, width=2, inner=3, experts=3)
    groups = torch.tensor([0, -1, 0])
    torch.autograd.gradgradcheck(
        lambda *g: mix(g[0], route(g[1], 2, True, groups), *g[2:], torch.tanh), (x, logits, w_in, w_out)
    )


def test_padding_alone_goes_nowhere():
    x, logits, w_in, w_out = given = weights()
    routing = route(logits, 2, True, torch.full((12,), -1), 1.0)
    found = mix(x, routing, w_in, w_out, gelu)
    loss = router_loss(stacked([router_totals(logits, routing, torch.zeros(12, dtype=torch.bool))]), None, 1.0, 1.0)
    gradients = torch.autograd.grad(found.sum() + loss, given)
    assert all(float(value.detach().abs().max()) == 0.0 for value in (found, loss, *gradients))


def test_never_multiplies_more_than_what_is_chosen(monkeypatch):
    rows = []
    monkeypatch.setattr(grouped, "grouped_product", lambda r, w, g: rows.append(len(r)) or r @ w[0])
    x, logits, w_in, w_out = weights()
    mix(x, route(logits, 2, True, groups_of(PACKED)), w_in, w_out, gelu)
    assert rows == [20, 20]  # ten real tokens, two experts each
