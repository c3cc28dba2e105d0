"""`realign` moves what lies at odd addresses and nothing else, and what shares memory goes on sharing it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lnlm.models.base import ALIGNMENT, realign


def odd(values: torch.Tensor, offset: int = 28) -> torch.Tensor:
    """Return a copy that begins `offset` bytes beyond a multiple of 64 and is a storage of its own, as a mapped file's."""
    raw = torch.empty(values.nbytes + 2 * ALIGNMENT, dtype=torch.uint8).untyped_storage()
    begin = -raw.data_ptr() % ALIGNMENT + offset
    return values.new_empty(0).set_(raw[begin : begin + values.nbytes], 0, values.shape).copy_(values)


class Holder(nn.Module):
    """Parameters and buffers under the names given."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def test_odd_ones_move_and_aligned_ones_stay():
    values = torch.arange(35.0).view(5, 7)
    model = Holder(odd=nn.Parameter(odd(values)), even=nn.Parameter(values.clone()), buffer=odd(values, 60))
    kept, place = model.odd, model.even.data_ptr()
    assert model.odd.data_ptr() % ALIGNMENT == 28 and model.buffer.data_ptr() % ALIGNMENT == 60
    realign(model)
    assert model.odd is kept and model.odd.requires_grad and model.odd.is_leaf
    assert model.odd.data_ptr() % ALIGNMENT == model.buffer.data_ptr() % ALIGNMENT == 0
    assert model.even.data_ptr() == place
    assert torch.equal(model.odd, values) and torch.equal(model.buffer, values)


def test_what_shares_memory_goes_on_sharing_it():
    table = odd(torch.arange(24.0).view(4, 6))
    tied = nn.Parameter(table)
    model = Holder(a=tied, b=tied, view=nn.Parameter(table.t()), rows=nn.Parameter(table[1:3]))
    realign(model)
    assert model.a is model.b
    with torch.no_grad():
        model.a[1, 2] = -1.0
    assert model.view[2, 1] == model.rows[0, 2] == -1.0
    assert model.view.shape == (6, 4) and model.rows.data_ptr() % ALIGNMENT == 24


class Wrapped(torch.Tensor):
    """Stands for a quantised weight: a tensor whose memory is its own affair."""


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.empty(0),
        odd(torch.ones(3)).as_subclass(Wrapped),
    ],
    ids=["meta", "sparse", "empty", "subclass"],
)
def test_the_rest_is_left_alone(tensor: torch.Tensor):
    model = Holder(tensor=tensor)
    place = 0 if tensor.is_sparse or tensor.is_meta else tensor.data_ptr()
    realign(model)
    assert model.tensor is tensor
    assert place == (0 if tensor.is_sparse or tensor.is_meta else tensor.data_ptr())
