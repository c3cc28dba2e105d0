"""Convolutions over time: against torch's own, under masks, in pieces, with documents, through adapters."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_lnlm.nn.convolution import (
    CausalConvolution,
    TimeConvolution,
    convolve,
    init_centred,
    justify,
    left_justify,
    restore,
    window_mask,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def taps_of(convolution: TimeConvolution) -> torch.Tensor:
    return convolution.projection.weight.view(
        convolution.out_features, convolution.in_features, convolution.kernel_size
    )


@pytest.mark.parametrize(("padding", "stride"), [((0, 0), 1), ((2, 2), 1), ((1, 2), 1), ((1, 1), 2)])
def test_equals_conv1d(padding, stride):
    convolution, inputs = TimeConvolution(3, 4, 3, padding, stride), torch.randn(2, 3, 9)
    wanted = F.conv1d(F.pad(inputs, padding), taps_of(convolution), convolution.projection.bias, stride=stride)
    torch.testing.assert_close(convolution(inputs), wanted)


def test_masked_frames_count_as_zeros():
    convolution, inputs = TimeConvolution(3, 4, 3, (1, 1)), torch.randn(2, 3, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    noisy = inputs.masked_fill(~mask[:, None], 7.0)
    torch.testing.assert_close(convolution(noisy, mask), convolution(inputs * mask[:, None]))


def test_too_short_an_input_is_refused():
    with pytest.raises(ValueError, match="5 frames, got 3"):
        TimeConvolution(2, 2, 5)(torch.randn(1, 2, 3))


def test_weight_norm_is_length_times_direction():
    convolution = TimeConvolution(3, 4, 2, weight_norm=True)
    nn.init.uniform_(convolution.gain, 0.5, 2.0)
    weight, _ = convolution.kernel(torch.zeros(1))
    torch.testing.assert_close(weight.norm(dim=1), convolution.gain)
    torch.testing.assert_close(F.cosine_similarity(weight, convolution.projection.weight), torch.ones(4))


def test_an_adapter_reaches_the_kernel():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = TimeConvolution(3, 4, 3, (1, 1))

        def forward(self, inputs):
            return self.convolution(inputs)

    outer, inputs = Outer(), torch.randn(2, 3, 9)
    before = outer(inputs)
    model = peft.get_peft_model(outer, peft.LoraConfig(r=2, target_modules=["projection"]))
    torch.testing.assert_close(model(inputs), before)
    layer = model.base_model.model.convolution.projection
    nn.init.normal_(layer.lora_B["default"].weight)
    adapted = model(inputs)
    assert not torch.allclose(adapted, before, atol=1e-3)
    adapted.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model.merge_and_unload()(inputs), adapted, rtol=1e-4, atol=1e-5)


def definition(convolution, joined):
    """Σ over taps of W_tap x, in float64, with weight normalisation and gate as in their papers."""
    weight = convolution.projection.weight.double()
    if convolution.gain is not None:
        weight = weight / weight.norm(dim=1, keepdim=True) * convolution.gain.double()[:, None]
    taps = weight.view(convolution.out_features, convolution.kernel_size, convolution.in_features)
    length = joined.shape[1] - convolution.window_size
    output = sum(joined[:, tap : tap + length].double() @ taps[:, tap].T for tap in range(convolution.kernel_size))
    output = output + convolution.projection.bias.double()
    if not convolution.gated:
        return output
    half = convolution.out_features // 2
    return output[..., :half] * torch.sigmoid(output[..., half:])


KINDS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("weight_norm", "gated"), KINDS)
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 4), (1, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_pieces_equal_the_whole(pieces, weight_norm, gated, training):
    convolution, inputs = CausalConvolution(3, 4, 4, weight_norm, gated), torch.randn(2, 9, 3)
    window, outputs = None, []
    with torch.set_grad_enabled(training):
        for piece in inputs.split(pieces, dim=1):
            output, window = convolution(piece, window)
            outputs.append(output)
    wanted = definition(convolution, F.pad(inputs, (0, 0, 3, 0))).float()
    torch.testing.assert_close(torch.cat(outputs, 1), wanted)
    torch.testing.assert_close(window, inputs[:, -3:])


@pytest.mark.parametrize(("weight_norm", "gated"), KINDS)
@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_gradients_equal_those_of_the_definition(weight_norm, gated, kernel_size):
    convolution = CausalConvolution(3, 4, kernel_size, weight_norm, gated).double()
    if weight_norm:
        nn.init.uniform_(convolution.gain, -1.0, 2.0)
    inputs = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    window = torch.randn(2, kernel_size - 1, 3, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 7, convolution.output_size, dtype=torch.float64)
    leaves = [inputs, *convolution.parameters()] + ([window] if kernel_size > 1 else [])
    found = torch.autograd.grad((convolution(inputs, window)[0] * probe).sum(), leaves)
    wanted = torch.autograd.grad((definition(convolution, torch.cat([window, inputs], 1)) * probe).sum(), leaves)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_filter_without_length_stays_finite():
    convolution = CausalConvolution(3, 4, 2, weight_norm=True, gated=True)
    nn.init.zeros_(convolution.projection.weight)
    convolution(torch.randn(2, 5, 3))[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in convolution.parameters())


def test_fused_and_plain_steps_agree_under_autocast_and_function_transforms():
    convolution, inputs = CausalConvolution(3, 4, 2, weight_norm=True, gated=True), torch.randn(2, 5, 3)
    whole = convolution(inputs)[0]
    each = torch.func.vmap(lambda row: convolution(row[None])[0][0])(inputs)
    torch.testing.assert_close(each, whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = convolution(inputs)[0]
        half.float().sum().backward()
    torch.testing.assert_close(half.float(), whole, rtol=0.05, atol=0.05)
    assert convolution.projection.weight.grad.isfinite().all()


def test_a_row_without_frames_keeps_its_window():
    convolution, window = CausalConvolution(3, 4, 4), torch.randn(2, 3, 3)
    _, after = convolution(torch.randn(2, 5, 3), window, torch.tensor([0, 2]))
    torch.testing.assert_close(after[0], window[0])
    torch.testing.assert_close(after[1, 0], window[1, 2])


@pytest.mark.parametrize(("weight_norm", "gated"), KINDS)
def test_documents_do_not_see_each_other(weight_norm, gated):
    convolution, inputs = CausalConvolution(3, 4, 4, weight_norm, gated), torch.randn(1, 9, 3)
    window, lengths = torch.randn(1, 3, 3), torch.tensor([9])
    output, after = convolution(inputs, window, lengths, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2]]))
    first, _ = convolution(inputs[:, :3], window)
    second, _ = convolution(inputs[:, 3:8])
    third, last = convolution(inputs[:, 8:])
    torch.testing.assert_close(output, torch.cat([first, second, third], 1))
    torch.testing.assert_close(after, last)


def test_the_past_alone_has_a_gradient():
    convolution, inputs = CausalConvolution(3, 4, 4, gated=True), torch.randn(1, 9, 3, requires_grad=True)
    output, _ = convolution(inputs)
    output[:, 5].sum().backward()
    assert torch.equal(inputs.grad[:, 6:], torch.zeros(1, 3, 3))
    assert torch.equal(inputs.grad[:, :2], torch.zeros(1, 2, 3))
    assert (inputs.grad[:, 2:6].abs().sum(2) > 0).all()


@pytest.mark.parametrize("row", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_justify_and_restore(row):
    mask = torch.tensor([row, [1, 0, 0, 1, 0]]).bool()
    values = torch.randn(2, 5, 3)
    plan = left_justify(mask)
    moved = justify(values, plan)
    for index in range(2):
        count = int(mask[index].sum())
        torch.testing.assert_close(moved[index, :count], values[index, mask[index]])
        assert not moved[index, count:].any()
    torch.testing.assert_close(restore(moved, plan), values * mask[:, :, None])


def test_window_mask_says_which_windows_see_a_token():
    mask = torch.tensor([[1, 0, 0, 0, 1]]).bool()
    assert window_mask(mask, 2, 1).tolist() == [[True, True, False, False, True, True]]


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (1, 2)])
def test_frames_in_either_order_of_memory_give_the_same(stride, padding):
    frames = torch.randn(2, 9, 3, requires_grad=True)
    weight, bias = torch.randn(4, 3, 3, requires_grad=True), torch.randn(4)
    found, wanted = (convolve(rows, weight, bias, stride, padding) for rows in (frames.mT, frames.mT.contiguous()))
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (frames, weight), probe) for y in (found, wanted))):
        torch.testing.assert_close(ours, theirs)


def test_centred_weights_have_no_mean_and_the_wanted_spread():
    weight = torch.empty(2000, 12)
    init_centred(weight, 0.3)
    torch.testing.assert_close(weight.mean(1), torch.zeros(2000), rtol=0, atol=1e-6)
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.3, rel=0.02)
    single = torch.zeros(2000, 1)
    init_centred(single, 0.3)
    assert float(single.std()) == pytest.approx(0.3, rel=0.1)


def test_centring_leaves_loaded_weights_alone():
    weight = nn.Parameter(torch.ones(3, 4))
    weight._is_hf_initialized = True
    state = torch.get_rng_state()
    init_centred(weight, 0.3)
    assert weight.eq(1).all()
    assert torch.equal(torch.get_rng_state(), state)
