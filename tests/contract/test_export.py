"""torch.compile and torch.export see every head whole."""

from __future__ import annotations

import pytest
import torch

from .cases import Case, build, cases, first_output, inputs_of, main_output, one_case_a_family

SHORT = 5


def tiered() -> list:
    """One head a family by default, the others in the slow tier."""
    chosen = one_case_a_family()
    return [pytest.param(c, id=str(c), marks=[] if c in chosen else [pytest.mark.slow]) for c in cases()]


def padded_inputs(case: Case) -> dict[str, torch.Tensor]:
    inputs = inputs_of(case, batch=2, length=SHORT)
    inputs["attention_mask"][0, ..., :2] = 0
    return inputs


def close_at_real_tokens(found: torch.Tensor, wanted: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    if wanted.ndim == 3 and wanted.shape[:2] == inputs["input_ids"].shape:
        real = inputs["attention_mask"].bool()
        found, wanted = found[real], wanted[real]
    elif wanted.ndim == 3:  # a model that shortens the text, which a tracer can't
        found = found[:, : wanted.shape[1]]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", tiered())
def test_exports(case: Case):
    model = build(case, use_cache=False)
    inputs = padded_inputs(case)
    program = torch.export.export(model, (), inputs, strict=False)
    exported = program.module()
    close_at_real_tokens(main_output(exported(**inputs)), first_output(model, **inputs), inputs)
    other = dict(inputs, attention_mask=torch.ones_like(inputs["attention_mask"]))
    close_at_real_tokens(main_output(exported(**other)), first_output(model, **other), other)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_exports_with_any_batch_size(case: Case):
    model = build(case, use_cache=False)
    inputs = padded_inputs(case)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs}, strict=False)
    more = {name: torch.cat([values, values.flip(0), values]) for name, values in inputs.items()}
    close_at_real_tokens(main_output(program.module()(**more)), first_output(model, **more), more)


@pytest.mark.parametrize("case", tiered())
def test_traces_as_one_graph(case: Case):
    model = build(case, use_cache=False)
    inputs = padded_inputs(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close_at_real_tokens(first_output(compiled, **inputs), first_output(model, **inputs), inputs)
