"""State and addressing of the memory models: how they begin, move, are saved and masked, and what is shown of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lnlm import (
    DNCForQuestionAnswering,
    DNCForSequenceClassification,
    DNCForTokenClassification,
    NTMForQuestionAnswering,
    NTMForSequenceClassification,
    NTMForTokenClassification,
)
from hf_lnlm.ops.memory.dnc import cpu as dnc_cpu
from hf_lnlm.ops.memory.ntm import cpu as ntm_cpu
from hf_lnlm.trainer.recurrent_state import CarriedState

from .test_memory_models import BITS, BODIES, CAUSAL, CONFIGS, TINY, TRANSDUCERS, causal, family, ids

LABELLED = {
    "ntm": (NTMForSequenceClassification, NTMForTokenClassification, NTMForQuestionAnswering),
    "dnc": (DNCForSequenceClassification, DNCForTokenClassification, DNCForQuestionAnswering),
}
MEMORIES = ("constant", "learned", "random")
LOOKS = {
    "ntm": ("read_weightings", "write_weightings"),
    "dnc": (
        "read_weightings", "write_weightings", "usage", "free_gates", "allocation_gates", "write_gates", "read_modes",
    ),
}  # fmt: skip


def first_state(model: Any, like: torch.Tensor) -> Any:
    return model.layers[0].forwards.initial_states(2, like)


@pytest.mark.parametrize("kind", ["random", "peaked", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_initial_weighting_is_a_distribution(kind, dtype):
    """Zeros would let weight leak away at the first interpolation."""
    weightings = first_state(BODIES["ntm"](CONFIGS["ntm"](**TINY, initial_weighting=kind)).to(dtype), torch.zeros(1))
    assert weightings.weightings.shape == (2, 2, 17) and weightings.weightings.dtype == torch.float32
    torch.testing.assert_close(weightings.weightings.sum(-1), torch.ones(2, 2))


@family
def test_the_initial_state_moves_with_the_model(name):
    """Nothing of it is a plain tensor that stays behind: on another device or in float64 it goes along."""
    kinds = [{"memory_init": kind} for kind in MEMORIES] if name == "ntm" else [{}]
    for fields in kinds:
        model = BODIES[name](CONFIGS[name](**TINY, **fields))
        wide = first_state(model.double(), torch.zeros(1, dtype=torch.float64))
        assert all(part.dtype == torch.float64 for part in wide)
        away = first_state(model.to("meta"), torch.zeros(1, device="meta"))
        assert all(part.device.type == "meta" for part in away)


@pytest.mark.parametrize("kind", MEMORIES)
def test_initial_memories_are_saved_and_learned(kind, tmp_path):
    torch.manual_seed(0)
    model = causal("ntm", memory_init=kind, backend="cpu")
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = CAUSAL["ntm"].from_pretrained(tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    memory = first_state(model.model, torch.zeros(1)).memory[0]
    assert torch.equal(first_state(again.model, torch.zeros(1)).memory[0], memory)
    assert (memory.std() > 0.01) == (kind != "constant")
    model(ids(), labels=ids()).loss.backward()
    learned = [n for n, p in model.named_parameters() if "initial_memory" in n and p.grad is not None and p.grad.any()]
    assert len(learned) == (2 if kind == "learned" else 0)
    assert model.no_weight_decay() and set(learned) <= set(model.no_weight_decay())


@family
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_masked_steps_leave_the_whole_state_alone(name, backend):
    """Padding on the left, on the right and inside: state and addressing are those of the real tokens alone."""
    model, places = causal(name, backend=backend).model, [1, 2, 5, 6, 9]
    tokens, mask = ids(2, 11), torch.zeros(2, 11, dtype=torch.long)
    mask[:, places] = 1
    padded = model(tokens, attention_mask=mask, use_cache=True, output_addressing=True)
    alone = model(tokens[:, places], use_cache=True, output_addressing=True)
    for one, other in zip(padded.past_key_values.layers, alone.past_key_values.layers, strict=True):
        for part, value in other.states.items():
            torch.testing.assert_close(one.states[part], value, rtol=1e-5, atol=1e-6, msg=part)
    for look in LOOKS[name]:
        for one, other in zip(padded[look], alone[look], strict=True):
            torch.testing.assert_close(one[:, places], other, rtol=1e-4, atol=1e-6)


@family
@pytest.mark.parametrize("packed", [False, True])
def test_addressing_of_the_fast_path_is_the_references(name, packed):
    inputs: dict[str, Any] = {"attention_mask": torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1], [1] * 8 + [0]])}
    if packed:
        inputs = {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 5 + [1] * 4])}
    fast, slow = (
        causal(name, backend=backend, num_read_heads=2, num_write_heads=2).model(
            ids(), output_addressing=True, **inputs
        )
        for backend in ("cpu", "reference")
    )
    for look in LOOKS[name]:
        assert len(fast[look]) == TINY["num_hidden_layers"]
        for one, other in zip(fast[look], slow[look], strict=True):
            assert one.shape == other.shape and one.shape[:2] == (2, 9) and not one.requires_grad
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@family
def test_addressing_needs_no_slower_path(name, monkeypatch):
    loop, calls = (ntm_cpu if name == "ntm" else dnc_cpu).CPULoop, []
    fast = loop.run_forward
    monkeypatch.setattr(loop, "run_forward", lambda *arguments: calls.append(1) or fast(*arguments))
    model = causal(name, backend="cpu")
    plain, shown = model(ids()), model(ids(), output_addressing=True)
    assert len(calls) == 2 * TINY["num_hidden_layers"] and torch.equal(plain.logits, shown.logits)


@family
def test_every_head_shows_the_addressing(name):
    models = [causal(name), TRANSDUCERS[name](CONFIGS[name](**BITS))]
    models += [cls(CONFIGS[name](**TINY, num_labels=3)) for cls in LABELLED[name]]
    for model in models:
        inputs = (
            {"inputs_embeds": torch.rand(2, 9, 9)} if isinstance(model, TRANSDUCERS[name]) else {"input_ids": ids()}
        )
        assert not any(look in model(**inputs) for look in LOOKS["dnc"])
        base = model.model(**inputs, output_addressing=True)
        shown = model(**inputs, output_addressing=True, output_hidden_states=True)
        assert shown.hidden_states
        for look in LOOKS["dnc"]:
            assert (look in shown) == (look in LOOKS[name])
        for look in LOOKS[name]:
            assert all(torch.equal(one, other) for one, other in zip(shown[look], base[look], strict=True))
        model.config.output_addressing = True
        assert model(**inputs).read_weightings is not None
        assert isinstance(model(**inputs, return_dict=False), tuple)


@family
def test_frozen_weights_change_no_other_gradient(name):
    """The compiled loop is told which gradients are wanted; those must be the ones it gives when all are."""

    def gradients(kept: str) -> dict[str, torch.Tensor]:
        model = causal(name, backend="cpu")
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(kept in key)
        model(ids(), labels=ids()).loss.backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    whole = gradients("")
    for kept in ("interface_proj", "recurrent_proj", "input_proj.bias", "embed_tokens", "output_proj"):
        found = gradients(kept)
        assert found and all(kept in key for key in found)
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, whole[key], rtol=1e-4, atol=1e-6)


@family
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_inference_mode_goes_on_in_pieces(name, backend):
    model = causal(name, backend=backend)
    whole = model(ids()).logits
    with torch.inference_mode():
        first = model(ids()[:, :4], use_cache=True)
        second = model(ids()[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-5)


@family
def test_a_lane_that_is_reset_begins_with_the_initial_state(name):
    """Which is not zero for a Turing machine; the lane beside it goes on."""
    model, carried = causal(name), CarriedState()
    fresh = model(ids(), use_cache=True)
    carried.keep_from(fresh)
    found = model(ids(), past_key_values=carried.start(model, 2, torch.tensor([True, False]))).logits
    gone_on = model(ids(), past_key_values=model(ids(), use_cache=True).past_key_values).logits
    torch.testing.assert_close(found[0], fresh.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], gone_on[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], fresh.logits[1], atol=1e-3)


@family
def test_the_forget_gate_begins_open(name):
    for layer in BODIES[name](CONFIGS[name](**TINY)).layers:
        bias = layer.forwards.input_proj.bias.view(4, -1)
        assert (bias[1] == 1).all() and not bias[[0, 2, 3]].any()


@family
def test_stateful_models_refuse_what_needs_a_rollback(name):
    model = causal(name)
    cache = model(ids(), use_cache=True).past_key_values
    assert model._is_stateful
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(3)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids(1, 5), assistant_model=causal(name), max_new_tokens=3)


def seen_by_output(model: Any, **inputs: Any) -> torch.Tensor:
    """What the first layer's output projection is given: [h ; r], `(batch, length, controller + reads)`."""
    found = []
    handle = model.layers[0].forwards.output_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(**inputs)
    handle.remove()
    return found[0].detach()


@family
def test_bypass_dropout_drops_what_goes_past_the_memory_in_training_only(name):
    torch.manual_seed(0)
    model = BODIES[name](CONFIGS[name](**(TINY | {"num_hidden_layers": 1}), bypass_dropout=0.9))
    calm, trained = (seen_by_output(model.train(training), input_ids=ids()) for training in (False, True))
    torch.testing.assert_close(trained[..., 16:], calm[..., 16:], rtol=1e-4, atol=1e-6)
    dropped = trained[..., :16] == 0
    assert 0.75 < dropped.float().mean() < 1 and (calm[..., :16] != 0).all()
    torch.testing.assert_close(trained[..., :16][~dropped], calm[..., :16][~dropped] * 10, rtol=1e-4, atol=1e-5)


@family
def test_layer_norm_normalises_controller_and_reads_together(name):
    torch.manual_seed(0)
    given = seen_by_output(BODIES[name](CONFIGS[name](**TINY, layer_norm=True)), input_ids=ids())
    assert given.mean(-1).abs().max() < 1e-5 and (given.var(-1, unbiased=False) - 1).abs().max() < 0.05


@family
def test_both_directions_add_up(name):
    """A reader of both ways, given the sequence backwards and its cells exchanged, puts out the same backwards."""
    torch.manual_seed(0)
    fields = TINY | {"num_hidden_layers": 1, "bidirectional": True}
    model = BODIES[name](CONFIGS[name](**fields)).eval()
    with torch.no_grad():
        before = model(ids()).last_hidden_state
        other = ids().clone()
        other[:, -1] = 3
        assert (model(other).last_hidden_state[:, 0] != before[:, 0]).any()
        layer = model.layers[0]
        layer.forwards, layer.backwards = layer.backwards, layer.forwards
        torch.testing.assert_close(model(ids().flip(1)).last_hidden_state.flip(1), before, rtol=1e-4, atol=1e-5)
