"""One input, one meaning: masks, ids, embeddings, packing and caches in every head of every family on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_lnlm import backends
from hf_lnlm.nn.inputs import CACHE_FIELD

from .cases import PAD, VOCABULARY, Case, build, cases, first_output, inputs_of, labels_of, one_case_a_family, token_ids

every_case = pytest.mark.parametrize("case", cases(), ids=str)
causal_case = pytest.mark.parametrize("case", cases(causal=True), ids=str)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
Change = Callable[[dict[str, Any]], dict[str, Any]]


def mask_of(values: Any, **kind: Any) -> Change:
    """Put a mask of these values over the first tokens."""

    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        mask = torch.ones_like(inputs["input_ids"]).to(kind.get("dtype", torch.float32))
        mask[..., :2] = values
        return {**inputs, "attention_mask": mask}

    return change


def additive(hidden: float) -> Change:
    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        mask = torch.zeros(inputs["input_ids"].shape)
        mask[..., :2] = hidden
        return {**inputs, "attention_mask": mask}

    return change


def changed_ids(function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda inputs: {"input_ids": function(inputs["input_ids"])}


def one_id(value: int) -> Change:
    return changed_ids(lambda ids: ids.flatten().index_fill(0, torch.tensor([3]), value).view(ids.shape))


REFUSED: dict[str, tuple[Change, str]] = {
    "additive, lowest": (additive(torch.finfo(torch.float32).min), "attention_mask"),
    "additive, infinite": (additive(float("-inf")), "attention_mask"),
    "additive, nothing hidden": (additive(0.0), "attention_mask"),
    "half": (mask_of(0.5), "attention_mask"),
    "two": (mask_of(2, dtype=torch.long), "attention_mask"),
    "not a number": (mask_of(float("nan")), "attention_mask"),
    "four dimensions": (
        lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"][..., None, None, :]},
        "mask|shape",
    ),
    "fractional ids": (changed_ids(lambda ids: ids.float()), "input_ids must be whole numbers"),
    "one dimension": (changed_ids(lambda ids: ids.flatten()[:5]), "input_ids must have shape|got"),
    "no rows": (changed_ids(lambda ids: ids[:0]), "no rows"),
    "no positions": (changed_ids(lambda ids: ids[..., :0]), "no positions"),
    "id beyond": (one_id(VOCABULARY), f"input_ids must be between 0 and vocab_size - 1.*got {VOCABULARY}"),
    "negative id": (one_id(-1), "input_ids must be between 0 and vocab_size - 1.*got -1"),
    "neither": (lambda inputs: {"attention_mask": inputs["attention_mask"]}, "exactly one of.*got neither"),
}


@pytest.mark.parametrize("case", [c for c in cases(both_ways=False) if c.auto != "AutoModelForMultipleChoice"], ids=str)
def test_inputs_that_mean_nothing_are_refused(case: Case):
    model = build(case)
    for name, (change, said) in REFUSED.items():
        with pytest.raises(ValueError, match=said) as refusal:
            first_output(model, **change(inputs_of(case)))
        assert type(refusal.value) is ValueError, name


@every_case
def test_an_argument_that_nothing_reads_is_refused(case: Case):
    model, inputs = build(case), inputs_of(case)
    with pytest.raises(TypeError, match="'atention_mask'"):
        first_output(model, **inputs, atention_mask=inputs["attention_mask"])
    first_output(model, **inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]), cache_position=torch.arange(9))


def embedding_case(case: Case) -> bool:
    return case.takes("inputs_embeds") and case.auto != "AutoModelForMultipleChoice"


@pytest.mark.parametrize("case", [c for c in cases(both_ways=False) if embedding_case(c)], ids=str)
def test_embeddings_are_checked(case: Case):
    model = build(case)
    width = model.get_input_embeddings().embedding_dim
    for wrong in (1, 7, width - 1, 2 * width, 512):
        with pytest.raises(ValueError, match=rf"inputs_embeds must have shape .*got \(2, 9, {wrong}\)"):
            first_output(model, inputs_embeds=torch.randn(2, 9, wrong))
    given = torch.randn(2, 9, width)
    for embeddings, said in (
        (given[0], "inputs_embeds must have shape"),
        (given.long(), "must be floating-point numbers"),
        (given.double(), "must be torch.float32"),
        (given[:0], "no rows"),
        (given[:, :0], "no positions"),
    ):
        with pytest.raises(ValueError, match=said):
            first_output(model, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="got both"):
        first_output(model, input_ids=token_ids(2, 9), inputs_embeds=given)


MARKERS = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]], dtype=torch.int32)},
    "cu_seq_lens_q": {
        "cu_seq_lens_q": torch.tensor([0, 5, 6, 12], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 5, 6, 12], dtype=torch.int32),
        "max_length_q": 6,
        "max_length_k": 6,
    },
}


def backends_of(case: Case) -> list[str]:
    """What the family's config accepts and can run here."""
    found = []
    for backend in ("reference", "eager", "cpu"):
        try:
            first_output(build(case, backend=backend), **inputs_of(case))
        except (ValueError, RuntimeError, ImportError):
            continue
        found.append(backend)
    return found or ["auto"]


@causal_case
@pytest.mark.parametrize("marker", MARKERS)
def test_packed_documents_are_apart(case: Case, marker: str):
    ids, documents = token_ids(1, 12, seed=8), [slice(0, 5), slice(5, 6), slice(6, 12)]
    assert backends()
    for backend in backends_of(case):
        model = build(case, backend=backend)
        packed = first_output(model, input_ids=ids, **MARKERS[marker])
        for document in documents:
            alone = first_output(model, input_ids=ids[:, document])
            torch.testing.assert_close(packed[:, document], alone, **TOLERANCE, msg=lambda m, b=backend: f"{b}: {m}")


@causal_case
def test_markers_that_do_not_fit_are_refused(case: Case):
    model, ids = build(case), token_ids(2, 12)
    for marker, said in (
        ({"seq_idx": torch.tensor([[1] * 6 + [0] * 6])}, "never decrease"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.long)}, "seq_idx must have shape"),
        ({"position_ids": torch.zeros(12, dtype=torch.long)}, "position_ids must have shape"),
        ({"cu_seq_lens_q": torch.tensor([0, 12])}, "a single packed row"),
    ):
        with pytest.raises(ValueError, match=said):
            first_output(model, input_ids=ids, **marker)


@causal_case
def test_a_cache_of_another_family_or_batch_is_refused(case: Case):
    model, ids = build(case), token_ids(2, 5)
    with torch.no_grad():
        own = model(input_ids=token_ids(3, 5), use_cache=True)[CACHE_FIELD]
    with pytest.raises(ValueError, match="3 rows, the input has 2"):
        first_output(model, input_ids=ids, past_key_values=own)
    for other in cases(causal=True):
        if other.family is case.family:
            continue
        with torch.no_grad():
            cache = build(other)(input_ids=ids, use_cache=True)[CACHE_FIELD]
        with pytest.raises(ValueError, match="past_key_values"):
            first_output(model, input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("case", one_case_a_family(), ids=str)
def test_padding_is_one_thing_in_every_type_of_mask(case: Case):
    model, inputs = build(case), inputs_of(case)
    inputs["input_ids"][..., :3] = PAD
    inputs["attention_mask"][..., :3] = 0
    wanted = first_output(model, **inputs)
    for dtype in (torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16):
        again = first_output(model, **{**inputs, "attention_mask": inputs["attention_mask"].to(dtype)})
        assert torch.equal(again, wanted), dtype


WRONG_LABELS: dict[str, list[tuple[dict[str, torch.Tensor], str]]] = {
    "AutoModelForSequenceClassification": [
        ({"labels": torch.tensor([0, 3])}, "labels must be between 0 and 2"),
        ({"labels": torch.tensor([0, -1])}, "labels must be between 0 and 2"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels must have shape"),
    ],
    "AutoModelForTokenClassification": [
        ({"labels": torch.full((2, 9), 3)}, "labels must be between 0 and 2"),
        ({"labels": torch.zeros(9, 2, dtype=torch.long)}, "labels must have shape"),
        ({"labels": torch.zeros(2, 9)}, "labels must be whole numbers"),
    ],
    "AutoModelForQuestionAnswering": [
        ({"start_positions": torch.tensor([0, -1]), "end_positions": torch.tensor([1, 2])}, "start_positions must be"),
        ({"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, -5])}, "end_positions must be"),
        ({"start_positions": torch.tensor([0]), "end_positions": torch.tensor([1])}, "start_positions must have shape"),
    ],
    "AutoModelForMultipleChoice": [
        ({"labels": torch.tensor([0, 2])}, "labels must be between 0 and 1"),
        ({"labels": torch.tensor([[0], [1]])}, "labels must have shape"),
    ],
}


@pytest.mark.parametrize("case", [c for c in cases(both_ways=False) if c.auto in WRONG_LABELS], ids=str)
def test_labels_that_a_head_cannot_learn_are_refused(case: Case):
    model, inputs = build(case), inputs_of(case)
    for labels, said in WRONG_LABELS[case.auto]:
        with pytest.raises(ValueError, match=said):
            model(**inputs, **labels)


@pytest.mark.parametrize("case", [c for c in cases() if c.auto == "AutoModelForQuestionAnswering"], ids=str)
def test_an_end_that_is_not_in_the_text_is_ignored(case: Case):
    model, inputs = build(case), inputs_of(case)
    ends = labels_of(case, inputs)
    first = model(**{n: v[:1] for n, v in inputs.items()}, **{n: v[:1] for n, v in ends.items()}).loss
    for outside in (-100, 9, 10_000):
        beyond = {name: torch.cat([values[:1], torch.tensor([outside])]) for name, values in ends.items()}
        torch.testing.assert_close(model(**inputs, **beyond).loss, first, rtol=1e-5, atol=1e-6)
