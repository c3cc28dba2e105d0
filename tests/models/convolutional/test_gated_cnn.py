"""The gated network against the paper's equations by hand, the window cache, causality by gradient, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from hf_lnlm.models.convolutional.configuration_gated_cnn import GatedCNNConfig
from hf_lnlm.models.convolutional.modeling_gated_cnn import (
    GatedCNNForCausalLM,
    GatedCNNForSequenceClassification,
    GatedCNNModel,
)
from tests.contract.cases import add_noise, token_ids

SHAPES = {
    "plain": {},
    "without weight norm": {"weight_norm": False},
    "bottleneck": {"bottleneck_size": 4},
    "channels and kernels of each layer": {"layer_channels": [8, 6], "layer_kernels": [3, 1]},
    "narrow embeddings": {"embedding_size": 5},
    "reference": {"backend": "reference"},
}
every_shape = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)


def make(cls=GatedCNNForCausalLM, **fields):
    torch.manual_seed(0)
    given = {"vocab_size": 61, "hidden_size": 8, "num_hidden_layers": 2, "kernel_width": 3, "pad_token_id": 0}
    return add_noise(cls(GatedCNNConfig(**(given | fields))), 1).double().eval()


def gated_by_hand(convolution, frames):
    """h = (X * W + b) ⊗ σ(X * V + c) (eq. 1), frame by frame, zeros before the first; g v / ‖v‖ for the weights."""
    weight = convolution.projection.weight
    if convolution.gain is not None:
        weight = convolution.gain[:, None] * weight / weight.norm(dim=1, keepdim=True)
    size, outputs = convolution.kernel_size, []
    padded = torch.cat([frames.new_zeros(size - 1, frames.shape[1]), frames])
    for place in range(len(frames)):
        value = weight @ padded[place : place + size].flatten() + convolution.projection.bias
        half = len(value) // 2
        outputs.append(value[:half] * torch.sigmoid(value[half:]))
    return torch.stack(outputs)


def hidden_by_hand(model, ids):
    hidden = model.embed_tokens.weight[ids]
    if model.embedding_projection is not None:
        hidden = hidden @ model.embedding_projection.weight.T
    for layer in model.layers:
        frames = hidden if layer.narrow is None else gated_by_hand(layer.narrow, hidden)
        frames = gated_by_hand(layer.convolution, frames)
        frames = frames if layer.widen is None else gated_by_hand(layer.widen, frames)
        hidden = frames + (hidden if layer.shortcut is None else hidden @ layer.shortcut.weight.T)
    return hidden


@every_shape
@pytest.mark.parametrize("grad", [False, True])
def test_hidden_states_by_hand(fields, grad):
    model, ids = make(GatedCNNModel, **fields), token_ids(1, 9)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(ids).last_hidden_state[0], hidden_by_hand(model, ids[0]))


@every_shape
def test_gradients_by_hand(fields):
    model, ids = make(GatedCNNModel, **fields), token_ids(1, 9)
    names, leaves = zip(*model.named_parameters())
    found = torch.autograd.grad(model(ids).last_hidden_state.square().sum(), leaves)
    wanted = torch.autograd.grad(hidden_by_hand(model, ids[0]).square().sum(), leaves)
    for name, ours, theirs in zip(names, found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=name)


@every_shape
def test_no_output_sees_a_later_token(fields):
    model = make(**fields)
    embeds = model.get_input_embeddings()(token_ids(1, 9)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 5].square().sum().backward()
    seen = embeds.grad[0].abs().sum(1)
    assert torch.equal(seen[6:], torch.zeros(3, dtype=torch.float64))
    first = 5 - model.config.receptive_field + 1
    assert torch.equal(seen[:first], torch.zeros(max(first, 0), dtype=torch.float64))
    assert (seen[max(first, 0) : 6] > 0).all()


@every_shape
@pytest.mark.parametrize("pieces", [(1,) * 11, (4, 1, 6), (2, 9)])
def test_pieces_with_the_window_cache_equal_the_whole(fields, pieces):
    model, ids = make(**fields), token_ids(2, 11)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            found.append(model(piece, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(found, 1), model(ids).logits)
    sizes = [
        tuple(layer.read("gated_cnn", 2, {"window": own.window_shape})["window"].shape)
        for layer, own in zip(cache.layers, model.model.layers)
    ]
    assert sizes == [(2, own.convolution.window_size, own.convolution.in_features) for own in model.model.layers]


@every_shape
def test_padding_anywhere_changes_nothing(fields):
    model, ids = make(**fields), token_ids(1, 9)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0]])
    kept = ids[mask.bool()][None]
    with torch.no_grad():
        both = torch.cat([ids, token_ids(1, 9, seed=8)]), torch.cat([mask, torch.ones_like(mask)])
        torch.testing.assert_close(model(*both).logits[:1][mask.bool()], model(kept).logits[0])
        torch.testing.assert_close(model(*both).logits[1:], model(both[0][1:]).logits)


@every_shape
def test_packed_documents_do_not_see_each_other(fields):
    model, ids = make(**fields), token_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    with torch.no_grad():
        parts = [model(part).logits for part in ids.split([4, 2, 3], dim=1)]
        torch.testing.assert_close(model(ids, position_ids=positions).logits, torch.cat(parts, 1))


def test_a_text_shorter_than_a_window_is_read_from_zeros():
    model = make(kernel_width=7)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(1, 2)).logits, model(token_ids(1, 9)[:, :2]).logits)
        hidden = hidden_by_hand(model.model, token_ids(1, 2)[0])
        torch.testing.assert_close(model.model(token_ids(1, 2)).last_hidden_state[0], hidden)


def test_the_state_does_not_grow_and_decoding_matches_generation():
    model, ids = make(), token_ids(2, 5)
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    grown = ids
    with torch.no_grad():
        for _ in range(12):
            grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, grown)


def multiplications(model, ids, cache):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, past_key_values=cache, use_cache=True)
    return counter.get_total_flops()


def test_one_more_token_costs_the_same_after_any_context():
    model, costs = make(), []
    for context in (4, 400):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(token_ids(1, context), past_key_values=cache, use_cache=True)
        costs.append(multiplications(model, token_ids(1, 1), cache))
    assert costs[0] == costs[1] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_head": "chunked", "loss_chunk_size": 4},
        {"loss_head": "adaptive", "adaptive_cutoffs": [10, 30], "adaptive_div_value": 2.0},
    ],
    ids=["chunked", "adaptive"],
)
def test_heads_without_logits_give_the_same_loss(fields):
    tied = fields["loss_head"] != "adaptive"
    model, ids = make(tie_word_embeddings=tied, **fields).train(), token_ids(3, 9)
    training = model(ids, labels=ids)
    evaluation = model.eval()(ids, labels=ids)
    assert training.logits is None
    torch.testing.assert_close(training.loss, evaluation.loss, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_loss_is_the_next_tokens():
    model, ids = make(), token_ids(3, 9)
    outputs = model(ids, labels=ids)
    wanted = cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, wanted, check_dtype=False)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_poolings_by_hand(pooling):
    model, ids = make(GatedCNNForSequenceClassification, pooling=pooling, num_labels=3), token_ids(1, 7)
    with torch.no_grad():
        hidden = hidden_by_hand(model.model, ids[0])
        pooled = {"last": hidden[-1], "mean": hidden.mean(0), "max": hidden.amax(0)}[pooling]
        wanted = pooled @ model.classifier.weight.T + model.classifier.bias
        torch.testing.assert_close(model(ids).logits[0], wanted)
        mask = torch.tensor([[1] * 7, [0] * 7])
        both = model(ids.expand(2, -1), mask).logits
        torch.testing.assert_close(both[0], wanted)
        torch.testing.assert_close(both[1], model.classifier.bias)


def test_the_published_bottleneck_and_its_receptive_field():
    config = GatedCNNConfig(num_hidden_layers=3, layer_kernels=[4, 1, 6])
    assert config.receptive_field == 9
    layer = make(GatedCNNModel, bottleneck_size=4).layers[0]
    assert [part.kernel_size for part in (layer.narrow, layer.convolution, layer.widen)] == [1, 3, 1]


def test_initial_gains_are_the_lengths_of_the_filters():
    torch.manual_seed(0)
    model = GatedCNNModel(GatedCNNConfig(vocab_size=61, hidden_size=64, num_hidden_layers=1))
    convolution = model.layers[0].convolution
    torch.testing.assert_close(convolution.gain, convolution.projection.weight.norm(dim=1))
    assert convolution.projection.weight.std().item() == pytest.approx((2 / (64 * 5)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kernel_width": 0}, "kernel_width"),
        ({"layer_kernels": [3]}, r"len\(layer_kernels\)"),
        ({"layer_channels": [8, 8, 8]}, r"len\(layer_channels\)"),
        ({"loss_head": "sampled"}, "loss_head must be"),
        ({"loss_dtype": "float16"}, "loss_dtype must be"),
        ({"pooling": "first"}, "pooling must be"),
        ({"dropout": 1.0}, "dropout"),
        ({"loss_head": "adaptive", "adaptive_cutoffs": [61]}, "adaptive_cutoffs"),
        ({"loss_head": "adaptive", "adaptive_cutoffs": [10], "tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"backend": "cpu"}, "backend must be"),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        GatedCNNForCausalLM(GatedCNNConfig(vocab_size=61, hidden_size=8, num_hidden_layers=2, **fields))


def test_inputs_that_do_not_fit_are_refused():
    model, ids = make(), token_ids(2, 5)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"no positions: input_ids has shape \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="past_key_values must hold the states of 2 layers"):
        model(ids, past_key_values=DynamicCache())


def test_a_state_of_another_batch_or_config_is_refused():
    model, other = make(), make(kernel_width=4)
    with torch.no_grad():
        cache = model(token_ids(2, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds the state of 2 rows, the input has 3"):
        model(token_ids(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="window"):
        other(token_ids(2, 1), past_key_values=cache)
