"""What is particular to the memory models: fast path and wrappers, state, addressing, initial memories, bad configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from hf_lnlm.models.memory.configuration_dnc import DNCConfig
from hf_lnlm.models.memory.configuration_ntm import NTMConfig
from hf_lnlm.models.memory.modeling_dnc import (
    DNCForCausalLM,
    DNCForSequenceClassification,
    DNCForSequenceTransduction,
    DNCModel,
)
from hf_lnlm.models.memory.modeling_ntm import NTMForCausalLM, NTMForSequenceTransduction, NTMModel

CONFIGS = {"ntm": NTMConfig, "dnc": DNCConfig}
CAUSAL = {"ntm": NTMForCausalLM, "dnc": DNCForCausalLM}
BODIES = {"ntm": NTMModel, "dnc": DNCModel}
TRANSDUCERS = {"ntm": NTMForSequenceTransduction, "dnc": DNCForSequenceTransduction}
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "memory_size": 17,
    "memory_width": 6,
    "num_hidden_layers": 2,
}
BITS: dict[str, Any] = {"hidden_size": 8, "controller_size": 20, "input_size": 9, "output_size": 8, "memory_size": 17}
family = pytest.mark.parametrize("name", CONFIGS)


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(5))


def causal(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = CAUSAL[name](CONFIGS[name](**(TINY | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(input_ids=ids(), labels=ids())
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@family
def test_the_fast_path_equals_the_equations(name):
    logits, gradients = logits_and_gradients(causal(name, backend="cpu"))
    expected, wanted = logits_and_gradients(causal(name, backend="reference"))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert set(gradients) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-3, atol=1e-5)


@family
def test_adapters_work_on_the_fast_path(name):
    def adapted(backend: str) -> Any:
        config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", exclude_modules=["lm_head"])
        model = get_peft_model(causal(name, backend=backend), config)
        generator = torch.Generator().manual_seed(3)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        return model

    fast, slow = adapted("cpu"), adapted("reference")
    plain = causal(name)(ids()).logits
    logits, gradients = logits_and_gradients(fast)
    expected, wanted = logits_and_gradients(slow)
    assert not torch.allclose(logits, plain, atol=1e-2)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert {key.split(".")[-4] for key in gradients} >= {
        "input_proj",
        "recurrent_proj",
        "interface_proj",
        "output_proj",
    }
    for key, value in wanted.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-3, atol=1e-5)
    merged = fast.merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, logits, rtol=1e-4, atol=1e-5)


RECOMPUTED = {
    "plain": {},
    "normalised, both ways": {"bidirectional": True, "layer_norm": True},
    "bare": {"residual": False, "controller_type": "feedforward", "num_hidden_layers": 1},
}


def trained(name: str, fields: dict[str, Any], lora: bool = False, **inputs: Any) -> list[Any]:
    """States, addressing and gradients of a body whose outputs, final state and carried state all bear on the loss."""
    torch.manual_seed(0)
    model = BODIES[name](CONFIGS[name](**(TINY | fields))).train()
    if lora:
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
        for key, parameter in model.named_parameters():  # small: nearly equal usages may swap places by rounding alone
            parameter.data += 0.1 * torch.randn_like(parameter) * ("lora_B" in key)
    carried = None if fields.get("bidirectional") else model(ids(), use_cache=True).past_key_values
    out = model(
        ids(length=12), past_key_values=carried, use_cache=carried is not None, output_addressing=True, **inputs
    )
    weights = torch.randn(out.last_hidden_state.shape, generator=torch.Generator().manual_seed(1))
    loss = (out.last_hidden_state * weights).sum()
    states = [] if carried is None else [s for layer in carried.layers for s in layer.states.values()]
    (loss + sum(state.square().sum() for state in states)).backward()
    looks = [*out.read_weightings, *out.write_weightings]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [out.last_hidden_state, *states, *looks, *gradients]


def assert_equal_lists(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        largest = max([1.0, *other.detach().abs().flatten().tolist()])
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6 * largest)


@family
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("kind", RECOMPUTED)
def test_recomputed_states_change_nothing(name, kind, backend):
    """Lengths that chunks don't divide; padding on both sides and inside; a carried state."""
    fields = RECOMPUTED[kind] | {"backend": backend}
    mask = torch.tensor([[0, 0] + [1] * 10, [1] * 5 + [0] + [1] * 3 + [0] * 3])
    mask = mask if "bidirectional" in fields else torch.cat([mask.new_ones(2, 9), mask], 1)
    for inputs in ({}, {"attention_mask": mask}, {"attention_mask": torch.zeros_like(mask)}):
        expected = trained(name, fields, **inputs)
        found = trained(name, fields | {"recompute_states": True}, **inputs)
        assert_equal_lists(found, expected)


@family
def test_recomputed_states_know_adapters(name):
    fields = {"backend": "cpu", "layer_norm": True}
    expected, found = trained(name, fields, lora=True), trained(name, fields | {"recompute_states": True}, lora=True)
    assert_equal_lists(found, expected)


@family
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_recomputed_states_keep_no_sequence_of_outputs(name, backend):
    """What the graph holds of 50 steps: inputs and outputs of the layer, not what lies between."""

    def largest(recompute: bool) -> int:
        model = BODIES[name](CONFIGS[name](**BITS, residual=False, backend=backend, recompute_states=recompute))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.untyped_storage().size()) or t, lambda t: t
        ):
            model(inputs_embeds=torch.rand(3, 50, 9), use_cache=False)
        return max(sizes, default=0) // 4

    weights = 4 * 20 * (20 + 20)
    assert largest(recompute=True) <= max(3 * 50 * 9, weights)
    assert backend == "eager" or largest(recompute=False) >= 3 * 50 * 40


@family
def test_the_core_runs_in_float32(name):
    model = causal(name).to(torch.bfloat16)
    out = model(ids(), use_cache=True)
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    assert all(state.dtype == torch.float32 for state in out.past_key_values.layers[0].states.values())
    model = causal(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(ids(), use_cache=True)
    states = cast.past_key_values.layers[0].states
    assert all(state.dtype == torch.float32 for state in states.values())


@family
def test_reset_means_the_initial_state(name):
    model = causal(name)
    cache = DynamicCache(config=model.config)
    first = model(ids(), past_key_values=cache).logits
    assert not torch.allclose(model(ids(), past_key_values=cache).logits, first, atol=1e-4)
    cache.reset()
    torch.testing.assert_close(model(ids(), past_key_values=cache).logits, first)


@family
def test_gradients_flow_through_a_carried_state(name):
    model = causal(name, backend="cpu")
    whole = model(ids(), use_cache=True).logits[:, -1].sum()
    (expected,) = torch.autograd.grad(whole, model.model.embed_tokens.weight)
    cache = model(ids()[:, :4], use_cache=True).past_key_values
    (found,) = torch.autograd.grad(
        model(ids()[:, 4:], past_key_values=cache).logits[:, -1].sum(), model.model.embed_tokens.weight
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_state_of_another_family_is_refused():
    ntm, dnc = causal("ntm"), causal("dnc")
    cache = ntm(ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="lnlm_ntm"):
        dnc(ids(), past_key_values=cache)


@family
def test_a_state_of_another_shape_is_refused(name):
    cache = causal(name)(ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="rows"):
        causal(name)(ids(3), past_key_values=cache)
    with pytest.raises(ValueError, match="shape"):
        causal(name, memory_size=19)(ids(), past_key_values=cache)


@family
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_addressing(name, backend):
    model = causal(name, backend=backend, num_read_heads=2).model
    out = model(ids(), output_addressing=True)
    assert [look.shape for look in out.read_weightings] == [(2, 9, 2, 17)] * 2
    assert [look.shape for look in out.write_weightings] == [(2, 9, 1, 17)] * 2
    assert model(ids()).read_weightings is None
    if name == "ntm":
        torch.testing.assert_close(out.read_weightings[0].sum(-1), torch.ones(2, 9, 2))
    else:
        assert out.usage[0].shape == (2, 9, 17) and out.read_modes[1].shape == (2, 9, 2, 3)
        torch.testing.assert_close(out.read_modes[0].sum(-1), torch.ones(2, 9, 2))


@family
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_transduction(name, backend):
    torch.manual_seed(0)
    model = TRANSDUCERS[name](CONFIGS[name](**BITS, residual=False, backend=backend))
    inputs, labels = torch.rand(2, 7, 9), torch.randint(0, 2, (2, 7, 8)).float()
    labels[0, :3] = -100
    out = model(inputs_embeds=inputs, labels=labels, output_addressing=True)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(out.logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(out.loss, wanted)
    assert out.read_weightings[0].shape == (2, 7, 1, 17)
    halved = model(inputs_embeds=inputs, labels=labels, num_items_in_batch=2 * int((labels >= 0).sum()))
    torch.testing.assert_close(halved.loss, wanted / 2)
    with pytest.raises(ValueError, match="labels"):
        model(inputs_embeds=inputs, labels=labels[:, :, :4])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=inputs[..., :4])


def test_parameters_of_the_papers_copy_network():
    """62,736 (LSTM) and 13,536 here, 67,561 and 17,162 in the paper, which doesn't say what it counts: see the card."""
    sizes = {"hidden_size": 8, "controller_size": 100, "input_size": 9, "output_size": 8, "residual": False}
    gates = 400 * (9 + 100 + 20) + 400
    heads = (100 + 1) * (2 * (20 + 3 + 3) + 2 * 20)
    output, initial = (120 + 1) * 8, 100 + 100 + 20 + 2 * 128
    model = NTMForSequenceTransduction(NTMConfig(**sizes))
    assert model.num_parameters() == gates + heads + output + initial == 62_736
    gates, initial = 100 * (9 + 20) + 100, 20 + 2 * 128
    model = NTMForSequenceTransduction(NTMConfig(**sizes, controller_type="feedforward"))
    assert model.num_parameters() == gates + heads + output + initial == 13_536


@pytest.mark.parametrize("kind", ["random", "peaked", "uniform"])
def test_initial_weightings(kind):
    model = NTMModel(NTMConfig(**TINY, initial_weighting=kind))
    weighting = model.layers[0].forwards.initial_weightings.softmax(-1)
    if kind == "peaked":
        assert weighting[:, 0].min() > 0.99
    else:
        assert weighting.max() < 0.5
        assert (weighting.std() == 0) == (kind == "uniform")


@pytest.mark.parametrize(
    "fields",
    [
        {"use_temporal_links": False},
        {"use_masking": True, "use_deallocation": True, "use_sharpness": True},
        {"layer_norm": True, "bypass_dropout": 0.1},
        {"bidirectional": True, "num_read_heads": 2},
        {"controller_type": "feedforward", "num_write_heads": 2},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_variants_of_the_neural_computer_learn(fields):
    torch.manual_seed(0)
    model = DNCForSequenceClassification(DNCConfig(**(TINY | fields), num_labels=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    labels = torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids(4, 6), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("ntm", {"memory_size": 0}, "memory_size"),
        ("ntm", {"memory_size": True}, "memory_size"),
        ("ntm", {"shift_range": 9}, "shift_range"),
        ("ntm", {"shift_range": -1}, "shift_range"),
        ("ntm", {"interface_clip": 0.0}, "interface_clip"),
        ("ntm", {"interface_clip": float("nan")}, "interface_clip"),
        ("ntm", {"controller_type": "gru"}, "controller_type"),
        ("ntm", {"memory_init": "zero"}, "memory_init"),
        ("ntm", {"initial_weighting": "first"}, "initial_weighting"),
        ("ntm", {"num_write_heads": 0}, "num_write_heads"),
        ("ntm", {"pad_token_id": 61}, "pad_token_id"),
        ("dnc", {"memory_width": 0}, "memory_width"),
        ("dnc", {"num_read_heads": 0}, "num_read_heads"),
        ("dnc", {"use_sharpness": True, "use_temporal_links": False}, "use_sharpness"),
        ("dnc", {"mask_min": 2.0}, "mask_min"),
        ("dnc", {"bypass_dropout": 1.0}, "bypass_dropout"),
        ("dnc", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_bad_configs_are_refused(name, fields, field):
    with pytest.raises(ValueError, match=field):
        CONFIGS[name](**(TINY | fields))


@family
def test_bad_calls_are_refused(name):
    model = causal(name)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="no positions"):
        model(ids()[:, :0])
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids(), attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="input_size"):
        CAUSAL[name](CONFIGS[name](**TINY, input_size=4))
    with pytest.raises(ValueError, match="input_size"):
        TRANSDUCERS[name](CONFIGS[name](**TINY))
    with pytest.raises(ValueError, match="bidirectional"):
        CAUSAL[name](CONFIGS[name](**TINY, bidirectional=True))


@pytest.mark.parametrize("shift_range", [0, 1, 2])
def test_a_tape_begins_at_its_first_slot_where_readers_wait_and_writers_walk_on(shift_range):
    fields = {"initial_weighting": "peaked", "initial_addressing": "tape", "shift_range": shift_range}
    torch.manual_seed(0)
    model = NTMModel(NTMConfig(**(TINY | {"num_hidden_layers": 1, "num_read_heads": 2}), **fields))
    out = model(ids(), output_addressing=True)
    places = torch.arange(TINY["memory_size"]).float()
    written, read = out.write_weightings[0].mean(0)[:, 0], out.read_weightings[0].mean(0)
    walked = (written[1:] - written[:-1]) @ places
    assert written[0, : shift_range + 1].sum() > 0.5 and (read[0, :, 0] > 0.5).all()
    assert (walked[:5] > 0.4).all() if shift_range else (walked.abs() < 0.5).all()
    assert (read[:4] @ places < 3).all()
    assert not NTMModel(NTMConfig(**TINY)).layers[0].forwards.interface_proj.bias.any()
