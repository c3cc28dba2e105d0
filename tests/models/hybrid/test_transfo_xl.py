"""Transformer-XL: equal to transformers 4.36's formulation, and its memory to the letter of the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_lnlm import TransformerXLConfig
from hf_lnlm.convert.transfo_xl import transfo_xl_from_state
from hf_lnlm.models.hybrid.modeling_transfo_xl import TransformerXLForCausalLM, TransformerXLModel
from hf_lnlm.models.hybrid.relative_attention import distance_encodings
from hf_lnlm.nn.inputs import CACHE_FIELD
from tests.contract.cases import add_noise

from .transfo_xl_peer import Peer, Shape

SIZES = {"d_model": 16, "n_head": 2, "d_head": 6, "d_inner": 20, "n_layer": 2, "vocab_size": 60}
SHAPES = {
    "clusters": Shape(**SIZES, cutoffs=[20, 40], d_embed=16, div_val=2, mem_len=7, same_length=True, clamp_len=5),
    "one table": Shape(**SIZES, cutoffs=[20, 40], d_embed=12, mem_len=5, pre_lnorm=True, untie_r=False),
    "plain": Shape(**SIZES, cutoffs=[], d_embed=16, mem_len=4, pre_lnorm=True),
    "projected": Shape(**SIZES, cutoffs=[], d_embed=10, mem_len=6, same_length=True),
    "tied": Shape(**SIZES, cutoffs=[30], d_embed=8, div_val=4, mem_len=6, tie_projs=[True, False], clamp_len=3),
}


def text(rows: int, length: int, seed: int = 5, words: int = 60) -> torch.Tensor:
    return torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(seed))


def pair(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Peer, TransformerXLForCausalLM]:
    """The old formulation and ours with its weights."""
    peer = Peer(shape).to(dtype).eval()
    return peer, transfo_xl_from_state(peer.state_dict(), peer.config(), {}).to(dtype).eval()


def tiny(**fields: Any) -> TransformerXLConfig:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return TransformerXLConfig(**{**sizes, **fields})


def model(**fields: Any) -> TransformerXLForCausalLM:
    torch.manual_seed(0)
    return add_noise(TransformerXLForCausalLM(tiny(**fields)).eval(), 1).double()


def segments(it: Any, ids: torch.Tensor, cuts: list[int], **given: Any) -> tuple[torch.Tensor, DynamicCache]:
    """Logits of a text in segments that begin at 0 and `cuts`."""
    cache, found = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        with torch.no_grad():
            out = it(ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache = out[CACHE_FIELD]
        found.append(out.logits)
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_equals_the_old_formulation_over_segments(name: str, dtype: torch.dtype, training: bool):
    """Log-probabilities, losses and memories of three uneven segments, the first after a memory of zeros."""
    peer, own = pair(SHAPES[name], dtype)
    own.train(training)
    tolerance = 1e-10 if dtype is torch.float64 else 3e-5
    cache, mems = None, None
    ids = text(3, 16)
    for start, stop in ((0, 4), (4, 11), (11, 16)):
        piece = ids[:, start:stop]
        with torch.no_grad():
            wanted_loss, _ = peer.loss(piece, mems)
            wanted, mems = peer(piece, mems)
            out = own(piece, labels=piece, past_key_values=cache, use_cache=True)
        cache = out[CACHE_FIELD]
        torch.testing.assert_close(out.loss.to(dtype), wanted_loss, rtol=0.0, atol=max(tolerance, 2e-6))
        if out.logits is not None:
            torch.testing.assert_close(out.logits.log_softmax(-1), wanted, rtol=0.0, atol=tolerance)
        for layer, memory in zip(cache.layers, mems, strict=True):
            torch.testing.assert_close(layer.hidden, memory.transpose(0, 1), rtol=0.0, atol=tolerance)
            assert (layer.keys is None) is training


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_the_old_formulation(name: str):
    """Of weights that a memory passes through too; what the memory itself was is cut off."""
    peer, own = pair(SHAPES[name])
    own.train()
    ids = text(2, 12)
    mems, cache = None, None
    for piece in (ids[:, :7], ids[:, 7:]):
        wanted, mems = peer.loss(piece, mems)
        out = own(piece, labels=piece, past_key_values=cache, use_cache=True)
        cache = out[CACHE_FIELD]
    wanted.backward()
    out.loss.backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    for i, layer in enumerate(own.model.layers):
        attention = f"transformer.layers.{i}.dec_attn."
        both = torch.cat([layer.attention.q_net.weight.grad, layer.attention.kv_net.weight.grad])
        pairs = [(both, theirs[attention + "qkv_net.weight"])]
        pairs += [
            (getattr(layer.attention, n).weight.grad, theirs[f"{attention}{n}.weight"]) for n in ("r_net", "o_net")
        ]
        pairs += [(layer.attention.norm.bias.grad, theirs[attention + "layer_norm.bias"])]
        if layer.attention.biases is not None:
            biases = layer.attention.biases
            pairs += [(biases.content_bias.grad, theirs[attention + "r_w_bias"])]
            pairs += [(biases.position_bias.grad, theirs[attention + "r_r_bias"])]
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)  # the loss is float32
    table = own.get_input_embeddings()
    table = table.layers[0].weight if hasattr(table, "layers") else table.weight
    torch.testing.assert_close(table.grad, theirs["transformer.word_emb.emb_layers.0.weight"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("start", ["empty", "zeros"])
@pytest.mark.parametrize("clamp_len", [None, 4])
def test_segments_equal_one_pass_while_the_memory_holds_all(pre_norm: bool, start: str, clamp_len: int | None):
    it = model(pre_norm=pre_norm, mem_len=32, mem_init=start, clamp_len=clamp_len)
    if start == "empty":  # of zeros, only at the same length are as many in reach whatever the segments
        it.config.same_length = False
    ids = text(2, 15)
    whole, _ = segments(it, ids, [])
    for cuts in ([3, 4, 9], list(range(1, 15))):
        pieces, cache = segments(it, ids, cuts)
        torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    assert cache.get_seq_length() == 15


def seen_by(it: Any, ids: torch.Tensor, cuts: list[int]) -> list[int]:
    """How many tokens each position's output depends on, itself included: of a model of one layer."""
    whole, _ = segments(it, ids, cuts)
    counts = [0] * ids.shape[1]
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[:, place] = (other[:, place] + 7) % 60
        changed, _ = segments(it, other, cuts)
        for at in range(ids.shape[1]):
            counts[at] += bool(((changed - whole)[0, at].abs() > 1e-9).any())
    return counts


def test_how_far_a_query_looks():
    """`mem_len` entries before the segment and all of it up to itself; at the same length exactly `mem_len` tokens."""
    ids = text(1, 12)
    it = model(num_hidden_layers=1, mem_len=4, same_length=False)
    assert seen_by(it, ids, [5, 8]) == [1, 2, 3, 4, 5, 5, 6, 7, 5, 6, 7, 8]
    it.config.same_length = True
    for cuts in ([], [5, 8], list(range(1, 12))):
        assert seen_by(it, ids, cuts) == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    it.config.same_length, it.config.mem_len = False, 0
    assert seen_by(it, ids, [5, 8]) == [1, 2, 3, 4, 5, 1, 2, 3, 1, 2, 3, 4]


def test_encodings_are_sines_then_cosines_of_clamped_distances():
    found = distance_encodings(4, 4, 2, torch.zeros((), dtype=torch.float64))
    distances = torch.tensor([2.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # 3, 2, 1, 0, clamped
    columns = [distances.sin(), (distances / 100).sin(), distances.cos(), (distances / 100).cos()]
    torch.testing.assert_close(found, torch.stack(columns, 1))


@pytest.mark.parametrize("start", ["empty", "zeros"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_documents_begin_inside_a_carried_memory(start: str, training: bool):
    """A row's new document sees nothing of the row or the memory before it, and the memory after it is its own."""
    it = model(mem_len=6, mem_init=start).train(training)
    ids, more = text(2, 7), text(2, 4, seed=9)
    positions = torch.arange(7).expand(2, -1).clone()
    positions[0] = torch.tensor([3, 4, 0, 1, 2, 3, 4])
    positions[1] += 3
    with torch.no_grad():
        first = it(text(2, 3, seed=8), use_cache=True)[CACHE_FIELD]
        out = it(ids, position_ids=positions, past_key_values=first, use_cache=True)
        last = it(more, past_key_values=out[CACHE_FIELD], use_cache=True).logits
        alone = it(ids[:1, 2:], use_cache=True)
        after = it(more[:1], past_key_values=alone[CACHE_FIELD], use_cache=True).logits
        going_on = it(text(2, 3, seed=8), use_cache=True)[CACHE_FIELD]
        together = it(ids, past_key_values=going_on, use_cache=True)
    torch.testing.assert_close(out.logits[:1, 2:], alone.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last[:1], after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.logits[1:], together.logits[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.logits[:1, :2], together.logits[:1, :2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("start", ["empty", "zeros"])
def test_padding_between_segments_is_not_there(start: str, same_length: bool):
    """A memory shorter than the rows: it holds each row's last real tokens."""
    it = model(mem_len=5, mem_init=start, same_length=same_length)
    real = text(2, 12)
    wanted, _ = segments(it, real, [4, 8])
    padded, mask = torch.full((2, 18), 3), torch.zeros(2, 18, dtype=torch.long)
    places = [[0, 2, 3, 5, 6, 8, 9, 10, 13, 15, 16, 17], [1, 2, 3, 4, 7, 8, 9, 11, 12, 14, 15, 16]]
    for row in range(2):
        padded[row, places[row]], mask[row, places[row]] = real[row], 1
    cache, found = None, []
    for begin, end in ((0, 6), (6, 12), (12, 18)):
        with torch.no_grad():
            piece = padded[:, begin:end]
            out = it(piece, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out[CACHE_FIELD]
        found.append(out.logits)
    together = torch.cat(found, 1)
    for row in range(2):
        torch.testing.assert_close(together[row, places[row]], wanted[row], rtol=1e-12, atol=1e-12)


def test_attention_weights_and_the_eager_implementation():
    it = model(mem_len=8, loss_head="full")
    ids = text(2, 9)
    mask = torch.ones_like(ids)
    mask[0, [0, 4]] = 0
    with torch.no_grad():
        cache = it(ids, attention_mask=mask, use_cache=True)[CACHE_FIELD]
        plain = it(ids, attention_mask=torch.cat([mask, mask], 1), past_key_values=cache, use_cache=True)
        it.set_attn_implementation("eager")
        cache = it(ids, attention_mask=mask, use_cache=True)[CACHE_FIELD]
        dense = it(
            ids,
            attention_mask=torch.cat([mask, mask], 1),
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )
    torch.testing.assert_close(dense.logits[mask == 1], plain.logits[mask == 1], rtol=1e-12, atol=1e-12)
    for weights in dense.attentions:
        assert weights.shape == (2, 2, 9, 8 + 9)
        sums = weights.sum(-1)
        torch.testing.assert_close(sums, mask[:, None].double().expand_as(sums))


@pytest.mark.parametrize("start", ["empty", "zeros"])
def test_generation_beyond_the_memory(start: str):
    """Each new token sees the `mem_len` tokens before it, however the memory grew; rows differ in length."""
    it = model(mem_len=6, mem_init=start, same_length=True, eos_token_id=None)
    ids = text(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 90, "do_sample": False, "pad_token_id": 0}
    found = it.generate(ids, attention_mask=mask, **options)
    for row, first in ((0, 0), (1, 4)):
        with torch.no_grad():
            logits = it(found[row : row + 1, first:], use_cache=False).logits
        best = logits[0, 8 - first : -1].argmax(-1)
        assert best.tolist() == found[row, 9:].tolist()


def test_a_cache_goes_from_training_to_evaluation_and_back():
    it = model(mem_len=6)
    ids = text(2, 12)
    wanted, _ = segments(it, ids, [4, 8])
    for order in ((True, False, False), (False, True, False), (True, True, False)):
        cache, found = None, []
        for i, training in enumerate(order):
            it.train(training)
            with torch.no_grad():
                out = it(ids[:, 4 * i : 4 * i + 4], past_key_values=cache, use_cache=True)
            cache = out[CACHE_FIELD]
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-12, atol=1e-12)


def test_adaptive_embeddings_are_the_table_they_stand_for():
    config = tiny(loss_head="adaptive", adaptive_cutoffs=[20, 40], adaptive_div_value=2)
    it = add_noise(TransformerXLModel(config), 3)
    words = it.embed_tokens
    table = torch.cat([layer.weight @ p.weight.t() for layer, p in zip(words.layers, words.projections, strict=True)])
    ids = text(3, 8)
    torch.testing.assert_close(words(ids), table[ids])
    torch.testing.assert_close(words._traced(ids, torch.bucketize(ids, torch.tensor([20, 40]), right=True)), table[ids])
    with pytest.raises(ValueError, match="input_ids must be between 0 and vocab_size - 1"):
        it(torch.tensor([[60]]))
    with pytest.raises(ValueError, match="input_ids must be between 0 and vocab_size - 1"):
        it(torch.tensor([[-1]]))
    with pytest.raises(ValueError, match="adaptive embeddings cannot be resized"):
        it.resize_token_embeddings(70)


WRONG = [
    ({"mem_len": -1}, "mem_len must be between 0"),
    ({"clamp_len": 0}, "clamp_len must be between 1"),
    ({"hidden_size": 15, "num_attention_heads": 3}, "hidden_size must be even"),
    ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size"),
    ({"same_length": True, "mem_len": 0}, "mem_len must be at least 1"),
    ({"mem_init": "ones"}, "mem_init must be one of empty, zeros"),
    ({"loss_head": "adaptive", "adaptive_cutoffs": [40, 20]}, "adaptive_cutoffs must ascend"),
    ({"loss_head": "adaptive", "adaptive_cutoffs": [20, 60]}, "adaptive_cutoffs must ascend"),
    ({"loss_head": "adaptive", "adaptive_cutoffs": [20], "adaptive_div_value": 3}, "adaptive_div_value must be"),
    ({"loss_head": "adaptive", "adaptive_cutoffs": [20], "adaptive_div_value": 1.5}, "adaptive_div_value must be"),
    ({"loss_head": "adaptive", "adaptive_cutoffs": [20, 40], "tie_projections": [True]}, "tie_projections must say so"),
    ({"tie_projections": [True]}, "tie_projections is for loss_head='adaptive'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_wrong_configs_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_another_reach_than_the_memory_was_filled_under_is_refused():
    it = model(mem_len=6)
    with torch.no_grad():
        cache = it(text(2, 4), use_cache=True)[CACHE_FIELD]
    for name, value in (("mem_len", 5), ("clamp_len", 3), ("same_length", False)):
        old = getattr(it.config, name)
        setattr(it.config, name, value)
        with pytest.raises(ValueError, match="past_key_values was filled under Reach"):
            it(text(2, 1), past_key_values=cache)
        setattr(it.config, name, old)
    other = model(mem_len=6, hidden_size=8)
    with pytest.raises(ValueError, match="past_key_values holds"):
        other(text(2, 1), past_key_values=cache)


def test_labels_that_are_all_ignored_stay_as_they_are():
    it = model()
    labels = torch.full((2, 5), -100)
    it(text(2, 5), labels=labels)
    assert (labels == -100).all()


def test_evaluation_with_a_longer_memory_than_training(tmp_path):
    model(mem_len=6).save_pretrained(tmp_path)
    longer = AutoModelForCausalLM.from_pretrained(tmp_path, mem_len=20, same_length=True, clamp_len=8)
    assert tuple(longer.config.reach) == (20, 8, True)
    ids = text(1, 30)
    with torch.no_grad():
        cache = longer(ids, use_cache=True)[CACHE_FIELD]
    assert cache.layers[0].hidden.shape[1] == 20
