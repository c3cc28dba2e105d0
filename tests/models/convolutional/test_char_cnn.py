"""The character network against the paper's layers run on all 1,014 characters, blanks included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_lnlm.data.characters import ALPHABET, character_tokenizer
from hf_lnlm.models.convolutional.configuration_char_cnn import CharCNNConfig
from hf_lnlm.models.convolutional.modeling_char_cnn import CharCNNForSequenceClassification, CharCNNModel
from tests.contract.cases import add_noise

SMALL = {"num_filters": 8, "intermediate_size": 12, "dropout": 0.0, "num_labels": 3}


def make(cls=CharCNNForSequenceClassification, **fields):
    torch.manual_seed(0)
    model = cls(CharCNNConfig(**(SMALL | fields))).eval()
    one_hot = model.get_input_embeddings().weight.clone()
    add_noise(model, 1)
    if model.config.quantization == "one-hot":
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(one_hot)
    return model


def by_hand(model, ids):
    """Tables 1 and 2 of the paper on one text: one-hot, backwards, blanks up to 1,014, six layers, three pools, dense."""
    network, config = model.model, model.config
    frames = torch.zeros(70, config.max_position_embeddings)
    for place, character in enumerate(reversed(ids[-config.max_position_embeddings :])):
        if config.num_special_tokens <= character < config.num_special_tokens + 70:
            frames[character - config.num_special_tokens, place] = 1.0
    hidden = frames[None]
    for index, layer in enumerate(network.layers):
        projection, size = layer.convolution.projection, (7, 7, 3, 3, 3, 3)[index]
        hidden = F.conv1d(hidden, projection.weight.view(config.num_filters, -1, size), projection.bias).relu()
        hidden = F.max_pool1d(hidden, 3) if index in (0, 1, 5) else hidden
    pooled = hidden.mT.flatten(1)
    for dense in network.dense:
        pooled = dense(pooled).relu()
    return model.classifier(pooled)[0], hidden.shape[2]


@pytest.mark.parametrize("length", [1, 9, 400, 1014, 1100])
def test_scores_by_hand(length):
    model = make()
    ids = torch.randint(0, 77, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        wanted, frames = by_hand(model, ids[0].tolist())
        torch.testing.assert_close(model(ids).logits[0], wanted, rtol=1e-5, atol=1e-5)
    assert frames == 34


def test_blanks_and_masked_characters_change_nothing():
    model = make()
    ids = torch.randint(7, 77, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        plain = model(ids, mask).logits
        left = model(torch.cat([ids[:, :5], ids], 1), torch.cat([mask[:, :5] * 0, mask], 1)).logits
        torch.testing.assert_close(left, plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(model(ids[1:, :12]).logits, plain[1:], rtol=0, atol=1e-6)


def test_published_sizes():
    small = CharCNNModel(CharCNNConfig())
    assert sum(p.numel() for layer in small.layers for p in layer.parameters()) == 1_372_160
    with torch.device("meta"):
        large = CharCNNModel(CharCNNConfig(num_filters=1024, intermediate_size=2048, initializer_range=0.02))
    assert sum(p.numel() for layer in large.layers for p in layer.parameters()) == 20_430_848
    assert small.dense[0].in_features == 34 * 256  # table 2: l6 = 34 frames
    assert large.dense[0].in_features == 34 * 1024


def test_a_fresh_classifier_is_quiet():
    torch.manual_seed(0)
    model = CharCNNForSequenceClassification(CharCNNConfig(num_labels=4)).eval()
    with torch.no_grad():
        logits = model(torch.randint(7, 77, (4, 200))).logits
    assert 0 < logits.abs().max() < 0.2


def test_one_hot_vectors_are_not_trained_and_learned_ones_are():
    ids = torch.tensor([[7, 8, 9]])
    for quantization, learns in (("one-hot", False), ("learned", True)):
        model = make(quantization=quantization).train()
        model(ids, labels=torch.tensor([1])).loss.backward()
        assert (model.get_input_embeddings().weight.grad is not None) == learns


def test_characters_of_the_tokenizer_are_channels():
    tokenizer, model = character_tokenizer(), make()
    table = model.get_input_embeddings().weight
    for place, character in enumerate(ALPHABET):
        (number,) = tokenizer(character)["input_ids"]
        assert table[number].tolist() == [float(channel == place) for channel in range(70)]
    (unknown,) = tokenizer("ß")["input_ids"]
    assert not table[unknown].any()
    assert tokenizer("Ab")["input_ids"] == tokenizer("aB")["input_ids"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quantization": "two-hot"}, "quantization must be"),
        ({"max_position_embeddings": 100}, "no frame is left"),
        ({"kernel_sizes": [7, 7]}, r"len\(kernel_sizes\)"),
        ({"pool_size": 0}, "pool_size"),
        ({"num_filters": 0}, "num_filters"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        CharCNNConfig(**fields)


def test_inputs_that_do_not_fit_are_refused():
    model, ids = make(), torch.tensor([[7, 8, 9]])
    with pytest.raises(ValueError, match=r"no positions: input_ids has shape \(1, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"\(1, 3\), got \(1, 2\)"):
        model(ids, torch.ones(1, 2))
    with pytest.raises(ValueError, match="input_ids must be between 0 and vocab_size - 1 \\(76\\), got 77"):
        model(torch.tensor([[77]]))
