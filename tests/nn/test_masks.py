"""Marks of a batch: what the mask, positions and document numbers mean to a recurrence."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.nn.masks import end_token, sequence_marks

INPUTS = torch.zeros(2, 4, 3)


class Running:
    """A cache in the middle of a sequence."""

    def get_seq_length(self) -> int:
        return 7


def has_work(marks) -> bool:
    """Whether anything must be gathered."""
    return any(getattr(marks, name, None) is not None for name in ("layout", "blocks", "rows"))


def test_no_mask_is_no_work():
    assert not has_work(sequence_marks(INPUTS, None))
    assert not has_work(sequence_marks(INPUTS, torch.ones(2, 4)))
    assert not has_work(sequence_marks(INPUTS, torch.ones(2, 9), cache=Running()))


def test_the_last_columns_of_a_longer_mask_count():
    mask = torch.ones(2, 9)
    mask[0, 2] = 0
    assert not has_work(sequence_marks(INPUTS, mask, cache=Running()))
    mask[0, 6] = 0
    assert has_work(sequence_marks(INPUTS, mask, cache=Running()))


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (2,), (2, 1, 4, 4)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have shape .*\(2, >= 4\), got"):
        sequence_marks(INPUTS, torch.ones(shape))


def test_a_document_at_the_first_token_changes_nothing_unless_state_is_carried():
    positions = torch.arange(4)[None].expand(2, -1)
    assert not has_work(sequence_marks(INPUTS, None, position_ids=positions))
    assert has_work(sequence_marks(INPUTS, None, position_ids=positions, cache=Running()))
    assert not has_work(sequence_marks(INPUTS, None, position_ids=positions + 7, cache=Running()))


def test_one_decoded_token_can_begin_a_document():
    one = INPUTS[:, :1]
    assert not has_work(sequence_marks(one, None, position_ids=torch.tensor([[7], [7]]), cache=Running()))
    assert has_work(sequence_marks(one, None, position_ids=torch.tensor([[7], [0]]), cache=Running()))


def test_end_token():
    hidden = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(end_token(hidden, None), hidden[:, -1])
    assert torch.equal(end_token(hidden, None, first=True), hidden[:, 0])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(end_token(hidden, mask), torch.stack([hidden[0, 2], torch.zeros(3)]))
    assert torch.equal(end_token(hidden, mask, first=True), torch.stack([hidden[0, 1], torch.zeros(3)]))
