"""State space duality's Triton kernels, by Triton's interpreter: outputs, final state and every gradient."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.ssd import ssd

from .test_ssd import arguments, marks, relative


def compared(shape, step=0.1, absent=(), marked=False, bent=False, **options) -> dict[str, float]:
    """Relative error of everything that comes out, against the float64 recurrence."""
    call = arguments(*shape, step=step) | dict.fromkeys(absent)
    call |= {"diagonal": torch.rand(*shape[:3])} if bent else {}
    options |= marks(*shape[:2]) if marked else {}
    doubled = {n: None if v is None else v.double().requires_grad_() for n, v in call.items()}
    single = {n: None if v is None else v.clone().requires_grad_() for n, v in call.items()}
    expected = ssd(**doubled, backend="reference", **{k: v for k, v in options.items() if k != "chunk_size"})
    got = ssd(**single, backend="gpu", **options)
    weights = [torch.randn_like(t) for t in got]
    names = [n for n, v in call.items() if v is not None]
    errors = {n: relative(one, other) for n, one, other in zip(("y", "state"), got, expected, strict=True)}
    losses = [sum((t * w).sum() for t, w in zip(outputs, weights, strict=True)) for outputs in (got, expected)]
    grads = torch.autograd.grad(losses[0], [single[n] for n in names])
    exact = torch.autograd.grad(losses[1], [doubled[n] for n in names])
    return errors | {f"d({n})": relative(one, other) for n, one, other in zip(names, grads, exact, strict=True)}


def assert_equal(errors: dict[str, float]) -> None:
    assert not {name: error for name, error in errors.items() if error > (5e-5 if name[0] == "d" else 1e-5)}


@pytest.mark.parametrize("shape", [(1, 1, 2, 3, 1, 2), (2, 19, 4, 5, 2, 3), (1, 70, 2, 20, 1, 17)], ids=str)
def test_outputs_state_and_gradients_match_the_reference(interpreted, shape):
    assert_equal(interpreted(compared, shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 129, 4, 8, 4, 64), (2, 33, 2, 7, 1, 128), (1, 65, 3, 70, 1, 16)], ids=str)
def test_more_shapes_match_the_reference(interpreted, shape):
    assert_equal(interpreted(compared, shape))


@pytest.mark.parametrize("step", [20.0, 650.0], ids=["e^-80", "dt·|A| = 2600"])
def test_hard_decays(interpreted, step):
    assert_equal(interpreted(compared, (1, 20, 2, 3, 1, 4), step))


def marked(reverse) -> dict[str, float]:
    """Masks, documents, direction and a diagonal together."""
    return compared((2, 21, 2, 3, 1, 4), marked=True, bent=True, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_masks_documents_and_direction(interpreted, reverse):
    assert_equal(interpreted(marked, reverse))


@pytest.mark.parametrize("absent", [("D",), ("initial_state",), ("D", "initial_state")], ids=str)
def test_optional_arguments(interpreted, absent):
    assert_equal(interpreted(compared, (1, 5, 2, 3, 1, 4), 0.1, absent))


def chunked(chunk_size) -> dict[str, float]:
    """States stored every so many tokens."""
    return compared((1, 15 if chunk_size == 1 else 40, 2, 3, 1, 4), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 7, 20, pytest.param(64, marks=pytest.mark.slow)])
def test_chunk_size_does_not_matter(interpreted, chunk_size):
    assert_equal(interpreted(chunked, chunk_size))


def long_chunks() -> dict[str, float]:
    """Chunks of several tiles of tokens, as they come where the device is not the processor."""
    from hf_lnlm.ops.ssd.gpu import ssd_gpu, ssd_gpu_backward

    call = arguments(1, 150, 2, 3, 1, 4) | {"diagonal": None, "reset": None}
    grad = torch.randn_like(call["x"]), torch.randn_like(call["initial_state"])
    results = []
    for chunk in (50, 100):
        y, state, entries = ssd_gpu(*call.values(), chunk, True)
        results.append({"y": y, "state": state} | ssd_gpu_backward(*grad, entries, *call.values(), chunk))
    names = [name for name in results[0] if name != "diagonal"]
    return {name: relative(results[1][name], results[0][name].double()) for name in names}


@pytest.mark.slow
def test_chunks_of_several_tiles_give_the_same(interpreted):
    assert max(interpreted(long_chunks).values()) <= 1e-5


def operator() -> dict[str, bool]:
    """One node for the compiler; no second derivative; NaN stays in its head."""
    call = {name: value.requires_grad_() for name, value in arguments(1, 3, 2, 3, 1, 4).items()}
    targets = []

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if "ssd" in str(node.target))
        return graph

    compiled = torch.compile(lambda *v: ssd(*v, backend="gpu")[0], fullgraph=True, backend=keep)
    y = compiled(*call.values())
    (first,) = torch.autograd.grad(y.sum(), call["x"], create_graph=True)
    poisoned = {name: value.detach().clone() for name, value in call.items()}
    poisoned["log_decay"][:, 1, 1] = float("nan")
    bad, _ = ssd(**poisoned, backend="gpu")
    try:
        second = first.requires_grad and first.sum().backward() is None
    except RuntimeError:
        second = False
    return {
        "one node": len(targets) == 1,
        "no second derivative": not second,
        "NaN": bool(bad[:, 1:, 1].isnan().all() and bad[:, :, 0].isfinite().all()),
    }


def test_it_is_one_node_and_wrong_use_is_open(interpreted):
    found = interpreted(operator)
    assert all(found.values()), found


@pytest.mark.parametrize("length", [1, 4])
def test_it_is_refused_where_it_cannot_run(length):
    with torch.no_grad(), pytest.raises(ValueError, match="backend 'gpu' cannot run"):
        ssd(**arguments(1, length), backend="gpu")
