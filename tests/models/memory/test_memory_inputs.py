"""Bad and unusual inputs of the memory models: refused by name, or defined."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_lnlm import (
    DNCForSequenceClassification,
    DNCForTokenClassification,
    DNCModel,
    NTMForSequenceClassification,
    NTMForTokenClassification,
    NTMModel,
    RNNConfig,
    RNNForCausalLM,
)

from .test_memory_models import BITS, BODIES, CONFIGS, TINY, TRANSDUCERS, causal, family, ids

CLASSIFIERS = {"ntm": NTMForSequenceClassification, "dnc": DNCForSequenceClassification}
TAGGERS = {"ntm": NTMForTokenClassification, "dnc": DNCForTokenClassification}


@family
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"memory_size": 2.5}, "memory_size"),
        ({"memory_size": 2**17}, "memory_size"),
        ({"memory_width": 0}, "memory_width must be between 1 and 65536, got 0"),
        ({"memory_width": 2**16 + 1}, "memory_width must be between 1 and 65536, got 65537"),
        ({"num_read_heads": 0}, "num_read_heads"),
        ({"num_write_heads": 0}, "num_write_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"controller_size": 0}, "controller_size"),
        ({"interface_clip": -1.0}, "interface_clip"),
        ({"interface_clip": float("inf")}, "interface_clip"),
        ({"hidden_dropout": -0.1}, "hidden_dropout"),
        ({"classifier_dropout": 1.5}, "classifier_dropout"),
        ({"bypass_dropout": float("nan")}, "bypass_dropout"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"pad_token_id": 61}, "pad_token_id"),
        ({"input_size": 0}, "input_size"),
        ({"output_size": 0}, "output_size"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_fields_are_refused_by_name(name, fields, field):
    with pytest.raises(ValueError, match=field):
        CONFIGS[name](**(TINY | fields))


def test_memories_beyond_a_gigabyte_a_row_are_refused():
    with pytest.raises(ValueError, match="memory_width must be at most 32768 for memory_size 8192, got 40000"):
        CONFIGS["ntm"](**(TINY | {"memory_size": 2**13, "memory_width": 40_000}))
    with pytest.raises(ValueError, match="num_write_heads must be at most 16 for temporal links between 4096 slots"):
        CONFIGS["dnc"](**(TINY | {"memory_size": 4096, "num_write_heads": 17}))
    CONFIGS["dnc"](**(TINY | {"memory_size": 4096, "num_write_heads": 17, "use_temporal_links": False}))


@pytest.mark.parametrize("value", ["tapes", "Tape", ""])
def test_bad_initial_addressing(value):
    with pytest.raises(ValueError, match="initial_addressing"):
        CONFIGS["ntm"](**TINY, initial_addressing=value)


@family
def test_bad_calls_are_refused_by_name(name):
    model = causal(name)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids(), inputs_embeds=torch.zeros(2, 9, 16))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(2, 9, 15))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(2, 16))
    for no_rows in ({"input_ids": ids()[:0]}, {"inputs_embeds": torch.zeros(0, 9, 16)}):
        with pytest.raises(ValueError, match=r"the input has no rows: input.* has shape \(0, 9"):
            model(**no_rows)
    with pytest.raises(ValueError, match=r"input_ids must have shape \(batch, length\), got \(9,\)"):
        model(ids()[0])
    with pytest.raises(ValueError, match="input_size"):
        TRANSDUCERS[name](CONFIGS[name](**BITS)).model(input_ids=ids())


@family
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, 9), 61), "labels must be between 0 and 60, or -100 to be ignored, got 61"),
        (torch.full((2, 9), -1), "labels must be between 0 and 60, or -100 to be ignored, got -1"),
        (torch.zeros(2, 9), "labels must be whole numbers from 0 to 60, got type torch.float32"),
        (torch.zeros(2, 8, dtype=torch.long), r"labels must have shape \(2, 9\), got \(2, 8\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(name, labels, message):
    model = causal(name)
    with pytest.raises(ValueError, match=message):
        model(ids(), labels=labels)
    assert model(ids(), labels=torch.where(ids() < 30, ids(), -100)).loss.isfinite()
    with pytest.raises(ValueError, match=message.replace("60", "3")):
        TAGGERS[name](CONFIGS[name](**TINY, num_labels=4))(ids(), labels=labels)


@family
def test_labels_of_texts_that_are_no_classes_are_refused(name):
    fields = {"num_labels": 3, "problem_type": "single_label_classification"}
    model = CLASSIFIERS[name](CONFIGS[name](**TINY, **fields))
    for labels, message in {
        (0, 3): "labels must be between 0 and 2, or -100 to be ignored, got 3",
        (0, -1): "got -1",
        (0.0, 1.0): "labels must be whole numbers from 0 to 2, got type torch.float32",
        (0, 1, 2): r"labels must have shape \(2,\), got \(3,\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            model(ids(), labels=torch.tensor(labels))


@family
@pytest.mark.parametrize("label", [2.0, -1.0, float("nan")])
def test_labels_that_are_no_bits_are_refused(name, label):
    model, labels = TRANSDUCERS[name](CONFIGS[name](**BITS)), torch.ones(2, 6, 8)
    labels[1, 3, 2], labels[0] = label, -100
    with pytest.raises(ValueError, match=f"labels must be between 0 and 1, or -100 to be ignored, got {label}"):
        model(inputs_embeds=torch.rand(2, 6, 9), labels=labels)


@family
def test_a_state_that_was_rounded_or_moved_is_refused(name):
    model = causal(name)
    for change, message in {
        (lambda t: t.bfloat16()): "must be torch.float32, as the memory computes, got torch.bfloat16",
        (lambda t: t.to("meta")): "must lie on cpu, as its layer does, got meta",
    }.items():
        cache = model(ids(), use_cache=True).past_key_values
        cache.layers[1].states = {part: change(tensor) for part, tensor in cache.layers[1].states.items()}
        with pytest.raises(ValueError, match=f"past_key_values: state .* {message}"):
            model(ids(), past_key_values=cache)


@family
def test_the_other_familys_and_a_recurrent_networks_state_are_refused(name):
    other = causal("dnc" if name == "ntm" else "ntm")
    with pytest.raises(ValueError, match="lnlm_"):
        causal(name)(ids(), past_key_values=other(ids(), use_cache=True).past_key_values)
    recurrent = RNNForCausalLM(RNNConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2)).eval()
    with pytest.raises(ValueError, match="lnlm_"):
        causal(name)(ids(), past_key_values=recurrent(ids(), use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="the states of 2 layers"):
        causal(name)(ids(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="the states of 2 layers"):
        causal(name)(ids(), past_key_values=causal(name, num_hidden_layers=1)(ids(), use_cache=True).past_key_values)


@family
def test_a_bidirectional_model_refuses_a_state(name):
    model = BODIES[name](CONFIGS[name](**TINY, bidirectional=True)).eval()
    cache = causal(name)(ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="reads both ways"):
        model(ids(), past_key_values=cache)


@family
def test_a_row_without_any_token_keeps_the_initial_state(name):
    model, mask = causal(name), torch.ones(2, 9, dtype=torch.long)
    mask[0] = 0
    out = model(ids(), attention_mask=mask, use_cache=True)
    alone = model(ids()[1:], use_cache=True)
    cell = model.model.layers[0].forwards
    assert out.logits.isfinite().all()
    torch.testing.assert_close(out.logits[1:], alone.logits, rtol=1e-4, atol=1e-5)
    initial = cell.initial_states(1, torch.zeros(1))
    for part, value in zip(model.model.state_names, initial, strict=True):
        torch.testing.assert_close(out.past_key_values.layers[0].states[part][:1], value)


@family
def test_holes_in_a_mask_are_skipped(name):
    model, mask = causal(name), torch.ones(2, 9, dtype=torch.long)
    mask[:, [0, 3, 4, 8]] = 0
    logits = model(ids(), attention_mask=mask).logits
    kept = mask[0].bool()
    torch.testing.assert_close(logits[:, kept], model(ids()[:, kept]).logits, rtol=1e-4, atol=1e-5)


@family
def test_rows_of_different_lengths_need_no_pad_token_to_be_classified(name):
    torch.manual_seed(0)
    model = CLASSIFIERS[name](CONFIGS[name](**TINY, num_labels=3, pad_token_id=None)).eval()
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    torch.testing.assert_close(
        model(ids(), attention_mask=mask).logits[1:], model(ids()[1:, :4]).logits, rtol=1e-4, atol=1e-5
    )


@family
def test_an_addressing_of_masked_steps_is_zero(name):
    model, mask = causal(name, backend="cpu").model, torch.ones(2, 9)
    mask[0, :4] = 0
    looks = model(ids(), attention_mask=mask, output_addressing=True)
    assert not looks.read_weightings[0][0, :4].any() and looks.read_weightings[0][0, 4:].any()
    assert not looks.write_weightings[0][0, :4].any()


@family
def test_nan_in_one_row_stays_there(name):
    model, inputs = TRANSDUCERS[name](CONFIGS[name](**BITS)).eval(), torch.rand(2, 6, 9)
    inputs[0, 2] = float("nan")
    logits = model(inputs_embeds=inputs).logits
    assert logits[0, 2:].isnan().any() and logits[1].isfinite().all() and logits[0, :2].isfinite().all()


@family
def test_a_tagger_reads_continuous_inputs_too(name):
    model = TAGGERS[name](CONFIGS[name](**BITS, num_labels=4))
    out = model(inputs_embeds=torch.rand(2, 6, 9), labels=torch.randint(0, 4, (2, 6)))
    assert out.logits.shape == (2, 6, 4) and out.loss.isfinite()


@pytest.mark.parametrize("body", [NTMModel, DNCModel])
def test_two_sequences_at_once_do_not_meet(body):
    """Nothing of a sequence stays on the module: runs in between change nothing."""
    model = body(CONFIGS["ntm" if body is NTMModel else "dnc"](**TINY)).eval()
    first = model(ids()).last_hidden_state
    model(ids(3, 4))
    assert torch.equal(model(ids()).last_hidden_state, first)
