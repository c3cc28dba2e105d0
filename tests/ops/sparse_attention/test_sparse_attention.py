"""Sparse attention against its dense-mask reference: values, gradients, padding, groups and paths."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from hf_lnlm.ops.sparse_attention import attention, dense, merge, parts, tiles
from hf_lnlm.ops.sparse_attention.attention import sparse_attention
from hf_lnlm.ops.sparse_attention.dense import dense_is_cheaper, sparse_attention_dense
from hf_lnlm.ops.sparse_attention.eager import sparse_attention_eager
from hf_lnlm.ops.sparse_attention.pattern import KINDS, SparsePattern, logical_positions, patterns_for_layer
from hf_lnlm.ops.sparse_attention.reference import sparse_attention_reference
from hf_lnlm.ops.sparse_attention.step import attend_cached

STRIDE, SUMMARY, HEADS, WIDTH = 8, 3, 4, 6
LENGTHS = (1, 5, 8, 9, 16, 61)
SPARSE_KINDS = KINDS[1:]


def tensors(length, key_heads=HEADS, dtype=torch.float64, batch=2):
    shapes = [(batch, heads, length, WIDTH) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def dense_masked(query, key, value, allowed, scale=WIDTH**-0.5):
    """An oracle of the oracle: the formula with a mask built by Python loops elsewhere."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    weights = (query @ key.mT * scale).exp() * allowed
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)) @ value


def allowed_pairs(kind, length, causal):
    """The sets as the paper writes them, one pair at a time."""

    def sees(i, j):
        local, column = abs(i - j) < STRIDE, (i - j) % STRIDE == 0
        block, summary = i // STRIDE == j // STRIDE, j % STRIDE >= STRIDE - SUMMARY
        sets = {"full": True, "local": local, "column": column, "strided": local or column}
        sets |= {"block": block, "summary": summary, "fixed": block or summary}
        return sets[kind] and (j <= i or not causal)

    return torch.tensor([[float(sees(i, j)) for j in range(length)] for i in range(length)], dtype=torch.float64)


def gradients(out, inputs, weight):
    return torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)


def worst(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(params=["blocks", "dense", "rows", "written_out"])
def path(request, monkeypatch):
    """Forces one way of computing; groups and rows are small, so that short inputs reach every branch."""
    monkeypatch.setattr(parts, "GROUP_QUERIES", 3 * STRIDE)
    monkeypatch.setattr(dense, "WHOLE", 10 if request.param == "rows" else 1000)
    monkeypatch.setattr(dense, "ROWS", STRIDE)
    monkeypatch.setattr(merge, "CHUNK_NUMBERS", 1000)
    forced = {"blocks": lambda *a: False, "written_out": lambda *a: False}
    forced |= dict.fromkeys(("dense", "rows"), lambda p, n: n > dense.empty_queries(p))
    monkeypatch.setattr(dense, "dense_is_cheaper", forced[request.param])
    if request.param == "written_out":
        monkeypatch.setattr(tiles, "_is_fused", lambda query, dropout: False)
    dense.dense_plan.cache_clear()
    yield request.param
    dense.dense_plan.cache_clear()


@pytest.mark.parametrize(("kind", "causal"), list(itertools.product(SPARSE_KINDS, (True, False))))
@pytest.mark.core
def test_equals_dense_mask_in_value_and_gradient(kind, causal, path):
    torch.manual_seed(0)
    pattern = SparsePattern(kind, STRIDE, SUMMARY, causal)
    for length, key_heads in itertools.product(LENGTHS, (HEADS, 2)):
        inputs = tensors(length, key_heads)
        ours = sparse_attention(*inputs, pattern)
        theirs = dense_masked(*inputs, allowed_pairs(kind, length, causal))
        weight = torch.randn_like(ours)
        assert worst([ours], [theirs]) <= 1e-12, (length, key_heads)
        assert worst(gradients(ours, inputs, weight), gradients(theirs, inputs, weight)) <= 1e-12, (length, key_heads)


@pytest.mark.parametrize(("kind", "causal"), list(itertools.product(KINDS, (True, False))))
def test_padding_anywhere_equals_no_padding(kind, causal, path):
    torch.manual_seed(1)
    pattern = SparsePattern(kind, STRIDE, SUMMARY, causal)
    for real, shift in ((6, 0), (21, 3), (40, 9)):
        inputs = tensors(real)
        mask = torch.zeros(2, real + 9, dtype=torch.bool)
        mask[0, shift : shift + real] = True
        mask[1, 4 : 4 + real // 2] = True
        mask[1, 9 + real // 2 :] = True
        padded = [torch.randn(2, HEADS, real + 9, WIDTH, dtype=torch.float64) for _ in inputs]
        for x, wide in zip(inputs, padded, strict=True):
            wide.transpose(1, 2)[mask] = x.detach().transpose(1, 2).flatten(0, 1)
            wide.requires_grad_()
        plain, out = sparse_attention(*inputs, pattern), sparse_attention(*padded, pattern, mask=mask)
        found = out.transpose(1, 2)[mask].view(2, real, HEADS, WIDTH).transpose(1, 2)
        assert worst([found], [plain]) <= 1e-12
        assert out.transpose(1, 2)[~mask].abs().max() == 0.0
        weight = torch.randn_like(plain)
        theirs = gradients(plain, inputs, weight)
        for grad, expected in zip(gradients(found, padded, weight), theirs, strict=True):
            kept = grad.transpose(1, 2)[mask].view(2, real, HEADS, WIDTH).transpose(1, 2)
            assert worst([kept], [expected]) <= 1e-12
            assert grad.transpose(1, 2)[~mask].abs().max() == 0.0


def test_reference_backend_equals_eager_with_a_mask():
    torch.manual_seed(2)
    mask = torch.rand(2, 30) > 0.3
    for kind, causal in itertools.product(KINDS, (True, False)):
        inputs, pattern = tensors(30, 2), SparsePattern(kind, STRIDE, SUMMARY, causal)
        ours = sparse_attention(*inputs, pattern, mask=mask)
        theirs = sparse_attention(*inputs, pattern, mask=mask, backend="reference")
        weight = torch.randn_like(ours)
        assert worst([ours], [theirs]) <= 1e-12
        assert worst(gradients(ours, inputs, weight), gradients(theirs, inputs, weight)) <= 1e-12


@pytest.mark.parametrize(("kind", "causal"), [("strided", True), ("fixed", True), ("summary", True), ("fixed", False)])
def test_gradcheck(kind, causal):
    torch.manual_seed(3)
    pattern = SparsePattern(kind, 3, 1, causal)
    inputs = [torch.randn(1, 1, 8, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: sparse_attention_eager(*x, pattern, 0.6), inputs)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_no_gradient_from_the_future(kind):
    torch.manual_seed(4)
    inputs = tensors(40)
    out = sparse_attention_eager(*inputs, SparsePattern(kind, STRIDE, SUMMARY), 0.4)
    for position in (0, 7, 8, 23, 38):
        for grad in torch.autograd.grad(out[:, :, position].sum(), inputs, retain_graph=True):
            assert grad[:, :, position + 1 :].abs().max() == 0.0


def test_heads_in_groups_of_patterns():
    torch.manual_seed(5)
    inputs = tensors(30)
    groups = patterns_for_layer("fixed", "per_head", 0, stride=STRIDE, summary=SUMMARY, causal=True)
    out = sparse_attention(*inputs, groups)
    for half, pattern in zip((slice(0, 2), slice(2, 4)), groups, strict=True):
        alone = sparse_attention(*(x[:, half] for x in inputs), pattern)
        assert torch.equal(out[:, half], alone)


def test_patterns_of_layers():
    def kinds(pattern, combination, layer):
        found = patterns_for_layer(pattern, combination, layer, stride=8, summary=2, causal=True)
        return [x.kind for x in found]

    assert kinds("strided", "merged", 1) == ["strided"]
    assert [kinds("fixed", "interleaved", i) for i in range(3)] == [["block"], ["summary"], ["block"]]
    assert kinds("strided", "per_head", 0) == ["local", "column"]
    assert kinds("local", "interleaved", 1) == ["local"]


def test_dropout_is_that_of_one_softmax(monkeypatch):
    """Dropping weights part by part with unnormalised merging equals dropping in the union."""
    torch.manual_seed(6)
    pattern = SparsePattern("strided", 4)
    inputs = [torch.randn(1, 1, 11, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def fixed_draw(*x):
        torch.manual_seed(7)
        return sparse_attention_eager(*x, pattern, 0.6, dropout=0.4)

    assert torch.autograd.gradcheck(fixed_draw, inputs)
    with torch.no_grad():
        plain = sparse_attention_eager(*inputs, pattern, 0.6)
        drawn = torch.stack([sparse_attention_eager(*inputs, pattern, 0.6, dropout=0.4) for _ in range(400)])
    error = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - plain).abs() <= 6 * error + 1e-12).all()
    assert error.max() > 1e-3


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.float32, 3e-6, 2e-5), (torch.bfloat16, 2e-2, 6e-2)])
def test_lower_precision(dtype, forward, backward):
    torch.manual_seed(8)
    for kind, causal in itertools.product(SPARSE_KINDS, (True, False)):
        inputs = tensors(45, dtype=dtype)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        pattern = SparsePattern(kind, STRIDE, SUMMARY, causal)
        ours = sparse_attention_eager(*inputs, pattern, 0.4)
        theirs = sparse_attention_eager(*exact, pattern, 0.4)
        weight = torch.randn_like(ours)
        assert worst([ours.double()], [theirs]) <= forward
        found = [x.double() for x in gradients(ours, inputs, weight)]
        assert worst(found, gradients(theirs, exact, weight.double())) <= backward


def test_float16_is_written_out():
    torch.manual_seed(9)
    inputs = [x.detach() for x in tensors(30, dtype=torch.float16)]
    pattern = SparsePattern("fixed", STRIDE, SUMMARY, causal=False)
    exact = sparse_attention_eager(*(x.double() for x in inputs), pattern, 0.4)
    assert worst([sparse_attention_eager(*inputs, pattern, 0.4).double()], [exact]) <= 5e-3


def test_a_query_that_sees_nothing_gets_zeros_and_no_nan():
    torch.manual_seed(10)
    inputs = tensors(13)
    for length_dense in (False, True):
        pattern = SparsePattern("summary", STRIDE, SUMMARY)
        run = sparse_attention_dense if length_dense else sparse_attention_eager
        out = run(*inputs, pattern, 0.4)
        assert out[:, :, : STRIDE - SUMMARY].abs().max() == 0.0
        assert all(grad.isfinite().all() for grad in gradients(out, inputs, torch.ones_like(out)))
    mask = torch.tensor([[False] * 13, [True] * 13])
    for kind, causal in itertools.product(KINDS, (True, False)):
        out = sparse_attention(*inputs, SparsePattern(kind, STRIDE, SUMMARY, causal), mask=mask)
        assert out[0].abs().max() == 0.0 and out.isfinite().all()


def test_cached_step_equals_full_run():
    torch.manual_seed(11)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :5] = False
    positions = logical_positions(mask)
    for kind in KINDS:
        inputs, pattern = tensors(40), SparsePattern(kind, STRIDE, SUMMARY)
        full = sparse_attention(*inputs, pattern, mask=mask)
        for first in (39, 30):
            query = inputs[0][:, :, first:]
            out = attend_cached(query, *inputs[1:], pattern, positions[:, first:], positions, WIDTH**-0.5)
            assert worst([out], [full[:, :, first:]]) <= 1e-12


def test_compiled_graph_equals_eager():
    torch.manual_seed(12)
    pattern = SparsePattern("strided", STRIDE)
    inputs = tensors(20)
    compiled = torch.compile(lambda *x: sparse_attention(*x, pattern), backend="eager", fullgraph=True)
    assert worst([compiled(*inputs)], [sparse_attention(*inputs, pattern)]) <= 1e-12


def test_never_builds_the_square(monkeypatch):
    """The blocks path asks the fused tile for nothing with more than a window of keys per query."""
    seen = []
    real = tiles.tile_forward

    def spy(query, key, *rest):
        seen.append((query.shape[2], key.shape[2], query.shape[0] * query.shape[1]))
        return real(query, key, *rest)

    monkeypatch.setattr("hf_lnlm.ops.sparse_attention.merge.tile_forward", spy)
    length, stride = 4096, 64
    query = torch.randn(1, 1, length, 8)
    for kind, bound in (("local", 2 * stride), ("strided", 2 * stride + length // stride), ("block", stride)):
        seen.clear()
        sparse_attention(query, query, query, SparsePattern(kind, stride))
        assert sum(q * k * tiles_ for q, k, tiles_ in seen) <= bound * length


def test_the_cheaper_path_is_taken(monkeypatch):
    """Dense where few keys are hidden, blocks where most are; never a square of a long text."""
    taken = []
    for name, function in (("dense", "attend_rows"), ("eager", "sparse_attention_eager")):
        real = getattr(attention, function)
        spy = lambda *args, name=name, real=real: taken.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(attention, function, spy)
    expected = {100: ["dense"] * 3, 150: ["dense"] * 3, 320: ["dense"] * 3, 1536: ["eager"] * 3}
    for length, paths in expected.items():
        taken.clear()
        for kind in ("local", "strided", "fixed"):
            sparse_attention(*(torch.randn(1, 1, length, 8) for _ in range(3)), SparsePattern(kind, 128))
        assert taken == paths
    assert not dense_is_cheaper(SparsePattern("strided", 4096), 9000)


def test_biases_made_in_inference_mode_serve_training():
    inputs = [torch.randn(1, 1, 45, 4, requires_grad=True) for _ in range(3)]
    for run in (sparse_attention_dense, sparse_attention_eager):
        pattern = SparsePattern("fixed", 7, 2)
        with torch.inference_mode():
            run(*(x.detach() for x in inputs), pattern, 0.5)
        torch.autograd.grad(run(*inputs, pattern, 0.5).sum(), inputs)


def test_fused_operator_is_there_in_the_tested_torch():
    assert tiles.fused_tile_available()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "diagonal"}, "kind must be one of"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"kind": "fixed", "summary": 0}, "summary must lie in"),
        ({"kind": "fixed", "summary": 9}, "summary must lie in"),
    ],
)
def test_bad_patterns(change, message):
    with pytest.raises(ValueError, match=message):
        SparsePattern(**({"kind": "local", "stride": 8, "summary": 2} | change))


def test_bad_inputs():
    query, key, value = tensors(10)
    pattern = SparsePattern("local", 4)
    cases = [
        ((query[0], key, value, pattern), {}, "must be"),
        ((query, key[:, :, :5], value[:, :, :5], pattern), {}, "match query"),
        ((query, key[:, :3], value[:, :3], pattern), {}, "match query"),
        ((query, key, value[:, :, :5], pattern), {}, "key like value"),
        ((query, key, value, (pattern,) * 3), {}, "divide evenly"),
        ((query, key, value, ()), {}, "divide evenly"),
        ((query, key, value, pattern), {"mask": torch.ones(2, 10)}, "mask must be bool"),
        ((query, key, value, pattern), {"mask": torch.ones(2, 9, dtype=torch.bool)}, "mask must be bool"),
        ((query, key, value, pattern), {"dropout": 1.0}, "dropout must lie in"),
        ((query, key, value, pattern), {"backend": "fast"}, "backend must be"),
        ((query, key, value, pattern), {"backend": "gpu"}, "backend must be"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            sparse_attention(*args, **kwargs)
    for name in (("sparse", "merged"), ("fixed", "added")):
        with pytest.raises(ValueError, match="must be one of"):
            patterns_for_layer(*name, 0, stride=4, summary=1, causal=True)


def test_reference_shapes_and_weights():
    torch.manual_seed(13)
    inputs, pattern = tensors(12), SparsePattern("fixed", 4, 1)
    positions = torch.arange(12).unsqueeze(0)
    out, weights = sparse_attention_reference(*inputs, pattern, positions, positions, 0.5)
    assert out.shape == inputs[0].shape and weights.shape == (2, HEADS, 12, 12)
    assert torch.allclose(weights.sum(-1), torch.ones(2, HEADS, 12, dtype=torch.float64))
    full = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.5)
    all_keys = sparse_attention_reference(*inputs, SparsePattern("full"), positions, positions, 0.5)[0]
    assert worst([all_keys], [full]) <= 1e-12
