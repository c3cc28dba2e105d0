"""Before its first step a model knows nothing: its loss is that of equal odds, whatever the head."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from .cases import Case, cases

VOCABULARY, CLASSES, LENGTH = 1000, 4, 24
WITHIN = 0.1  # nats
LANGUAGE = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
CUTOFFS = [50, 300]


def variants(case: Case) -> list[dict[str, Any]]:
    """Fields by which the first logits of a family differ."""
    names = {field.name for field in dataclasses.fields(case.family.config_class)}
    found: list[dict[str, Any]] = [{"cell_type": cell} for cell in ("lstm", "gru")] if "cell_type" in names else [{}]
    if case.auto in LANGUAGE:
        found = [{**fields, "tie_word_embeddings": tied} for fields in found for tied in (True, False)]
    return found


def fresh(case: Case, **fields: Any) -> Any:
    """A model of size `tiny` as it is drawn, in evaluation mode."""
    both = (case.family.bidirectional or {}) if case.both_ways else {}
    labels = {} if case.auto in LANGUAGE else {"num_labels": CLASSES}
    config = case.family.config_class(
        **{**case.family.sizes["tiny"], "vocab_size": VOCABULARY, **both, **labels, **fields}
    )
    torch.manual_seed(0)
    return case.cls(config).eval()


def ids(seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(seed))


LANGUAGE_CASES = [
    pytest.param(case, fields, id=f"{case}-{'-'.join(map(str, fields.values()))}")
    for case in cases()
    if case.auto in LANGUAGE
    for fields in variants(case)
]


@torch.no_grad()
@pytest.mark.parametrize(("case", "fields"), LANGUAGE_CASES)
def test_first_loss_of_a_language_model(case: Case, fields: dict[str, Any]):
    model = fresh(case, **fields)
    labels = ids(2)
    found = float(model(ids(1), labels=labels).loss)
    assert abs(found - math.log(VOCABULARY)) < WITHIN, found - math.log(VOCABULARY)
    if model.config.tie_word_embeddings:
        return
    adaptive = {"loss_head": "adaptive", "adaptive_cutoffs": CUTOFFS, "adaptive_div_value": 2.0}
    found = float(fresh(case, **fields, **adaptive)(ids(1), labels=labels).loss)
    counted = labels[:, 1:] if case.causal else labels
    edges = [*CUTOFFS, VOCABULARY]
    cluster = torch.bucketize(counted.contiguous(), torch.tensor(CUTOFFS), right=True)
    leaf = torch.tensor([0.0, *(math.log(last - first) for first, last in pairwise(edges))])
    equal_odds = math.log(CUTOFFS[0] + len(CUTOFFS)) + float(leaf[cluster].mean())
    assert abs(found - equal_odds) < WITHIN, found - equal_odds


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in cases(loss=True) if c.auto.endswith("Classification")], ids=str)
def test_first_loss_of_a_classifier(case: Case):
    for fields in variants(case):
        model = fresh(case, **fields)
        logits = model(ids(1)).logits.flatten(0, -2)
        every = logits.shape[-1]
        rows = logits.repeat_interleave(every, 0)
        labels = torch.arange(every).repeat(len(logits))
        loss = float(torch.nn.functional.cross_entropy(rows, labels))  # each text with each class once
        assert abs(loss - math.log(every)) < WITHIN, loss - math.log(every)
        assert every == CLASSES
