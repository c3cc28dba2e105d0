"""Cross-entropy of a projection in chunks: the loss and gradients of the whole, in every precision, in less memory."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lnlm.ops.linear_cross_entropy import linear_cross_entropy
from hf_lnlm.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def problem(tokens: int = 23, width: int = 6, classes: int = 17, dtype=torch.float64, bias: bool = True):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(0, classes, (tokens,), generator=generator)
    labels[::5] = -100
    return draw(tokens, width), draw(classes, width), draw(classes) if bias else None, labels


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def test_by_hand():
    # h = (1, 0), W = ((ln 3, 5), (0, 7)): logits (ln 3, 0), softmax (3/4, 1/4).
    #   label 0: loss ln(4/3), gradient of the logits (-1/4, 1/4), of h = W^T·that = (-ln 3 / 4, -5/4 + 7/4),
    #   of W = that ⊗ h = ((-1/4, 0), (1/4, 0)).
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3), 5.0], [0.0, 7.0]], dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, None, torch.tensor([0]), dtype=torch.float64)
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-14)
    loss.backward()
    assert hidden.grad[0].tolist() == pytest.approx([-math.log(3) / 4, 0.5], abs=1e-14)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.25, 0, 0.25, 0], abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
@pytest.mark.core
def test_chunked_is_the_whole(dtype, bias, chunk):
    hidden, weight, offset, labels = problem(dtype=dtype, bias=bias)
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    found = linear_cross_entropy(hidden, weight, offset, labels, chunk, dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, offset)]
    wanted = linear_cross_entropy_reference(*exact, labels)
    assert found.dtype == dtype
    assert relative(found, wanted) <= TOLERANCE[dtype]
    wanted_gradients = torch.autograd.grad(3.0 * wanted, [t for t in exact if t is not None])
    for a, b in zip(torch.autograd.grad(3.0 * found, leaves), wanted_gradients, strict=True):
        assert relative(a, b) <= TOLERANCE[dtype]


@pytest.mark.parametrize("leaves", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_products(leaves):
    hidden, weight, offset, labels = problem(tokens=200, width=32, classes=50, dtype=leaves)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, offset)]
    wanted = linear_cross_entropy_reference(*exact, labels)
    found = linear_cross_entropy(hidden, weight, offset, labels, 64, torch.bfloat16)
    assert found.dtype == torch.float32
    assert relative(found, wanted) <= 5e-3
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight, offset)), torch.autograd.grad(wanted, exact), strict=True
    ):
        assert a.dtype == leaves
        assert relative(a, b) <= 1.5e-2


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
def test_negative_labels_are_ignored(backend):
    hidden, weight, offset, labels = problem()
    kept = labels >= 0
    wanted = linear_cross_entropy_reference(hidden[kept], weight, offset, labels[kept])
    for ignored in (-100, -1, -7):
        marked = torch.where(kept, labels, ignored)
        found = linear_cross_entropy(hidden, weight, offset, marked, 4, torch.float64, backend=backend)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert not torch.autograd.grad(found, hidden)[0][~kept].any()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_nothing_to_predict(backend):
    hidden, weight, offset, labels = problem()
    loss = linear_cross_entropy(hidden, weight, offset, torch.full_like(labels, -100), backend=backend)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, weight)[0].any()
    empty = linear_cross_entropy(hidden[:0], weight, offset, labels[:0], backend=backend)
    assert empty.item() == 0


def test_large_logits_do_not_overflow():
    hidden, weight, offset, labels = problem(dtype=torch.float32)
    found = linear_cross_entropy(1e4 * hidden, weight, offset, labels)
    assert torch.isfinite(found)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found, (hidden, weight)))


def test_only_what_is_asked_for_gets_a_gradient():
    hidden, weight, offset, labels = problem()
    loss = linear_cross_entropy(hidden.detach(), weight, offset.detach(), labels, dtype=torch.float64)
    loss.backward()
    assert weight.grad is not None
    assert hidden.grad is None
    assert offset.grad is None
    plain = linear_cross_entropy(hidden.detach(), weight.detach(), offset.detach(), labels, dtype=torch.float64)
    assert not plain.requires_grad


def test_double_backward_is_refused():
    hidden, weight, offset, labels = problem()
    loss = linear_cross_entropy(hidden, weight, offset, labels, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and how many large ones are alive at once."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.largest, self.most = large, 0, 0
        self.alive: list = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.large:
                    self.alive.append(weakref.ref(tensor))
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.most = max(self.most, len(self.alive))
        return result


def test_all_logits_never_exist():
    tokens, classes, chunk = 512, 400, 32
    hidden, weight, offset, labels = problem(tokens, 8, classes, torch.float32)
    with Largest(tokens * classes) as seen:
        linear_cross_entropy(hidden, weight, offset, labels, chunk).backward()
    assert seen.most == 0
    assert seen.largest <= chunk * classes
    with Largest(tokens * classes) as whole:
        linear_cross_entropy_reference(hidden, weight, offset, labels).backward()
    assert whole.most > 0, "the measurement sees nothing"


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 12),
    classes=st.integers(1, 9),
    width=st.integers(1, 4),
    chunk=st.integers(1, 14),
    ignored=st.integers(0, 2**12 - 1),
)
def test_any_shape(tokens, classes, width, chunk, ignored):
    hidden, weight, offset, labels = problem(tokens, width, classes)
    for row in range(tokens):
        if ignored >> row & 1:
            labels[row] = -100
    wanted = linear_cross_entropy_reference(hidden, weight, offset, labels)
    found = linear_cross_entropy(hidden, weight, offset, labels, chunk, torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    hidden, weight, offset, labels = problem(tokens=5, width=3, classes=4)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, b, labels, 2, torch.float64), (hidden, weight, offset)
    )
