"""Exponential, logistic and softplus in float32 that LLVM can vectorise (numba has no vector `exp` without SVML).

`decayf` splits the argument into an integer and a rest of at most 1/2, evaluates a degree-6 polynomial of the rest and
adds the integer to the exponent bits. Results below 2^-126 are flushed to zero: denormal numbers would make the
recurrences a hundred times slower.
Relative error of `2^x` ≤ 1.2e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

# Every lane rounds alike, whether it runs in a vector loop or in its scalar remainder: results do not depend on where
# tensors lie in memory.
STRICT = {"contract", "nsz"}
# For sums over channels, whose order is then the compiler's.
LANES = {"contract", "nsz", "reassoc"}

LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_ZERO = np.float32(0.0)
# Adding 1.5 · 2^23 rounds to the nearest integer and leaves that integer in the low mantissa bits.
_ROUNDER = np.float32(12582912.0)
_LOWEST = np.float32(-125.0)
_HIGHEST = np.float32(127.0)
_NORMAL = np.float32(-126.0)
_SMALLEST = np.float32(2.0**-126)
_P6 = np.float32(1.5370704932138324e-4)
_P5 = np.float32(1.3399848248809576e-3)
_P4 = np.float32(9.618373587727547e-3)
_P3 = np.float32(5.550329014658928e-2)
_P2 = np.float32(0.24022647738456726)
_P1 = np.float32(0.6931471824645996)
_L1 = np.float32(1.0 / 3.0)
_L2 = np.float32(1.0 / 5.0)
_L3 = np.float32(1.0 / 7.0)
_L4 = np.float32(1.0 / 9.0)
_L5 = np.float32(1.0 / 11.0)
_L6 = np.float32(1.0 / 13.0)
_L7 = np.float32(1.0 / 15.0)


def compiled(flags: set[str], forceinline: bool = False) -> Any:
    """Decorator: compile with numba, cached on disk where some folder for the cache can be written.

    Args:
        flags: LLVM fast-math flags.
        forceinline: always inline into the caller; without it a loop that calls the function may stay scalar.
    """

    def decorate(function: Any) -> Any:
        options: dict[str, Any] = {"fastmath": flags, "error_model": "numpy", "nogil": True, "forceinline": forceinline}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no writable place for the cache: compile again in every process
            return njit(**options)(function)

    return decorate


def _bit_cast(source: Any, target: Any) -> Any:
    """Make an intrinsic that reinterprets the bits of a 32-bit number."""

    @intrinsic
    def cast(typing_context: Any, value: Any) -> Any:
        """Reinterpret bits."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return cast


_float_bits = _bit_cast(types.float32, types.int32)
_float_from_bits = _bit_cast(types.int32, types.float32)


@compiled(STRICT, forceinline=True)
def _power(f: Any, rounded: Any, x: Any) -> Any:
    """`2^f` times the power of two in the low bits of `rounded`; 0 where `x` is below the normal range."""
    p = (((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _ONE
    scaled = _float_from_bits(np.int32(_float_bits(p) + np.int32(_float_bits(rounded) << np.int32(23))))
    return _ZERO if x < _LOWEST else scaled


@compiled(STRICT, forceinline=True)
def _clip(x: Any, low: Any, high: Any) -> Any:
    """Keep an exponent in the normal range. Conditional expressions become vector selects and let NaN through."""
    clipped = low if x < low else x
    return high if clipped > high else clipped


@compiled(STRICT, forceinline=True)
def decayf(x: Any) -> Any:
    """`2^x` for `x ≤ 0` in float32; 0 below -126; NaN stays NaN; any `x > 127` gives nonsense.

    The innermost operation of the scan, so without the second bound and with a subtraction for the flush to zero.
    """
    clipped = _NORMAL if x < _NORMAL else x
    rounded = clipped + _ROUNDER
    f = clipped - (rounded - _ROUNDER)
    p = (((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1) * f + _ONE
    return _float_from_bits(np.int32(_float_bits(p) + np.int32(_float_bits(rounded) << np.int32(23)))) - _SMALLEST


@compiled(STRICT, forceinline=True)
def expf(x: Any) -> Any:
    """`exp(x)` in float32, with the argument reduced in two parts: relative error ≤ 1.2e-7 for every `x`."""
    clipped = _clip(x, _LOWEST / LOG2E, _HIGHEST / LOG2E)
    rounded = clipped * LOG2E + _ROUNDER
    whole = rounded - _ROUNDER
    f = (clipped - whole * _LN2_HIGH - whole * _LN2_LOW) * LOG2E
    return _power(f, rounded, x * LOG2E)


@compiled(STRICT, forceinline=True)
def sigmoidf(x: Any) -> Any:
    """Logistic function `1 / (1 + exp(-x))` in float32."""
    return _ONE / (_ONE + expf(-x))


@compiled(STRICT, forceinline=True)
def softplusf(x: Any) -> Any:
    """`log(1 + exp(x))` in float32, relatively exact for very negative `x` too.

    With `w = exp(-|x|)`, `log1p(w) = 2·artanh(s)`, `s = w / (2 + w) ≤ 1/3`, summed as its odd power series.
    """
    w = expf(-x if x > _ZERO else x)
    s = w / (_TWO + w)
    q = s * s
    series = ((((((_L7 * q + _L6) * q + _L5) * q + _L4) * q + _L3) * q + _L2) * q + _L1) * q + _ONE
    return (x if x > _ZERO else _ZERO) + _TWO * s * series
