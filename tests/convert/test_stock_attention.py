"""Sparse patterns in stock models: exactness, saving, and every way in which they could silently stay dense."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    DynamicCache,
    EncoderDecoderModel,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_lnlm
from hf_lnlm.convert import stock_attention as stock
from hf_lnlm.convert.stock_attention import disable_sparse_attention, enable_sparse_attention
from hf_lnlm.models.hybrid.modeling_encoder_cnn import EncoderCNNModel
from hf_lnlm.ops.sparse_attention.pattern import patterns_for_layer

CAUSAL, ENCODERS = ("gpt2", "llama"), ("bert", "roberta", "electra", "albert")
STRIDE, SUMMARY, LENGTH = 16, 4, 50


def build(kind, implementation=None, **fields):
    torch.manual_seed(0)
    special = {"llama": {"num_key_value_heads": 2}, "electra": {"embedding_size": 8}, "albert": {"embedding_size": 8}}
    config = AutoConfig.for_model(
        kind, vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **special.get(kind, {}), **fields,
    )  # fmt: skip
    auto = AutoModelForCausalLM if kind in CAUSAL else AutoModelForMaskedLM
    model = auto.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


def tokens(length=LENGTH):
    torch.manual_seed(1)
    return torch.randint(5, 60, (2, length))


def visible(kind, pattern, length, combination="merged", layer=0):
    """Which keys each query sees, `(heads or 1, length, length)`."""
    found = patterns_for_layer(pattern, combination, layer, stride=STRIDE, summary=SUMMARY, causal=kind in CAUSAL)
    positions = torch.arange(length)
    seen = torch.stack([group.visible(positions, positions) for group in found])
    return seen.repeat_interleave(4 // len(found), 0) if len(found) > 1 else seen


def dense_mask(kind, pattern, length):
    lowest = torch.finfo(torch.float64).min
    bias = torch.zeros(1, length, length, dtype=torch.float64).masked_fill(~visible(kind, pattern, length), lowest)
    return bias.expand(2, 1, -1, -1)


def dense_attention(options):
    """An attention function that computes an n x n softmax under the pattern's mask; what sees nothing gives zeros."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        causal, layer = bool(getattr(module, "is_causal", True)), getattr(module, "layer_idx", None) or 0
        seen = visible("gpt2" if causal else "bert", options["pattern"], query.shape[2], options["combination"], layer)
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = (query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)).exp() * seen
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=1e-300)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return attend


@pytest.mark.parametrize("kind", (*CAUSAL, *ENCODERS))
def test_equals_stock_attention_under_the_dense_mask(kind):
    ids, expected = tokens(), build(kind, "eager")
    for pattern in ("fixed", "strided", "local"):
        model = enable_sparse_attention(build(kind), pattern, stride=STRIDE, summary_size=SUMMARY)
        theirs = expected(ids, attention_mask=dense_mask(kind, pattern, LENGTH)).logits
        assert (model(ids).logits - theirs).abs().max() <= 2e-6  # llama's norms compute in float32
        weights = model(ids, output_attentions=True)
        assert (weights.logits - theirs).abs().max() <= 2e-6
        wanted = expected(ids, attention_mask=dense_mask(kind, pattern, LENGTH), output_attentions=True).attentions
        assert len(weights.attentions) == len(wanted) == 2
        for ours, eager in zip(weights.attentions, wanted, strict=True):
            assert ours.shape == (2, 4, LENGTH, LENGTH)
            assert (ours - eager).abs().max() <= 2e-6
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("combination", ["interleaved", "per_head"])
@pytest.mark.parametrize("pattern", ["fixed", "strided"])
@pytest.mark.parametrize("kind", (*CAUSAL, *ENCODERS))
def test_combinations_are_those_of_each_layer_and_head(kind, pattern, combination, monkeypatch):
    if kind == "albert" and combination == "interleaved":
        return  # refused: see test_bad_options
    model = enable_sparse_attention(build(kind), pattern, combination, stride=STRIDE, summary_size=SUMMARY)
    ids = tokens()
    found = model(ids).logits
    merged = enable_sparse_attention(build(kind), pattern, stride=STRIDE, summary_size=SUMMARY)(ids).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, stock.IMPLEMENTATION, dense_attention(model.config.sparse_attention))
    assert (found - model(ids).logits).abs().max() <= 2e-6
    assert (found - merged).abs().max() > 1e-3


@pytest.mark.parametrize("kind", (*CAUSAL, *ENCODERS))
def test_survives_saving_again_and_again(kind, tmp_path, monkeypatch):
    model = enable_sparse_attention(build(kind), stride=STRIDE, summary_size=SUMMARY)
    ids, auto = tokens(), AutoModelForCausalLM if kind in CAUSAL else AutoModelForMaskedLM
    expected = model(ids).logits
    for turn in range(3):
        model.save_pretrained(tmp_path / str(turn))
        model = auto.from_pretrained(tmp_path / str(turn), dtype=torch.float64)
        assert model.config._attn_implementation == "lnlm_sparse"
    calls = []
    real = stock.sparse_attention
    monkeypatch.setattr(stock, "sparse_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert torch.equal(model(ids).logits, expected)
    assert len(calls) == 2
    disable_sparse_attention(model).save_pretrained(tmp_path / "dense")
    assert auto.from_pretrained(tmp_path / "dense").config._attn_implementation == "sdpa"


def test_a_process_without_the_package_refuses(tmp_path):
    """By any class, from the weights or from the config alone, and inside a checkpoint that carries its code."""
    for kind in (*CAUSAL, *ENCODERS):
        enable_sparse_attention(build(kind), stride=STRIDE).save_pretrained(tmp_path / kind)
    encoder = enable_sparse_attention(AutoModel.from_config(build("bert").config), stride=STRIDE)
    EncoderCNNModel.from_encoder_pretrained(encoder).save_pretrained(tmp_path / "encoder_cnn")
    code = (
        "import sys; sys.modules['hf_lnlm'] = None\n"
        "from transformers import AutoConfig, AutoModel, GPT2Model\n"
        "folder, trust = sys.argv[1], {'trust_remote_code': True}\n"
        "loads = [lambda kind=kind: AutoModel.from_pretrained(f'{folder}/{kind}', **trust) for kind in sys.argv[2:]]\n"
        "loads.append(lambda: GPT2Model.from_pretrained(folder + '/gpt2'))\n"
        "loads.append(lambda: AutoModel.from_config(AutoConfig.from_pretrained(folder + '/llama')))\n"
        "for load in loads:\n"
        "    try: load()\n"
        "    except ValueError as error: print(' '.join(str(error).split()))\n"
        "    else: print('loaded')\n"
    )
    kinds = (*CAUSAL, *ENCODERS, "encoder_cnn")
    hub = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *kinds],
        capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | hub,
    )  # fmt: skip
    lines = run.stdout.strip().splitlines()
    assert len(lines) == len(kinds) + 2 and all("lnlm_sparse" in line for line in lines), lines


def test_unsetting_the_implementation_does_not_make_a_model_dense(tmp_path):
    """`attn_implementation=None` says nothing, and configs of several models say it of all their parts."""
    enable_sparse_attention(build("bert"), stride=STRIDE).save_pretrained(tmp_path / "bert")
    model = AutoModel.from_pretrained(tmp_path / "bert", attn_implementation=None)
    assert model.config._attn_implementation == "lnlm_sparse"
    decoder = AutoModelForCausalLM.from_config(build("gpt2", add_cross_attention=True).config)
    pair = EncoderDecoderModel(encoder=model, decoder=decoder)
    pair.save_pretrained(tmp_path / "pair")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pair")
    assert again.encoder.config._attn_implementation == "lnlm_sparse"
    assert again.decoder.config._attn_implementation == "sdpa"
    dense = AutoModel.from_pretrained(tmp_path / "bert", attn_implementation="eager")  # asked for by name
    assert dense.config._attn_implementation == "eager"


def test_other_configs_may_have_an_attribute_of_the_same_name():
    for value in (True, None, {"block": 16}):
        config = BertConfig(sparse_attention=value)
        assert config.sparse_attention == value
        assert config._attn_implementation is None
        assert "attn_implementation" not in config.to_dict()


@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_and_left_padding(kind):
    model, ids = enable_sparse_attention(build(kind), stride=STRIDE, summary_size=SUMMARY), tokens(30)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), expected)
    padded = torch.cat([torch.full((2, 7), 3), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 7:], expected)


@pytest.mark.parametrize("kind", (*CAUSAL, *ENCODERS))
@pytest.mark.parametrize("pattern", ["fixed", "strided", "local"])
def test_padding_reaches_the_attention(kind, pattern):
    """On any side: the patterns count real tokens, so a left-padded text keeps its blocks."""
    model, ids = enable_sparse_attention(build(kind), pattern, stride=STRIDE, summary_size=SUMMARY), tokens()
    mask, first = torch.ones_like(ids), int(kind == "roberta")  # RoBERTa counts positions from pad_token_id + 1
    mask[0, 33:] = 0
    alone = model(ids[:1, :33]).logits
    assert (model(ids, attention_mask=mask).logits[:1, :33] - alone).abs().max() <= 2e-6
    padded = torch.cat([torch.full((2, 7), 3), ids], 1)
    mask = torch.cat([torch.zeros(2, 7, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + first
    left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:]
    assert (left - model(ids).logits).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", (*CAUSAL, *ENCODERS))
def test_a_row_of_padding_alone_gives_no_nan(kind):
    model, ids = enable_sparse_attention(build(kind), stride=STRIDE, summary_size=SUMMARY), tokens()
    mask = torch.ones_like(ids)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert (logits[1] - model(ids).logits[1]).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", ["xlnet", "gpt_neo", "longformer", "t5", "switch_transformers", "opt"])
def test_models_that_would_ignore_it_are_refused_by_name(kind):
    small = {"vocab_size": 40, "num_hidden_layers": 1, "num_layers": 1, "attention_types": [[["global"], 1]]}
    fields = {name: value for name, value in small.items() if kind == "gpt_neo" or name == "vocab_size"}
    config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if kind in ("t5", "switch_transformers") else AutoModel).from_config(config)
    with pytest.raises(ValueError, match=f"{kind} cannot use sparse attention"):
        enable_sparse_attention(model)
    assert getattr(model.config, "sparse_attention", None) is None
    auto = AutoModelForSeq2SeqLM if kind in ("t5", "switch_transformers") else AutoModel
    with torch.device("meta"), pytest.raises(ValueError, match=f"{kind} cannot use sparse attention"):
        auto.from_config(config, attn_implementation="lnlm_sparse")
    options = {"pattern": "fixed", "combination": "merged", "stride": 8, "summary_size": 2}
    with pytest.raises(ValueError, match=f"{kind} cannot use sparse attention"):
        AutoConfig.for_model(kind, sparse_attention=options)


def test_name_without_options_is_refused():
    model = build("gpt2", "lnlm_sparse")
    with pytest.raises(ValueError, match="enable_sparse_attention"):
        model(tokens())


def test_what_cannot_be_honoured_is_refused():
    model, ids = enable_sparse_attention(build("llama"), stride=STRIDE), tokens()
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model(ids, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.float64))
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, -1)
    with pytest.raises(ValueError, match="packed rows"):
        model(ids, position_ids=positions, use_cache=False)
    for fields in ({"use_cache": True}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="packed rows"):
            model(ids, position_ids=positions, **fields)
    with pytest.raises(ValueError, match="cache that grows"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=80))
    attention, states = model.model.layers[0].self_attn, torch.randn(1, 4, 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="position_bias"):
        stock.sparse_attention_forward(attention, states, states, states, None, position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="keys must cover queries"):
        stock.sparse_attention_forward(attention, states, states[:, :, :3], states[:, :, :3], None)
    assert model(ids, past_key_values=DynamicCache(config=model.config)).logits.isfinite().all()


def test_bad_options():
    albert = build("albert")
    with pytest.raises(ValueError, match="cannot interleave"):
        enable_sparse_attention(albert, combination="interleaved")
    bert = build("bert")
    for options, message in (
        ({"pattern": "banded"}, "pattern must be one of"),
        ({"combination": "both"}, "combination must be one of"),
        ({"stride": 0}, "stride must be a whole number .* at least 1, got 0"),
        ({"stride": 8.0}, "stride must be a whole number .* got 8.0"),
        ({"summary_size": 0}, "summary_size must be a whole number .* at least 1, got 0"),
        ({"stride": 8, "summary_size": 9}, r"summary_size must be at most stride \(8\), got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            enable_sparse_attention(bert, **options)
        assert getattr(bert.config, "sparse_attention", None) is None
    bert.config.num_attention_heads = 3
    with pytest.raises(ValueError, match="num_attention_heads must divide evenly over 2 patterns, got 3"):
        enable_sparse_attention(bert, combination="per_head")
    for option in ("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        with pytest.raises(ValueError, match=f"{option}: it must be False, got True"):
            enable_sparse_attention(build("gpt2", **{option: True}))
    weights = build("bert", "eager", output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False in the config, got True"):
        enable_sparse_attention(weights)


def test_dropout_in_training_is_exact_in_expectation():
    model = build("gpt2", attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0)
    enable_sparse_attention(model, "strided", stride=STRIDE)
    ids = tokens()
    plain = model(ids).logits
    assert torch.equal(model(ids).logits, plain)
    model.train()
    torch.manual_seed(2)
    first = model(ids).logits
    torch.manual_seed(2)
    assert torch.equal(model(ids).logits, first)
    assert not torch.allclose(model(ids).logits, first)
    query, key, value = torch.randn(3, 1, 4, LENGTH, 4, dtype=torch.float64)
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        wanted, _ = stock.sparse_attention_forward(attention, query, key, value, None)
        found = [stock.sparse_attention_forward(attention, query, key, value, None, dropout=0.3)[0] for _ in range(200)]
    drawn = torch.stack(found)
    error = drawn.std(0) / 200**0.5
    assert ((drawn.mean(0) - wanted).abs() <= 6 * error + 1e-12).all()
    assert error.max() > 1e-3


def test_public_name():
    assert hf_lnlm.enable_sparse_attention is enable_sparse_attention
