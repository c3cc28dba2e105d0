"""Configs, fuzzed: plausible ones build, run, save, reload; impossible ones are refused before any allocation."""

from __future__ import annotations

import json
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lnlm import LinformerConfig, LinformerForCausalLM, SparseTransformerConfig
from hf_lnlm.registry import FAMILIES, Family, family

from .cases import Case, add_noise, first_output, inputs_of, one_case_a_family, tiny_config, tiny_fields
from .fields import impossible_fields, own_fields, plausible_fields

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda row: row.name)
tiers = pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
MEGABYTE = 2**20


def names_a_field(family: Family, message: str) -> bool:
    return any(name in message for name in (*own_fields(family), *getattr(family.config_class, "attribute_map", {})))


def builds_and_reloads(case: Case, fields: dict[str, Any]) -> bool:
    """Whether a config is accepted; if it is, everything after it must work."""
    family = case.family
    try:
        config = family.config_class(**(tiny_fields(family.model_type) | fields))
        torch.manual_seed(0)
        model = case.cls(config).eval()
    except ValueError as refusal:
        assert names_a_field(family, str(refusal)), f"the refusal names no field: {refusal}"
        return False
    add_noise(model, 1)
    inputs = inputs_of(case, batch=2, length=9)
    wanted = first_output(model, **inputs)
    assert torch.isfinite(wanted).all()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = case.cls.from_pretrained(folder).eval()
    assert torch.equal(first_output(again, **inputs), wanted)
    assert {**again.config.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    return True


@tiers
@pytest.mark.parametrize("case", one_case_a_family(), ids=str)
def test_plausible_configs_work_or_say_why_not(case: Case, examples: int):
    accepted = []

    @settings(max_examples=examples)
    @given(fields=plausible_fields(case.family))
    def check(fields: dict[str, Any]) -> None:
        accepted.append(builds_and_reloads(case, fields))

    check()
    assert sum(accepted) >= len(accepted) / 5, "hardly any config was accepted"


def refusal_of(attempt: Callable[[], Any]) -> tuple[str, int, int]:
    """Return the message of the ValueError that a call raises, the peak of memory in bytes, and the calls it took."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        attempt()
    except ValueError as refusal:
        message = str(refusal)
    else:
        message = ""
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return message, peak, calls


def check_refused(family: Family, name: str, value: Any) -> None:
    config_class, fields = family.config_class, tiny_fields(family.model_type) | {name: value}
    message, peak, calls = refusal_of(lambda: config_class(**fields))
    assert message, f"{name}={value!r} was accepted"
    common = {own: alias for alias, own in getattr(config_class, "attribute_map", {}).items()}
    assert name in message or common.get(name, name) in message, f"{name}={value!r}: {message}"
    assert peak < MEGABYTE, f"{name}={value!r} allocated {peak} bytes first"
    assert calls < 20_000, f"{name}={value!r} took {calls} calls"


@tiers
@every_family
def test_impossible_configs_are_refused_at_once(family: Family, examples: int):
    pairs = impossible_fields(family)

    @settings(max_examples=examples)
    @given(pair=st.sampled_from(pairs))
    def check(pair: tuple[str, Any]) -> None:
        check_refused(family, *pair)

    check()


def enlarged(config: dict[str, Any], name: str, value: int) -> dict[str, Any]:
    """Return a saved config with one field changed, there and in the config of the model inside, if there is one."""
    inner = {key: sub | {name: value} for key, sub in config.items() if isinstance(sub, dict) and "model_type" in sub}
    return config | {name: value} | inner


@every_family
@pytest.mark.parametrize("huge", [10**9, 10**12])
def test_huge_sizes_are_refused_at_once(family: Family, huge: int):
    sizes = [n for n in own_fields(family) if n.endswith(("_size", "_layers", "_dim", "_heads"))]
    common = {"vocab_size", "hidden_size", "num_hidden_layers"} & set(own_fields(family))
    for name in [*sizes, *common]:
        check_refused(family, name, huge)
    config = tiny_config(Case(family, next(iter(family.models)))).to_dict()
    message, peak, calls = refusal_of(
        lambda: family.config_class.from_dict(enlarged(config, "num_hidden_layers", huge))
    )
    assert "num_hidden_layers" in message
    assert peak < MEGABYTE
    assert calls < 20_000


@every_family
def test_hostile_config_file_is_refused(family: Family, tmp_path):
    case = Case(family, next(iter(family.models)))
    tiny_config(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        own = getattr(family.config_class, "attribute_map", {}).get(name, name)
        path.write_text(json.dumps(enlarged(saved, own, 10**12)))
        with pytest.raises(ValueError, match=f"{name}|{own}"):
            transformers.AutoConfig.from_pretrained(tmp_path)


@every_family
def test_bounds_hold_when_an_attribute_was_set_later(family: Family, tmp_path):
    config = tiny_config(Case(family, next(iter(family.models))))
    config.vocab_size = 10**12
    with pytest.raises(ValueError, match="vocab_size"):
        config.save_pretrained(tmp_path)


@every_family
def test_defaults_are_accepted_and_documented(family: Family):
    config = family.config_class()
    assert config.model_type == family.model_type
    for name in own_fields(family):
        assert hasattr(config, name)
        documented = any(name in (cls.__doc__ or "") for cls in family.config_class.__mro__)
        assert documented, f"{family.config} says nothing about {name}"
    sizes = [family.config_class(**fields) for fields in family.sizes.values()]
    assert list(family.sizes) == ["tiny", "small", "base"]
    assert len(sizes) == 3


@every_family
def test_unknown_fields_are_kept_as_attributes(family: Family):
    assert family.config_class(**tiny_fields(family.model_type), remark="mine").remark == "mine"


UNREAD: list[tuple[str, dict[str, Any], str, Any]] = [
    ("linformer", {"is_decoder": True}, "projection", "mean_pool"),
    ("linformer", {"is_decoder": True}, "bias_order", "paper"),
    ("linformer", {}, "loss_dtype", "bfloat16"),
    ("gpt3", {}, "adaptive_cutoffs", [100]),
    ("ssm", {"loss_head": "chunked"}, "adaptive_div_value", 2.0),
    ("rnn", {"cell_type": "gru"}, "forget_bias", 0.0),
    ("ntm", {"memory_init": "learned"}, "memory_init_value", 0.5),
    ("dnc", {}, "mask_min", 0.1),
    ("gpt3", {"attention_layers": ["dense", "dense"]}, "band_size", 16),
    ("ssm", {"mixer": "mamba1"}, "n_groups", 2),
    ("ssm", {"mixer": "mamba1"}, "rope_fraction", 1.0),
    ("ssm", {"mixer": "mamba1"}, "time_step_limit", [0.0, 1.0]),
    ("ssm", {"mixer": "mamba2"}, "mixer_rms_norm", True),
    ("ssm", {"mixer": "mamba2"}, "time_step_init_scheme", "constant"),
    ("ssm", {"mixer": "mamba3"}, "conv_kernel", 2),
    ("ssm", {}, "attention_dropout", 0.1),
]


@pytest.mark.parametrize(("name", "variant", "field", "value"), UNREAD, ids=lambda value: str(value).replace("'", ""))
def test_a_field_that_the_variant_does_not_read_is_refused(name: str, variant: dict[str, Any], field: str, value: Any):
    config_class = family(f"lnlm_{name}").config_class
    fields = {"hidden_size": 64, "num_hidden_layers": 2} | variant
    saved = config_class(**fields).to_dict()  # which holds every field
    assert config_class.from_dict(saved).to_dict() == saved
    with pytest.raises(ValueError, match=f"{field} is for .*: it must be left at .*, got "):
        config_class(**fields, **{field: value})


def test_a_head_refuses_what_it_does_not_read():
    with pytest.raises(ValueError, match="projection is for a bidirectional Linformer"):
        LinformerForCausalLM(LinformerConfig(projection="mean_pool"))
    with pytest.raises(ValueError, match="zero_initial_logits is for an untied head"):
        SparseTransformerConfig(zero_initial_logits=True, tie_word_embeddings=True)
