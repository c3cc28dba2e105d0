"""The fused Mamba-1 core against its reference: outputs, states and every gradient."""

from typing import Any

import pytest
import torch

from hf_lnlm.ops.causal_conv import conv_gather_index
from hf_lnlm.ops.mamba_inner import MAMBA_INNER, MambaWeights, mamba_inner, mamba_inner_reference

FAST = ("eager", "cpu")
BATCH, LENGTH, CHANNELS, RANK, STATES, KERNEL = 2, 75, 40, 5, 8, 4


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def arguments(*, whole: bool) -> tuple[torch.Tensor, list[Any], list[Any], list[Any]]:
    """Input, weights, states and marks; `whole` leaves nothing out."""
    torch.manual_seed(0)
    weights = [draw(CHANNELS, 1, KERNEL), draw(CHANNELS), draw(RANK + 2 * STATES, CHANNELS) / 6, draw(CHANNELS, RANK)]
    weights += [draw(CHANNELS) - 2, draw(CHANNELS, STATES), draw(CHANNELS)]
    states: list[Any] = [draw(BATCH, KERNEL - 1, CHANNELS), draw(BATCH, STATES, CHANNELS)]
    mask, starts = torch.rand(BATCH, LENGTH) > 0.2, torch.rand(BATCH, LENGTH) > 0.9
    marks: list[Any] = [conv_gather_index(mask, starts & mask, KERNEL), mask, starts & mask]
    if not whole:
        weights[1] = weights[4] = None
        states, marks = [None, None], [None, None, None]
    return draw(BATCH, LENGTH, 2 * CHANNELS), weights, states, marks


def with_gradients(function: Any, dtype: torch.dtype, arguments: Any) -> list[torch.Tensor]:
    projected, weights, states, marks = arguments
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (projected, *weights, *states)]
    results = function(leaves[0], MambaWeights(*leaves[1:8]), tuple(leaves[8:]), tuple(marks))
    real = torch.ones(projected.shape[:2]) if marks[1] is None else marks[1]
    results = (results[0] * real.unsqueeze(2), *results[1:])  # outputs at masked positions mean nothing
    loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=dtype).view(t.shape)).sum() for t in results)
    return [*results, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]


def run(backend: str) -> Any:
    """A backend, with the reference's arguments."""
    return lambda x, weights, states, marks: MAMBA_INNER.load(backend)(marks, x, *weights, *states)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.core
def test_backends_equal_the_reference(backend: str, whole: bool) -> None:
    given = arguments(whole=whole)
    ours = with_gradients(run(backend), torch.float32, given)
    exact = with_gradients(mamba_inner_reference, torch.float64, given)
    assert len(ours) == len(exact)
    for got, expected in zip(ours, exact):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("whole", [True, False])
def test_a_long_row_runs_in_pieces(backend: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lnlm.ops.mamba_inner.PIECE", 32)
    projected, weights, states, marks = arguments(whole=whole)
    marks[0] = None  # a gather index forbids pieces
    if whole:
        marks[1:] = [torch.ones(1, LENGTH, dtype=torch.bool), torch.rand(1, LENGTH) > 0.9]
    given = projected[:1], weights, [None if t is None else t[:1] for t in states], marks
    ours = with_gradients(run(backend), torch.float32, given)
    for got, expected in zip(ours, with_gradients(mamba_inner_reference, torch.float64, given), strict=True):
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("backend", FAST)
def test_unwanted_gradients_are_left_out(backend: str) -> None:
    projected, weights, states, marks = arguments(whole=True)
    weights[6].requires_grad_()
    y = run(backend)(projected, weights, states, marks)[0]
    y.sum().backward()
    assert weights[6].grad is not None and weights[0].grad is None


def test_only_plain_float32_tensors_are_fused() -> None:
    x = torch.randn(2, 3)
    assert mamba_inner("eager", x, None) is MAMBA_INNER.load("eager")
    assert mamba_inner("auto", x, x.double()) is None
    assert mamba_inner("gpu", x) is None and mamba_inner("reference", x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert mamba_inner("auto", x) is None
