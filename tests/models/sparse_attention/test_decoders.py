"""Sparse Transformer and GPT-3: exactness of padding, packing, caches and weights, initialisation, bad inputs."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from hf_lnlm.models.sparse_attention.cache import SparseAttentionCacheLayer
from hf_lnlm.models.sparse_attention.configuration_gpt3 import GPT3Config
from hf_lnlm.models.sparse_attention.configuration_sparse_transformer import SparseTransformerConfig
from hf_lnlm.models.sparse_attention.modeling_gpt3 import GPT3ForCausalLM, GPT3Model
from hf_lnlm.models.sparse_attention.modeling_sparse_transformer import (
    SparseTransformerForCausalLM,
    SparseTransformerForSequenceClassification,
    SparseTransformerModel,
)

STRIDE, SUMMARY, LENGTH = 6, 2, 40
TINY = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SPARSE = [
    {"attention_pattern": pattern, "combination": combination}
    for pattern, combination in itertools.product(("strided", "fixed"), ("merged", "interleaved", "per_head"))
]
VARIANTS = [("gpt3", {}), ("sparse", {"attention_pattern": "local"}), *[("sparse", fields) for fields in SPARSE]]


def build(kind, **fields):
    torch.manual_seed(0)
    if kind == "gpt3":
        model = GPT3ForCausalLM(GPT3Config(**{**TINY, "band_size": STRIDE, **fields}))
    else:
        own = {"stride": STRIDE, "summary_size": SUMMARY, "num_key_value_heads": 2}
        model = SparseTransformerForCausalLM(SparseTransformerConfig(**{**TINY, **own, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.double().eval()


def tokens(length=LENGTH, rows=2):
    torch.manual_seed(1)
    return torch.randint(2, 50, (rows, length))


def left_padded(ids, width=7):
    padded = torch.cat([torch.full((ids.shape[0], width), 3), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :width] = 0
    return padded, mask


def in_chunks(model, ids, bounds, mask=None):
    past, found = None, []
    for start, end in itertools.pairwise(bounds):
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1), past


@pytest.mark.parametrize(("kind", "fields"), VARIANTS)
def test_every_way_of_running_gives_the_same_logits(kind, fields):
    model, ids = build(kind, **fields), tokens()
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    eager = model(ids, output_attentions=True)
    model.set_attn_implementation("sdpa")
    padded, mask = left_padded(ids)
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    packed = model(ids, position_ids=positions).logits
    documents = torch.tensor([0] * 22 + [1] * 25).expand(2, -1)
    alone = torch.cat([model(ids[:, :15]).logits, model(ids[:, 15:]).logits], 1)
    differences = {
        "eager": eager.logits - expected,
        "left padding": model(padded, attention_mask=mask).logits[:, 7:] - expected,
        "chunks and steps": in_chunks(model, ids, (0, 13, 14, 15, 27, 40))[0] - expected,
        "padded chunks": in_chunks(model, padded, (0, 3, 20, 21, 47), mask)[0][:, 7:] - expected,
        "packed": packed - alone,
        "packed and padded": model(padded, attention_mask=mask, seq_idx=documents).logits[:, 7:] - alone,
    }
    for name, difference in differences.items():
        assert difference.abs().max() <= 1e-12, name
    assert all(weights.shape == (2, 4, LENGTH, LENGTH) for weights in eager.attentions)
    assert model(ids, output_attentions=True).attentions[0].shape == (2, 4, LENGTH, LENGTH)


@pytest.mark.parametrize(("kind", "fields"), VARIANTS)
def test_generation_equals_recomputing(kind, fields):
    model, ids = build(kind, **fields), tokens(9)
    padded, mask = left_padded(ids, 4)
    expected = ids
    for _ in range(14):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=14, do_sample=False), expected)
    found = model.generate(padded, attention_mask=mask, max_new_tokens=14, do_sample=False)
    assert torch.equal(found[:, 4:], expected)


def by_hand(model, ids):
    """Equations 12 to 15 of the paper on one text, with a softmax under the pattern's mask, pair by pair."""
    network, config = model.model, model.config
    length, heads = len(ids), config.num_attention_heads
    positions = torch.arange(length)
    tables = [table.weight for table in network.embed_coordinates.tables]
    hidden = network.embed_tokens.weight[ids] + tables[0][positions // STRIDE] + tables[1][positions % STRIDE]
    for index, layer in enumerate(network.layers):
        normal = layer.attention_norm(hidden)
        split = [
            linear(normal).view(length, -1, 16 // heads).transpose(0, 1)
            for linear in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
        ]
        query, key, value = split[0], *(x.repeat_interleave(heads // x.shape[0], 0) for x in split[1:])
        groups = config.patterns(index)
        seen = torch.stack([group.visible(positions, positions) for group in groups])
        scores = (query @ key.mT / 2).exp() * seen.repeat_interleave(heads // len(groups), 0)
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=1e-300)
        attended = layer.attention.o_proj((weights @ value).transpose(0, 1).flatten(1))  # a(H)
        inner = layer.mlp.fc1(layer.mlp_norm(hidden + attended))
        hidden = hidden + attended + layer.mlp.fc2(inner * torch.sigmoid(1.702 * inner))  # b(H + a(H))
    return model.lm_head(network.norm(hidden))


@pytest.mark.parametrize("fields", [fields for kind, fields in VARIANTS if kind == "sparse"])
def test_sparse_transformer_is_the_papers_equations(fields):
    model, ids = build("sparse", **fields), tokens()
    found = model(ids).logits
    for row in range(2):
        assert (found[row] - by_hand(model, ids[row])).abs().max() <= 1e-12


def test_a_strided_step_reads_only_what_it_sees(monkeypatch):
    """The cache keeps all, a decoding step gathers its window and its column: l + n / l keys at most."""
    read, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *rest, **kwargs):
        read.append(key.shape[2])
        return real(query, key, value, *rest, **kwargs)

    model, ids = build("sparse", attention_pattern="strided"), tokens()
    past = in_chunks(model, ids, (0, LENGTH - 1))[1]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model(ids[:, -1:], past_key_values=past, use_cache=True)
    assert past.layers[0].keys.shape[2] == LENGTH
    assert len(read) == 2 and max(read) <= STRIDE + LENGTH // STRIDE


@pytest.mark.parametrize("kind", ["gpt3", "sparse"])
def test_a_cache_filled_under_another_pattern_is_refused(kind):
    """Its keys may be gone, and nothing else would tell."""
    ids = tokens()
    banded = in_chunks(build(kind), ids, (0, 20))[1]
    other = build("gpt3", band_size=9) if kind == "gpt3" else build("sparse", attention_pattern="strided")
    with pytest.raises(ValueError, match=r"past_key_values was filled under .* this layer attends by"):
        other(ids[:, 20:], past_key_values=banded)


def test_caches_hold_no_more_than_promised():
    ids = tokens(LENGTH, 3)
    banded = in_chunks(build("gpt3"), ids, (0, 10, 11, LENGTH))[1]
    assert [layer.keys.shape[2] for layer in banded.layers] == [LENGTH, STRIDE - 1]
    model = build("sparse", attention_pattern="fixed")
    past = None
    for length in range(1, LENGTH + 1):
        past = model(ids[:, length - 1 : length], past_key_values=past, use_cache=True).past_key_values
        entries = past.layers[0].keys.shape[2]
        assert entries == length % STRIDE + SUMMARY * (length // STRIDE) <= STRIDE + SUMMARY * (length // STRIDE)
        assert past.get_seq_length() == length
    strided = in_chunks(build("sparse", attention_pattern="strided"), ids, (0, LENGTH))[1]
    assert strided.layers[0].keys.shape[2] == LENGTH


def test_earlier_keys_stay_when_more_are_written():
    """Memory is taken ahead: whoever holds on to a cache's keys, or a copy of a layer, keeps what it had."""
    model, ids = build("gpt3"), tokens()
    with torch.no_grad():
        past = in_chunks(model, ids, (0, 20, 21))[1]
        kept = [(layer.keys, layer.keys.clone()) for layer in past.layers]
        other = copy.copy(past)
        other.layers = [copy.copy(layer) for layer in past.layers]
        expected = model(ids).logits[:, 21:]
        for cache, first in ((past, 2), (other, None), (past, None)):
            start = cache.get_seq_length()
            stop = LENGTH if first is None else start + first
            for at in range(start, stop):
                found = model(ids[:, at : at + 1], past_key_values=cache).logits[:, 0]
                assert (found - expected[:, at - 21]).abs().max() <= 1e-12
    assert all(torch.equal(held, copied) for held, copied in kept)


@pytest.mark.parametrize("pattern", ["local", "strided", "fixed"])
def test_a_stride_longer_than_the_text_is_dense(pattern):
    ids = tokens()
    dense = build("sparse", attention_pattern="full", position_shape=[8, 8])
    sparse = build("sparse", attention_pattern=pattern, position_shape=[8, 8], stride=1000)
    assert (sparse(ids).logits - dense(ids).logits).abs().max() <= 1e-12


@pytest.mark.parametrize(("kind", "fields"), VARIANTS)
def test_drafts_are_taken_back_exactly(kind, fields):
    """Prompt lookup and an assistant draft tokens whose keys are cropped again: the texts are those of plain decoding."""
    model = build(kind, **fields)
    ids = torch.cat([tokens(9, 1)] * 2, 1)
    plain = {"do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, max_new_tokens=24, **plain)
    assert torch.equal(model.generate(ids, max_new_tokens=24, prompt_lookup_num_tokens=5, **plain), expected)
    other = build("gpt3")  # as another model of the family that is checked drafts mostly wrong tokens
    assert torch.equal(model.generate(ids, max_new_tokens=24, assistant_model=other, **plain), expected)
    itself = build(kind, **fields)
    assert torch.equal(model.generate(ids, max_new_tokens=24, assistant_model=itself, **plain), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "fields"), VARIANTS)
def test_recorded_tokens_can_be_taken_back(kind, fields, padded):
    model, ids, mask = build(kind, **fields), tokens(), None
    if padded:
        ids, mask = left_padded(ids)
        mask[0, 12] = 0
    at = ids.shape[1] - 10
    seen = [None if mask is None else mask[:, :end] for end in (at, at + 7, ids.shape[1])]
    past = model(ids[:, :at], attention_mask=seen[0], use_cache=True).past_key_values
    past.activate_past_recording()
    before = [layer.keys.shape[2] for layer in past.layers]
    drafted = torch.full_like(ids[:, :7], 4)
    model(drafted, attention_mask=seen[1], past_key_values=past)
    past.crop(-7)
    assert [layer.keys.shape[2] for layer in past.layers] == before
    found = model(ids[:, at:], attention_mask=seen[2], past_key_values=past).logits
    real = slice(None) if mask is None else mask[:, at:].bool()
    assert (found - model(ids, attention_mask=mask).logits[:, at:])[real].abs().max() <= 1e-12


def test_cache_rows_can_be_reordered_and_repeated_but_not_cropped():
    model, ids = build("sparse", attention_pattern="fixed"), tokens()
    expected = model(ids).logits[:, 20:]
    past = in_chunks(model, ids[:, :20], (0, 20))[1]
    past.reorder_cache(torch.tensor([1, 0]))
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([3, 1]))
    found = model(ids[:, 20:], past_key_values=past).logits
    assert (found - expected).abs().max() <= 1e-12
    for wrong, message in ((5, "cannot be cropped to a length"), (-20, "cannot be cropped by 20 of 40 tokens")):
        with pytest.raises(ValueError, match=message):
            past.layers[0].crop(wrong)
    past.layers[0].reset()
    assert past.layers[0].batch_size is None


@pytest.mark.parametrize(("kind", "fields"), VARIANTS)
def test_no_gradient_from_the_future(kind, fields):
    model = build(kind, **fields)
    embeds = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    for position in (0, 5, 17, 38):
        grad = torch.autograd.grad(logits[:, position].sum(), embeds, retain_graph=True)[0]
        assert grad[:, position + 1 :].abs().max() == 0.0


def test_initialisation_follows_the_paper():
    torch.manual_seed(2)
    config = SparseTransformerConfig(vocab_size=500, hidden_size=128, num_hidden_layers=8, zero_initial_logits=True)
    model = SparseTransformerForCausalLM(config)
    block = model.model.layers[3]
    plain = 0.125 / 128**0.5
    assert block.attention.q_proj.weight.std().item() == pytest.approx(plain, rel=0.05)
    assert block.attention.o_proj.weight.std().item() == pytest.approx(plain / 4, rel=0.05)
    assert block.mlp.fc2.weight.std().item() == pytest.approx(0.125 / 512**0.5 / 4, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(plain, rel=0.05)
    tables = model.model.embed_coordinates.tables
    assert [table.num_embeddings for table in tables] == [16, 128]
    assert tables[1].weight.std().item() == pytest.approx(0.125 / 256**0.5, rel=0.05)
    assert model.lm_head.weight.abs().max() == 0.0 and block.attention.q_proj.bias.abs().max() == 0.0
    gpt3 = GPT3Model(GPT3Config(vocab_size=500, hidden_size=128, num_hidden_layers=8))
    assert gpt3.layers[0].attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_positions_are_mixed_radix_digits():
    config = SparseTransformerConfig(**{**TINY, "position_shape": [4, 5, 4]})
    embed = SparseTransformerModel(config).embed_coordinates
    tables = [table.weight for table in embed.tables]
    position = 2 * 20 + 3 * 4 + 1
    expected = tables[0][2] + tables[1][3] + tables[2][1]
    assert torch.allclose(embed(torch.tensor([[position]]))[0, 0], expected)


def test_layers_alternate_dense_first():
    config = GPT3Config(num_hidden_layers=4)
    assert [config.patterns(i)[0].kind for i in range(4)] == ["full", "local", "full", "local"]
    assert config.band_size == 256


def test_classifier_reads_the_last_real_token():
    torch.manual_seed(3)
    config = SparseTransformerConfig(**{**TINY, "stride": STRIDE, "summary_size": SUMMARY, "num_labels": 3})
    model = SparseTransformerForSequenceClassification(config).double().eval()
    ids = tokens(20)
    padded, mask = left_padded(ids)
    right = torch.cat([ids, torch.full((2, 5), 3)], 1)
    right_mask = torch.cat([torch.ones(2, 20), torch.zeros(2, 5)], 1).long()
    expected = model(ids).logits
    assert (model(padded, attention_mask=mask).logits - expected).abs().max() <= 1e-12
    assert (model(right, attention_mask=right_mask).logits - expected).abs().max() <= 1e-12
    assert model(ids, attention_mask=torch.zeros_like(ids)).logits.abs().max() == 0.0


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SparseTransformerConfig, {"attention_pattern": "stride"}, "attention_pattern must be one of"),
        (SparseTransformerConfig, {"combination": "union"}, "combination must be one of"),
        (SparseTransformerConfig, {"stride": 0}, "stride must be between"),
        (SparseTransformerConfig, {"stride": 8, "summary_size": 9}, "summary_size must be at most"),
        (SparseTransformerConfig, {"summary_size": 0}, "summary_size must be between"),
        (SparseTransformerConfig, {"num_attention_heads": 3}, "must divide hidden_size"),
        (SparseTransformerConfig, {"num_key_value_heads": 3}, "must divide num_attention_heads"),
        (SparseTransformerConfig, {"combination": "per_head", "num_attention_heads": 1}, "divide evenly"),
        (SparseTransformerConfig, {"position_shape": [3, 3]}, "position_shape must hold"),
        (GPT3Config, {"band_size": 0}, "band_size must be between"),
        (GPT3Config, {"attention_layers": ["dense"]}, "attention_layers must name"),
        (GPT3Config, {"attention_layers": ["dense", "sparse"]}, "attention_layers must be one of"),
        (GPT3Config, {"num_attention_heads": 5}, "must divide hidden_size"),
    ],
)
def test_bad_configs(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**{**TINY, **fields})


def test_bad_inputs():
    model, ids = build("sparse", attention_pattern="fixed"), tokens(10)
    bad_masks = (torch.rand(2, 10), torch.ones(2, 1, 10, 10), torch.full((2, 10), 2), torch.ones(2, 4), torch.ones(10))
    for mask in bad_masks:
        with pytest.raises(ValueError, match="attention_mask must"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(tokens(65))
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="no positions"):
        model(ids[:, :0])
    other = DynamicCache()
    with pytest.raises(ValueError, match="the states of 2 layers"):
        model(ids, past_key_values=other)
    past = in_chunks(model, ids, (0, 10))[1]
    with pytest.raises(ValueError, match="holds the state of 2 rows"):
        model(ids[:1], past_key_values=past)
    with pytest.raises(ValueError, match="cannot begin inside"):
        model(ids, past_key_values=past, seq_idx=torch.tensor([0] * 5 + [1] * 5).expand(2, -1))
    layer = SparseAttentionCacheLayer()
    layer.extend(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), None)
    with pytest.raises(ValueError, match="holds 3 heads"):
        layer.extend(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), None)
