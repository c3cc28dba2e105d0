"""The convolution over time with all channels: one product of windows and nine products against the sum over taps."""

import pytest
import torch

from hf_lnlm.nn.convolution import CausalConvolution
from hf_lnlm.ops.time_conv import time_conv, winograd_conv
from hf_lnlm.ops.time_conv.im2col_conv import gated_windows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("kernel_size", "channels"), [(1, 3), (3, 5), (4, 128)])
@pytest.mark.core
def test_backends_equal_the_reference(gated, whole, kernel_size, channels):
    """Outputs and gradients; wide enough for nine products at the end."""
    shapes = (2, 700, channels), (channels * 2, kernel_size * channels), (channels * 2,), (channels * 2,)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = []
    for (frames, weight, gain, bias), backend in ((leaves, "eager"), (exact, "reference")):
        rest = (gain, bias) if whole else (None, None)
        output = time_conv(frames, weight, *rest, kernel_size, gated, backend=backend)
        used = [frames, weight, *(tensor for tensor in rest if tensor is not None)]
        found.append(
            [output, *torch.autograd.grad((output * torch.linspace(0.5, 1, output.shape[1])[:, None]).sum(), used)]
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_fused_step_passes_gradcheck():
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6, 3), (4, 6), (4,), (4,))]
    assert torch.autograd.gradcheck(lambda *given: gated_windows(*given, 2), leaves)
    assert torch.autograd.gradcheck(lambda x, v, b: gated_windows(x, v, None, b, 2), [*leaves[:2], leaves[3]])


@pytest.mark.parametrize("length", [1, 3, 4, 11])
def test_nine_products_equal_sixteen(length, monkeypatch):
    """Values and every gradient, for whole tiles and for a part of one."""
    convolution = CausalConvolution(3, 4, 4, weight_norm=True, gated=True).double()
    frames = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    leaves, found = [frames, *convolution.parameters()], []
    for enough in (10**6, 1):
        monkeypatch.setattr(winograd_conv, "MIN_CHANNELS", enough)
        monkeypatch.setattr(winograd_conv, "MIN_FRAMES", 0 if length > 3 else enough)
        output, _ = convolution(frames)
        with torch.no_grad():
            torch.testing.assert_close(convolution(frames)[0], output, rtol=0.0, atol=1e-12)
        gradients = torch.autograd.grad((output * torch.linspace(-1, 1, length)[:, None]).sum(), leaves)
        found.append([output, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-12)


def test_nine_products_pass_gradcheck_and_leave_frozen_frames_alone(monkeypatch):
    monkeypatch.setattr(winograd_conv, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd_conv, "MIN_FRAMES", 0)
    frames, weight = torch.randn(2, 9, 2, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    bias, gain = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    assert winograd_conv.winograd_pays(frames, weight, 4)
    leaves = [tensor.requires_grad_() for tensor in (frames, weight, gain, bias)]
    assert torch.autograd.gradcheck(lambda *given: gated_windows(*given, 4), leaves)
    assert torch.autograd.gradcheck(lambda *given: gated_windows(frames.detach(), *given, 4), leaves[1:])
