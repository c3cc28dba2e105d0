"""Padding anywhere, and packed documents: real tokens give what they give alone."""

from __future__ import annotations

import pytest
import torch

from .cases import PAD, Case, build, cases, first_output, inputs_of, token_ids, with_core

LENGTH = 9
# positions of the real tokens in a padded row
LAYOUTS = {
    "right": [*range(LENGTH)],
    "left": [*range(5, 5 + LENGTH)],
    "inside": [0, 1, 3, 4, 5, 8, 9, 11, 12],
    "scattered": [2, 3, 5, 6, 8, 9, 10, 12, 13],
}
WIDTH = 14
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}

every_case = pytest.mark.parametrize("case", cases(composed=True), ids=str)


def pad(inputs: dict[str, torch.Tensor], places: list[int]) -> dict[str, torch.Tensor]:
    """Move ids, of a decoder too, to these places and mask the others."""
    moved = {}
    for name in [name for name in inputs if name.endswith("input_ids")]:
        ids = inputs[name]
        padded = torch.full((*ids.shape[:-1], WIDTH), PAD)
        mask = torch.zeros_like(padded)
        padded[..., places] = ids
        mask[..., places] = 1
        moved |= {name: padded, name.replace("input_ids", "attention_mask"): mask}
    return moved


@pytest.mark.parametrize("case", with_core(cases()))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_nothing(case: Case, layout: str):
    model = build(case)
    inputs = inputs_of(case, batch=3, length=LENGTH)
    wanted = first_output(model, **inputs)
    padded = pad(inputs, LAYOUTS[layout])
    if case.composite:  # a stock encoder counts columns unless it is told which token is where
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    got = first_output(model, **padded)
    if wanted.ndim > 1 and wanted.shape[1] == LENGTH:  # an output a token
        got = got[:, LAYOUTS[layout]]
    elif wanted.ndim == 3:  # a model that shortens the text: its frames come first
        got = got[:, : wanted.shape[1]]
    torch.testing.assert_close(got, wanted, **TOLERANCE)


@every_case
def test_rows_of_a_batch_are_independent(case: Case):
    model = build(case)
    whole = inputs_of(case, batch=3, length=LENGTH)
    padded = pad(whole, LAYOUTS["left"])
    for row, layout in enumerate(("right", "left", "inside")):
        one = pad({name: ids[row : row + 1] for name, ids in whole.items()}, LAYOUTS[layout])
        for name, values in one.items():
            padded[name][row] = values[0]
    together = first_output(model, **padded)
    for row in range(3):
        alone = first_output(model, **{name: values[row : row + 1] for name, values in padded.items()})
        real = padded["attention_mask"][row].bool()
        keep = (lambda t: t[:, real]) if alone.ndim == 3 and alone.shape[1] == WIDTH else (lambda t: t)
        shared = together[row : row + 1, : alone.shape[1]] if alone.ndim == 3 else together[row : row + 1]
        torch.testing.assert_close(keep(shared), keep(alone), **TOLERANCE)


@every_case
def test_masks_of_other_types(case: Case):
    model = build(case)
    inputs = pad(inputs_of(case, length=LENGTH), LAYOUTS["left"])
    wanted = first_output(model, **inputs)
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    assert torch.equal(first_output(model, **inputs), wanted)


@every_case
def test_row_without_a_token_is_finite(case: Case):
    model = build(case)
    inputs = inputs_of(case, batch=3)
    inputs["attention_mask"][2] = 0
    outputs = model.train()(**inputs)
    found = next(v for v in outputs.values() if isinstance(v, torch.Tensor))
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_case
@pytest.mark.parametrize("wrong", [(2, 4), (3, 9)], ids=["too short", "other batch"])
def test_mask_of_a_wrong_shape_is_refused(case: Case, wrong: tuple[int, int]):
    inputs = inputs_of(case, batch=2, length=LENGTH)
    inputs["attention_mask"] = torch.ones(wrong, dtype=torch.long)
    with pytest.raises((ValueError, RuntimeError), match=r"mask|shape|size"):
        build(case)(**inputs)


@every_case
def test_empty_input_is_refused_or_empty(case: Case):
    inputs = inputs_of(case, batch=2, length=LENGTH)
    inputs = {name: values[..., :0] for name, values in inputs.items()}
    try:
        output = first_output(build(case), **inputs)
    except ValueError:
        return
    assert torch.isfinite(output).all()


def packed_ids() -> tuple[torch.Tensor, list[slice]]:
    return token_ids(2, 12, seed=8), [slice(0, 5), slice(5, 6), slice(6, 12)]


MARKERS = {
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]]),
    "seq_idx": torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]]),
}


def packed_cases() -> list:
    """Heads that know a marker of documents, or are language models (whose users will try)."""
    return [
        pytest.param(case, marker, id=f"{case}-{marker}")
        for case in cases()
        for marker in MARKERS
        if case.per_token and (case.causal or (marker == "seq_idx" and case.takes("seq_idx")))
    ]


@pytest.mark.parametrize(("case", "marker"), packed_cases())
def test_packed_documents_are_apart_or_refused(case: Case, marker: str):
    model = build(case)
    ids, documents = packed_ids()
    try:
        packed = first_output(model, input_ids=ids, use_cache=False, **{marker: MARKERS[marker].expand(2, -1)})
    except (ValueError, TypeError) as refusal:
        assert marker in str(refusal)
        return
    for document in documents:
        alone = first_output(model, input_ids=ids[:, document], use_cache=False)
        torch.testing.assert_close(packed[:, document], alone, **TOLERANCE)
