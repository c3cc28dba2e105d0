"""Conversions of state space checkpoints: weights byte by byte, logits, greedy generation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, FalconMambaConfig, GPT2Config, Mamba2Config, MambaConfig

from hf_lnlm.convert.state_space import (
    ssm_config_from_stock,
    ssm_config_to_stock,
    ssm_from_original,
    ssm_from_stock,
    ssm_to_original,
    ssm_to_stock,
)
from hf_lnlm.models.state_space.configuration_ssm import SelectiveSSMConfig

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STOCK = {
    "mamba": lambda **kw: MambaConfig(**TINY, **kw),
    "mamba2": lambda **kw: Mamba2Config(**TINY, num_heads=4, head_dim=16, n_groups=2, chunk_size=8, **kw),
    "falcon_mamba": lambda **kw: FalconMambaConfig(**TINY, **kw),
}
kinds = pytest.mark.parametrize("kind", STOCK)


@torch.no_grad()
def stock(kind, auto=AutoModelForCausalLM, **fields):
    torch.manual_seed(0)
    model = auto.from_config(STOCK[kind](**fields)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def same_bytes(left, right):
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


@kinds
@pytest.mark.parametrize("use_bias", [False, True])
def test_logits_generation_and_round_trip(kind, use_bias):
    model = stock(kind, use_bias=use_bias)
    ours = ssm_from_stock(model)
    ids = torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = model(ids).logits, ours(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), ours.generate(ids, **options))
    back = ssm_to_stock(ours)
    same_bytes(model.state_dict(), back.state_dict())
    same, changed = model.config.to_dict(), back.config.to_dict()
    for name in ("hidden_size", "state_size", "use_bias", "num_hidden_layers", "expand", "conv_kernel", "n_groups"):
        assert same.get(name) == changed.get(name)


@kinds
def test_base_models_and_narrow_types(kind):
    model = stock(kind, AutoModel).bfloat16()
    ours = ssm_from_stock(model)
    assert ours.dtype == torch.bfloat16
    same_bytes(model.state_dict(), ssm_to_stock(ours).state_dict())


def test_step_limits_survive():
    config = ssm_config_from_stock(STOCK["mamba2"](time_step_limit=(0.02, 0.03)))
    assert tuple(config.time_step_limit) == (0.02, 0.03)
    assert tuple(ssm_config_to_stock(config).time_step_limit) == (0.02, 0.03)
    assert ssm_config_from_stock(STOCK["mamba2"]()).time_step_limit is None


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_original_files_round_trip(kind):
    ours = ssm_from_stock(stock(kind))
    state, config = ssm_to_original(ours)
    assert {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"} <= set(state)
    assert config["ssm_cfg"]["layer"] == ("Mamba2" if kind == "mamba2" else "Mamba1")
    again = ssm_from_original(state, config)
    same_bytes(ours.state_dict(), again.state_dict())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"mixer": "mamba3", "head_dim": 16}, {"bidirectional": "add"}, {"attn_layer_indices": [0]}], ids=str
)
def test_what_stock_lacks_is_refused(fields):
    with pytest.raises(ValueError, match="stock has"):
        ssm_config_to_stock(SelectiveSSMConfig(hidden_size=32, num_hidden_layers=2, **fields))


def test_other_models_and_weights_are_refused():
    with pytest.raises(ValueError, match="gpt2"):
        ssm_config_from_stock(GPT2Config())
    with pytest.raises(ValueError, match="hidden_act"):
        ssm_config_from_stock(STOCK["mamba"](hidden_act="gelu"))
    state, config = ssm_to_original(ssm_from_stock(stock("mamba")))
    del state["backbone.layers.0.mixer.D"]
    with pytest.raises(ValueError, match=r"mixer\.D"):
        ssm_from_original(state, config)
    with pytest.raises(ValueError, match="attention"):
        ssm_from_original(state, config | {"attn_layer_idx": [1]})
