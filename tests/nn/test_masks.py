"""What is known of a batch's positions: what mask, positions, document numbers and offsets mean to a recurrence."""

from __future__ import annotations

import math

import pytest
import torch

from hf_lnlm.nn.masks import SegmentInfo, current_mask, end_token, segment_info

INPUTS = torch.zeros(2, 4, 3)
PLAIN = SegmentInfo(4)


def test_no_mask_is_no_work():
    assert segment_info(INPUTS, None) == PLAIN
    assert segment_info(INPUTS, torch.ones(2, 4)) == PLAIN
    assert segment_info(INPUTS, torch.ones(2, 9), past=5) == PLAIN
    assert PLAIN.in_rows() == PLAIN == PLAIN.reversed()


def test_the_last_columns_of_a_longer_mask_count():
    mask = torch.ones(2, 9)
    mask[0, 2] = 0
    assert segment_info(INPUTS, mask, past=5) == PLAIN
    mask[0, 6] = 0
    assert segment_info(INPUTS, mask, past=5).mask[0].tolist() == [True, False, True, True]


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (3, 4), (2,), (2, 1, 4, 4), (2, 4, 4)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have shape .*\(2, 4\), got"):
        segment_info(INPUTS, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_zeros_and_ones_of_any_type_are_a_mask(dtype):
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).to(dtype)
    assert current_mask(mask, 2, 4).tolist() == mask.bool().tolist()
    empty = torch.zeros(2, 4, dtype=dtype)
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match="additive mask"):
            current_mask(empty, 2, 4)
    else:
        assert not current_mask(empty, 2, 4).any()


@pytest.mark.parametrize("value", [0.5, 2, -1, -1e4, math.nan, -math.inf, torch.finfo(torch.float32).min])
def test_other_values_are_no_mask(value):
    mask = torch.ones(2, 4)
    mask[1, 2] = value
    with pytest.raises(ValueError, match="attention_mask must hold only 0 and 1"):
        current_mask(mask, 2, 4)


def test_a_document_at_the_first_token_changes_nothing_unless_state_is_carried():
    positions = torch.arange(4)[None].expand(2, -1)
    assert segment_info(INPUTS, None, positions) == PLAIN
    assert segment_info(INPUTS, None, positions, past=7).starts[:, 0].all()
    assert segment_info(INPUTS, None, positions + 7, past=7) == PLAIN


def test_one_decoded_token_can_begin_a_document():
    one = INPUTS[:, :1]
    assert segment_info(one, None, torch.tensor([[7], [7]]), past=7) == SegmentInfo(1)
    assert segment_info(one, None, torch.tensor([[7], [0]]), past=7).starts.tolist() == [[False], [True]]


def test_three_ways_to_say_where_documents_begin():
    one = INPUTS[:1]
    found = [
        segment_info(one, None, position_ids=torch.tensor([[0, 1, 0, 1]])),
        segment_info(one, None, seq_idx=torch.tensor([[3, 3, 4, 4]])),
        segment_info(one, None, cu_seq_lens=torch.tensor([0, 2, 4], dtype=torch.int32)),
    ]
    for segments in found:
        assert segments.starts.tolist() == [[False, False, True, False]]
        assert segments.reversed().starts.tolist() == [[False, False, True, False]]
        assert segments.in_rows().layout.lengths.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"position_ids": torch.zeros(2, 3, dtype=torch.long)}, r"position_ids must have shape .*got \(2, 3\)"),
        ({"position_ids": torch.zeros(2, 4)}, "position_ids must be whole numbers, got torch.float32"),
        ({"seq_idx": torch.zeros(8, dtype=torch.long)}, r"seq_idx must have shape .*got \(8,\)"),
        ({"seq_idx": torch.tensor([[1, 1, 0, 0]])}, "seq_idx must never decrease"),
        ({"cu_seq_lens": torch.tensor([0, 2, 4])}, "cu_seq_lens_q is for a single packed row, got a batch of 2"),
    ],
)
def test_markers_that_do_not_fit_are_refused(places, said):
    with pytest.raises(ValueError, match=said):
        segment_info(INPUTS, None, **places)


@pytest.mark.parametrize("offsets", [[0, 5], [1, 4], [0, 3, 2, 4], [4], [[0, 4]], [0.0, 4.0]])
def test_offsets_that_are_no_documents_are_refused(offsets):
    with pytest.raises(ValueError, match="cu_seq_lens_q must"):
        segment_info(INPUTS[:1], None, cu_seq_lens=torch.tensor(offsets))


def test_end_token():
    hidden = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(end_token(hidden, None), hidden[:, -1])
    assert torch.equal(end_token(hidden, None, first=True), hidden[:, 0])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(end_token(hidden, mask), torch.stack([hidden[0, 2], torch.zeros(3)]))
    assert torch.equal(end_token(hidden, mask, first=True), torch.stack([hidden[0, 1], torch.zeros(3)]))
