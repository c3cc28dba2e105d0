"""Causal language models: the state or cache is exact, and `generate` is stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import set_seed

from hf_lnlm.nn.inputs import CACHE_FIELD

from .cases import PAD, Case, build, cases, first_output, token_ids, with_core

causal_case = pytest.mark.parametrize("case", cases(causal=True), ids=str)
causal_core = pytest.mark.parametrize("case", with_core(cases(causal=True)))
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
LONG = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
SHORT = {**LONG, "max_new_tokens": 6}


def generator(case: Case, **fields: Any) -> Any:
    """Build a model that never ends a sequence by itself."""
    model = build(case, eos_token_id=None, **fields)
    model.generation_config.eos_token_id = None
    return model


def run_in_pieces(model: Any, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    cache, pieces, start = None, [], 0
    for stop in [*cuts, ids.shape[1]]:
        seen = None if mask is None else mask[:, :stop]
        with torch.no_grad():
            out = model(input_ids=ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, stop
        pieces.append(out.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(pieces, dim=1)


@causal_case
@pytest.mark.parametrize("cuts", [[4], [1, 2], [10], [*range(1, 11)], [3, 4, 8]], ids=str)
def test_pieces_equal_the_whole(case: Case, cuts: list[int]):
    model = build(case)
    ids = token_ids(2, 11)
    whole = first_output(model, input_ids=ids, use_cache=False)
    torch.testing.assert_close(run_in_pieces(model, ids, cuts), whole, **TOLERANCE)


@causal_case
def test_pieces_of_padded_rows_equal_the_whole(case: Case):
    model = build(case)
    ids = token_ids(3, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left
    mask[1, [2, 5, 6]] = 0  # inside, on both sides of a cut
    ids[mask == 0] = PAD
    whole = first_output(model, input_ids=ids, attention_mask=mask, use_cache=False)
    for cuts in ([5], [6, 7, 8], [2, 9]):
        pieces = run_in_pieces(model, ids, cuts, mask)
        torch.testing.assert_close(pieces[mask == 1], whole[mask == 1], **TOLERANCE)


@causal_case
def test_logits_to_keep(case: Case):
    model = build(case)
    ids = token_ids(2, 9)
    whole = first_output(model, input_ids=ids)
    torch.testing.assert_close(first_output(model, input_ids=ids, logits_to_keep=2), whole[:, -2:], **TOLERANCE)


@causal_core
def test_greedy_is_the_argmax_of_the_whole(case: Case):
    model = generator(case)
    ids = token_ids(2, 6)
    out = model.generate(ids, do_sample=False, **SHORT)
    for length in range(6, 12):
        logits = first_output(model, input_ids=out[:, :length], use_cache=False)[:, -1]
        chosen = out[:, length]
        best = logits.amax(-1)
        torch.testing.assert_close(logits.gather(1, chosen[:, None])[:, 0], best, **TOLERANCE)


@causal_core
@pytest.mark.parametrize("how", ["greedy", "beams", "returned beams", "sampling", "sampled beams", "several samples"])
def test_with_and_without_cache(case: Case, how: str):
    options = {
        "greedy": {"do_sample": False},
        "beams": {"num_beams": 4, "do_sample": False},
        "returned beams": {"num_beams": 4, "num_return_sequences": 4, "do_sample": False},
        "sampling": {"do_sample": True},
        "sampled beams": {"num_beams": 3, "do_sample": True},
        "several samples": {"do_sample": True, "num_return_sequences": 3},
    }[how]
    model = generator(case)
    ids = token_ids(2, 6)
    found = []
    for use_cache in (True, False):
        set_seed(7)
        found.append(model.generate(ids, use_cache=use_cache, **options, **LONG))
    assert found[0].shape == (2 * options.get("num_return_sequences", 1), 18)
    assert found[0].tolist() == found[1].tolist()


@causal_case
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_batch_equals_single_runs(case: Case, beams: int):
    model = generator(case)
    ids = token_ids(3, 8)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding], mask[row, :padding] = PAD, 0
    options = {"do_sample": False, "num_beams": beams, **SHORT}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, padding in enumerate((0, 3, 6)):
        alone = model.generate(ids[row : row + 1, padding:], **options)
        assert together[row, padding:].tolist() == alone[0].tolist()


@causal_core
def test_generation_goes_on_from_a_cache(case: Case):
    model = generator(case)
    ids = token_ids(2, 6)
    straight = model.generate(ids, do_sample=False, **LONG)
    first = model.generate(ids, do_sample=False, return_dict_in_generate=True, **SHORT)
    rest = model.generate(first.sequences, **{CACHE_FIELD: first[CACHE_FIELD]}, do_sample=False, **SHORT)
    assert rest.tolist() == straight.tolist()


@causal_case
def test_a_state_has_two_names_and_no_third(case: Case):
    model, ids = build(case), token_ids(2, 6)
    with torch.no_grad():
        caches = [model(input_ids=ids[:, :5], use_cache=True)[CACHE_FIELD] for _ in range(3)]
        old = model(input_ids=ids[:, 5:], past_key_values=caches[0]).logits
        new = model(input_ids=ids[:, 5:], cache=caches[1]).logits
        for name in ("cache_params", "state"):
            with pytest.raises(TypeError, match=f"{name!r}"):
                model(input_ids=ids[:, 5:], **{name: caches[2]})
        with pytest.raises(TypeError, match="'atention_mask'"):
            model(input_ids=ids, atention_mask=torch.ones_like(ids))
    assert torch.equal(old, new)


@causal_case
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_from_embeddings(case: Case, beams: int):
    model, ids = generator(case), token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model.generate(ids, attention_mask=mask, do_sample=False, num_beams=beams, **SHORT)[:, 6:]
    embedded = model.get_input_embeddings()(ids)
    for how in ({}, {"use_cache": False}):
        found = model.generate(
            inputs_embeds=embedded, attention_mask=mask, do_sample=False, num_beams=beams, **how, **SHORT
        )
        assert found.tolist() == wanted.tolist(), how


HYBRID = {"mixer": "mamba2", "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("case", "fields"),
    [pytest.param(case, {}, id=str(case)) for case in cases(causal=True)]
    + [
        pytest.param(case, HYBRID | {"attn_layer_indices": layers}, id=f"hybrid-{layers}")
        for case in cases(causal=True)
        if case.family.name == "ssm"
        for layers in ([1], [0, 2])
    ],
)
def test_a_static_cache_changes_nothing(case: Case, fields: dict[str, Any]):
    model, ids = generator(case, **fields), token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model.generate(ids, attention_mask=mask, do_sample=False, **SHORT)
    found = model.generate(ids, attention_mask=mask, do_sample=False, cache_implementation="static", **SHORT)
    assert found.tolist() == wanted.tolist()


@causal_case
def test_calls_do_not_leak_into_each_other(case: Case):
    model = generator(case)
    ids = token_ids(2, 6)
    before = first_output(model, input_ids=ids)
    model.generate(ids, do_sample=False, **SHORT)
    first_output(model, input_ids=ids.flip(1), use_cache=True)
    assert torch.equal(first_output(model, input_ids=ids), before)


@causal_case
def test_cache_of_another_batch_is_refused(case: Case):
    model = build(case)
    with torch.no_grad():
        cache = model(input_ids=token_ids(3, 5), use_cache=True).past_key_values
    with pytest.raises((ValueError, RuntimeError)):
        model(input_ids=token_ids(2, 1), past_key_values=cache)


@causal_case
def test_end_token_ends_a_row(case: Case):
    model = build(case)
    ids = token_ids(2, 6)
    free = generator(case).generate(ids, do_sample=False, **SHORT)
    end = int(free[0, 7])
    at = 6 + int((free[0, 6:] == end).nonzero()[0])  # a model may say the same token twice
    out = model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=end, pad_token_id=0)
    assert out[0, at] == end
    assert (out[0, at + 1 :] == 0).all()
