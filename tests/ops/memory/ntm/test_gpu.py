"""The Turing machine's Triton kernels, by Triton's interpreter: outputs, final state and every gradient."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.memory.ntm import ntm_memory
from hf_lnlm.ops.memory.ntm.layout import NTMOptions
from hf_lnlm.ops.memory.ntm.reference import ntm_memory_reference

from .cases import NAMES, gradients, layer, relative

ONE = {"batch": 1, "steps": 1, "slots": 7, "width": 3}
ODD = {"batch": 2, "steps": 3, "slots": 13, "width": 5}
VARIANTS = [("lstm", True, 1, False), ("feedforward", False, 2, True), ("lstm", False, 0, True)]


def compared(heads, shape, controller, read_first, shift, masked) -> dict[str, float]:
    """Relative error of everything that comes out, against the float64 equations."""
    options = NTMOptions(*heads, shift, controller, read_first)
    mask = torch.rand(shape["batch"], shape["steps"], generator=torch.Generator().manual_seed(3)) < 0.6
    mask = mask if masked else None
    expected, wanted = gradients(ntm_memory_reference, layer(options, **shape), options, mask)
    arguments = layer(options, **shape, dtype=torch.float32)
    result, got = gradients(ntm_memory, arguments, options, mask, backend="gpu")
    found, known = ((*r.state, r.outputs, r.weightings) for r in (result, expected))
    errors = {"outputs": max(relative(one, other) for one, other in zip(found, known, strict=True))}
    return errors | {
        f"d({i} {n})": relative(*pair) for i, (n, *pair) in enumerate(zip(NAMES, got, wanted, strict=True))
    }


def assert_equal(errors: dict[str, float]) -> None:
    assert len(errors) == len(NAMES) + 1
    assert not {name: error for name, error in errors.items() if error > (1e-5 if name == "outputs" else 5e-5)}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_step_equals_the_reference(interpreted, variant):
    assert_equal(interpreted(compared, (1, 1), ONE, *variant))


@pytest.mark.parametrize("heads", [(2, 1), (1, 2)], ids=str)
def test_odd_sizes_equal_the_reference(interpreted, heads):
    assert_equal(interpreted(compared, heads, ODD, *VARIANTS[heads[0] - 1]))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("heads", [(1, 2), (4, 4)], ids=str)
def test_all_variants_equal_the_reference(interpreted, heads, variant):
    assert_equal(interpreted(compared, heads, ODD, *variant))


def pieces() -> float:
    """Error of a sequence in two pieces, without gradients, with the state carried from one to the other."""
    options = NTMOptions()
    inputs, weights, state = layer(options, batch=1, steps=5, dtype=torch.float32)
    with torch.no_grad():
        first = ntm_memory(inputs[:, :2], weights, state, options, backend="gpu")
        second = ntm_memory(inputs[:, 2:], weights, first.state, options, backend="gpu")
        whole = ntm_memory(inputs, weights, state, options, backend="reference")
    joined = torch.cat([first.outputs, second.outputs], 1)
    pairs = zip((joined, *second.state), (whole.outputs, *whole.state), strict=True)
    return max(relative(one, other) for one, other in pairs)


def test_a_sequence_in_pieces_gives_the_same(interpreted):
    assert interpreted(pieces) <= 1e-5


def hostile() -> dict[str, bool]:
    """NaN, masked rows and a second derivative."""
    options = NTMOptions()
    inputs, weights, state = layer(options, steps=2, dtype=torch.float32)
    poisoned = inputs.detach().clone()
    poisoned[0, 0] = poisoned[2] = float("nan")
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    result = ntm_memory(poisoned, weights, state, options, mask, backend="gpu")
    (first,) = torch.autograd.grad(result.outputs[1].square().sum(), weights.inputs, create_graph=True)
    try:
        first.sum().backward()
    except RuntimeError:
        raised = True
    else:
        raised = False
    return {
        "NaN passes on": bool(result.outputs[0].isnan().all()),
        "within its sample": bool(result.outputs[1:].isfinite().all()),
        "masked rows keep their state": all(torch.equal(a[2], b[2]) for a, b in zip(result.state, state, strict=True)),
        "masked rows put out zero": not result.outputs[2].any(),
        "a second derivative raises": raised,
    }


def test_what_goes_wrong_goes_wrong_openly(interpreted):
    found = interpreted(hostile)
    assert all(found.values()), found


def test_it_is_refused_where_it_cannot_run():
    options = NTMOptions()
    with pytest.raises(ValueError, match="backend 'gpu' cannot run"):
        ntm_memory(*layer(options), options, backend="gpu")


def test_a_memory_too_large_for_the_chip_is_refused():
    options = NTMOptions()
    refusals = "a memory of more than 32768 numbers does not fit|no CUDA device|triton is not installed|on cpu"
    with pytest.raises(ValueError, match=refusals):
        ntm_memory(*layer(options, slots=2**12, width=16), options, backend="gpu")
