"""VDCNN against figure 1 and 2 of the paper by hand: blocks, shortcuts, the three poolings, depths, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_lnlm.models.convolutional.configuration_vdcnn import VDCNNConfig
from hf_lnlm.models.convolutional.modeling_vdcnn import VDCNNForSequenceClassification, VDCNNModel
from tests.contract.cases import add_noise, token_ids

POOLINGS = ("max", "kmax", "convolution")
SMALL = {
    "vocab_size": 61, "hidden_size": 4, "num_hidden_layers": 3, "stage_channels": [4, 6], "stage_blocks": [2, 1],
    "num_groups": 2, "intermediate_size": 10, "k_max": 3, "num_labels": 3,
}  # fmt: skip


def make(cls=VDCNNForSequenceClassification, **fields):
    torch.manual_seed(0)
    return add_noise(cls(VDCNNConfig(**(SMALL | fields))), 1).eval()


def convolve(layer, hidden):
    weight = layer.projection.weight.view(layer.out_features, layer.in_features, layer.kernel_size)
    return F.conv1d(hidden, weight, layer.projection.bias, stride=layer.stride, padding=layer.kernel_size // 2)


def greatest(values, k):
    """Each channel's k greatest values in the order of time, `(C, k)`, zeros at the end if there are fewer."""
    rows = []
    for row in values.tolist():
        best = sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])
        rows.append([row[i] for i in best] + [0.0] * (k - len(best)))
    return torch.tensor(rows)


def normal(norm, features, kind):
    if kind == "batch":  # in evaluation: the running statistics
        return F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return F.group_norm(features, norm.num_groups, norm.weight, norm.bias, norm.eps)


def by_hand(model, ids):
    """One text through figure 1, without any mask."""
    network, config = model.model, model.config
    hidden = network.embed_tokens(ids).mT
    for index, layer in enumerate(network.layers):
        if layer.stem is not None:
            hidden = convolve(layer.stem, hidden)
        if index == 2 and config.pooling == "max":
            hidden = F.max_pool1d(hidden, 3, 2, 1)
        elif index == 2 and config.pooling == "kmax":
            hidden = greatest(hidden[0], -(-hidden.shape[2] // 2))[None]
        inner = normal(layer.first_norm, convolve(layer.first, hidden), config.normalization).relu()
        outer = normal(layer.second_norm, convolve(layer.second, inner), config.normalization)
        if config.shortcut:
            outer = outer + (hidden if layer.shortcut is None else convolve(layer.shortcut, hidden))
        hidden = outer.relu()
    pooled = greatest(hidden[0], config.k_max).flatten()
    for dense in network.dense:
        pooled = dense(pooled).relu()
    return model.classifier(pooled)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("normalization", ["group", "batch"])
@pytest.mark.parametrize("length", [2, 9, 16])
def test_scores_by_hand(pooling, shortcut, normalization, length):
    model = make(pooling=pooling, shortcut=shortcut, normalization=normalization)
    ids = token_ids(1, length)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], by_hand(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalization", ["group", "batch"])
def test_padding_changes_nothing(pooling, normalization):
    model = make(pooling=pooling, normalization=normalization, shortcut=True)
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        plain = model(ids, mask).logits
        left = model(torch.cat([ids[:, :4], ids], 1), torch.cat([mask[:, :4] * 0, mask], 1)).logits
        torch.testing.assert_close(left, plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(ids[1:, :6]).logits, plain[1:], rtol=0, atol=1e-5)


def test_batch_statistics_leave_padding_out():
    model = make(normalization="batch").train()
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    longer = torch.cat([ids, ids], 1), torch.cat([mask, mask * 0], 1)
    first = model(ids, mask).logits
    second = make(normalization="batch").train()(*longer).logits
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


# Table 2 of the paper names the convolutions of each depth; what it says of 3-wide ones without bias, and of the
# embedding and the first convolution, gives the counts by hand.
def counted(blocks):
    channels, total, before = (64, 128, 256, 512), 77 * 16 + (16 * 3 + 1) * 64, 64
    for count, width in zip(blocks, channels):
        for _ in range(count):
            total += 3 * before * width + 3 * width * width + 2 * 2 * width
            before = width
    return total


@pytest.mark.parametrize(
    ("depth", "blocks", "millions"),
    [(9, (1, 1, 1, 1), 1.58), (17, (2, 2, 2, 2), 3.67), (29, (5, 5, 2, 2), 4.04), (49, (8, 8, 5, 3), 7.17)],
)
def test_published_depths(depth, blocks, millions):
    config = VDCNNConfig.of_depth(depth)
    with torch.device("meta"):
        model = VDCNNModel(config)
    convolutional = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("dense"))
    assert convolutional == counted(blocks)
    assert convolutional / 1e6 == pytest.approx(millions, abs=0.005)
    assert 2 * len(model.layers) + 1 == depth
    assert [(dense.in_features, dense.out_features) for dense in model.dense] == [(4096, 2048), (2048, 2048)]


@pytest.mark.parametrize("normalization", ["group", "batch"])
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_fresh_network_tells_texts_apart(normalization, shortcut):
    """Plain normal weights give 0.2 of these features under group normalisation and a third of the units dead."""
    torch.manual_seed(0)
    config = VDCNNConfig.of_depth(9, normalization=normalization, shortcut=shortcut, intermediate_size=64, num_labels=4)
    model, seen = VDCNNForSequenceClassification(config).train(), []
    model.model.dense[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        logits = model(torch.randint(7, 77, (12, 8)).repeat(1, 12)).logits  # each text repeats a word of its own
    features, units = seen[0]
    assert features.std(0).mean() > 0.6 * features.square().mean().sqrt()
    assert units.gt(0).any(0).all()
    assert logits.abs().max() < 0.1


def test_equal_values_are_kept_in_the_order_of_time():
    model = make(pooling="kmax")
    layer = model.model.layers[2]
    values, _ = layer.halve(torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0]]]), None)
    assert values.tolist() == [[[1.0, 2.0, 2.0]]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pooling": "mean"}, "pooling must be"),
        ({"normalization": "layer"}, "normalization must be"),
        ({"kernel_size": 4}, "kernel_size must be odd.*got 4"),
        ({"stage_blocks": [1, 1]}, "stage_blocks must name 2 numbers of blocks that sum up to num_hidden_layers"),
        ({"stage_blocks": [3]}, "stage_blocks must name 2"),
        ({"num_groups": 5}, "num_groups must divide stage_channels"),
        ({"k_max": 0}, "k_max"),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VDCNNConfig(**(SMALL | fields))


def test_other_depths_are_refused():
    with pytest.raises(ValueError, match="depth must be one of 9, 17, 29, 49, got 10"):
        VDCNNConfig.of_depth(10)


def test_inputs_that_do_not_fit_are_refused():
    model, ids = make(), token_ids(2, 5)
    with pytest.raises(ValueError, match=r"no positions: input_ids has shape \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(2, 4\)"):
        model(ids, torch.ones(2, 4))


def test_a_row_without_characters_has_finite_gradients():
    for normalization in ("group", "batch"):
        model = make(normalization=normalization).train()
        model(token_ids(2, 6), torch.tensor([[1] * 6, [0] * 6]), labels=torch.tensor([0, 1])).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
