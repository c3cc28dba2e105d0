"""Products by oneDNN: the same numbers and gradients as torch's own, whatever lies how in memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from hf_lnlm.ops import dense as module
from hf_lnlm.ops.dense import Dense, dense, pays

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def layouts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    wide, weight = torch.randn(4, 9, 40), torch.randn(24, 40)
    return {
        "rows": (wide[..., :20].contiguous(), weight[:, :20].contiguous()),
        "a part of a weight": (wide[..., :20].contiguous(), weight[:, :20]),
        "a part of the inputs": (wide[..., 10:30], weight[:, :20].contiguous()),
        "transposed": (torch.randn(20, 33).mT, torch.randn(20, 24).mT),
        "few rows": (torch.randn(2, 20), weight[:, :20]),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("biased", [True, False])
def test_equals_torchs_product_and_its_gradients(layout: str, biased: bool):
    inputs, weight = (part.detach().requires_grad_() for part in layouts()[layout])
    bias = torch.randn(24, requires_grad=True) if biased else None
    given = [part for part in (inputs, weight, bias) if part is not None]
    assert pays(inputs, weight) == (layout != "few rows")
    found, wanted = dense(inputs, weight, bias), linear(inputs, weight, bias)
    torch.testing.assert_close(found, wanted, **CLOSE)
    upstream = torch.randn_like(wanted).mT.contiguous().mT  # of other strides than the output
    gradients = [torch.autograd.grad(output, given, upstream, create_graph=True) for output in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    twice = [torch.autograd.grad(g[0].square().sum(), weight)[0] for g in gradients]
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-3)


def test_gives_way_where_the_kernel_cannot_or_must_not_be_used(monkeypatch: pytest.MonkeyPatch):
    inputs, weight = torch.randn(20, 8), torch.randn(6, 8)
    assert pays(inputs, weight)
    assert not pays(inputs.double(), weight.double())
    assert not pays(inputs.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(inputs, weight)
        assert dense(inputs, weight).dtype == torch.bfloat16
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not pays(inputs, weight)
    layer = Dense(8, 6)
    exported = torch.export.export(torch.nn.Sequential(layer), (inputs,))
    assert not [node for node in exported.graph.nodes if "mkldnn" in str(node.target)]
    monkeypatch.setattr(module, "product", lambda *_: pytest.fail("called"))
    assert dense(inputs[:0], weight).shape == (0, 6)
