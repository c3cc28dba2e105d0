"""Sixteen channels at once: explicit vectors for numba kernels, where LLVM's own vectoriser leaves speed behind.

A `Lanes` value is LLVM's `<16 x float>`: one register with AVX-512, two with AVX2, four with SSE or NEON. Arithmetic is
spelled out (`fma(p, h, mul(s, b))`), every lane rounds alike, and no loop needs a check whether arrays overlap. Memory is
given by address (`tensor.data_ptr()`; the caller keeps the tensor alive): numba's own arrays are counted references, and
counting costs more than sixteen multiplications.

`decay` splits its argument into an integer and a rest of at most 1/2, evaluates a degree-6 polynomial of the rest and adds
the integer to the exponent bits. Results below 2^-126 are flushed to zero: denormal numbers would make the recurrences a
hundred times slower. Relative error of `2^x` ≤ 1.2e-7. AVX-512 has instructions for the first and the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from .compiled import STRICT, part

try:
    import numpy as np
    from llvmlite.binding import get_host_cpu_features
    from numba.core import cgutils, config, types
    from numba.core.cgutils import ir
    from numba.extending import intrinsic, models, register_model
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

WIDTH = 16

_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
_FLAGS = ("contract", "nsz")

_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
LOG2E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# Adding 1.5 · 2^23 rounds to the nearest integer and leaves that integer in the low mantissa bits.
_ROUNDER = np.float32(12582912.0)
_NORMAL, _SMALLEST = np.float32(-126.0), np.float32(2.0**-126)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
# Coefficients of `2^x` for at most 1/2 either way, highest power first; relative error ≤ 1.2e-7.
EXP2 = (
    np.float32(1.5370704932138324e-4), np.float32(1.3399848248809576e-3), np.float32(9.618373587727547e-3),
    np.float32(5.550329014658928e-2), np.float32(0.24022647738456726), np.float32(0.6931471824645996), _ONE,
)  # fmt: skip
_L1, _L2, _L3, _L4 = np.float32(1 / 3), np.float32(1 / 5), np.float32(1 / 7), np.float32(1 / 9)
_L5, _L6, _L7 = np.float32(1 / 11), np.float32(1 / 13), np.float32(1 / 15)

Vector = Any  # a `Lanes` value inside a kernel
Build = Callable[..., Any]


class Lanes(types.Type):
    """numba's type of sixteen float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{WIDTH}")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


_lanes = Lanes()


def _operation(build: Build, arguments: int) -> Any:
    """Make an intrinsic from vectors to a vector; `build(builder, *vectors)` writes its instructions."""

    def typed(context: Any, *kinds: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return build(builder, *values)

        return _lanes(*[_lanes] * arguments), generate

    if arguments == 1:
        return intrinsic(lambda context, x: typed(context, x))
    if arguments == 2:
        return intrinsic(lambda context, x, y: typed(context, x, y))
    return intrinsic(lambda context, x, y, z: typed(context, x, y, z))


def _constant(value: Any) -> Any:
    return ir.Constant(_FLOATS, [ir.Constant(ir.FloatType(), float(value))] * WIDTH)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return builder.fadd(builder.fmul(x, y, flags=_FLAGS), z, flags=_FLAGS)


def _at_least(builder: Any, x: Any, bound: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, _constant(bound)), _constant(bound), x)


def _at_most(builder: Any, x: Any, bound: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, _constant(bound)), _constant(bound), x)


def _polynomial(builder: Any, rest: Any) -> Any:
    """`2^rest`, for at most 1/2 either way."""
    p = _constant(EXP2[0])
    for coefficient in EXP2[1:]:
        p = _fma(builder, p, rest, _constant(coefficient))
    return p


def _power(builder: Any, rest: Any, rounded: Any) -> Any:
    """`2^rest` times the power of two in the low bits of `rounded`."""
    p = _polynomial(builder, rest)
    exponent = builder.shl(
        builder.bitcast(rounded, _INTEGERS), ir.Constant(_INTEGERS, [ir.Constant(ir.IntType(32), 23)] * WIDTH)
    )
    return builder.bitcast(builder.add(builder.bitcast(p, _INTEGERS), exponent), _FLOATS)


@cache
def has_avx512() -> bool:
    """Tell whether kernels are compiled for a processor with AVX-512's scaling and range reduction."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return False  # compiled for another processor than this one
    try:
        features = get_host_cpu_features()
    except RuntimeError:
        return False
    return bool(features.get("avx512f") and features.get("avx512dq"))


def _wide(builder: Any, name: str, *arguments: Any) -> Any:
    """Call an AVX-512 instruction that works on sixteen numbers."""
    kind = ir.FunctionType(_FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.{name}"), arguments)


def _wide_decay(builder: Any, x: Any) -> Any:
    """`_decay` in ten instructions instead of thirteen: one reduces, one scales and zeroes what is too small."""
    word, half = ir.IntType(32), ir.IntType(16)
    kept = builder.bitcast(builder.fcmp_unordered(">=", x, _constant(_NORMAL)), half)
    rest = _wide(builder, "reduce.ps.512", x, word(8), x, half(-1), word(4))
    whole = builder.fsub(x, rest)
    return _wide(builder, "scalef.ps.512", _polynomial(builder, rest), whole, _constant(_ZERO), kept, word(4))


def _decay(builder: Any, x: Any) -> Any:
    clipped = _at_least(builder, x, _NORMAL)
    rounded = builder.fadd(clipped, _constant(_ROUNDER))
    rest = builder.fsub(clipped, builder.fsub(rounded, _constant(_ROUNDER)))
    return builder.fsub(_power(builder, rest, rounded), _constant(_SMALLEST))


def _exp(builder: Any, x: Any) -> Any:
    clipped = _at_most(builder, _at_least(builder, x, _LOWEST), _HIGHEST)
    rounded = builder.fadd(builder.fmul(clipped, _constant(LOG2E)), _constant(_ROUNDER))
    whole = builder.fsub(rounded, _constant(_ROUNDER))
    rest = _fma(builder, whole, _constant(-LN2_HIGH), clipped)
    rest = _fma(builder, whole, _constant(-LN2_LOW), rest)
    return _power(builder, builder.fmul(rest, _constant(LOG2E)), rounded)


add = _operation(lambda builder, x, y: builder.fadd(x, y, flags=_FLAGS), 2)
sub = _operation(lambda builder, x, y: builder.fsub(x, y, flags=_FLAGS), 2)
mul = _operation(lambda builder, x, y: builder.fmul(x, y, flags=_FLAGS), 2)
div = _operation(lambda builder, x, y: builder.fdiv(x, y), 2)
fma = _operation(_fma, 3)
positive = _operation(lambda builder, x: _at_least(builder, x, _ZERO), 1)
negative = _operation(lambda builder, x: _at_most(builder, x, _ZERO), 1)
# `y`, or 0 where `x` is below a bound.
vanish_below = _operation(
    lambda builder, x, bound, y: builder.select(builder.fcmp_ordered("<", x, bound), _constant(0.0), y), 3
)
# `2^x` for `x ≤ 0`; 0 below -126; NaN stays NaN. The innermost operation of the scan.
decay = _operation(_wide_decay if has_avx512() else _decay, 1)
# `exp(x)`, clipped to finite, normal results; the argument is reduced in two parts.
exp = _operation(_exp, 1)


@intrinsic
def splat(context: Any, x: Any) -> Any:
    """The same number in every lane."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), values[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(_INTEGERS, [ir.Constant(ir.IntType(32), 0)] * WIDTH)
        return builder.shuffle_vector(one, one, zeros)

    return _lanes(types.float32), generate


@intrinsic
def first_lane(context: Any, x: Any) -> Any:
    """The number in the first lane."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.extract_element(values[0], ir.Constant(ir.IntType(32), 0))

    return types.float32(_lanes), generate


@intrinsic
def total(context: Any, x: Any) -> Any:
    """The sum of the lanes, as a tree."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value, half = values[0], WIDTH // 2
        while half:
            order = [ir.Constant(ir.IntType(32), (lane + half) % WIDTH) for lane in range(WIDTH)]
            value = builder.fadd(value, builder.shuffle_vector(value, value, ir.Constant(_INTEGERS, order)))
            half //= 2
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(_lanes), generate


def _pointer(builder: Any, address: Any, at: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [at])


def _reader(kind: Any, numba_kind: Any) -> Any:
    """Make an intrinsic that reads element `at` of numbers of one kind."""

    def typed(context: Any, address: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.load(_pointer(builder, values[0], values[1], kind))

        return numba_kind(types.intp, types.intp), generate

    return intrinsic(lambda context, address, at: typed(context, address, at))


def _writer(kind: Any, numba_kind: Any) -> Any:
    """Make an intrinsic that writes element `at` of numbers of one kind."""

    def typed(context: Any, address: Any, at: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            builder.store(values[2], _pointer(builder, values[0], values[1], kind))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, numba_kind), generate

    return intrinsic(lambda context, address, at, x: typed(context, address, at, x))


# Single elements of a flat array, by its address.
read_float, write_float = (make(ir.FloatType(), types.float32) for make in (_reader, _writer))
read_double, write_double = (make(ir.DoubleType(), types.float64) for make in (_reader, _writer))
read_integer = _reader(ir.IntType(64), types.int64)
read_byte = _reader(ir.IntType(8), types.uint8)


def _vector_at(builder: Any, address: Any, at: Any) -> Any:
    return builder.bitcast(_pointer(builder, address, at, ir.FloatType()), _FLOATS.as_pointer())


@intrinsic
def load(context: Any, address: Any, at: Any) -> Any:
    """Sixteen numbers of a flat array, from element `at` on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(_vector_at(builder, *values), align=4)

    return _lanes(types.intp, types.intp), generate


@intrinsic
def store(context: Any, address: Any, at: Any, x: Any) -> Any:
    """Write sixteen numbers of a flat array, from element `at` on."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _vector_at(builder, *values[:2]), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, _lanes), generate


def _first(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    limit = builder.trunc(count, ir.IntType(32))
    every = builder.insert_element(ir.Constant(_INTEGERS, ir.Undefined), limit, ir.Constant(ir.IntType(32), 0))
    every = builder.shuffle_vector(every, every, ir.Constant(_INTEGERS, [ir.Constant(ir.IntType(32), 0)] * WIDTH))
    numbers = ir.Constant(_INTEGERS, [ir.Constant(ir.IntType(32), lane) for lane in range(WIDTH)])
    return builder.icmp_signed("<", numbers, every)


def _masked(builder: Any, name: str, result: Any, kinds: list[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name)


@intrinsic
def load_some(context: Any, address: Any, at: Any, count: Any) -> Any:
    """The first `count` of sixteen numbers, zeros for the others, whose memory is not touched."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _vector_at(builder, *values[:2])
        mask = _first(builder, values[2])
        kinds = [_FLOATS.as_pointer(), ir.IntType(32), mask.type, _FLOATS]
        function = _masked(builder, f"llvm.masked.load.v{WIDTH}f32.p0", _FLOATS, kinds)
        return builder.call(function, [pointer, ir.Constant(ir.IntType(32), 4), mask, _constant(0.0)])

    return _lanes(types.intp, types.intp, types.intp), generate


@intrinsic
def store_some(context: Any, address: Any, at: Any, x: Any, count: Any) -> Any:
    """Write the first `count` of sixteen numbers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _vector_at(builder, *values[:2])
        mask = _first(builder, values[3])
        kinds = [_FLOATS, _FLOATS.as_pointer(), ir.IntType(32), mask.type]
        function = _masked(builder, f"llvm.masked.store.v{WIDTH}f32.p0", ir.VoidType(), kinds)
        builder.call(function, [values[2], pointer, ir.Constant(ir.IntType(32), 4), mask])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, _lanes, types.intp), generate


def padded_size(count: int) -> int:
    """The least multiple of `WIDTH` that is not below `count`."""
    return (count + WIDTH - 1) // WIDTH * WIDTH


whole_lanes = part(STRICT)(padded_size)  # the same within kernels


@part(STRICT, forceinline=True)
def load_row(address: int, at: int, left: int) -> Vector:
    """Sixteen numbers of a row of which `left` remain."""
    return load(address, at) if left >= WIDTH else load_some(address, at, left)


@intrinsic
def _load_lanes(context: Any, address: Any, at: Any, step: Any, count: Any) -> Any:
    """Elements `at + lane · step` for the first `count` lanes, the last of them for the others."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address, at, step, count = values
        vector = ir.Constant(_FLOATS, ir.Undefined)
        last = builder.sub(count, ir.Constant(count.type, 1))
        for lane in range(WIDTH):
            number = ir.Constant(count.type, lane)
            place = builder.select(builder.icmp_signed("<", number, last), number, last)
            pointer = _pointer(builder, address, builder.add(at, builder.mul(place, step)), ir.FloatType())
            vector = builder.insert_element(vector, builder.load(pointer), ir.Constant(ir.IntType(32), lane))
        return vector

    return _lanes(types.intp, types.intp, types.intp, types.intp), generate


@part(STRICT, forceinline=True)
def load_column(address: int, at: int, step: int, left: int) -> Vector:
    """Sixteen numbers that lie `step` elements apart, of which `left` remain."""
    return _load_lanes(address, at, step, left)


@part(STRICT, forceinline=True)
def store_row(address: int, at: int, x: Vector, left: int) -> None:
    """Write sixteen numbers of a row of which `left` remain."""
    if left >= WIDTH:
        store(address, at, x)
    else:
        store_some(address, at, x, left)


@part(STRICT, forceinline=True)
def sigmoid(x: Vector) -> Vector:
    """Logistic function `1 / (1 + exp(-x))`."""
    one = splat(_ONE)
    return div(one, add(one, exp(sub(splat(_ZERO), x))))


@part(STRICT, forceinline=True)
def softplus(x: Vector) -> Vector:
    """`log(1 + exp(x))`, relatively exact for very negative `x` too.

    With `w = exp(-|x|)`, `log1p(w) = 2·artanh(s)`, `s = w / (2 + w) ≤ 1/3`, summed as its odd power series.
    """
    above = positive(x)
    w = exp(sub(negative(x), above))
    s = div(w, add(splat(_TWO), w))
    q = mul(s, s)
    series = fma(fma(fma(splat(_L7), q, splat(_L6)), q, splat(_L5)), q, splat(_L4))
    series = fma(fma(fma(fma(series, q, splat(_L3)), q, splat(_L2)), q, splat(_L1)), q, splat(_ONE))
    return fma(mul(splat(_TWO), s), series, above)


@part(STRICT, forceinline=True)
def scalar_exp(x: Any) -> Any:
    """`exp` of one number."""
    return first_lane(exp(splat(x)))


@part(STRICT, forceinline=True)
def scalar_softplus(x: Any) -> Any:
    """`softplus` of one number."""
    return first_lane(softplus(splat(x)))


@part(STRICT)
def flush(part: int, totals: int, count: int) -> None:
    """Move a block's float32 sums into the float64 totals."""
    for i in range(count):
        write_double(totals, i, read_double(totals, i) + read_float(part, i))
        write_float(part, i, _ZERO)
