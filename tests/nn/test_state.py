"""The cache layer of recurrent states: what generation does to it, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

import hf_lnlm
from hf_lnlm.nn.state import RECURRENT_LAYER_TYPE, RecurrentStateLayer

SHAPES = {"h": (4,), "c": (4, 2)}


def states(batch: int = 3) -> dict[str, torch.Tensor]:
    return {"h": torch.arange(batch * 4.0).view(batch, 4), "c": torch.arange(batch * 8.0).view(batch, 4, 2)}


def written(batch: int = 3, tokens: int = 5) -> RecurrentStateLayer:
    layer = RecurrentStateLayer()
    layer.write("lstm", states(batch), tokens)
    return layer


def test_empty_layer_means_the_initial_state():
    layer = RecurrentStateLayer()
    assert layer.read("lstm", 3, SHAPES) is None
    assert layer.get_seq_length() == 0
    assert layer.batch_size is None
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.detach_()
    layer.offload()
    layer.prefetch()
    assert layer.read("gru", 7, {"h": (2,)}) is None


def test_what_was_written_is_read():
    layer = written()
    for name, tensor in layer.read("lstm", 3, SHAPES).items():
        assert torch.equal(tensor, states()[name])
    assert layer.get_seq_length() == 5
    layer.write("lstm", states(), 2)
    assert layer.get_seq_length() == 7
    assert layer.get_mask_sizes(4) == (11, 0)
    assert layer.get_max_length() == -1
    assert layer.batch_size == 3


def test_states_are_read_in_the_order_they_are_asked_for():
    layer = written()
    layer.keep(dict(reversed(layer.tensors().items())))
    assert list(layer.read("lstm", 3, SHAPES)) == list(SHAPES)


@pytest.mark.parametrize(
    ("kind", "batch", "shapes", "said"),
    [
        ("gru", 3, SHAPES, "'lstm' layer, this is a 'gru' layer"),
        ("lstm", 2, SHAPES, "3 rows, the input has 2"),
        ("lstm", 3, {"h": (4,)}, r"\['c', 'h'\], expected \['h'\]"),
        ("lstm", 3, {"h": (4,), "c": (4, 3)}, r"'c' has shape \(4, 2\) a row, expected \(4, 3\)"),
        ("lstm", 3, {"h": (5,), "c": (4, 2)}, r"'h' has shape \(4,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(kind, batch, shapes, said):
    with pytest.raises(ValueError, match=said):
        written().read(kind, batch, shapes)


def test_rows_are_reordered_repeated_and_selected():
    layer = written()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.states["h"], states()["h"][[2, 0, 0]])
    layer = written(2)
    layer.batch_repeat_interleave(3)
    assert torch.equal(layer.states["c"], states(2)["c"][[0, 0, 0, 1, 1, 1]])
    assert layer.batch_size == 6
    layer = written()
    layer.batch_select_indices(torch.tensor([2, 1]))
    assert torch.equal(layer.states["c"], states()["c"][[2, 1]])
    layer = written()
    layer.batch_select_indices(torch.tensor([True, False, True]))
    assert torch.equal(layer.states["h"], states()["h"][[0, 2]])


def test_reset_forgets_everything():
    layer = written()
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.read("gru", 1, {"h": (9,)}) is None


def test_detach_cuts_the_graph_and_write_keeps_it():
    layer, leaf = RecurrentStateLayer(), torch.ones(2, 4, requires_grad=True)
    layer.write("gru", {"h": 2 * leaf}, 1)
    assert layer.states["h"].requires_grad
    layer.detach_()
    assert not layer.states["h"].requires_grad
    assert torch.equal(layer.states["h"], torch.full((2, 4), 2.0))


def test_writing_does_not_share_the_dictionary():
    layer, mine = RecurrentStateLayer(), states()
    layer.write("lstm", mine, 1)
    mine.clear()
    assert set(layer.states) == {"h", "c"}


def test_crop_is_refused_unless_nothing_changes():
    layer = written()
    layer.crop(5)
    for length in (4, 1, -1):
        with pytest.raises(ValueError, match=f"cropped to {length} of 5"):
            layer.crop(length)


def test_offload_and_prefetch_keep_the_values():
    layer = written()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.states["h"], states()["h"])


def test_update_tolerates_what_replication_calls_it_with():
    assert RecurrentStateLayer().update(None, None) == (None, None)


def test_layer_type_carries_a_hash_and_is_registered_in_both_tables():
    assert RECURRENT_LAYER_TYPE.startswith("lnlm_recurrent_")
    assert len(RECURRENT_LAYER_TYPE.removeprefix("lnlm_recurrent_")) == 12
    assert DYNAMIC_LAYER_TYPE_MAPPING[RECURRENT_LAYER_TYPE] is RecurrentStateLayer
    assert STATIC_LAYER_TYPE_MAPPING[RECURRENT_LAYER_TYPE] is RecurrentStateLayer


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=8)])
def test_caches_of_transformers_hold_our_layers(make):
    config = hf_lnlm.RNNConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3)
    cache = make(config=config)
    assert [type(layer) for layer in cache.layers] == [RecurrentStateLayer] * 3
    model = hf_lnlm.RNNModel(config).eval()
    ids = torch.arange(8).view(2, 4)
    model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 4
    cache.reset()
    assert cache.get_seq_length() == 0
