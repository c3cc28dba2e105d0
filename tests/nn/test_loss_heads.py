"""Losses of heads: normalised alike however a batch is cut, and the adaptive softmax is a distribution."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from hf_lnlm.nn.loss_heads import (
    AdaptiveSoftmax,
    chunked_loss,
    classification_loss,
    next_token_labels,
    normalised,
)


def test_next_token_labels():
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    assert next_token_labels(labels).tolist() == [[2, 3, -100], [5, -100, -100]]
    shifted = torch.tensor([[7, 8, 9]])
    assert torch.equal(next_token_labels(labels, shifted), shifted)
    assert next_token_labels(labels, shifted.T.contiguous().T).is_contiguous()


def test_normalised():
    total = torch.tensor(12.0)
    assert normalised(total, 4, None) == 3
    assert normalised(total, torch.tensor(4), None) == 3
    assert normalised(total, 4, 6) == 2
    assert normalised(total, 4, torch.tensor(6)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_chunked_loss_is_the_full_one(dtype, bias):
    head = nn.Linear(8, 30, bias=bias).to(dtype)
    hidden = torch.randn(40, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 30, (40,))
    labels[::3] = -100
    wanted = cross_entropy(head(hidden), labels, reduction="sum")
    found = chunked_loss(head, hidden, labels, 7, dtype)
    leaves = [hidden, *head.parameters()]
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_chunked_loss_in_bfloat16():
    head, hidden = nn.Linear(64, 200), torch.randn(300, 64, requires_grad=True)
    labels = torch.randint(0, 200, (300,))
    wanted, found = (
        cross_entropy(head(hidden), labels, reduction="sum"),
        chunked_loss(head, hidden, labels, 64, torch.bfloat16),
    )
    assert abs(found - wanted) <= 2e-3 * wanted
    leaves = [hidden, *head.parameters()]
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm()


def adaptive() -> AdaptiveSoftmax:
    torch.manual_seed(1)
    return AdaptiveSoftmax(8, 30, [5, 12, 20], 2.0).double()


def test_adaptive_softmax_is_a_distribution():
    head, hidden = adaptive(), torch.randn(2, 3, 8).double()
    logits = head(hidden)
    assert logits.shape == (2, 3, 30)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 3).double())


def test_adaptive_loss_is_that_of_its_log_probabilities():
    head, hidden = adaptive(), torch.randn(25, 8).double().requires_grad_()
    labels = torch.arange(25)
    labels[::4] = -100
    found, wanted = head.summed_loss(hidden, labels), cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(found, wanted)
    leaves = [hidden, *head.parameters()]
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_adaptive_loss_of_nothing_is_zero_and_has_a_graph():
    head, hidden = adaptive(), torch.randn(4, 8).double().requires_grad_()
    loss = head.summed_loss(hidden, torch.full((4,), -100))
    assert loss.item() == 0
    loss.backward()
    assert not hidden.grad.any()


def config(kind: str | None, labels: int) -> SimpleNamespace:
    return SimpleNamespace(problem_type=kind, num_labels=labels)


@pytest.mark.parametrize(
    ("labels", "count", "kind"),
    [
        (torch.tensor([0.5, 1.0]), 1, "regression"),
        (torch.tensor([1, 0]), 1, "regression"),
        (torch.tensor([2, 0]), 3, "single_label_classification"),
        (torch.tensor([[1.0, 0, 0], [0, 1, 1]]), 3, "multi_label_classification"),
    ],
)
def test_the_kind_of_problem_follows_from_labels_and_is_remembered(labels, count, kind):
    given_config = config(None, count)
    classification_loss(torch.randn(2, count), labels, given_config)
    assert given_config.problem_type == kind


@settings(max_examples=50)
@given(
    kind=st.sampled_from(["regression", "multi_label_classification", "single_label_classification"]),
    cut=st.integers(0, 6),
    ignored=st.integers(0, 5),
)
def test_parts_add_up_to_the_whole(kind, cut, ignored):
    logits = torch.randn(6, 1 if kind == "regression" else 4)
    labels = {
        "regression": torch.randn(6),
        "multi_label_classification": (torch.rand(6, 4) > 0.5).float(),
        "single_label_classification": torch.randint(0, 4, (6,)),
    }[kind]
    items = labels.numel()
    if kind == "single_label_classification":
        labels[ignored] = -100
        items = 5
    settings_of = config(kind, logits.shape[1])
    whole = classification_loss(logits, labels, settings_of)
    parts = [classification_loss(logits[s], labels[s], settings_of, items) for s in (slice(0, cut), slice(cut, 6))]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)


def test_labels_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"regression labels must have shape \(3,\), got \(2,\)"):
        classification_loss(torch.randn(3, 1), torch.randn(2), config("regression", 1))
    with pytest.raises(ValueError, match=r"multi_label.*\(3, 4\), got \(3,\)"):
        classification_loss(torch.randn(3, 4), torch.zeros(3), config("multi_label_classification", 4))
