"""Classes: entities by CoNLL's rules, weights that leave the scale of the loss alone, metrics equal to scikit-learn's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight

from hf_lnlm.tasks.classification_metrics import (
    WeightedLoss,
    class_metrics,
    class_weights,
    confusion_matrix,
    entities,
    entity_counts,
    entity_kinds,
    entity_metrics,
)

TAGS = ["O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b", "E-b", "S-b"]
rows_of_tags = st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1), min_size=1)


def test_entities_by_hand():
    assert entities(["B-a", "I-a", "O", "B-a", "B-a", "I-b", "I-b"]) == {
        ("a", 0, 2),
        ("a", 3, 4),
        ("a", 4, 5),
        ("b", 5, 7),
    }
    assert entities(["I-a", "E-a", "I-a"]) == {("a", 0, 2), ("a", 2, 3)}
    assert entities(["O", "O"]) == entities([]) == set()


@given(rows_of_tags)
@settings(max_examples=200)
def test_entities_and_f1_are_seqevals(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from seqeval.metrics import f1_score as seqeval_f1
        from seqeval.metrics import precision_score, recall_score
        from seqeval.metrics.sequence_labeling import get_entities

        guesses, facts = ([[pair[i] for pair in row] for row in rows] for i in (0, 1))
        for row in facts:
            assert entities(row) == {(kind, start, end + 1) for kind, start, end in get_entities(row)}
        counts = sum(entity_counts(guess, fact, ["a", "b"]) for guess, fact in zip(guesses, facts))
        found = entity_metrics(counts)
        assert found["f1"] == pytest.approx(seqeval_f1(facts, guesses))
        assert found["precision"] == pytest.approx(precision_score(facts, guesses))
        assert found["recall"] == pytest.approx(recall_score(facts, guesses))


def test_only_entity_tags_make_entities():
    assert entity_kinds(["O", "B-x", "I-x", "B-y-z"]) == ["x", "y-z"]
    assert entity_kinds(["NOUN", "O"]) == []
    assert entity_kinds(["0", "1"]) == []


def test_class_metrics_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    predicted, wanted = torch.randint(0, 4, (2, 200), generator=generator)
    found = class_metrics(confusion_matrix(predicted, wanted, 5))
    assert found["accuracy"] == pytest.approx(accuracy_score(wanted, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(wanted, predicted, average="macro"))


def test_balanced_weights_are_scikit_learns():
    labels = [0, 0, 0, 0, 0, 1, 1, 2]
    rows = [{"labels": [label, -100]} for label in labels]
    weights = class_weights("balanced", ["a", "b", "c"], rows)
    assert weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels).tolist())
    named = class_weights({"c": 3.0}, ["a", "b", "c"], [{"labels": label} for label in labels])
    assert named[2] == pytest.approx(3 * named[0])
    assert sum(named[label] for label in labels) == pytest.approx(len(labels))


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("even", "must be `balanced` or a weight for each class, got 'even'"),
        ({"x": 2.0}, "no class 'x'"),
        ({"a": 0.0}, "class_weights.a must be above 0, got 0.0"),
    ],
)
def test_wrong_weights_are_named(wanted, message):
    with pytest.raises(ValueError, match=message):
        class_weights(wanted, ["a", "b"], [{"labels": 0}])


def test_weighted_loss_is_torchs_and_adds_up():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, -100, 2])
    loss = WeightedLoss((0.5, 1.0, 2.0))
    whole = loss({"logits": logits}, labels)
    by_hand = torch.nn.functional.cross_entropy(
        logits, labels, torch.tensor([0.5, 1.0, 2.0]), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(whole, by_hand / 5)
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], torch.tensor(5)) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)
