"""One decoded token of Mamba-1 and Mamba-2 layers: each backend against the equations in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hf_lnlm.ops.decode_step import DECODE_STEP, decode_step

reference = DECODE_STEP.load("reference")

pytestmark = pytest.mark.usefixtures("_no_gradients")
every_backend = pytest.mark.parametrize("backend", ["eager", "cpu"])
with_and_without = pytest.mark.parametrize("whole", [True, False])


@pytest.fixture
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def equal(ours, exact):
    for got, expected in zip(ours, exact, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()


@every_backend
@with_and_without
@pytest.mark.core
def test_ways_in_and_out_equal_the_reference(backend, whole):
    step = DECODE_STEP.load(backend)
    into = draw(3, 1, 37), draw(37), 1e-5, draw(50, 37), draw(50) if whole else None
    out = draw(3, 1, 50), draw(37, 50), draw(37) if whole else None, draw(3, 1, 37)
    equal([step.enter(*into), step.leave(*out)], [reference.enter(*into), reference.leave(*out)])


@every_backend
@with_and_without
@pytest.mark.core
def test_a_token_of_mamba_1_equals_the_reference(backend, whole):
    channels, rank, states, kernel = 40, 5, 8, 4
    weights = [draw(channels, 1, kernel), draw(channels), draw(rank + 2 * states, channels) / 6, draw(channels, rank)]
    weights += [draw(channels), draw(channels, states), draw(channels)]
    carried = [draw(3, kernel - 1, channels), draw(3, states, channels)]
    if not whole:
        weights[1] = weights[4] = None
        carried = [None, None]
    given = draw(3, 1, 2 * channels), *weights, *carried
    equal(DECODE_STEP.load(backend).mamba1(*given), reference.mamba1(*given))


@every_backend
@with_and_without
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.5, 1.0)])
@pytest.mark.core
def test_a_token_of_mamba_2_equals_the_reference(backend, whole, limit):
    heads, width, groups, states, kernel = 6, 8, 2, 16, 3
    inner = heads * width
    channels = inner + 2 * groups * states
    weights = [draw(channels, 1, kernel), draw(channels) if whole else None, draw(heads), draw(heads), draw(heads)]
    carried = [draw(3, kernel - 1, channels), draw(3, heads, width, states)] if whole else [None, None]
    given = draw(3, 1, inner + channels + heads), *weights, draw(inner), 1e-5, groups, limit, *carried
    equal(DECODE_STEP.load(backend).mamba2(*given), reference.mamba2(*given))


def test_only_plain_tensors_of_one_dtype_are_taken():
    x = draw(2, 3)
    assert decode_step("eager", x, None) is DECODE_STEP.load("eager")
    assert decode_step("auto", x, x.double()) is None
    assert decode_step("auto", x.double()) is DECODE_STEP.load("eager")
    assert decode_step("gpu", x) is None and decode_step("reference", x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_step("auto", x) is None
    with torch.enable_grad():
        assert decode_step("auto", x) is None
