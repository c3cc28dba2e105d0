"""State space duality: the chunked form against the float64 recurrence."""

from __future__ import annotations

import pytest
import torch

from hf_lnlm.ops.ssd import ssd

FAST = ("eager", "cpu")
every_backend = pytest.mark.parametrize("backend", FAST)


def arguments(batch=2, length=70, heads=4, width=8, groups=2, states=16, step=0.1):
    torch.manual_seed(0)
    dt = torch.rand(batch, length, heads) * step
    return {
        "x": torch.randn(batch, length, heads, width),
        "scale": dt,
        "log_decay": -dt * torch.arange(1.0, heads + 1),
        "B": torch.randn(batch, length, groups, states),
        "C": torch.randn(batch, length, groups, states),
        "D": torch.randn(heads),
        "initial_state": torch.randn(batch, heads, width, states),
    }


def marks(batch, length):
    torch.manual_seed(1)
    return {"mask": (torch.rand(batch, length) > 0.3).long(), "reset": torch.rand(batch, length) > 0.85}


def relative(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def compare(call, backend, **options):
    torch.manual_seed(2)
    doubled = {n: None if v is None else v.double().requires_grad_() for n, v in call.items()}
    single = {n: None if v is None else v.clone().requires_grad_() for n, v in call.items()}
    expected = ssd(**doubled, backend="reference", **{k: v for k, v in options.items() if k != "chunk_size"})
    got = ssd(**single, backend=backend, **options)
    weights = [torch.randn_like(t) for t in got]
    names = [n for n, v in call.items() if v is not None]
    for pair in zip(got, expected):
        assert relative(*pair) <= 5e-7
    grads = torch.autograd.grad(sum((t * w).sum() for t, w in zip(got, weights)), [single[n] for n in names])
    exact = torch.autograd.grad(sum((t * w).sum() for t, w in zip(expected, weights)), [doubled[n] for n in names])
    for name, grad, true in zip(names, grads, exact):
        assert relative(grad, true) <= 2e-6, name


@every_backend
@pytest.mark.parametrize(
    "shape",
    [(2, 70, 4, 8, 2, 16), (1, 129, 4, 8, 1, 64), (3, 64, 3, 5, 3, 8), (1, 1, 4, 8, 4, 8), (2, 33, 2, 7, 1, 128)],
    ids=str,
)
@pytest.mark.core
def test_outputs_state_and_gradients_match_the_reference(backend, shape):
    compare(arguments(*shape), backend)


@every_backend
@pytest.mark.parametrize("step", [20.0, 650.0], ids=["e^-80", "dt·|A| = 2600"])
def test_hard_decays(backend, step):
    compare(arguments(step=step), backend)


@every_backend
def test_long_memory(backend):
    call = arguments(1, 8192, 2, 4, 1, 8, step=1e-4)
    y, state = ssd(**{n: v.double() for n, v in call.items()}, backend="eager")
    got, last = ssd(**call, backend=backend)
    assert relative(got, y) <= 5e-6
    assert relative(last, state) <= 5e-6


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_masks_resets_and_direction(backend, reverse):
    compare(arguments(), backend, reverse=reverse, **marks(2, 70))


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_diagonal(backend, reverse):
    compare(arguments() | {"diagonal": torch.rand(2, 70, 4)}, backend, reverse=reverse, **marks(2, 70))


@every_backend
@pytest.mark.parametrize("absent", ["D", "initial_state"])
def test_optional_arguments(backend, absent):
    compare(arguments() | {absent: None}, backend)


@every_backend
def test_slices_of_a_projection_are_read_in_place(backend):
    call = arguments(length=40)
    wide = torch.cat([call["x"].flatten(2), torch.randn(2, 40, 5)], 2)
    sliced = ssd(**(call | {"x": wide[..., :32].unflatten(2, (4, 8))}), backend=backend)
    for got, expected in zip(sliced, ssd(**call, backend=backend)):
        assert torch.equal(got, expected)


@every_backend
def test_bfloat16_is_computed_in_float32(backend):
    call = arguments()
    rows = ("x", "B", "C")
    narrow = {n: v.bfloat16() if n in rows else v for n, v in call.items()}
    got, _ = ssd(**narrow, backend=backend)
    expected, _ = ssd(**{n: v.float() for n, v in narrow.items()}, backend=backend)
    assert torch.equal(got, expected.bfloat16())


@every_backend
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 256])
def test_chunk_size_does_not_matter(backend, chunk_size):
    compare(arguments(), backend, chunk_size=chunk_size)


def test_gradcheck_with_masks_and_resets():
    call = {n: v.double().requires_grad_() for n, v in arguments(2, 7, 2, 3, 1, 4).items()}

    def function(*values):
        return ssd(**dict(zip(call, values)), chunk_size=3, **marks(2, 7))

    assert torch.autograd.gradcheck(function, tuple(call.values()))


@every_backend
def test_every_split_continues_exactly(backend):
    call = arguments(length=9)
    rows = ("x", "scale", "log_decay", "B", "C")
    y, state = ssd(**call, backend=backend)
    for split in range(1, 9):
        left, middle = ssd(**{n: v[:, :split] if n in rows else v for n, v in call.items()}, backend=backend)
        second = {n: v[:, split:] if n in rows else v for n, v in call.items()}
        right, last = ssd(**(second | {"initial_state": middle}), backend=backend)
        assert relative(torch.cat([left, right], 1), y.double()) <= 1e-6
        assert relative(last, state.double()) <= 1e-6


@every_backend
def test_not_a_number_is_not_hidden(backend):
    call = arguments()
    call["log_decay"][:, 5, 1] = float("nan")
    y, _ = ssd(**call, backend=backend)
    assert y[:, 6:, 1].isnan().all()
    assert not y[:, :, 0].isnan().any()


@every_backend
def test_compiled_as_one_node_without_recompiling_over_lengths(backend):
    call = arguments()
    rows = ("x", "scale", "log_decay", "B", "C")
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: ssd(*values, backend=backend), fullgraph=True, dynamic=True, backend=keep)
    for length in (70, 40, 9):
        part = {n: v[:, :length].clone() if n in rows else v for n, v in call.items()}
        for got, expected in zip(compiled(*part.values()), ssd(**part, backend=backend)):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert len(graphs) == 1
    assert sum("ssd" in target for target in graphs[0]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0, 4, 8)}, "length"),
        ({"scale": torch.zeros(2, 70, 3)}, "scale"),
        ({"B": torch.zeros(2, 70, 3, 16)}, "groups"),
        ({"D": torch.zeros(3)}, r"D must be \(4,\), got \(3,\)"),
        ({"initial_state": torch.zeros(1, 4, 8, 16)}, r"initial_state must be \(2, 4, 8, 16\)"),
        ({"diagonal": torch.zeros(2, 70, 3)}, "diagonal must"),
        ({"mask": torch.ones(2, 69)}, "mask must"),
        ({"reset": torch.zeros(1, 70, dtype=torch.bool)}, "reset must"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "fortran"}, "backend"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ssd(**(arguments() | change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(dtype):
    """The kernels write float32 whatever torch makes by default."""
    values = {n: v.requires_grad_() for n, v in arguments().items()}

    def outputs():
        y, last = ssd(**values, backend="cpu")
        return (y, last, *torch.autograd.grad((y**2).sum() + (last**2).sum(), list(values.values())))

    expected = outputs()
    torch.set_default_dtype(dtype)
    try:
        got = outputs()
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
