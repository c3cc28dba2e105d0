"""Causal convolution: every backend against its float64 sum; carried state, masks, documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_lnlm.ops.causal_conv import causal_conv, conv_gather_index

FAST = ("eager", "cpu")


def arguments(batch=2, length=33, channels=20, kernel=4):
    torch.manual_seed(0)
    return {
        "x": torch.randn(batch, length, channels),
        "weight": torch.randn(channels, kernel),
        "bias": torch.randn(channels),
        "state": torch.randn(batch, kernel - 1, channels),
    }


def marks(batch, length, kernel, seed=1):
    torch.manual_seed(seed)
    mask = (torch.rand(batch, length) > 0.3).long()
    return mask, conv_gather_index(mask, torch.rand(batch, length) > 0.8, kernel)


def relative(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def compare(call, backend, **options):
    torch.manual_seed(2)
    doubled = {n: None if v is None else v.double().requires_grad_() for n, v in call.items()}
    single = {n: None if v is None else v.clone().requires_grad_() for n, v in call.items()}
    expected = causal_conv(**doubled, backend="reference", **options)
    got = causal_conv(**single, backend=backend, **options)
    weights = [torch.randn_like(t) for t in got]
    names = [n for n, v in call.items() if v is not None and v.numel()]
    for pair in zip(got, expected):
        if pair[0].numel():
            assert relative(*pair) <= 5e-7
    loss = sum((t * w).sum() for t, w in zip(got, weights))
    exact = sum((t * w).sum() for t, w in zip(expected, weights))
    grads = torch.autograd.grad(loss, [single[n] for n in names])
    for name, grad, true in zip(names, grads, torch.autograd.grad(exact, [doubled[n] for n in names])):
        assert relative(grad, true) <= 2e-6, name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("shape", [(2, 33, 20, 4), (1, 200, 33, 3), (1, 2, 7, 4), (3, 9, 5, 2), (2, 5, 4, 1)], ids=str)
@pytest.mark.core
def test_matches_the_reference(backend, activation, shape):
    compare(arguments(*shape), backend, activation=activation)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("absent", ["bias", "state"])
def test_optional_arguments(backend, absent):
    compare(arguments() | {absent: None}, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_masks_and_documents(backend, reverse):
    compare(arguments(), backend, gather_index=marks(2, 33, 4)[1], reverse=reverse)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_is_torchs_convolution(backend):
    call = arguments() | {"state": None}
    y, state = causal_conv(**call, activation=False, backend=backend)
    padded = F.pad(call["x"].mT, (3, 0))
    expected = F.conv1d(padded, call["weight"].unsqueeze(1), call["bias"], groups=20).mT
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, call["x"][:, -3:])


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_every_split_continues_exactly(backend):
    call = arguments(length=9)
    x = call.pop("x")
    y, state = causal_conv(x, **call, backend=backend)
    for split in range(1, 9):
        left, middle = causal_conv(x[:, :split], **call, backend=backend)
        right, last = causal_conv(x[:, split:], **(call | {"state": middle}), backend=backend)
        torch.testing.assert_close(torch.cat([left, right], 1), y, rtol=1e-6, atol=1e-6)
        assert torch.equal(last, state)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_masked_tokens_are_as_if_absent(backend):
    call = arguments(batch=1)
    mask = marks(1, 33, 4)[0]
    real = mask[0].bool()
    y, state = causal_conv(**call, gather_index=conv_gather_index(mask, None, 4), backend=backend)
    alone, last = causal_conv(**(call | {"x": call["x"][:, real]}), backend=backend)
    torch.testing.assert_close(y[:, real], alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_documents_do_not_see_each_other(backend):
    call = arguments(batch=1, length=12)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 5] = reset[0, 7] = True
    y, state = causal_conv(**call, gather_index=conv_gather_index(torch.ones(1, 12), reset, 4), backend=backend)
    for first, last in ((5, 7), (7, 12)):
        alone, end = causal_conv(**(call | {"x": call["x"][:, first:last], "state": None}), backend=backend)
        torch.testing.assert_close(y[:, first:last], alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, end)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0, 20)}, "length"),
        ({"weight": torch.zeros(19, 4)}, "weight"),
        ({"bias": torch.zeros(19)}, r"bias must be \(20,\), got \(19,\)"),
        ({"state": torch.zeros(2, 4, 20)}, "state"),
        ({"gather_index": torch.zeros(2, 33, 3, dtype=torch.long)}, "gather_index"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv(**(arguments() | change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(dtype):
    """The kernels write float32 whatever torch makes by default."""
    values = {n: v.requires_grad_() for n, v in arguments().items()}

    def outputs():
        y, last = causal_conv(**values, backend="cpu")
        return (y, last, *torch.autograd.grad((y**2).sum() + (last**2).sum(), list(values.values())))

    expected = outputs()
    torch.set_default_dtype(dtype)
    try:
        got = outputs()
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
