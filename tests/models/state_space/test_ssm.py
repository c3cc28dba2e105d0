"""Selective state space models: every way of reading a text gives what the whole, unpadded text gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from hf_lnlm import (
    SelectiveSSMConfig,
    SelectiveSSMForCausalLM,
    SelectiveSSMForMaskedLM,
    SelectiveSSMForSequenceClassification,
    SelectiveSSMModel,
)

VOCABULARY = 50
LENGTH = 24
BAR = 1e-6
MIXERS = ("mamba1", "mamba2", "mamba3")
CASES = {
    **{f"{mixer}{bias}": {"mixer": mixer, "use_bias": bool(bias)} for mixer in MIXERS for bias in ("", "+bias")},
    "mamba1+norms": {"mixer": "mamba1", "mixer_rms_norm": True},
    "mamba2+limit": {"mixer": "mamba2", "use_bias": True, "time_step_limit": (0.02, 0.03)},
    "mamba2 hybrid": {"mixer": "mamba2", "attn_layer_indices": [1], "num_key_value_heads": 2},
}
every_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())


def config(mixer="mamba1", **fields):
    groups = {} if mixer == "mamba1" else {"n_groups": 2, "head_dim": 16}
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16}
    return SelectiveSSMConfig(**(small | groups | {"mixer": mixer, "num_attention_heads": 4} | fields))


@torch.no_grad()
def build(cls=SelectiveSSMForCausalLM, **fields):
    """A model whose weights have noise: at zero biases, leaks through padding would be invisible."""
    torch.manual_seed(0)
    model = cls(config(**fields)).eval()
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1))
    return model


def tokens(batch=2, length=LENGTH, seed=1):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got, expected):
    assert (got - expected).abs().max() <= BAR * expected.abs().max()


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def alone(model, ids, documents):
    return torch.cat([logits(model, ids[:, first:last]) for first, last in documents], 1)


@every_case
def test_chunks_at_every_split(fields):
    model, ids = build(**fields), tokens()
    whole = logits(model, ids)
    for split in range(1, LENGTH):
        cache = DynamicCache(config=model.config)
        parts = [logits(model, part, past_key_values=cache) for part in (ids[:, :split], ids[:, split:])]
        close(torch.cat(parts, 1), whole)


@every_case
def test_token_by_token(fields):
    model, ids = build(**fields), tokens()
    cache = DynamicCache(config=model.config)
    close(
        torch.cat([logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(LENGTH)], 1),
        logits(model, ids),
    )


@every_case
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_tokens_decoded_in_one_kernel(fields, backend):
    """Without gradients a single token takes another path than a sequence: for every backend and several rows."""
    model, ids = build(**fields, backend=backend), tokens(batch=3)
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :1], *ids[:, 1:].split([7, 1, 1, 1, 5, 1, 1, 6], 1)]
    close(torch.cat([logits(model, part, past_key_values=cache) for part in parts], 1), logits(model, ids))


def test_wrapped_modules_are_not_read_around_while_decoding():
    """A hook on a projection between the projections must act on single tokens too."""
    model, ids = build(), tokens()
    for layer in model.model.layers:
        layer.mixer.x_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
        layer.mixer.conv1d.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(LENGTH)]
    close(torch.cat(parts, 1), logits(model, ids))


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("name", ["norm", "mixer.in_proj", "mixer.out_proj", "mixer.norm"])
def test_a_watched_module_is_not_read_around(mixer, name):
    """Fused operations hold norms and projections, whose hooks must act on single tokens and while training too."""
    if mixer == "mamba1" and name == "mixer.norm":
        return
    model, ids = build(mixer=mixer), tokens()
    for layer in model.model.layers:
        layer.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(LENGTH)]
    close(torch.cat(parts, 1), whole)
    close(model(ids).logits, whole)


def test_wrapped_modules_are_not_read_around_while_training():
    """What runs with gradients, where a core is fused, equals what runs without."""
    model, ids = build(), tokens()
    close(model(ids).logits, logits(model, ids))
    for layer in model.model.layers:
        layer.mixer.dt_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    close(model(ids).logits, logits(model, ids))


def test_generation_without_mask_equals_reading_again():
    """A prompt padded on the left goes on without its mask: the generated tokens are those of whole forward passes."""
    model, ids = build(), tokens(batch=2, length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for row, begin in enumerate((4, 0)):
        text = ids[row : row + 1, begin:]
        for _ in range(6):
            text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
        assert made[row, begin:].tolist() == text[0].tolist()


@every_case
@pytest.mark.parametrize("places", [range(6, 30), range(24), [*range(2), *range(4, 9), *range(12, 29)]], ids=str)
def test_padding_left_right_inside(fields, places):
    model, ids, places = build(**fields), tokens(), list(places)
    padded, mask = tokens(length=30, seed=2), torch.zeros(2, 30, dtype=torch.long)
    padded[:, places], mask[:, places] = ids, 1
    close(logits(model, padded, attention_mask=mask)[:, places], logits(model, ids))


@every_case
def test_right_padded_prefill_then_continue(fields):
    model, ids = build(**fields), tokens()
    cache = DynamicCache(config=model.config)
    mask = (torch.arange(25) < 20).long().expand(2, -1)
    logits(model, torch.cat([ids[:, :20], tokens(length=5, seed=3)], 1), attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    close(logits(model, ids[:, 20:], attention_mask=mask, past_key_values=cache), logits(model, ids)[:, 20:])


@every_case
def test_packed_documents(fields):
    model, ids = build(**fields), tokens()
    documents = [(0, 7), (7, 8), (8, 24)]
    expected = alone(model, ids, documents)
    numbers = torch.tensor([[0] * 7 + [1] + [2] * 16]).expand(2, -1)
    positions = torch.tensor([[*range(7), 0, *range(16)]]).expand(2, -1)
    close(logits(model, ids, seq_idx=numbers, use_cache=False), expected)
    close(logits(model, ids, position_ids=positions, use_cache=False), expected)
    close(logits(model, ids[:1], cu_seq_lens_q=torch.tensor([0, 7, 8, 24]), use_cache=False), expected[:1])


@every_case
@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str)
def test_what_the_flattening_collator_gives(fields, options):
    model, ids = build(**fields), tokens(batch=1)
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)
    rows = [{"input_ids": ids[0, first:last].tolist()} for first, last in ((0, 9), (9, 24))]
    batch = {name: value for name, value in collate(rows).items() if name != "labels"}
    with torch.no_grad():
        close(model(**batch, use_cache=False).logits, alone(model, ids, [(0, 9), (9, 24)]))


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_rows_with_padding_and_a_carried_state(mixer):
    """A document that goes on from the state, padding, then another document."""
    model, ids = build(mixer=mixer, use_bias=True), tokens()
    whole, second = logits(model, ids[:, :16]), logits(model, ids[:, 16:])
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :10], past_key_values=cache)
    row = torch.cat([ids[:, 10:16], tokens(length=3, seed=4), ids[:, 16:]], 1)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, 6:9] = 0
    numbers = torch.tensor([[0] * 6 + [1] * 11]).expand(2, -1)
    got = logits(model, row, attention_mask=mask, seq_idx=numbers, past_key_values=cache)
    close(got[:, :6], whole[:, 10:])
    close(got[:, 9:], second)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("bidirectional", ["add", "tied"])
def test_both_directions(mixer, bidirectional):
    model = build(SelectiveSSMForMaskedLM, mixer=mixer, use_bias=True, bidirectional=bidirectional)
    ids = tokens()
    whole = logits(model, ids)
    places = [*range(2), *range(4, 9), *range(12, 29)]
    padded, mask = tokens(length=30, seed=2), torch.zeros(2, 30, dtype=torch.long)
    padded[:, places], mask[:, places] = ids, 1
    close(logits(model, padded, attention_mask=mask)[:, places], whole)
    numbers = torch.tensor([[0] * 7 + [1] + [2] * 16]).expand(2, -1)
    close(logits(model, ids, seq_idx=numbers), alone(model, ids, [(0, 7), (7, 8), (8, 24)]))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % VOCABULARY
    assert (logits(model, changed)[:, 0] - whole[:, 0]).abs().max() > 1e-4  # the first token sees the last


@pytest.mark.parametrize("mixer", MIXERS)
def test_reverse_scan_is_the_forward_scan_of_the_flipped_text(mixer):
    model = build(SelectiveSSMModel, mixer=mixer, bidirectional="add", num_hidden_layers=1)
    layer = model.layers[0]
    layer.reverse_mixer.load_state_dict(layer.mixer.state_dict())
    ids = tokens()
    with torch.no_grad():
        close(model(ids.flip(1)).last_hidden_state.flip(1), model(ids).last_hidden_state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_flow_through_the_state(mixer):
    """Back-propagation through a split text is back-propagation through the whole one."""
    model, ids = build(mixer=mixer).train(), tokens()
    whole = torch.autograd.grad(model(ids, labels=ids).logits.pow(2).sum(), list(model.parameters()))
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :9], ids[:, 9:])]
    split = torch.autograd.grad(torch.cat(parts, 1).pow(2).sum(), list(model.parameters()))
    for got, expected in zip(split, whole):
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@every_case
def test_beams_are_reordered(fields):
    model, ids = build(**fields), tokens(length=6)
    options = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("mixer", MIXERS)
def test_backends_agree(mixer):
    ids = tokens()
    outputs = []
    for backend in ("reference", "eager", "auto"):
        model = build(mixer=mixer, backend=backend)
        loss = model(ids, labels=ids).loss
        outputs.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for other in outputs[1:]:
        for got, expected in zip(other, outputs[0]):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1e-6)


def test_initial_weights_are_the_papers():
    model = SelectiveSSMModel(config(hidden_size=256, num_hidden_layers=4))
    mixer = model.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, -1))
    assert torch.equal(mixer.D, torch.ones(512))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.0009 < steps.min() < 0.002
    assert 0.05 < steps.max() < 0.11
    assert mixer.dt_proj.weight.abs().max() <= 16**-0.5
    assert abs(model.embed_tokens.weight.std().item() - 0.02) < 0.002
    assert mixer.out_proj.weight.abs().max() <= 512**-0.5 / 2  # divided by the root of four layers
    second = SelectiveSSMModel(config(mixer="mamba2", hidden_size=256, head_dim=8)).layers[0].mixer
    assert second.A_log.exp().min() >= 1
    assert 4 < second.A_log.exp().mean() < 13
    assert second.A_log.exp().max() <= 16.001


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_weight_decay_spares(mixer):
    model = SelectiveSSMForCausalLM(config(mixer=mixer))
    spared = {name.removeprefix("model.layers.0.") for name in model.no_weight_decay()}
    assert {"mixer.D", "norm.weight"} <= spared
    assert "model.norm.weight" in spared
    assert ("mixer.A_log" in spared) == (mixer != "mamba3")
    assert ("mixer.dt_proj.bias" if mixer == "mamba1" else "mixer.dt_bias") in spared
    assert not any("in_proj" in name or "embed" in name for name in spared)


def test_masked_models_read_both_ways_unless_told_otherwise(tmp_path):
    model = SelectiveSSMForMaskedLM(config())
    assert model.config.bidirectional == "tied"
    model.save_pretrained(tmp_path)
    assert SelectiveSSMModel.from_pretrained(tmp_path).config.bidirectional == "tied"
    with pytest.raises(ValueError, match="bidirectional='none'"):
        SelectiveSSMForMaskedLM(config(bidirectional="none"))


@pytest.mark.parametrize("bidirectional", ["add", "tied"])
def test_bidirectional_models_do_not_generate(bidirectional):
    with pytest.raises(ValueError, match="cannot be bidirectional"):
        SelectiveSSMForCausalLM(config(bidirectional=bidirectional))
    model = build(SelectiveSSMModel, bidirectional=bidirectional)
    with pytest.raises(ValueError, match="past_key_values"):
        model(tokens(), past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "first"])
def test_poolings_ignore_padding(pooling):
    model = build(SelectiveSSMForSequenceClassification, pooling=pooling, use_bias=True)
    ids = tokens()
    padded, mask = tokens(length=30, seed=2), torch.zeros(2, 30, dtype=torch.long)
    padded[:, 3:27], mask[:, 3:27] = ids, 1
    close(logits(model, padded, attention_mask=mask), logits(model, ids))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "mamba4"}, "mixer"),
        ({"mixer": "mamba2", "head_dim": 24}, "head_dim"),
        ({"mixer": "mamba2", "num_heads": 3}, "num_heads"),
        ({"mixer": "mamba2", "n_groups": 3}, "n_groups"),
        ({"mixer": "mamba3", "rope_fraction": 0.3}, "rope_fraction"),
        ({"mixer": "mamba3", "state_size": 2}, "state_size"),
        ({"state_size": 0}, "state_size"),
        ({"conv_kernel": 0}, "conv_kernel"),
        ({"expand": 0}, "expand"),
        ({"time_step_min": 0.5}, "time_step_min"),
        ({"time_step_limit": (0.1, 0.2)}, "time_step_limit"),
        ({"mixer": "mamba2", "time_step_limit": (0.3, 0.2)}, "time_step_limit"),
        ({"time_step_rank": "some"}, "time_step_rank"),
        ({"bidirectional": "both"}, "bidirectional"),
        ({"pooling": "sum"}, "pooling"),
        ({"attn_layer_indices": [2]}, "attn_layer_indices"),
        ({"attn_layer_indices": [1], "num_attention_heads": 5}, "num_attention_heads"),
        ({"attn_layer_indices": [1], "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"backend": "fortran"}, "backend"),
        ({"hidden_size": 2**30}, "hidden_size"),
    ],
    ids=str,
)
def test_bad_configs_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 7)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 24, 24)}, "attention_mask"),
        ({"attention_mask": torch.full((2, 24), 0.5)}, "attention_mask"),
        ({"seq_idx": torch.zeros(3, 24, dtype=torch.long)}, "seq_idx"),
        ({"seq_idx": torch.arange(24).flip(0).expand(2, -1)}, "seq_idx"),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.long)}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 24])}, "cu_seq_lens_q"),
        ({"inputs_embeds": torch.zeros(2, 24, 32)}, "exactly one"),
    ],
    ids=str,
)
def test_bad_inputs_name_the_argument(inputs, message):
    with pytest.raises(ValueError, match=message):
        build()(tokens(), **inputs)


def test_no_positions_no_inputs_and_unknown_ids():
    model = build()
    with pytest.raises(ValueError, match="no positions"):
        model(tokens(length=0))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    for bad in (VOCABULARY, -1):
        with pytest.raises(ValueError, match=f"input_ids must be .*got {bad}"):
            model(torch.full((1, 3), bad))


def test_states_of_another_mixer_or_size_are_refused():
    first, second = build(), build(mixer="mamba2")
    cache = DynamicCache(config=first.config)
    logits(first, tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="mamba1"):
        second(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="rows"):
        first(tokens(batch=3), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        first(tokens(), past_key_values=DynamicCache())


def test_a_document_cannot_begin_inside_the_keys_of_a_hybrid():
    model = build(mixer="mamba2", attn_layer_indices=[1])
    cache = DynamicCache(config=model.config)
    logits(model, tokens(length=5), past_key_values=cache)
    with pytest.raises(ValueError, match="document"):
        model(tokens(length=4), seq_idx=torch.tensor([[0, 0, 1, 1]]).expand(2, -1), past_key_values=cache)


def test_a_broken_weight_is_seen():
    model = build()
    with torch.no_grad():
        model.model.layers[0].mixer.A_log[3, 2] = float("nan")
    assert logits(model, tokens()).isnan().any()


def test_labels_that_are_all_ignored_are_seen_too():
    """As in torch: a mean over nothing is no number; over the items of a larger batch it adds nothing."""
    model, ids = build(), tokens()
    nothing = torch.full_like(ids, -100)
    assert model(ids, labels=nothing).loss.isnan()
    loss = model(ids, labels=nothing, num_items_in_batch=5).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_half_precision_on_the_cpu(mixer, dtype, bar):
    """Weights of two bytes; scans and states stay in float32, in one piece and token by token."""
    exact, ids = build(mixer=mixer), tokens()
    expected = logits(exact, ids)
    model = build(mixer=mixer).to(dtype)
    cache = DynamicCache(config=model.config)
    steps = torch.cat([logits(model, ids[:, t : t + 1], past_key_values=cache) for t in range(LENGTH)], 1)
    for got in (logits(model, ids), steps):
        assert got.dtype == dtype
        assert (got.float() - expected).abs().max() <= bar * expected.abs().max()
    assert cache.layers[0].states["ssm"].dtype == torch.float32


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_without_any_real_token(mixer):
    """It has finite outputs, leaves its state at zero, and its neighbour does not notice."""
    model, ids = build(mixer=mixer, use_bias=True), tokens()
    mask = torch.ones_like(ids)
    mask[0] = 0
    cache = DynamicCache(config=model.config)
    found = logits(model, ids, attention_mask=mask, past_key_values=cache)
    assert found.isfinite().all()
    close(found[1:], logits(model, ids[1:]))
    assert all(not state[0].any() for layer in cache.layers for state in layer.states.values())


def test_a_checkpoint_of_another_mixer_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|size"):
        SelectiveSSMForCausalLM.from_pretrained(tmp_path, config=config(mixer="mamba2"))
