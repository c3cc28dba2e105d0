"""Selective scan: every backend against the float64 reference, in every situation the models use it in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from hf_lnlm.ops.kernels.flat import flat_bytes, flat_integers, flat_rows, flat_vector
from hf_lnlm.ops.selective_scan import selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
FAST = ("eager", "cpu")


def arguments(batch=2, length=37, channels=20, states=8, dt=-4.0, seed=0):
    torch.manual_seed(seed)
    rows = (batch, length)
    return {
        "u": torch.randn(*rows, channels),
        "dt": torch.randn(*rows, channels) + dt,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1) * torch.rand(channels, states).add(0.5),
        "B": torch.randn(*rows, states),
        "C": torch.randn(*rows, states),
        "D": torch.randn(channels),
        "z": torch.randn(*rows, channels),
        "dt_bias": torch.randn(channels),
        "initial_state": torch.randn(batch, states, channels),
    }


def relative(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def run(call, backend, weights=None, **options):
    """Outputs, final state and, given weights for both, every gradient."""
    leaves = {name: None if value is None else value.detach().clone().requires_grad_() for name, value in call.items()}
    y, state = selective_scan(**leaves, backend=backend, **options)
    weights = weights or (torch.randn_like(y), torch.randn_like(state))
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), list(present.values()))
    return y.detach(), state.detach(), dict(zip(present, grads)), weights


def compare(call, backend, output_bar=5e-7, gradient_bar=2e-6, **options):
    doubled = {name: None if value is None else value.double() for name, value in call.items()}
    y, state, grads, weights = run(doubled, "reference", **options)
    weights = tuple(w.float() for w in weights)
    y, state, grads, _ = run(doubled, "reference", tuple(w.double() for w in weights), **options)
    got_y, got_state, got, _ = run(call, backend, weights, **options)
    assert relative(got_y, y) <= output_bar
    assert relative(got_state, state) <= output_bar
    for name, grad in grads.items():
        assert relative(got[name], grad) <= gradient_bar, name


def marks(batch, length, seed=1):
    torch.manual_seed(seed)
    return {"mask": (torch.rand(batch, length) > 0.3).long(), "reset": torch.rand(batch, length) > 0.85}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 5, 8), (2, 37, 20, 8), (1, 65, 300, 16), (3, 33, 17, 64), (1, 40, 16, 128), (2, 16, 1, 1)],
    ids=str,
)
@pytest.mark.core
def test_outputs_state_and_gradients_match_the_reference(backend, shape):
    compare(arguments(*shape), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dt", [5.0, 162.5], ids=["decay e^-80", "dt·|A| = 2600"])
def test_hard_decays(backend, dt):
    call = arguments(states=16)
    call["A"] = -torch.arange(1.0, 17).repeat(20, 1)
    call["dt"][:, ::2] = dt
    call["dt_bias"] = None
    compare(call, backend)


@pytest.mark.parametrize("backend", FAST)
def test_long_memory(backend):
    call = arguments(1, 8192, 4, 8)
    call["A"] = call["A"] * 1e-4
    reference = selective_scan(**{name: value.double() for name, value in call.items()}, backend="eager")
    y, state = selective_scan(**call, backend=backend)
    assert relative(y, reference[0]) <= 5e-6
    assert relative(state, reference[1]) <= 1e-5


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", [False, True])
def test_masks_resets_and_direction(backend, reverse):
    compare(arguments(), backend, reverse=reverse, **marks(2, 37))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_optional_arguments(backend, absent):
    compare(arguments() | {absent: None}, backend)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_without_softplus(backend):
    call = arguments() | {"dt_bias": None}
    call["dt"] = call["dt"].abs() * 0.1
    compare(call, backend, softplus=False)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_growing_states_are_right_too(backend):
    call = arguments(length=20)
    call["A"] = -0.1 * call["A"]
    compare(call, backend)


def test_the_kernels_refuse_growing_states():
    call = arguments(length=20)
    for change in ({"softplus": False}, {"A": -call["A"]}):
        with pytest.raises(ValueError, match="'cpu' cannot run: its states must not grow"):
            selective_scan(**(call | change), backend="cpu")


def test_gradcheck_with_masks_and_resets():
    call = {name: value.double().requires_grad_() for name, value in arguments(2, 7, 3, 4).items()}
    options = marks(2, 7)

    def function(*values):
        return selective_scan(**dict(zip(call, values)), backend="eager", **options)

    assert torch.autograd.gradcheck(function, tuple(call.values()))


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_every_split_continues_exactly(backend):
    call = arguments(length=9)
    y, state = selective_scan(**call, backend=backend)
    for split in range(1, 9):
        first = {n: v[:, :split] if n in ("u", "dt", "B", "C", "z") else v for n, v in call.items()}
        second = {n: v[:, split:] if n in ("u", "dt", "B", "C", "z") else v for n, v in call.items()}
        left, middle = selective_scan(**first, backend=backend)
        right, last = selective_scan(**(second | {"initial_state": middle}), backend=backend)
        assert relative(torch.cat([left, right], 1), y.double()) <= 1e-6
        assert relative(last, state.double()) <= 1e-6


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_masked_positions_never_matter(backend):
    call, options = arguments(), marks(2, 37)
    y, state = selective_scan(**call, **options, backend=backend)
    real = options["mask"].bool()
    for name in ("u", "dt", "B", "C", "z"):
        call[name] = torch.where(real.unsqueeze(2), call[name], torch.randn_like(call[name]))
    again, state_again = selective_scan(**call, **options, backend=backend)
    assert torch.equal(y[real], again[real])
    assert torch.equal(state, state_again)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_has_half_of_the_error_of_stock(backend):
    call = arguments(1, 256, 64, 16, dt=-2.0)
    call = {n: v.bfloat16() if n in ("u", "dt", "B", "C", "z") else v for n, v in call.items()} | {
        "initial_state": None
    }
    exact = selective_scan(**{n: None if v is None else v.double() for n, v in call.items()}, backend="reference")[0]
    ours, _ = selective_scan(**call, backend=backend)
    flip = {n: call[n].transpose(1, 2) for n in ("dt", "B", "C", "z")}
    stock = mamba_selective_scan(
        call["u"].transpose(1, 2), A=call["A"], D=call["D"], delta_bias=call["dt_bias"], delta_softplus=True, **flip
    )
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) <= 0.5 * relative(stock.bfloat16().transpose(1, 2), exact)


@pytest.mark.parametrize("backend", FAST)
def test_not_a_number_is_not_hidden(backend):
    call = arguments()
    call["A"][3, 2] = float("nan")
    y, _ = selective_scan(**call, backend=backend)
    assert y[:, :, 3].isnan().all()
    assert not y[:, :, 4].isnan().any()


@pytest.mark.parametrize("backend", FAST)
def test_poisoned_memory_does_not_leak(backend, monkeypatch):
    """Buffers come with NaN in them: nothing may read what it did not write."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        compare(arguments(), backend, **marks(2, 37))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("backend", FAST)
def test_compiled_as_one_node_without_recompiling_over_lengths(backend):
    call = arguments(channels=6)
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def function(*values):
        return selective_scan(*values, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=keep)
    for length in (37, 20, 9):
        part = {n: v[:, :length].clone() if n in ("u", "dt", "B", "C", "z") else v for n, v in call.items()}
        for got, expected in zip(compiled(*part.values()), function(*part.values())):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert len(graphs) == 1
    assert sum("selective_scan" in target for target in graphs[0]) == 1


@pytest.mark.parametrize("backend", FAST)
def test_exported_program_differentiates(backend):
    class Scan(torch.nn.Module):
        def forward(self, u, dt, A, B, C):
            return selective_scan(u, dt, A, B, C, backend=backend)[0]

    call = {n: v for n, v in arguments(channels=6).items() if n in ("u", "dt", "A", "B", "C")}
    program = torch.export.export(Scan(), tuple(call.values()))
    assert sum("selective_scan" in str(node.target) for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(*call.values()), selective_scan(**call, backend=backend)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 0, 20)}, "length"),
        ({"dt": torch.zeros(2, 37, 19)}, "dt"),
        ({"A": torch.zeros(8, 20)}, "A must"),
        ({"B": torch.zeros(2, 37, 9)}, "B must"),
        ({"D": torch.zeros(19)}, r"D must be \(20,\), got \(19,\)"),
        ({"z": torch.zeros(2, 36, 20)}, "z must"),
        ({"dt_bias": torch.zeros(21)}, "dt_bias must"),
        ({"initial_state": torch.zeros(1, 8, 20)}, r"initial_state must be \(2, 8, 20\)"),
        ({"mask": torch.ones(2, 36)}, "mask must"),
        ({"reset": torch.zeros(1, 37, dtype=torch.bool)}, "reset must"),
        ({"backend": "fortran"}, "backend"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(arguments() | change))


def test_tensors_of_another_device_are_not_read():
    with pytest.raises(ValueError, match="must be on the CPU, got one on meta"):
        flat_rows(torch.zeros(2, 3, device="meta"))
    for flat in (flat_vector, flat_bytes, flat_integers):
        with pytest.raises(ValueError, match="on meta"):
            flat(torch.zeros(2, 3, device="meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(dtype):
    """The kernels write float32 whatever torch makes by default."""
    values = {n: v.requires_grad_() for n, v in arguments().items()}
    token = {n: v[:, :1].detach() if n in ("u", "dt", "B", "C", "z") else v.detach() for n, v in values.items()}

    def outputs():
        y, last = selective_scan(**values, backend="cpu")
        grads = torch.autograd.grad((y**2).sum() + (last**2).sum(), list(values.values()))
        with torch.no_grad():
            return (y, last, *grads, *selective_scan(**token, backend="cpu"))

    expected = outputs()
    torch.set_default_dtype(dtype)
    try:
        got = outputs()
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_an_explicit_backend_that_cannot_run_raises():
    call = {name: value.double() for name, value in arguments().items()}
    assert selective_scan(**call)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="gpu"):
        selective_scan(**arguments(), backend="gpu")


def test_threads_do_not_share_scratch():
    """The kernels run without the interpreter's lock."""
    calls = [arguments(1, 400, 64, 16, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: selective_scan(**call, backend="cpu")[0], calls * 4))
    for i, got in enumerate(together):
        assert torch.equal(got, selective_scan(**calls[i % 4], backend="cpu")[0])
