"""The causal convolution's Triton kernels, by Triton's interpreter: outputs, next state and every gradient."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.causal_conv import causal_conv, gpu

from .test_causal_conv import arguments, marks, relative


def compared(shape, absent=(), marked=False, **options) -> dict[str, float]:
    """Relative error of everything that comes out, against the float64 sum."""
    call = arguments(*shape) | dict.fromkeys(absent)
    batch, length, _, kernel = shape
    options |= {"gather_index": marks(batch, length, kernel)[1]} if marked else {}
    doubled = {n: None if v is None else v.double().requires_grad_() for n, v in call.items()}
    single = {n: None if v is None else v.clone().requires_grad_() for n, v in call.items()}
    expected = causal_conv(**doubled, backend="reference", **options)
    got = causal_conv(**single, backend="gpu", **options)
    weights = [torch.randn_like(t) for t in got]
    names = [n for n, v in call.items() if v is not None and v.numel()]
    pairs = zip(("y", "state"), got, expected, strict=True)
    errors = {name: relative(one, other) for name, one, other in pairs if one.numel()}
    losses = [sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)) for outputs in (got, expected)]
    grads = torch.autograd.grad(losses[0], [single[n] for n in names])
    exact = torch.autograd.grad(losses[1], [doubled[n] for n in names])
    return errors | {f"d({n})": relative(one, other) for n, one, other in zip(names, grads, exact, strict=True)}


def assert_equal(errors: dict[str, float]) -> None:
    assert not {name: error for name, error in errors.items() if error > (5e-5 if name[0] == "d" else 1e-5)}


@pytest.mark.parametrize("shape", [(2, 33, 20, 4), (1, 2, 7, 4), (2, 5, 4, 1), (1, 70, 67, 3), (1, 1, 3, 2)], ids=str)
def test_matches_the_reference(interpreted, shape):
    assert_equal(interpreted(compared, shape))


@pytest.mark.parametrize("absent", [("bias",), ("state",), ("bias", "state")], ids=str)
def test_optional_arguments(interpreted, absent):
    assert_equal(interpreted(compared, (1, 6, 5, 4), absent))


@pytest.mark.parametrize("shape", [(2, 33, 5, 4), (2, 9, 5, 2)], ids=str)
def test_masks_and_documents(interpreted, shape):
    assert_equal(interpreted(compared, shape, (), True))


def variants() -> dict[str, float]:
    """Backward in time, and without the activation."""
    reverse = compared((1, 8, 3, 4), marked=True, reverse=True)
    return reverse | {f"d({name}, linear)": e for name, e in compared((1, 8, 3, 4), activation=False).items()}


def test_direction_and_activation(interpreted):
    assert_equal(interpreted(variants))


def one_node() -> int:
    """How often the compiler's graph names the operation."""
    call = arguments(1, 4, 3, 4)
    targets = []

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if "causal_conv" in str(node.target))
        return graph

    compiled = torch.compile(lambda *v: causal_conv(*v, backend="gpu"), fullgraph=True, backend=keep)
    for got, expected in zip(compiled(*call.values()), causal_conv(**call, backend="eager"), strict=True):
        torch.testing.assert_close(got, expected)
    return len(targets)


def test_it_is_one_node_for_the_compiler(interpreted):
    assert interpreted(one_node) == 1


@pytest.mark.parametrize("carried", [True, False])
def test_causal_conv1d_serves_what_it_can(monkeypatch, carried):
    """Its layout is `(batch, channel, length)`; the stand-in has the signature that causal-conv1d documents."""
    calls = []

    def stand_in(x, weight, bias=None, *, initial_states=None, return_final_states=False, activation=None):
        assert return_final_states and x.stride(1) == 1
        calls.append(tuple(x.shape))
        state = None if initial_states is None else initial_states.transpose(1, 2)
        y, last = causal_conv(x.transpose(1, 2), weight, bias, state, None, activation == "silu", backend="eager")
        return y.transpose(1, 2), last.transpose(1, 2)

    monkeypatch.setattr(gpu, "causal_conv1d_fn", stand_in)
    call = arguments(2, 6, 16, 4) | ({} if carried else {"state": None})
    expected = causal_conv(**call, backend="eager")
    torch.testing.assert_close(gpu.causal_conv_gpu(*call.values(), None, True, False)[:2], expected)
    assert calls == [(2, 16, 6)]
    assert not gpu._suits_causal_conv1d(arguments(2, 6, 9, 4) | {"gather_index": None})
    assert not gpu._suits_causal_conv1d(call | {"gather_index": marks(2, 6, 4)[1]})
