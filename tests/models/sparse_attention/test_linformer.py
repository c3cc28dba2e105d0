"""Linformer against its equations in every variant; padding, causality, lengths, bad inputs."""

import itertools

import pytest
import torch

from hf_lnlm.models.sparse_attention import linformer_attention
from hf_lnlm.models.sparse_attention.configuration_linformer import (
    BIAS_ORDERS,
    PROJECTIONS,
    SHARINGS,
    LinformerConfig,
)
from hf_lnlm.models.sparse_attention.linformer_projection import LearnedProjection
from hf_lnlm.models.sparse_attention.modeling_linformer import (
    LinformerForCausalLM,
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForPreTraining,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerModel,
)

LENGTH = 20
TINY = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "projected_size": 8, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
VARIANTS = list(itertools.product(SHARINGS, PROJECTIONS, BIAS_ORDERS))


def build(cls=LinformerModel, **fields):
    torch.manual_seed(0)
    model = cls(LinformerConfig(**{**TINY, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.double().eval()


def tokens(length=LENGTH, rows=2):
    torch.manual_seed(1)
    return torch.randint(2, 50, (rows, length))


def padded(ids, left=7, right=4):
    rows = ids.shape[0]
    wide = torch.cat([torch.full((rows, left), 3), ids, torch.full((rows, right), 3)], 1)
    mask = torch.zeros_like(wide)
    mask[:, left : left + ids.shape[1]] = 1
    return wide, mask


def matrices(projection, heads, length):
    """E as explicit matrices `(heads, slots, length)`."""
    if isinstance(projection, LearnedProjection):
        weight = projection.weight[..., :length, :].transpose(-1, -2)
    else:
        slots = -(-length // projection.window)
        member = torch.arange(length) // projection.window == torch.arange(slots).unsqueeze(1)
        weight = member.double()
        if projection.weight is None:
            weight = weight / weight.sum(1, keepdim=True)
        else:
            weight = weight * projection.weight[..., torch.arange(length) % projection.window].unsqueeze(-2)
    return weight.expand(heads, -1, -1)


@pytest.mark.parametrize(("sharing", "projection", "bias_order"), VARIANTS)
def test_attention_is_the_equation(sharing, projection, bias_order):
    model = build(sharing=sharing, projection=projection, bias_order=bias_order)
    attention, hidden = model.layers[0].attention, torch.randn(2, LENGTH, 16, dtype=torch.float64)
    first = model.shared_projection if sharing == "layerwise" else attention.key_projection
    second = attention.value_projection if sharing in ("none", "headwise") else first
    found = {}
    attention.dense.register_forward_hook(lambda module, inputs, out: found.update(heads=inputs[0]))
    attention.register_forward_pre_hook(lambda module, inputs: found.update(hidden=inputs[0]))
    model(inputs_embeds=hidden)
    hidden = found["hidden"]

    def project(linear, matrix):
        mixed = torch.einsum("hkn,bnd->bhkd", matrix, hidden @ linear.weight.T)
        bias = linear.bias.view(1, 1, -1) if bias_order == "fairseq" else matrix.sum(-1).unsqueeze(-1) * linear.bias
        mixed = (mixed + bias).unflatten(-1, (4, 4))
        return torch.stack([mixed[:, h, :, h] for h in range(4)], 1)

    keys = project(attention.key, matrices(first, 4, LENGTH))
    values = project(attention.value, matrices(second, 4, LENGTH))
    query = attention.split(attention.query(hidden))
    expected = torch.softmax(query @ keys.mT / 2, -1) @ values
    assert (found["heads"] - expected.transpose(1, 2).flatten(2)).abs().max() <= 1e-12


@pytest.mark.parametrize(("sharing", "projection", "bias_order"), VARIANTS)
def test_padded_equals_unpadded(sharing, projection, bias_order):
    model, ids = build(sharing=sharing, projection=projection, bias_order=bias_order), tokens()
    expected = model(ids).last_hidden_state
    for left, right in ((7, 0), (0, 9), (5, 4)):
        wide, mask = padded(ids, left, right)
        found = model(wide, attention_mask=mask).last_hidden_state[:, left : left + LENGTH]
        assert (found - expected).abs().max() <= 1e-12
    ragged = torch.cat([ids[:1], ids[1:]], 0)
    mask = torch.ones_like(ragged)
    mask[1, 11:] = 0
    alone = model(ids[1:, :11]).last_hidden_state
    assert (model(ragged, attention_mask=mask).last_hidden_state[1:, :11] - alone).abs().max() <= 1e-12
    model.set_attn_implementation("eager")
    eager = model(ids, output_attentions=True)
    assert (eager.last_hidden_state - expected).abs().max() <= 1e-12
    assert eager.attentions[0].shape == (2, 4, LENGTH, LENGTH)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_left_padding_with_positions_given(sharing, projection):
    """As a tokenizer padding on the left and a caller counting positions give them; those of padding mean nothing."""
    model, ids = build(sharing=sharing, projection=projection), tokens()
    expected = model(ids).last_hidden_state
    wide, mask = padded(ids, 7, 0)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    for positions in (counted, counted.masked_fill(mask == 0, 1), counted.masked_fill(mask == 0, 31)):
        found = model(wide, attention_mask=mask, position_ids=positions).last_hidden_state[:, 7:]
        assert (found - expected).abs().max() <= 1e-12
    later = model(ids, position_ids=torch.arange(LENGTH).expand(2, -1) + 12).last_hidden_state
    assert (later - expected).abs().max() > 1e-3  # other rows of E
    with pytest.raises(ValueError, match="max_position_embeddings is 32"):
        model(ids, position_ids=torch.arange(LENGTH).expand(2, -1) + 13)


def test_positions_choose_the_rows_of_e():
    """Tokens given in another order with their positions are the same set of tokens."""
    model, ids = build(), tokens()
    order = torch.randperm(LENGTH)
    shuffled = model(ids[:, order], position_ids=order.expand(2, -1)).last_hidden_state
    assert (shuffled - model(ids).last_hidden_state[:, order]).abs().max() <= 1e-12
    with pytest.raises(ValueError, match="must differ within a row"):
        model(ids, position_ids=torch.arange(LENGTH).expand(2, -1) // 2)


def test_numbers_of_matrices():
    """Section 4 of the paper: 288, 24, 12 and 1 matrices at 12 layers of 12 heads."""
    counts = {}
    for sharing in SHARINGS:
        fields = {"hidden_size": 12, "num_hidden_layers": 12, "num_attention_heads": 12, "sharing": sharing}
        model = LinformerModel(LinformerConfig(**{**TINY, **fields}))
        modules = [module for module in model.modules() if isinstance(module, LearnedProjection)]
        counts[sharing] = sum(module.heads for module in modules)
    assert counts == {"none": 288, "headwise": 24, "key_value": 12, "layerwise": 1}


def test_sizes_may_differ_between_layers():
    model = build(projected_size=[8, 4])
    shapes = [tuple(layer.attention.key_projection.weight.shape) for layer in model.layers]
    assert shapes == [(32, 8), (32, 4)]
    assert model(tokens()).last_hidden_state.isfinite().all()


def causal(**fields):
    own = {"segment_size": 6, "segment_summaries": 2, "max_position_embeddings": 64}
    return build(LinformerForCausalLM, **{**own, **fields})


def test_frozen_weights_round_the_same():
    """A merged adapter's model is frozen, the same model reloaded is not: both must give the same digits."""
    torch.manual_seed(0)
    project = LearnedProjection(8, 4)
    torch.nn.init.normal_(project.weight)
    segments = torch.randn(3, 3, 2, 8, 8).transpose(1, 2)
    trained = project(segments)
    assert torch.equal(project.requires_grad_(False)(segments), trained)
    assert torch.equal(project(segments.clone().requires_grad_()), trained)


@pytest.mark.parametrize("fields", [{}, {"sharing": "none"}, {"projection": "mean_pool"}, {"is_decoder": True}])
def test_a_text_taken_in_pieces_equals_the_whole(fields, monkeypatch):
    causal = {"causal_variant": "segment"} if "is_decoder" in fields else {}
    model, (ids, mask) = build(**causal, **fields), padded(tokens())
    for given in ({}, {"attention_mask": mask}):
        real, found = mask.bool() if given else torch.ones_like(mask).bool(), []
        for piece in (9, 10**6):
            monkeypatch.setattr(linformer_attention, "PIECE_TOKENS", piece)
            out = model(ids, **given).last_hidden_state[real]
            found.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sharing", ["headwise", "none"])
def test_causal_variant_every_way(sharing):
    model, ids = causal(sharing=sharing), tokens(40)
    expected = model(ids).logits
    wide, mask = padded(ids, 7, 0)
    differences = {"left padding": model(wide, attention_mask=mask).logits[:, 7:] - expected}
    for name, text, seen, bounds in (
        ("steps", ids, None, (0, 13, 14, 27, 40)),
        ("padded", wide, mask, (0, 3, 20, 21, 47)),
    ):
        past, found = None, []
        for start, end in itertools.pairwise(bounds):
            part = None if seen is None else seen[:, :end]
            out = model(text[:, start:end], attention_mask=part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits)
        differences[name] = torch.cat(found, 1)[:, -40:] - expected
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)
    alone = torch.cat([model(ids[:, :15]).logits, model(ids[:, 15:]).logits], 1)
    differences["packed"] = model(ids, position_ids=positions).logits - alone
    model.set_attn_implementation("eager")
    differences["eager"] = model(ids).logits - expected
    weights = model(ids, output_attentions=True)
    differences["weights"] = weights.logits - expected
    for name, difference in differences.items():
        assert difference.abs().max() <= 1e-12, name
    assert weights.attentions[0].shape == (2, 4, 40, 40)
    assert weights.attentions[0].triu(1).abs().max() == 0.0


@pytest.mark.parametrize("sharing", ["headwise", "none"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_causal_variant_leaks_nothing_and_sees_completed_segments(sharing, implementation):
    model = causal(sharing=sharing)
    model.set_attn_implementation(implementation)
    embeds = model.get_input_embeddings()(tokens(40)).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    for position in (0, 5, 6, 17, 38):
        grad = torch.autograd.grad(logits[:, position].sum(), embeds, retain_graph=True)[0]
        assert grad[:, position + 1 :].abs().max() == 0.0
        assert (grad[:, : position + 1].abs().amax(-1) > 0).all()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[:, :3] = mask[:, 20] = 0
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    grad = torch.autograd.grad(logits[:, 25].sum(), embeds)[0].abs().amax(-1)
    assert grad[:, 26:].max() == grad[:, :3].max() == grad[:, 20].max() == 0.0
    assert (grad[:, :26][:, mask[0, :26].bool()] > 0).all()


def test_resizing_keeps_slots_and_makes_room():
    ids = tokens(40)
    for projection in PROJECTIONS:
        model = build(LinformerForMaskedLM, projection=projection)
        before = model.model.layers[0].attention.key_projection
        sums = None if projection == "mean_pool" else before.weight.sum(-1 if projection == "convolution" else 0)
        with pytest.raises(ValueError, match=r"resize_position_embeddings\(40\)"):
            model(ids)
        model.resize_position_embeddings(64)
        after = model.model.layers[0].attention.key_projection
        assert model(ids).logits.shape == (2, 40, 50)
        assert model.get_position_embeddings().num_embeddings == model.config.max_position_embeddings == 64
        if sums is not None:
            assert torch.allclose(after.weight.sum(-1 if projection == "convolution" else 0), sums)
        with pytest.raises(ValueError, match="max_position_embeddings must be"):
            model.resize_position_embeddings(4)


@pytest.mark.parametrize(("sharing", "projection"), list(itertools.product(SHARINGS, PROJECTIONS)))
def test_a_resized_model_saves_and_reloads(sharing, projection, tmp_path):
    sizes = 8 if sharing == "layerwise" else [8, 4]
    model = build(LinformerForMaskedLM, sharing=sharing, projection=projection, projected_size=sizes)
    model.resize_position_embeddings(64)
    ids = tokens(40)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again, report = LinformerForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again.eval()(ids).logits, expected)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        again.resize_position_embeddings(4 if projection == "learned" else 33)  # windows must divide n evenly


def test_losses_add_up_over_accumulated_batches():
    """Two halves with the whole's number of items give the whole's loss."""
    ids, kwargs = tokens(rows=4), {}
    masked = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
    replaced = (torch.rand(ids.shape) < 0.3).long()
    choices = ids.view(2, 2, LENGTH)
    spans = {"start_positions": torch.arange(4), "end_positions": torch.arange(4) + 3}
    cases = [
        (LinformerForMaskedLM, ids, {"labels": masked}, (masked != -100).sum()),
        (LinformerForPreTraining, ids, {"labels": replaced}, torch.tensor(replaced.numel())),
        (LinformerForSequenceClassification, ids, {"labels": torch.tensor([0, 1, 1, 0])}, torch.tensor(4)),
        (LinformerForQuestionAnswering, ids, spans, torch.tensor(4)),
        (LinformerForMultipleChoice, choices, {"labels": torch.tensor([0, 1])}, torch.tensor(2)),
    ]  # fmt: skip
    for cls, inputs, labels, items in cases:
        model = build(cls)
        whole = model(inputs, **labels, **kwargs).loss
        half = inputs.shape[0] // 2
        parts = [
            model(inputs[part], **{name: value[part] for name, value in labels.items()}, num_items_in_batch=items).loss
            for part in (slice(0, half), slice(half, None))
        ]
        assert torch.allclose(parts[0] + parts[1], whole), cls.__name__


def test_discriminator_leaves_padding_out_of_its_loss():
    model, ids = build(LinformerForPreTraining), tokens()
    replaced = (torch.rand(ids.shape) < 0.3).long()
    expected = model(ids, labels=replaced)
    wide, mask = padded(ids, 0, 5)
    labels = torch.nn.functional.pad(replaced, (0, 5), value=1)
    found = model(wide, attention_mask=mask, labels=labels)
    assert (found.loss - expected.loss).abs() <= 1e-12
    assert (found.logits[:, :LENGTH] - expected.logits).abs().max() <= 1e-12
    labels[:, :9] = -100
    part = model(wide, attention_mask=mask, labels=labels).loss
    rest = torch.nn.functional.binary_cross_entropy_with_logits(expected.logits[:, 9:], replaced[:, 9:].double())
    assert (part - rest).abs() <= 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projected_size": 33}, "projected_size must be between"),
        ({"projected_size": 0}, "projected_size must be between"),
        ({"projected_size": [8]}, "must name one size for each"),
        ({"projected_size": [8, 4], "sharing": "layerwise"}, "one projected_size for all"),
        ({"sharing": "head"}, "sharing must be one of"),
        ({"projection": "max_pool"}, "projection must be one of"),
        ({"projection": "mean_pool", "projected_size": 5}, "divides max_position_embeddings"),
        ({"projection": "convolution", "projected_size": 5}, "divides max_position_embeddings"),
        ({"bias_order": "before"}, "bias_order must be one of"),
        ({"is_decoder": True, "causal_variant": None}, "plain Linformer cannot be causal"),
        ({"causal_variant": "mask"}, "causal_variant must be one of"),
        ({"is_decoder": True, "segment_size": 4, "segment_summaries": 5}, "segment_summaries must be at most"),
        ({"num_attention_heads": 3}, "must divide hidden_size"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        LinformerConfig(**{**TINY, **fields})


def test_bad_inputs():
    model, ids = build(), tokens()
    for mask in (torch.rand(2, LENGTH), torch.ones(2, 1, LENGTH, LENGTH), torch.full((2, LENGTH), 3), torch.ones(2, 5)):
        with pytest.raises(ValueError, match="attention_mask must"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="past_key_values must be None"):
        model(ids, past_key_values=object())
    with pytest.raises(ValueError, match="plain Linformer cannot be causal"):
        LinformerForCausalLM(LinformerConfig(**{**TINY, "causal_variant": None}))
    with pytest.raises(ValueError, match="max_position_embeddings is 64"):
        causal()(tokens(65))
    empty = model(ids, attention_mask=torch.zeros_like(ids)).last_hidden_state
    assert empty.isfinite().all()
