"""RMS norm: hand-worked values, every backend against the float64 equations, and what it refuses."""

from typing import Any

import pytest
import torch

from hf_lnlm.ops.rms_norm import rms_norm

FAST = ("eager", "cpu")


def draw(*shape: int, gated: bool, strided: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    size = shape[-1]
    wide = torch.randn(*shape[:-1], 2 * size + 3)
    x, z = (wide[..., :size], wide[..., size : 2 * size]) if strided else (torch.randn(shape), torch.randn(shape))
    return {"x": x, "weight": torch.randn(size), "z": z if gated else None}


def run(call: dict[str, Any], backend: str, groups: int) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.items() if t is not None}
    y = rms_norm(**leaves, eps=1e-5, groups=groups, backend=backend)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), list(leaves.values()))]


def test_by_hand() -> None:
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    for backend in ("reference", *FAST):
        y = rms_norm(x, weight, 0.0, backend=backend)
        torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((2, 3, 48), 1), ((1, 300, 130), 2), ((5, 7), 1), ((2, 70, 600), 3)])
@pytest.mark.core
def test_equals_the_reference(backend: str, gated: bool, shape: tuple[int, ...], groups: int) -> None:
    for strided in (False, True):
        call = draw(*shape, gated=gated, strided=strided)
        for ours, exact in zip(run(call, backend, groups), run(call, "reference", groups)):
            assert (ours - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("backend", FAST)
def test_without_gradients_and_with_them_are_equal(backend: str) -> None:
    call = draw(2, 40, 64, gated=True)
    with torch.no_grad():
        plain = rms_norm(**call, eps=1e-5, backend=backend)
    assert torch.equal(plain, run(call, backend, 1)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    call = {name: None if t is None else t.to(dtype) for name, t in draw(2, 9, 32, gated=True).items()}
    y, exact = rms_norm(**call, eps=1e-5), rms_norm(**call, eps=1e-5, backend="reference")
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact)


def test_extreme_inputs_stay_finite() -> None:
    for backend in FAST:
        for scale in (0.0, 1e-18, 1e15):
            x = torch.full((3, 32), scale).requires_grad_()
            y = rms_norm(x, torch.ones(32), 1e-5, backend=backend)
            y.sum().backward()
            assert y.isfinite().all() and x.grad.isfinite().all()


def test_traced_it_is_torchs_own_operations() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, 1e-5)

    x, weight = torch.randn(3, 32), torch.randn(32)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), function(x, weight))


def test_refusals() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="groups"):
        rms_norm(x, weight, 1e-5, groups=3)
    with pytest.raises(ValueError, match="z must have the shape"):
        rms_norm(x, weight, 1e-5, torch.randn(2, 7))
    with pytest.raises(ValueError, match="backend"):
        rms_norm(x, weight, 1e-5, backend="quick")
