"""TextCNN against the paper's equations by hand: windows, maxima, variants, max-norm, padding, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from hf_lnlm.models.convolutional.configuration_text_cnn import TextCNNConfig
from hf_lnlm.models.convolutional.modeling_text_cnn import TextCNNForSequenceClassification, TextCNNModel
from tests.contract.cases import add_noise, token_ids

VARIANTS = ("rand", "static", "non-static", "multichannel")


def make(cls=TextCNNForSequenceClassification, **fields):
    torch.manual_seed(0)
    given = {
        "vocab_size": 61,
        "hidden_size": 5,
        "num_filters": 3,
        "filter_sizes": [2, 3],
        "num_labels": 3,
        "dropout": 0.0,
    }
    return add_noise(cls(TextCNNConfig(**(given | fields))), 1).eval()


def features_by_hand(model, vectors):
    """c_i = f(w · x_{i:i+h-1} + b) over all windows of a text with h - 1 zeros before and after it; ĉ = max c (eq. 2)."""
    found = []
    for window in model.model.layers[0].windows:
        size = window.kernel_size
        weight = window.projection.weight.double().view(window.out_features, window.in_features, size)
        padded = F.pad(vectors.double(), (0, 0, size - 1, size - 1))
        maps = [
            torch.einsum("fck,kc->f", weight, padded[i : i + size]) + window.projection.bias.double()
            for i in range(len(padded) - size + 1)
        ]
        found.append(torch.stack(maps).relu().amax(0))
    return torch.cat(found)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_scores_by_hand(variant, length):
    model, ids = make(variant=variant), token_ids(1, length)
    table = model.model.embeddings
    vectors = table.embed_tokens.weight[ids[0]]
    if variant == "multichannel":  # each filter is applied to both channels and the results are added
        vectors = vectors + table.static_tokens.weight[ids[0]]
    features = features_by_hand(model, vectors).float()
    torch.testing.assert_close(model.model(ids).pooler_output[0], features)
    weight = model.classifier.weight
    weight = weight * (3.0 / weight.norm(dim=1, keepdim=True)).clamp(max=1.0)
    torch.testing.assert_close(model(ids).logits[0], F.linear(features, weight, model.classifier.bias))


def test_maps_stand_at_their_middle_words():
    model, ids = make(filter_sizes=[3]), token_ids(1, 6)
    window = model.model.layers[0].windows[0]
    columns = F.pad(model.model.embeddings(ids).mT, (1, 1))
    wanted = F.conv1d(columns, window.projection.weight.view(3, 5, 3), window.projection.bias).relu().mT
    torch.testing.assert_close(model.model(ids).last_hidden_state, wanted)


def test_a_classifier_leaves_out_the_maps_unless_they_are_asked_for():
    model, ids = make(num_hidden_layers=2), token_ids(2, 6)
    assert model.model(ids, pooled_only=True).last_hidden_state is None
    torch.testing.assert_close(model.model(ids, pooled_only=True).pooler_output, model.model(ids).pooler_output)
    plain = model(ids)
    asked = model(ids, output_hidden_states=True)
    torch.testing.assert_close(asked.logits, plain.logits)
    assert len(asked.hidden_states) == 3
    assert asked.hidden_states[-1].shape == (2, 6, 6)


@pytest.mark.parametrize("row", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0]])
def test_masked_words_are_as_if_they_were_not_there(row):
    model, ids, mask = make(), token_ids(1, 5), torch.tensor([row])
    kept = ids[mask.bool()][None]
    torch.testing.assert_close(model(ids, mask).logits, model(kept).logits)
    batch = torch.cat([ids, token_ids(1, 5, seed=8)]), torch.cat([mask, torch.ones(1, 5, dtype=torch.long)])
    torch.testing.assert_close(model(*batch).logits[:1], model(kept).logits)


def test_a_text_shorter_than_every_window_scores_as_in_a_longer_row():
    model, ids = make(filter_sizes=[4, 5]), token_ids(1, 2)
    longer = torch.cat([ids, token_ids(1, 9, seed=8)], 1)
    mask = torch.tensor([[1] * 2 + [0] * 9])
    torch.testing.assert_close(model(longer, mask).logits, model(ids).logits)


def test_a_row_without_words_gives_zero_features_and_finite_gradients():
    model = make().train()
    ids, mask = token_ids(2, 6), torch.tensor([[1] * 6, [0] * 6])
    assert not model.model(ids, mask).pooler_output[1].any()
    model(ids, mask, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_each_variant_learns(variant):
    model = make(variant=variant).train()
    model(token_ids(2, 6), labels=torch.tensor([0, 1])).loss.backward()
    table = model.model.embeddings
    assert (table.embed_tokens.weight.grad is None) == (variant == "static")
    if variant == "multichannel":
        assert table.static_tokens.weight.grad is None


def test_word_vectors_start_as_in_the_paper():
    model = TextCNNModel(TextCNNConfig(vocab_size=2000, hidden_size=50))
    weight = model.embeddings.embed_tokens.weight
    assert not weight[0].any()
    assert weight.abs().max() <= 0.25
    assert weight[1:].std().item() == pytest.approx(0.5 / 12**0.5, rel=0.02)


def long_rows(model):
    return model.classifier.weight.norm(dim=1).max().item()


def test_max_norm_holds_after_every_step_of_a_plain_loop():
    model = make(max_norm=0.5).train()
    optimizer = torch.optim.SGD(model.parameters(), 5.0)
    ids, labels = token_ids(4, 6), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert long_rows(model) > 0.5
        scores = model.eval()(ids).logits  # as of a projected weight, before anybody has projected it
        model.apply_constraints()
        assert long_rows(model) <= 0.5 + 1e-6
        torch.testing.assert_close(model(ids).logits, scores)
        model.train()


def test_max_norm_survives_transformers_own_trainer(tmp_path):
    model = make(max_norm=0.2)
    rows = [{"input_ids": ids, "labels": index % 3} for index, ids in enumerate(token_ids(8, 6))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=8, learning_rate=0.5, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    projected = by_hand_with_projection(rows, bound=0.2, steps=4, rate=0.5)
    unbounded = by_hand_with_projection(rows, bound=None, steps=4, rate=0.5)
    ids = token_ids(4, 6)
    model.save_pretrained(tmp_path / "saved")  # before anything has projected the last step
    for trained in (model, TextCNNForSequenceClassification.from_pretrained(tmp_path / "saved")):
        torch.testing.assert_close(trained.eval()(ids).logits, projected(ids).logits)
    assert not torch.allclose(unbounded(ids).logits, projected(ids).logits, atol=0.05)


def by_hand_with_projection(rows, bound, steps, rate):
    """Whole-batch gradient descent that scales the classifier's rows back to the bound after every step."""
    model = make(max_norm=None).train()
    ids, labels = torch.stack([row["input_ids"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    weight, turned_back = model.classifier.weight, 0

    def project():
        lengths = weight.norm(dim=1, keepdim=True)
        weight.mul_((bound / lengths).clamp(max=1.0))
        return int((lengths > bound).any())

    with torch.no_grad():
        turned_back += 0 if bound is None else project()
    for _ in range(steps):
        gradients = torch.autograd.grad(model(ids, labels=labels).loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter.sub_(gradient, alpha=rate)
            turned_back += 0 if bound is None else project()
    assert bound is None or turned_back > 1, "the bound never mattered"
    return model.eval()


def test_without_a_bound_rows_grow():
    model = make(max_norm=None)
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    model.train()(token_ids(2, 6))
    assert long_rows(model) > 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"variant": "frozen"}, "variant must be"),
        ({"filter_sizes": []}, "filter_sizes"),
        ({"filter_sizes": [0]}, "filter_sizes"),
        ({"num_filters": 0}, "num_filters"),
        ({"max_norm": 0.0}, "max_norm"),
        ({"dropout": 1.0}, "dropout"),
        ({"backend": "reference"}, "backend must be"),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        TextCNNConfig(**fields)


def test_inputs_that_do_not_fit_are_refused():
    model, ids = make(), token_ids(2, 5)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"no positions: input_ids has shape \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(2, 4\)"):
        model(ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="input_ids must be between 0 and vocab_size - 1 \\(60\\), got 61"):
        model(torch.full((1, 3), 61))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(3,\)"):
        model(ids, labels=torch.tensor([0, 1, 2]))


def test_other_numbers_of_labels_are_refused_on_reload(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        TextCNNForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
