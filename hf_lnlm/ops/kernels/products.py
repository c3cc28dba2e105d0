"""Compiled products of a few samples' rows with a weight matrix, whose sums stay in vector registers.

Within a step of a recurrence few samples wait for the same matrix, too few for a library's product to be worth its call.
So a tile of columns is summed over all rows of the matrix at once, for four samples together: each number of the matrix
is read once and used four times, and nothing is stored before the sum is complete. Matrices are packed tile by tile
beforehand, so that they are read from one end to the other.

Glossary: `lanes` as many float32 numbers as one instruction takes; a tile is two of them wide.

Complexity: O(K·n) multiply-adds a sample, for K inputs and n outputs.
"""

from typing import Any

import torch

from .compiled import inner
from .rows import add_scaled

try:
    import llvmlite.binding
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic, models, register_model
except ImportError as error:
    raise ImportError("the cpu backend needs numba (pip install 'hf_lnlm[cpu]')") from error

LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else 8
FEW = 4
_WIDE = ir.VectorType(ir.FloatType(), LANES)


class Lanes(types.Type):
    """`LANES` float32 numbers in a register."""

    def __init__(self) -> None:
        super().__init__(name=f"float32 x {LANES}")


_LANES = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    """How a compiled function holds them."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _WIDE)


def _address(context: Any, builder: Any, kind: Any, array: Any, start: Any) -> Any:
    """Where `LANES` numbers of a row begin."""
    row = context.make_array(kind)(context, builder, value=array)
    return builder.bitcast(builder.gep(row.data, [start]), _WIDE.as_pointer())


@intrinsic
def no_lanes(typing_context: Any) -> Any:
    """Zeros."""
    return _LANES(), lambda context, builder, signature, arguments: ir.Constant(_WIDE, [0.0] * LANES)


@intrinsic
def load_lanes(typing_context: Any, row: Any, start: Any) -> Any:
    """row[start : start + LANES]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], *arguments), align=4)

    return _LANES(row, types.intp), generate


@intrinsic
def multiply_add(typing_context: Any, lanes: Any, factor: Any, total: Any) -> Any:
    """total + lanes · factor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, factor, total = arguments
        one = builder.insert_element(ir.Constant(_WIDE, ir.Undefined), factor, ir.IntType(32)(0))
        all_places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        spread = builder.shuffle_vector(one, one, all_places)
        return builder.fadd(total, builder.fmul(lanes, spread, flags=["contract"]), flags=["contract"])

    return _LANES(_LANES, types.float32, _LANES), generate


@intrinsic
def add_lanes(typing_context: Any, row: Any, start: Any, lanes: Any) -> Any:
    """row[start : start + LANES] += lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(builder.fadd(builder.load(place, align=4), arguments[2]), place, align=4)
        return context.get_dummy_value()

    return types.void(row, types.intp, _LANES), generate


@intrinsic
def one_lane(typing_context: Any, lanes: Any, place: Any) -> Any:
    """lanes[place]."""
    return types.float32(_LANES, types.intp), lambda context, builder, signature, arguments: builder.extract_element(
        *arguments
    )


TILE = 2 * LANES


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Columns in tiles, the last one filled up with zeros: `(ceil(n / TILE), K·TILE)`.

    Args:
        weight: `(K, n)`, of any strides.
    """
    rows, columns = weight.shape
    tiles, whole = -(-columns // TILE), columns // TILE
    out = weight.new_empty(tiles, rows, TILE)
    if whole:
        out[:whole] = weight[:, : whole * TILE].unflatten(1, (whole, TILE)).transpose(0, 1)
    if whole < tiles:
        out[whole, :, : columns - whole * TILE] = weight[:, whole * TILE :]
        out[whole, :, columns - whole * TILE :] = 0.0
    return out.view(tiles, rows * TILE)


@inner
def _add(row: Any, start: Any, low: Any, high: Any) -> None:
    """row[start : start + TILE] += both halves of a tile, as far as the row goes."""
    if start + TILE <= row.shape[0]:
        add_lanes(row, start, low)
        add_lanes(row, start + LANES, high)
        return
    for j in range(min(LANES, row.shape[0] - start)):
        row[start + j] += one_lane(low, j)
    for j in range(row.shape[0] - start - LANES):
        row[start + LANES + j] += one_lane(high, j)


@inner
def _one_sample(out: Any, start: Any, x: Any, w: Any) -> None:
    """A tile of one sample, even and odd rows apart, so that no sum waits for itself."""
    low, high, odd_low, odd_high = no_lanes(), no_lanes(), no_lanes(), no_lanes()
    for k in range(0, x.shape[0] - 1, 2):
        at = k * TILE
        low = multiply_add(load_lanes(w, at), x[k], low)
        high = multiply_add(load_lanes(w, at + LANES), x[k], high)
        odd_low = multiply_add(load_lanes(w, at + TILE), x[k + 1], odd_low)
        odd_high = multiply_add(load_lanes(w, at + TILE + LANES), x[k + 1], odd_high)
    if x.shape[0] % 2:
        last = x.shape[0] - 1
        low = multiply_add(load_lanes(w, last * TILE), x[last], low)
        high = multiply_add(load_lanes(w, last * TILE + LANES), x[last], high)
    _add(out, start, low, high)
    _add(out, start, odd_low, odd_high)


@inner
def _four_samples(
    out0: Any, out1: Any, out2: Any, out3: Any, start: Any, x0: Any, x1: Any, x2: Any, x3: Any, w: Any
) -> None:
    """A tile of four samples."""
    a, b, c, d = no_lanes(), no_lanes(), no_lanes(), no_lanes()
    e, f, g, h = no_lanes(), no_lanes(), no_lanes(), no_lanes()
    for k in range(x0.shape[0]):
        low, high = load_lanes(w, k * TILE), load_lanes(w, k * TILE + LANES)
        p, q, r, s = x0[k], x1[k], x2[k], x3[k]
        a, b, c, d = multiply_add(low, p, a), multiply_add(low, q, b), multiply_add(low, r, c), multiply_add(low, s, d)
        e, f = multiply_add(high, p, e), multiply_add(high, q, f)
        g, h = multiply_add(high, r, g), multiply_add(high, s, h)
    _add(out0, start, a, e)
    _add(out1, start, b, f)
    _add(out2, start, c, g)
    _add(out3, start, d, h)


@inner
def _add_tiles(
    out: Any, out_step: Any, out_first: Any, columns: Any, x: Any, x_step: Any, x_first: Any, w: Any, first: Any,
    last: Any,
) -> None:  # fmt: skip
    """`add_product` with a packed matrix; a tile stays in the first-level cache while all samples use it."""
    rows, end = w.shape[1] // TILE, out_first + columns
    four, stop = first + (last - first) // 4 * 4, x_first + rows
    for i in range(w.shape[0]):
        for b in range(first, four, 4):
            _four_samples(
                out[b, out_step, out_first:end], out[b + 1, out_step, out_first:end],
                out[b + 2, out_step, out_first:end], out[b + 3, out_step, out_first:end], i * TILE,
                x[b, x_step, x_first:stop], x[b + 1, x_step, x_first:stop], x[b + 2, x_step, x_first:stop],
                x[b + 3, x_step, x_first:stop], w[i],
            )  # fmt: skip
        for b in range(four, last):
            _one_sample(out[b, out_step, out_first:end], i * TILE, x[b, x_step, x_first:stop], w[i])


@inner
def _add_eight(target: Any, w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any, x: Any) -> None:
    """target += Σ_j x[j] · w_j for eight rows."""
    a, b, c, d = x[0], x[1], x[2], x[3]
    e, f, g, h = x[4], x[5], x[6], x[7]
    for n in range(target.shape[0]):
        low = (a * w0[n] + b * w1[n]) + (c * w2[n] + d * w3[n])
        target[n] += low + ((e * w4[n] + f * w5[n]) + (g * w6[n] + h * w7[n]))


@inner
def _add_rows(
    out: Any, out_step: Any, out_first: Any, columns: Any, x: Any, x_step: Any, x_first: Any, w: Any, first: Any,
    last: Any,
) -> None:  # fmt: skip
    """`add_product` with a plain matrix, eight of its rows at a time."""
    rows, end = w.shape[0], out_first + columns
    whole = rows - rows % 8
    for k in range(0, whole, 8):
        for b in range(first, last):
            x_row, target = x[b, x_step, x_first + k : x_first + k + 8], out[b, out_step, out_first:end]
            _add_eight(target, w[k], w[k + 1], w[k + 2], w[k + 3], w[k + 4], w[k + 5], w[k + 6], w[k + 7], x_row)
    for k in range(whole, rows):
        for b in range(first, last):
            add_scaled(out[b, out_step, out_first:end], w[k], x[b, x_step, x_first + k])


@inner
def add_product(
    tiled: Any, out: Any, out_step: Any, out_first: Any, columns: Any, x: Any, x_step: Any, x_first: Any, w: Any,
    first: Any, last: Any,
) -> None:  # fmt: skip
    """out[b, out_step, out_first : out_first+columns] += x[b, x_step, x_first : x_first+K] @ W for first ≤ b < last.

    `w` is `packed` if `tiled`, else contiguous. Tiles are worth their packing from `FEW` samples on.
    """
    if tiled:
        _add_tiles(out, out_step, out_first, columns, x, x_step, x_first, w, first, last)
    else:
        _add_rows(out, out_step, out_first, columns, x, x_step, x_first, w, first, last)
