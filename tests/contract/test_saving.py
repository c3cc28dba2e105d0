"""Saving, loading and resizing, every head of every family."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from .cases import VOCABULARY, Case, build, cases, first_output, inputs_of, token_ids, with_core

every_case = pytest.mark.parametrize("case", cases(composed=True), ids=str)


@pytest.mark.parametrize("case", with_core(cases()))
def test_reloads_bit_identical(case: Case, moved, tmp_path):
    model = build(case)
    inputs, one_row = inputs_of(case), inputs_of(case, batch=1)  # products with one row are the most sensitive ones
    wanted, wanted_of_one = first_output(model, **inputs), first_output(model, **one_row)
    model.save_pretrained(tmp_path)
    moved(tmp_path)
    loaded, info = case.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(first_output(loaded.eval(), **inputs), wanted)
    assert torch.equal(first_output(loaded, **one_row), wanted_of_one)
    auto = getattr(transformers, case.auto).from_pretrained(tmp_path)
    assert type(auto) is case.cls
    assert torch.equal(first_output(auto.eval(), **inputs), wanted)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert len({path.stat().st_mode for path in tmp_path.rglob("*.*") if path.is_file()}) == 1  # the umask's


@every_case
def test_config_round_trip(case: Case, tmp_path):
    config = build(case).config
    config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == case.family.model_type
    assert saved["auto_map"] == case.family.auto_map()


@every_case
def test_saved_in_bfloat16_loads_in_both(case: Case, tmp_path):
    build(case).to(torch.bfloat16).save_pretrained(tmp_path)
    assert case.cls.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    wide = case.cls.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.isfinite(first_output(wide, **inputs_of(case))).all()


@every_case
def test_tied_weights_are_saved_once(case: Case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    tied = set(model.all_tied_weights_keys)
    assert not tied & set(load_file(tmp_path / "model.safetensors"))
    for target, source in model.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(source)


@every_case
@pytest.mark.parametrize("size", [70, 40])
def test_resize_token_embeddings(case: Case, size: int, tmp_path):
    model = build(case)
    before = model.get_input_embeddings()
    if before is None:
        with pytest.raises((ValueError, NotImplementedError)):
            model.resize_token_embeddings(size)
        return
    kept = min(size, before.weight.shape[0])
    old = before.weight[:kept].detach().clone()
    inputs = inputs_of(case)
    inputs |= {name: ids.clamp(max=kept - 1) for name, ids in inputs.items() if name.endswith("input_ids")}
    wanted = first_output(model, **inputs)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert torch.equal(model.get_input_embeddings().weight[:kept], old)
    got = first_output(model, **inputs)
    if wanted.shape[-1] == VOCABULARY:
        assert got.shape[-1] == size
        got, wanted = got[..., :kept], wanted[..., :kept]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = case.cls.from_pretrained(tmp_path)
    torch.testing.assert_close(first_output(again.eval(), **inputs)[..., : got.shape[-1]], got, rtol=1e-5, atol=1e-6)


@every_case
def test_inputs_embeds_equal_ids(case: Case):
    if case.composed:  # what the second model reads is drawn, or turned round, as ids
        with pytest.raises(TypeError, match="input_ids"):
            build(case)(inputs_embeds=torch.zeros(2, 9, 16))
        return
    if not case.takes("inputs_embeds"):
        pytest.fail(f"{case.cls.__name__}.forward takes no inputs_embeds")
    model = build(case)
    inputs = inputs_of(case)
    wanted = first_output(model, **inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(first_output(model, inputs_embeds=embeds, **inputs), wanted, rtol=1e-5, atol=1e-6)


@every_case
def test_hidden_states_one_a_layer(case: Case):
    model = build(case)
    with torch.no_grad():
        outputs = model(**inputs_of(case), output_hidden_states=True)
    kinds = (
        ("encoder_hidden_states", "decoder_hidden_states") if case.takes("decoder_input_ids") else ("hidden_states",)
    )
    assert [len(outputs[kind]) for kind in kinds] == [model.config.num_hidden_layers + 1] * len(kinds)
    as_tuple = model(**inputs_of(case), return_dict=False)
    assert isinstance(as_tuple, tuple)


@pytest.mark.parametrize("case", cases(causal=True), ids=str)
def test_output_depends_on_the_past_only(case: Case):
    model = build(case)
    ids = token_ids(2, 10)
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 50 + 5
    one, two = first_output(model, input_ids=ids), first_output(model, input_ids=other)
    torch.testing.assert_close(one[:, :6], two[:, :6], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, 6:], two[:, 6:])
    first = ids.clone()
    oldest = max(0, 10 - getattr(model.config, "receptive_field", 10))  # a convolution sees so far and no farther
    first[:, oldest] = (first[:, oldest] + 3) % 50 + 5
    assert (first_output(model, input_ids=first) - one)[:, -1].abs().max() > 1e-6, (
        "the last logits ignore the first token"
    )
