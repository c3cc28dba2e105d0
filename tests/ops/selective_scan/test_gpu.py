"""The selective scan's Triton kernels, by Triton's interpreter: outputs, final state and every gradient."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.selective_scan import gpu, selective_scan

from .test_selective_scan import arguments, marks, relative, run


def compared(shape, absent=(), marked=False, dtype=torch.float32, **options) -> dict[str, float]:
    """Relative error of everything that comes out, against the float64 recurrence."""
    call = arguments(*shape) | dict.fromkeys(absent)
    options |= marks(*shape[:2]) if marked else {}
    rows = ("u", "dt", "z", "B", "C")
    call = {n: v.to(dtype) if v is not None and n in rows else v for n, v in call.items()}
    doubled = {name: None if value is None else value.double() for name, value in call.items()}
    y, state, grads, weights = run(doubled, "reference", **options)
    single = (weights[0].to(dtype), weights[1].float())
    got_y, got_state, got, _ = run(call, "gpu", single, **options)
    errors = {"y": relative(got_y, y), "state": relative(got_state, state)}
    return errors | {f"d({name})": relative(got[name], grad) for name, grad in grads.items()}


def assert_equal(errors: dict[str, float]) -> None:
    assert not {name: error for name, error in errors.items() if error > (5e-5 if name[0] == "d" else 1e-5)}


@pytest.mark.parametrize("shape", [(1, 1, 5, 8), (2, 17, 7, 3), (1, 3, 33, 16)], ids=str)
def test_outputs_state_and_gradients_match_the_reference(interpreted, shape):
    assert_equal(interpreted(compared, shape))


def reversed_documents() -> dict[str, float]:
    """Masks, documents and direction together."""
    return compared((2, 19, 5, 4), marked=True, reverse=True)


def test_masks_documents_and_direction(interpreted):
    assert_equal(interpreted(reversed_documents))


@pytest.mark.parametrize("absent", [("D", "z", "dt_bias", "initial_state"), ("z",), ("D", "dt_bias")], ids=str)
def test_optional_arguments(interpreted, absent):
    assert_equal(interpreted(compared, (1, 4, 3, 2), absent))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 33, 17, 64), (2, 16, 1, 1), (1, 49, 70, 8)], ids=str)
def test_more_shapes_match_the_reference(interpreted, shape):
    assert_equal(interpreted(compared, shape))


def narrow() -> dict[str, float]:
    """Inputs of half precision: only the rounding of the output is left."""
    return compared((1, 9, 4, 8), dtype=torch.bfloat16)


def test_bfloat16_is_computed_in_float32(interpreted):
    assert max(interpreted(narrow).values()) <= 2**-7


def slices() -> float:
    """Slices of one projection, read in place."""
    call = arguments(1, 6, 4, 3)
    joined = torch.cat([call[name] for name in ("u", "dt", "z", "B", "C")], -1)
    parts = dict(zip(("u", "dt", "z", "B", "C"), joined.split([4, 4, 4, 3, 3], -1), strict=True))
    got, expected = (selective_scan(**(call | change), backend=b)[0] for change, b in ((parts, "gpu"), ({}, "eager")))
    return relative(got, expected.double())


def test_slices_are_read_in_place(interpreted):
    assert interpreted(slices) <= 1e-6


def operator() -> dict[str, bool]:
    """One node for the compiler; no second derivative; NaN stays in its channel."""
    call = {name: value.requires_grad_() for name, value in arguments(1, 3, 4, 2).items()}
    targets = []

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if "selective_scan" in str(node.target))
        return graph

    compiled = torch.compile(lambda *v: selective_scan(*v, backend="gpu")[0], fullgraph=True, backend=keep)
    y = compiled(*call.values())
    (first,) = torch.autograd.grad(y.sum(), call["u"], create_graph=True)
    poisoned = {name: value.detach().clone() for name, value in call.items()}
    poisoned["A"][1, 0] = float("nan")
    bad, _ = selective_scan(**poisoned, backend="gpu")
    return {
        "one node": len(targets) == 1,
        "no second derivative": not first.requires_grad or raises(first.sum().backward),
        "NaN": bool(bad[..., 1].isnan().all() and bad[..., [0, 2, 3]].isfinite().all()),
    }


def raises(function) -> bool:
    """Whether a call fails."""
    try:
        function()
    except RuntimeError:
        return True
    return False


def test_it_is_one_node_and_wrong_use_is_open(interpreted):
    found = interpreted(operator)
    assert all(found.values()), found


def test_mamba_ssm_serves_what_it_can(monkeypatch):
    """Its layout is `(batch, channel, length)`; the stand-in has the signature that mamba-ssm documents."""
    calls = []

    def stand_in(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        calls.append((tuple(u.shape), tuple(B.shape), return_last_state))
        rows = (None if t is None else t.transpose(1, 2) for t in (u, delta, B, C, z))
        u, delta, B, C, z = rows
        y, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, softplus=delta_softplus, backend="eager")
        return y.transpose(1, 2), state.transpose(1, 2)

    monkeypatch.setattr(gpu, "selective_scan_fn", stand_in)
    call = arguments(2, 5, 4, 3) | {"initial_state": None}
    expected = selective_scan(**call, backend="eager")
    y, state, entries = gpu.selective_scan_gpu(*call.values(), None, None, True, False)
    torch.testing.assert_close((y, state), expected)
    assert calls == [((2, 4, 5), (2, 3, 5), True)] and entries.numel() == 0
