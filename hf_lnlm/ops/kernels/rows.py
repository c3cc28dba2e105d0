"""Small compiled loops that the Turing machine's and the neural computer's processor backends share.

Every loop here works on float32 rows. The compiler vectorises a loop only if it knows that what the loop writes overlaps
nothing else it touches, so it is told: no array that an `inner` function writes may overlap another argument of it. `exp`
and `log` are polynomials, because the scalar library calls cannot be vectorised: relative error below 2e-7 on the ranges
used here. NaN is passed on by all of them.

Complexity: each function is one pass over its rows.
"""

import math
import platform
from typing import Any

from .compiled import formula, inner
from .simd import EXP2, LN2_HIGH, LN2_LOW, LOG2E

try:
    import numpy as np
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

GROUP = 8  # samples that go through time together: their memories stay in the cache while the weights are read once


def _without_count(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The value of an array, or of a tuple of arrays, with empty reference counters."""
    if isinstance(kind, types.Array):
        view = context.make_array(kind)(context, builder, value=value)
        for field in ("meminfo", "parent"):
            setattr(view, field, getattr(view, field).type(None))
        return view._getvalue()
    parts = [builder.extract_value(value, i) for i in range(len(kind))]
    views = [_without_count(context, builder, *pair) for pair in zip(kind, parts, strict=True)]
    return context.make_tuple(builder, kind, views)


@intrinsic
def borrowed(typing_context: Any, arrays: Any) -> Any:
    """The same array, or tuple of arrays, without reference counts: rows then cost no atomic operation. The
    caller keeps them alive."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_count(context, builder, signature.args[0], arguments[0])

    return arrays(arrays), generate


_FLUSH = 0x8040 if platform.machine().lower() in ("x86_64", "amd64") else 0  # bits of the control register


def _control(builder: Any, name: str, place: Any) -> None:
    """Stores (`st`) or loads (`ld`) the control register of the vector unit."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}mxcsr")
    builder.call(function, [builder.bitcast(place, ir.IntType(8).as_pointer())])


@intrinsic
def enable_ftz(typing_context: Any) -> Any:
    """From here on numbers below 1e-38 are zero, as each would cost hundreds of cycles; returns how it was before.

    Products of weightings get there at once: a slot nobody writes to has 1e-6 to the power of its place in the queue.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once_value(builder, ir.IntType(32)(0))
        if _FLUSH:
            _control(builder, "st", place)
        before = builder.load(place)
        builder.store(builder.or_(before, ir.IntType(32)(_FLUSH)), place)
        if _FLUSH:
            _control(builder, "ld", place)
        return before

    return types.int32(), generate


@intrinsic
def restore_fp_mode(typing_context: Any, before: Any) -> Any:
    """Undoes `enable_ftz`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _FLUSH:
            _control(builder, "ld", cgutils.alloca_once_value(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int32), generate


ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
EXP_MIN, EXP_MAX, EXP_ROUND, EXP_BIAS = np.float32(-87.0), np.float32(88.0), np.float32(127.5), np.int32(127)
LOG_0, LOG_1, LOG_2 = np.float32(7.0376836292e-2), np.float32(-1.1514610310e-1), np.float32(1.1676998740e-1)
LOG_3, LOG_4, LOG_5 = np.float32(-1.2420140846e-1), np.float32(1.4249322787e-1), np.float32(-1.6668057665e-1)
LOG_6, LOG_7, LOG_8 = np.float32(2.0000714765e-1), np.float32(-2.4999993993e-1), np.float32(3.3333331174e-1)
SQRT_HALF = np.float32(0.707106781186547524)


@formula
def fast_exp(x: Any) -> Any:
    """e^x: range reduction by powers of two, and the polynomial that `simd` takes of the rest."""
    x = EXP_MIN if x < EXP_MIN else x
    x = EXP_MAX if x > EXP_MAX else x
    biased = np.int32(x * LOG2E + EXP_ROUND)  # the exponent's bits as they are stored; positive: truncation rounds
    n = np.float32(biased - EXP_BIAS)
    r = (x - n * LN2_HIGH - n * LN2_LOW) * LOG2E
    p = (((((EXP2[0] * r + EXP2[1]) * r + EXP2[2]) * r + EXP2[3]) * r + EXP2[4]) * r + EXP2[5]) * r + EXP2[6]
    return p * np.int32(biased << np.int32(23)).view(np.float32)


@formula
def fast_log(x: Any) -> Any:
    """Natural logarithm of a positive number: exponent and a polynomial of degree 8 in the mantissa."""
    bits = np.float32(x).view(np.int32)
    exponent = np.float32((bits >> np.int32(23)) - np.int32(126))
    m = np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    small = m < SQRT_HALF
    exponent = exponent - (ONE if small else ZERO)
    m = (m + m - ONE) if small else (m - ONE)
    z = m * m
    p = ((((LOG_0 * m + LOG_1) * m + LOG_2) * m + LOG_3) * m + LOG_4) * m + LOG_5
    y = (((p * m + LOG_6) * m + LOG_7) * m + LOG_8) * m * z + exponent * LN2_LOW - HALF * z
    value = m + y + exponent * LN2_HIGH
    return value if x == x else x


@formula
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return ONE / (ONE + fast_exp(-x))


@formula
def tanh(x: Any) -> Any:
    """Hyperbolic tangent by way of the logistic function."""
    return TWO * sigmoid(TWO * x) - ONE


@formula
def softplus(x: Any) -> Any:
    """log(1 + e^x), without overflow."""
    return (x if x > ZERO else ZERO) + fast_log(ONE + fast_exp(-abs(x))) + ZERO * x


@formula
def clamp(x: Any, bound: Any) -> Any:
    """`x` within ±`bound`; NaN stays NaN."""
    x = -bound if x < -bound else x
    return bound if x > bound else x


@inner
def largest(row: Any) -> Any:
    """The largest entry of a row, in eight chains, since one alone would wait for itself at every entry."""
    a = b = c = d = e = f = g = h = row[0]
    count = row.shape[0]
    whole = count - count % 8
    for n in range(0, whole, 8):
        a, b, c, d = max(a, row[n]), max(b, row[n + 1]), max(c, row[n + 2]), max(d, row[n + 3])
        e, f, g, h = max(e, row[n + 4]), max(f, row[n + 5]), max(g, row[n + 6]), max(h, row[n + 7])
    for n in range(whole, count):
        a = max(a, row[n])
    return max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))


@inner
def apply_sigmoid(source: Any, target: Any) -> None:
    """target = sigmoid(source)."""
    for n in range(source.shape[0]):
        target[n] = sigmoid(source[n])


@inner
def apply_tanh(source: Any, target: Any) -> None:
    """target = tanh(source)."""
    for n in range(source.shape[0]):
        target[n] = tanh(source[n])


@inner
def sigmoid_in_place(row: Any) -> None:
    """row = sigmoid(row): one array, since two names for one row would look like an overlap and run unvectorised."""
    for n in range(row.shape[0]):
        row[n] = sigmoid(row[n])


@inner
def tanh_in_place(row: Any) -> None:
    """row = tanh(row)."""
    for n in range(row.shape[0]):
        row[n] = tanh(row[n])


@inner
def dot(x: Any, y: Any) -> Any:
    """Σ x·y."""
    total = ZERO
    for n in range(x.shape[0]):
        total += x[n] * y[n]
    return total


@inner
def add_scaled(target: Any, row: Any, scale: Any) -> None:
    """target += scale · row."""
    for n in range(target.shape[0]):
        target[n] += scale * row[n]


@inner
def add_four(target: Any, m0: Any, m1: Any, m2: Any, m3: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    """target += a·m0 + b·m1 + c·m2 + d·m3."""
    for n in range(target.shape[0]):
        target[n] += (a * m0[n] + b * m1[n]) + (c * m2[n] + d * m3[n])


@inner
def fill_row(row: Any, value: Any) -> None:
    """row = value."""
    for n in range(row.shape[0]):
        row[n] = value


@inner
def clip_row(row: Any, bound: Any) -> None:
    """Every entry of a row within ±`bound`."""
    for n in range(row.shape[0]):
        row[n] = clamp(row[n], bound)


@inner
def copy_row(source: Any, target: Any) -> None:
    """target = source."""
    for n in range(source.shape[0]):
        target[n] = source[n]


@inner
def copy_rows(source: Any, target: Any) -> None:
    """target = source, two dimensions."""
    for q in range(source.shape[0]):
        a, b = source[q], target[q]
        for n in range(a.shape[0]):
            b[n] = a[n]


@inner
def add_weighted_rows(matrix: Any, coefficients: Any, scale: Any, out: Any) -> None:
    """out += scale · coefficients @ matrix, four rows of `matrix` (q, n) at a time."""
    rows = matrix.shape[0]
    whole = rows - rows % 4
    for q in range(0, whole, 4):
        a, b, c, d = coefficients[q], coefficients[q + 1], coefficients[q + 2], coefficients[q + 3]
        m0, m1, m2, m3 = matrix[q], matrix[q + 1], matrix[q + 2], matrix[q + 3]
        add_four(out, m0, m1, m2, m3, scale * a, scale * b, scale * c, scale * d)
    for q in range(whole, rows):
        add_scaled(out, matrix[q], scale * coefficients[q])


@inner
def _add_squares(out: Any, m0: Any, m1: Any, m2: Any, m3: Any) -> None:
    """out += m0² + m1² + m2² + m3²."""
    for n in range(out.shape[0]):
        out[n] += (m0[n] * m0[n] + m1[n] * m1[n]) + (m2[n] * m2[n] + m3[n] * m3[n])


@inner
def inverse_norms(memory: Any, floor: Any, out: Any) -> None:
    """out[n] = 1 / sqrt(Σ_q memory[q, n]² + floor): the floor lies inside the root, so that the gradient at zero is
    finite."""
    fill_row(out, floor)
    rows = memory.shape[0]
    whole = rows - rows % 4
    for q in range(0, whole, 4):
        _add_squares(out, memory[q], memory[q + 1], memory[q + 2], memory[q + 3])
    for q in range(whole, rows):
        row = memory[q]
        for n in range(out.shape[0]):
            out[n] += row[n] * row[n]
    for n in range(out.shape[0]):
        out[n] = ONE / math.sqrt(out[n])


@inner
def _scaled_scores(scores: Any, inverse: Any) -> None:
    """scores ∘ inverse norms: cosines."""
    for n in range(scores.shape[0]):
        scores[n] *= inverse[n]


@inner
def _shifted_exp(scores: Any, strength: Any, top: Any, out: Any) -> Any:
    """out = e^(strength·(scores − top)); returns its sum."""
    total = ZERO
    for n in range(scores.shape[0]):
        value = fast_exp(strength * (scores[n] - top))
        out[n] = value
        total += value
    return total


@inner
def scale_row(row: Any, scale: Any) -> None:
    """row *= scale."""
    for n in range(row.shape[0]):
        row[n] *= scale


@inner
def content_scores(memory: Any, key: Any, inverse: Any, floor: Any, scores: Any) -> Any:
    """Cosines of `key` (W,) with every slot of `memory` (W, N); returns the key's inverse norm."""
    key_inverse = ONE / np.float32(math.sqrt(dot(key, key) + floor))
    fill_row(scores, ZERO)
    add_weighted_rows(memory, key, key_inverse, scores)
    _scaled_scores(scores, inverse)
    return key_inverse


@inner
def content_weighting(scores: Any, strength: Any, out: Any) -> None:
    """out = softmax(strength · scores)."""
    total = _shifted_exp(scores, strength, largest(scores), out)
    scale_row(out, ONE / total)


@inner
def _shifted_exp_in_place(row: Any, strength: Any, top: Any) -> Any:
    """row = e^(strength·(row − top)); returns its sum."""
    total = ZERO
    for n in range(row.shape[0]):
        value = fast_exp(strength * (row[n] - top))
        row[n] = value
        total += value
    return total


@inner
def content_weighting_in_place(row: Any, strength: Any) -> None:
    """row = softmax(strength · row)."""
    total = _shifted_exp_in_place(row, strength, largest(row))
    scale_row(row, ONE / total)


@inner
def _content_terms(weighting: Any, gradient: Any, mean: Any, strength: Any, terms: Any) -> None:
    """terms = strength · d(scores)."""
    for n in range(weighting.shape[0]):
        terms[n] = strength * weighting[n] * (gradient[n] - mean)


@inner
def _split_terms(terms: Any, scores: Any, inverse: Any, curvature: Any) -> None:
    """curvature = terms·scores/|m|², then terms /= |m|."""
    for n in range(terms.shape[0]):
        value = terms[n] * inverse[n]
        curvature[n] = value * scores[n] * inverse[n]
        terms[n] = value


@inner
def _content_row(row: Any, gradient: Any, terms: Any, curvature: Any, key: Any) -> Any:
    """Adds the cosine's gradient to one memory row; returns the key entry's numerator."""
    total = ZERO
    for n in range(row.shape[0]):
        total += terms[n] * row[n]
        gradient[n] += terms[n] * key - curvature[n] * row[n]
    return total


@inner
def content_backward(
    memory: Any, d_memory: Any, key: Any, key_inverse: Any, strength: Any, inverse: Any, scores: Any, weighting: Any,
    gradient: Any, d_key: Any, terms: Any, curvature: Any,
) -> Any:  # fmt: skip
    """Gradient of softmax(strength · cosine): adds to `d_memory`, sets `d_key`, returns that of the strength."""
    mean = dot(gradient, weighting)
    _content_terms(weighting, gradient, mean, strength, terms)
    along_key = dot(terms, scores)
    _split_terms(terms, scores, inverse, curvature)
    for q in range(key.shape[0]):
        unit = key[q] * key_inverse
        numerator = _content_row(memory[q], d_memory[q], terms, curvature, unit)
        d_key[q] = (numerator - along_key * unit) * key_inverse
    d_strength = ZERO
    for n in range(weighting.shape[0]):
        d_strength += weighting[n] * (gradient[n] - mean) * scores[n]
    return d_strength


@inner
def write_row(row: Any, weighting: Any, erase: Any, add: Any) -> None:
    """One word position: row = row ∘ (1 − erase·w) + add·w."""
    for n in range(row.shape[0]):
        row[n] += weighting[n] * (add - erase * row[n])


@inner
def written_row(before: Any, weighting: Any, erase: Any, add: Any, after: Any) -> None:
    """`write_row`, elsewhere."""
    for n in range(before.shape[0]):
        after[n] = before[n] + weighting[n] * (add - erase * before[n])


@inner
def keep_row(weightings: Any, erases: Any, position: Any, keep: Any, skip: Any) -> None:
    """keep = Π_i (1 − e_i·w_i) over the write heads but `skip` (−1: all of them)."""
    fill_row(keep, ONE)
    for i in range(weightings.shape[0]):
        if i != skip:
            w, e = weightings[i], erases[i, position]
            for n in range(keep.shape[0]):
                keep[n] *= ONE - e * w[n]


@inner
def write_memory(memory: Any, weightings: Any, erases: Any, adds: Any, keep: Any) -> None:
    """All erases, then all adds, in place: memory (W, N) = memory ∘ Π(1 − w e) + Σ w a."""
    for q in range(memory.shape[0]):
        if weightings.shape[0] == 1:
            write_row(memory[q], weightings[0], erases[0, q], adds[0, q])
            continue
        keep_row(weightings, erases, q, keep, -1)
        for n in range(keep.shape[0]):
            memory[q, n] *= keep[n]
        for i in range(weightings.shape[0]):
            add_scaled(memory[q], weightings[i], adds[i, q])


@inner
def dot_three(x: Any, y: Any, z: Any) -> Any:
    """Σ x·y·z."""
    total = ZERO
    for n in range(x.shape[0]):
        total += x[n] * y[n] * z[n]
    return total


@inner
def _write_row_backward(before: Any, d_row: Any, weighting: Any, d_weighting: Any, erase: Any, add: Any) -> None:
    """One write head, one word position, but for the gradients of erase and add."""
    for n in range(weighting.shape[0]):
        gradient = d_row[n]
        d_weighting[n] += gradient * (add - before[n] * erase)
        d_row[n] = gradient * (ONE - erase * weighting[n])


@inner
def _several_heads_backward(
    before: Any, d_row: Any, weightings: Any, d_weightings: Any, erases: Any, adds: Any, d_erases: Any, d_adds: Any,
    q: Any, keep: Any,
) -> None:  # fmt: skip
    """Several write heads, word position `q`."""
    for i in range(weightings.shape[0]):
        keep_row(weightings, erases, q, keep, i)
        w, d_w, e, a = weightings[i], d_weightings[i], erases[i, q], adds[i, q]
        d_erase, d_add = ZERO, ZERO
        for n in range(keep.shape[0]):
            gradient = d_row[n]
            product = gradient * before[n] * keep[n]
            d_add += gradient * w[n]
            d_erase -= product * w[n]
            d_w[n] += gradient * a - product * e
        d_erases[i, q], d_adds[i, q] = d_erase, d_add
    keep_row(weightings, erases, q, keep, -1)
    for n in range(keep.shape[0]):
        d_row[n] *= keep[n]


@inner
def write_backward(
    before: Any, d_memory: Any, weightings: Any, d_weightings: Any, erases: Any, adds: Any, d_erases: Any, d_adds: Any,
    keep: Any,
) -> None:  # fmt: skip
    """Turns d(after) in `d_memory` into d(before); adds to `d_weightings`, sets `d_erases` and `d_adds`."""
    for q in range(before.shape[0]):
        if weightings.shape[0] == 1:
            w, d_w = weightings[0], d_weightings[0]
            d_erases[0, q], d_adds[0, q] = -dot_three(d_memory[q], before[q], w), dot(d_memory[q], w)
            _write_row_backward(before[q], d_memory[q], w, d_w, erases[0, q], adds[0, q])
        else:
            _several_heads_backward(
                before[q], d_memory[q], weightings, d_weightings, erases, adds, d_erases, d_adds, q, keep
            )


@inner
def read_memory(memory: Any, weighting: Any, out: Any) -> None:
    """out (W,) = memory (W, N) @ weighting (N,)."""
    for q in range(memory.shape[0]):
        out[q] = dot(memory[q], weighting)


@inner
def read_backward(memory: Any, d_memory: Any, weighting: Any, d_weighting: Any, gradient: Any) -> None:
    """Adds the gradients of `read_memory`."""
    add_weighted_rows(memory, gradient, ONE, d_weighting)
    for q in range(memory.shape[0]):
        add_scaled(d_memory[q], weighting, gradient[q])
