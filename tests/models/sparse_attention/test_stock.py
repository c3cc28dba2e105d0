"""Sparse patterns in stock models: exactness, saving, and every way in which they could silently stay dense."""

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
    DynamicCache,
    StaticCache,
)

import hf_lnlm
from hf_lnlm.models.sparse_attention import stock
from hf_lnlm.models.sparse_attention.stock import disable_sparse_attention, enable_sparse_attention
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


def dense_mask(kind, pattern, length):
    found = patterns_for_layer(pattern, "merged", 0, stride=STRIDE, summary=SUMMARY, causal=kind in CAUSAL)[0]
    positions = torch.arange(length)
    lowest = torch.finfo(torch.float64).min
    bias = torch.zeros(length, length, dtype=torch.float64).masked_fill(~found.visible(positions, positions), lowest)
    return bias.expand(2, 1, -1, -1)


@pytest.mark.parametrize("kind", (*CAUSAL, *ENCODERS))
def test_equals_stock_attention_under_the_dense_mask(kind):
    ids, expected = tokens(), build(kind, "eager")
    for pattern in ("fixed", "strided", "local"):
        model = enable_sparse_attention(build(kind), pattern, stride=STRIDE, summary_size=SUMMARY)
        theirs = expected(ids, attention_mask=dense_mask(kind, pattern, LENGTH)).logits
        assert (model(ids).logits - theirs).abs().max() <= 2e-6  # llama's norms compute in float32
        weights = model(ids, output_attentions=True)
        assert (weights.logits - theirs).abs().max() <= 2e-6
        assert [tuple(x.shape) for x in weights.attentions] == [(2, 4, LENGTH, LENGTH)] * 2
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


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
    enable_sparse_attention(build("gpt2"), stride=STRIDE).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['hf_lnlm'] = None\n"
        "from transformers import AutoModelForCausalLM, GPT2Model\n"
        "for loader in (AutoModelForCausalLM, GPT2Model):\n"
        "    try: loader.from_pretrained(sys.argv[1])\n"
        "    except ValueError as error: print(error)\n"
        "    else: print('loaded')\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = run.stdout.strip().splitlines()
    assert len(lines) == 2 and all("lnlm_sparse" in line for line in lines)


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


@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_reaches_the_attention(kind):
    model, ids = enable_sparse_attention(build(kind), stride=STRIDE, summary_size=SUMMARY), tokens()
    mask = torch.ones_like(ids)
    mask[0, 33:] = 0
    alone = model(ids[:1, :33]).logits
    assert (model(ids, attention_mask=mask).logits[:1, :33] - alone).abs().max() <= 2e-6


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
        ({"stride": 0}, "stride must be"),
        ({"stride": 8, "summary_size": 9}, "summary"),
    ):
        with pytest.raises(ValueError, match=message):
            enable_sparse_attention(bert, **options)
    upcast = build("gpt2", reorder_and_upcast_attn=True)
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        enable_sparse_attention(upcast)


def test_dropout_in_training_is_exact_in_expectation():
    model = build("gpt2", attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0)
    enable_sparse_attention(model, "strided", stride=STRIDE)
    ids = tokens()
    model.train()
    torch.manual_seed(2)
    first = model(ids).logits
    torch.manual_seed(2)
    assert torch.equal(model(ids).logits, first)
    assert not torch.allclose(model(ids).logits, first)


def test_public_name():
    assert hf_lnlm.enable_sparse_attention is enable_sparse_attention
