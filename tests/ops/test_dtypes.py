"""Compiled operations take tensors of any float type, mixed as they come, under autocast too, or say what does not fit."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.causal_conv import causal_conv
from hf_lnlm.ops.selective_scan import selective_scan
from hf_lnlm.ops.ssd import ssd

from .causal_conv.test_causal_conv import arguments as conv_arguments
from .selective_scan.test_selective_scan import arguments as scan_arguments
from .ssd.test_ssd import arguments as ssd_arguments

CALLS = {
    "causal_conv": (causal_conv, conv_arguments),
    "scan": (selective_scan, scan_arguments),
    "ssd": (ssd, ssd_arguments),
}
every_operation = pytest.mark.parametrize("name", CALLS)


@every_operation
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
def test_any_argument_may_have_another_type(name, backend, other, cast):
    run, arguments = CALLS[name]
    call = arguments()
    for changed in call:
        mixed = {n: t.to(other) if n == changed else t for n, t in call.items()}
        leaves = {n: t.detach().clone().requires_grad_() for n, t in mixed.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y, state = run(**leaves, backend=backend)
            (y.float().sum() + state.float().sum()).backward()
        exact = {n: t.detach().double().requires_grad_() for n, t in mixed.items()}
        wanted, final = run(**exact, backend="reference")
        (wanted.sum() + final.sum()).backward()
        assert y.dtype == mixed[next(iter(call))].dtype
        bar = 1e-2 if y.dtype in (torch.bfloat16, torch.float16) else 1e-5
        assert (y.double() - wanted).abs().max() <= bar * wanted.abs().max()
        for n, leaf in leaves.items():
            near = 1e-2 if leaf.dtype in (torch.bfloat16, torch.float16) else 1e-4
            assert leaf.grad.dtype == leaf.dtype
            assert (leaf.grad.double() - exact[n].grad).abs().max() <= near * exact[n].grad.abs().max(), n


@every_operation
def test_what_is_no_dense_float_tensor_is_refused(name):
    run, arguments = CALLS[name]
    call = arguments()
    first = next(iter(call))
    with pytest.raises(ValueError, match=f"{first} must be one of float32, bfloat16, float16, float64, got int64"):
        run(**(call | {first: call[first].long()}), backend="cpu")
    with pytest.raises(ValueError, match="must be on cpu as the rest is, got meta"):
        run(**call | {list(call)[1]: call[list(call)[1]].to("meta")}, backend="cpu")
