"""Relative attention: the paper's four terms by hand, and the fast path equal to them with gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_lnlm.ops.relative_attention import relative_attention
from hf_lnlm.ops.relative_attention.eager import shifted
from hf_lnlm.ops.relative_attention.reference import plain_distance, relative_attention_weights

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 4), (2, 3, 4, 9), (3, 2, 1, 6), (1, 2, 5, 6)]
"""batch, heads, queries, keys"""


def causal(queries: int, keys: int) -> torch.Tensor:
    return (plain_distance(queries, keys, torch.device("cpu")) < 0).unsqueeze(1)


def tensors(
    batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype = torch.float64, extra: int = 0
) -> list:
    generator = torch.Generator().manual_seed(queries + 10 * keys)
    shapes = [(batch, heads, queries, 4), *[(batch, heads, keys, 4)] * 2, (heads, keys + extra, 4), *[(heads, 4)] * 2]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def test_two_keys_by_hand():
    """One head of width 1: A_ij = q k_j + q r_{i-j} + u k_j + v r_{i-j}, each term seen in turn."""
    query, key = torch.tensor([[[[2.0], [3.0]]]]), torch.tensor([[[[5.0], [7.0]]]])
    relative = torch.tensor([[[0.5], [0.25]]])  # distance 1, then 0
    u, v = torch.tensor([[11.0]]), torch.tensor([[13.0]])
    unseen = causal(2, 2)
    weights = relative_attention_weights(query, key, relative, (u, v), unseen, 1.0)[0, 0]
    first = (3 + 11) * 5 + (3 + 13) * 0.5
    second = (3 + 11) * 7 + (3 + 13) * 0.25
    assert weights[0].tolist() == [1.0, 0.0]
    assert weights[1, 0].item() == pytest.approx(1 / (1 + math.exp(second - first)), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_score_is_the_papers(shape: tuple[int, ...]):
    """Against a sum over indices, term by term."""
    batch, heads, queries, keys = shape
    query, key, _, relative, u, v = (t.detach() for t in tensors(*shape))
    weights = relative_attention_weights(query, key, relative, (u, v), causal(queries, keys), 0.5)
    for b, h, i in itertools.product(range(batch), range(heads), range(queries)):
        last = keys - queries + i
        scores = [
            0.5
            * ((query[b, h, i] + u[h]) @ key[b, h, j] + (query[b, h, i] + v[h]) @ relative[h, keys - 1 - (last - j)])
            for j in range(last + 1)
        ]
        wanted = torch.stack(scores).softmax(0)
        torch.testing.assert_close(weights[b, h, i, : last + 1], wanted, rtol=1e-12, atol=1e-12)
        assert not weights[b, h, i, last + 1 :].any()


def test_shift_reads_distances_by_key():
    """Scores whose value is their distance: after the shift, entry (i, j) is i + keys - queries - j."""
    queries, keys = 3, 5
    by_distance = torch.arange(keys - 1, -1, -1.0).expand(queries, keys)
    wanted = plain_distance(queries, keys, torch.device("cpu"))[0]
    seen = wanted >= 0
    assert torch.equal(shifted(by_distance)[seen].long(), wanted[seen])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extra", [0, 3], ids=["", "more distances"])
@pytest.mark.parametrize("smooth", [True, False], ids=["with gradients", "without"])
def test_eager_is_the_reference(shape: tuple[int, ...], extra: int, smooth: bool):
    batch, _, queries, keys = shape
    unseen = causal(queries, keys).expand(batch, 1, queries, keys).clone()
    if keys > queries:
        unseen[0, ..., 0] = True  # a row with a shorter memory
    found = {}
    for backend in ("reference", "eager"):
        inputs = tensors(*shape, extra=extra)
        with torch.set_grad_enabled(smooth):
            out = relative_attention(*inputs[:4], (inputs[4], inputs[5]), unseen, backend=backend)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), inputs) if smooth else ()
        found[backend] = (out, *grads)
    for got, wanted in zip(found["eager"], found["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_differences():
    inputs = tensors(1, 2, 3, 4)
    unseen = causal(3, 4)
    assert torch.autograd.gradcheck(
        lambda *given: relative_attention(*given[:4], (given[4], given[5]), unseen, backend="eager"), inputs
    )


def test_dropout_drops_weights_and_keeps_their_mean():
    inputs = tensors(1, 1, 1, 400, torch.float32)
    with torch.no_grad():
        plain = relative_attention(*inputs[:4], (inputs[4], inputs[5]))
        runs = [relative_attention(*inputs[:4], (inputs[4], inputs[5]), dropout=0.5) for _ in range(200)]
    assert not torch.equal(runs[0], runs[1])
    torch.testing.assert_close(torch.stack(runs).mean(0), plain, rtol=0.0, atol=0.2)
    smooth = relative_attention(*inputs[:4], (inputs[4], inputs[5]), dropout=0.5)
    assert torch.autograd.grad(smooth.sum(), inputs[0])[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype):
    inputs = [t.detach() for t in tensors(2, 3, 4, 9)]
    wanted = relative_attention(*inputs[:4], (inputs[4], inputs[5]), causal(4, 9), backend="reference")
    narrow = [t.to(dtype).requires_grad_() for t in inputs]
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    for smooth in (True, False):
        with torch.set_grad_enabled(smooth):
            found = relative_attention(*narrow[:4], (narrow[4], narrow[5]), causal(4, 9), backend="eager")
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_wrong_shapes_are_refused():
    query, key, value, relative, u, v = tensors(2, 3, 4, 9)
    with pytest.raises(ValueError, match="keys >= queries"):
        relative_attention(key, query, query, relative, (u, v))
    with pytest.raises(ValueError, match=r"relative must be \(3, at least 9, 4\)"):
        relative_attention(query, key, value, relative[:, :5], (u, v))
    with pytest.raises(ValueError, match="key and value"):
        relative_attention(query, key, value[:, :, 1:], relative, (u, v))
    with pytest.raises(ValueError, match="backend"):
        relative_attention(query, key, value, relative, (u, v), backend="cpu")
