"""The neural computer's Triton kernels, by Triton's interpreter: outputs, addressing, final state, every gradient."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.memory.dnc import dnc_memory
from hf_lnlm.ops.memory.dnc.layout import DNCOptions
from hf_lnlm.ops.memory.dnc.reference import dnc_memory_reference

from ..ntm.cases import gradients, relative
from .cases import NAMES, empty, layer
from .test_pitfalls import moved_by_rounding

ONE = {"batch": 1, "steps": 1, "slots": 7, "width": 3}
ODD = {"batch": 2, "steps": 3, "slots": 17, "width": 5}
EXTRAS = {
    "plain": {},
    "slim": {"temporal_links": False},
    "masking": {"masking": True, "mask_min": 0.1},
    "deallocation": {"deallocation": True},
    "all": {"masking": True, "deallocation": True},
}


def compared(heads, shape, controller, extras, masked=False, fresh=False) -> dict[str, float]:
    """Relative error of everything that comes out, against the float64 equations."""
    options = DNCOptions(*heads, controller, **EXTRAS[extras])
    mask = torch.rand(shape["batch"], shape["steps"], generator=torch.Generator().manual_seed(3)) < 0.6
    mask = mask if masked else None

    def case(dtype):
        # where two ranks coincide rounding chooses: the seed is one without
        inputs, weights, state = layer(options, **shape, seed=3, dtype=dtype)
        return inputs, weights, type(state)(*[t.detach().requires_grad_() for t in empty(state)]) if fresh else state

    expected, wanted = gradients(dnc_memory_reference, case(torch.float64), options, mask)
    result, got = gradients(dnc_memory, case(torch.float32), options, mask, backend="gpu")
    found, known = ((r.outputs, *r.state, *r.addressing) for r in (result, expected))
    errors = {"outputs": max(relative(one, other) for one, other in zip(found, known, strict=True))}
    return errors | {f"d({i} {n})": relative(*pair) for i, (n, *pair) in enumerate(zip(NAMES, got, wanted))}


def assert_equal(errors: dict[str, float]) -> None:
    assert len(errors) == len(NAMES) + 1
    assert not {name: error for name, error in errors.items() if error > (1e-5 if name == "outputs" else 5e-5)}


@pytest.mark.parametrize("extras", ["plain", "slim", "all"])
def test_one_step_equals_the_reference(interpreted, extras):
    assert_equal(interpreted(compared, (1, 1), ONE, "lstm", extras))


@pytest.mark.parametrize(
    ("heads", "controller", "extras", "masked"),
    [((2, 1), "feedforward", "plain", False), ((1, 2), "lstm", "all", True)],
    ids=["two read heads", "two write heads"],
)
def test_odd_sizes_equal_the_reference(interpreted, heads, controller, extras, masked):
    assert_equal(interpreted(compared, heads, ODD | {"batch": 1}, controller, extras, masked))


@pytest.mark.slow
@pytest.mark.parametrize("extras", EXTRAS)
def test_all_options_equal_the_reference(interpreted, extras):
    assert_equal(interpreted(compared, (2, 2), ODD, "lstm", extras, True))


@pytest.mark.slow
def test_four_heads_equal_the_reference(interpreted):
    assert_equal(interpreted(compared, (4, 4), ONE | {"steps": 2}, "lstm", "plain"))


def test_the_empty_initial_state_equals_the_reference(interpreted):
    """All usages are equal: slots are filled in the order of their index."""
    assert_equal(interpreted(compared, (1, 1), ONE | {"steps": 2}, "lstm", "plain", False, True))


def test_rounding_does_not_choose_among_equal_usages(interpreted):
    assert interpreted(moved_by_rounding, "gpu") < 1e-5


def pieces() -> float:
    """Error of a sequence in two pieces, without gradients, with the state carried from one to the other."""
    options = DNCOptions()
    inputs, weights, state = layer(options, batch=1, steps=3, dtype=torch.float32)
    with torch.no_grad():
        first = dnc_memory(inputs[:, :2], weights, state, options, backend="gpu")
        second = dnc_memory(inputs[:, 2:], weights, first.state, options, backend="gpu")
        whole = dnc_memory(inputs, weights, state, options, backend="reference")
    joined = torch.cat([first.outputs, second.outputs], 1)
    pairs = zip((joined, *second.state), (whole.outputs, *whole.state), strict=True)
    return max(relative(one, other) for one, other in pairs)


def test_a_sequence_in_pieces_gives_the_same(interpreted):
    assert interpreted(pieces) <= 1e-5


def hostile() -> dict[str, bool]:
    """NaN, masked rows and a second derivative."""
    options = DNCOptions()
    inputs, weights, state = layer(options, steps=1, dtype=torch.float32)
    poisoned = inputs.detach().clone()
    poisoned[0] = poisoned[2] = float("nan")
    mask = torch.tensor([[True], [True], [False]])
    result = dnc_memory(poisoned, weights, state, options, mask, backend="gpu")
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


@pytest.mark.parametrize("options", [DNCOptions(), DNCOptions(sharpness=True)], ids=["no device", "sharpness"])
def test_it_is_refused_where_it_cannot_run(options):
    with pytest.raises(ValueError, match="backend"):
        dnc_memory(*layer(options), options, backend="gpu")
