"""Convolutions over time: against torch's own, under masks, in pieces, with documents, through adapters."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_lnlm.nn.convolution import (
    CausalConvolution,
    TimeConvolution,
    check_mask,
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


@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 4), (1, 8)])
def test_pieces_equal_the_whole(pieces):
    convolution, inputs = CausalConvolution(3, 4, 4), torch.randn(2, 3, 9)
    window, outputs = torch.zeros(2, 3, 3), []
    for piece in inputs.split(pieces, dim=2):
        output, window = convolution(piece, window)
        outputs.append(output)
    wanted = F.conv1d(F.pad(inputs, (3, 0)), taps_of(convolution), convolution.projection.bias)
    torch.testing.assert_close(torch.cat(outputs, 2), wanted)
    torch.testing.assert_close(window, inputs[:, :, -3:])


def test_a_row_without_frames_keeps_its_window():
    convolution, window = CausalConvolution(3, 4, 4), torch.randn(2, 3, 3)
    _, after = convolution(torch.randn(2, 3, 5), window, torch.tensor([0, 2]))
    torch.testing.assert_close(after[0], window[0])
    torch.testing.assert_close(after[1, :, 0], window[1, :, 2])


def test_documents_do_not_see_each_other():
    convolution, inputs = CausalConvolution(3, 4, 4), torch.randn(1, 3, 9)
    window, lengths = torch.randn(1, 3, 3), torch.tensor([9])
    output, after = convolution(inputs, window, lengths, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2]]))
    first, _ = convolution(inputs[:, :, :3], window)
    second, _ = convolution(inputs[:, :, 3:8], torch.zeros(1, 3, 3))
    third, last = convolution(inputs[:, :, 8:], torch.zeros(1, 3, 3))
    torch.testing.assert_close(output, torch.cat([first, second, third], 2))
    torch.testing.assert_close(after, last)


def test_the_past_alone_has_a_gradient():
    convolution, inputs = CausalConvolution(3, 4, 4), torch.randn(1, 3, 9, requires_grad=True)
    output, _ = convolution(inputs, torch.zeros(1, 3, 3))
    output[:, :, 5].sum().backward()
    assert torch.equal(inputs.grad[:, :, 6:], torch.zeros(1, 3, 3))
    assert torch.equal(inputs.grad[:, :, :2], torch.zeros(1, 3, 2))
    assert (inputs.grad[:, :, 2:6].abs().sum(1) > 0).all()


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


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(2, 4\)"):
        check_mask(torch.ones(2, 4), 2, 5)
