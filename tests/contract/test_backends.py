"""Every backend of every family: inputs mean the same or are refused alike, and mixed precision is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lnlm.nn.inputs import CACHE_FIELD

from .cases import Case, build, cases, first_output, inputs_of, labels_of, one_case_a_family, token_ids
from .test_inputs import MARKERS, REFUSED, TOLERANCE, WRONG_LABELS, backends_of, embedding_case

HALF = (torch.bfloat16, torch.float16)
HEADS: dict[str, dict[str, Any]] = {
    "full": {},
    "chunked": {"loss_head": "chunked", "loss_chunk_size": 4},
    "adaptive": {
        "loss_head": "adaptive",
        "adaptive_cutoffs": [20, 40],
        "adaptive_div_value": 2,
        "tie_word_embeddings": False,
    },
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "ssm": {
        "mamba1": {"mixer": "mamba1"},
        "mamba2": {"mixer": "mamba2"},
        "mamba3": {"mixer": "mamba3"},
        "hybrid": {"mixer": "mamba2", "attn_layer_indices": [1]},
    },
    "rnn": {"lstm": {"cell_type": "lstm"}, "gru": {"cell_type": "gru"}},
    "sparse_transformer": {
        kind: {"attention_pattern": kind, "stride": 8, "summary_size": 2} for kind in ("fixed", "strided")
    },
}
CAUSAL = [
    pytest.param(case, fields, id=f"{case.family.name}-{name}")
    for case in cases(causal=True)
    for name, fields in VARIANTS.get(case.family.name, {"default": {}}).items()
]


@pytest.mark.parametrize("case", one_case_a_family(), ids=str)
def test_every_backend_refuses_the_same_inputs_in_the_same_words(case: Case):
    said: dict[str, set[str]] = {}

    def refused(name: str, message: str, model: Any, **inputs: Any) -> None:
        with pytest.raises(ValueError, match=message) as refusal:
            first_output(model, **inputs)
        said.setdefault(name, set()).add(str(refusal.value))

    for backend in backends_of(case):
        model, inputs = build(case, backend=backend), inputs_of(case)
        for name, (change, message) in REFUSED.items():
            refused(name, message, model, **change(inputs))
        for number, (labels, message) in enumerate(WRONG_LABELS.get(case.auto, [])):
            refused(f"labels {number}", message, model, **inputs, **labels)
        if embedding_case(case):
            refused("width", "inputs_embeds must have shape", model, inputs_embeds=torch.randn(2, 9, 7))
        if case.causal:
            refused("label", "labels must be", model, **inputs, labels=inputs["input_ids"] + 60)
            refused("turned labels", "labels must have shape", model, **inputs, labels=inputs["input_ids"].T)
            refused("order", "never decrease", model, **inputs, seq_idx=torch.tensor([[1] * 4 + [0] * 5] * 2))
            with torch.no_grad():
                own = model(input_ids=token_ids(3, 4), use_cache=True)[CACHE_FIELD]
            refused("rows", "3 rows, the input has 2", model, input_ids=inputs["input_ids"], past_key_values=own)
    assert not [name for name, messages in said.items() if len(messages) > 1]


@pytest.mark.parametrize("case", one_case_a_family(), ids=str)
def test_every_backend_reads_the_same_inputs_alike(case: Case):
    found: dict[str, torch.Tensor] = {}
    for backend in backends_of(case):
        model, inputs = build(case, backend=backend), inputs_of(case, batch=3)
        inputs["attention_mask"][0, :4] = 0
        inputs["attention_mask"][1] = 0  # an empty text
        every = first_output(model, **inputs)
        rest = first_output(model, **{name: values[[0, 2]] for name, values in inputs.items()})
        real = inputs["attention_mask"].bool()
        shown = (every[[0, 2]], rest) if not case.per_token else (every[[0, 2]][real[[0, 2]]], rest[real[[0, 2]]])
        torch.testing.assert_close(*shown, **TOLERANCE, msg=lambda m, b=backend: f"{b}: {m}")
        assert torch.isfinite(every).all()
        found[f"{backend}, padded"] = shown[0]
        if case.causal:
            packed = first_output(model, input_ids=token_ids(1, 12), **MARKERS["seq_idx"])
            embedded = first_output(model, inputs_embeds=model.get_input_embeddings()(token_ids(1, 12)).detach())
            found |= {f"{backend}, packed": packed, f"{backend}, embedded": embedded}
    for kind in ("padded", "packed", "embedded"):
        first, *others = [output for name, output in found.items() if name.endswith(kind)] or [None]
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-4, msg=lambda m, k=kind: f"{k}: {m}")


@pytest.mark.parametrize(("case", "fields"), CAUSAL)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_mixed_precision_trains_and_decodes(case: Case, fields: dict[str, Any], dtype: torch.dtype):
    """Under autocast losses, gradients and cached steps are those of float32 but for rounding."""
    ids = token_ids(2, 9)
    for backend in [backend for backend in backends_of(case) if backend != "reference"]:
        for head, chosen in HEADS.items():
            model = build(case, **fields, **chosen, backend=backend).train()
            wanted = model(input_ids=ids, labels=ids).loss
            with torch.autocast("cpu", dtype):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            assert loss.dtype == torch.float32, (backend, head)
            assert (loss - wanted).abs() <= 0.05 * wanted, (backend, head)
            assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), (backend, head)
        model = build(case, **fields, backend=backend)
        exact = first_output(model, input_ids=ids)
        with torch.autocast("cpu", dtype), torch.no_grad():
            past = model(input_ids=ids[:, :5], use_cache=True)[CACHE_FIELD]
            steps = [
                model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True).logits for i in range(5, 9)
            ]
        decoded = torch.cat(steps, 1).float()
        assert (decoded - exact[:, 5:]).norm() <= 0.1 * exact[:, 5:].norm(), backend


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", cases(causal=True, both_ways=False), ids=str)
def test_an_adaptive_softmax_of_a_16_bit_model_is_computed_in_float32(case: Case, dtype: torch.dtype):
    model, ids = build(case, **HEADS["adaptive"]).train(), token_ids(2, 9)
    wanted = model(input_ids=ids, labels=ids).loss
    half = model.to(dtype)
    loss = half(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert (loss - wanted).abs() <= 0.05 * wanted
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)
    assert half.eval()(input_ids=ids, labels=labels_of(case, {"input_ids": ids})["labels"]).logits.isfinite().all()
