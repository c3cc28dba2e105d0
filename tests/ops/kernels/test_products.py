"""The products inside the compiled loops: tiles of any size, for any number of samples, equal a plain product."""

from __future__ import annotations

import numba
import pytest
import torch

from hf_lnlm.ops.kernels.products import LANES, TILE, add_product, packed


@numba.njit
def run(tiled, out, first_column, columns, x, w, first, last):
    add_product(tiled, out, 1, first_column, columns, x, 0, 1, w, first, last)


@pytest.mark.parametrize("tiled", [False, True])
def test_products_of_any_size(tiled):
    generator = torch.Generator().manual_seed(0)
    for rows, columns, samples in [
        (1, 1, 1),
        (8, TILE, 4),
        (13, LANES + 3, 5),
        (20, TILE + 1, 9),
        (7, 3 * TILE - 1, 2),
    ]:
        x = torch.randn(samples + 2, 1, rows + 1, generator=generator)
        w, before = torch.randn(rows, columns, generator=generator), torch.randn(samples + 2, 2, columns + 4)
        for weight in (w, w.t().contiguous().t()):
            out = before.clone()
            ready = packed(weight) if tiled else weight.contiguous()
            run(tiled, out.numpy(), 2, columns, x.numpy(), ready.numpy(), 1, 1 + samples)
            expected = before.clone()
            expected[1 : 1 + samples, 1, 2 : 2 + columns] += x[1 : 1 + samples, 0, 1:] @ w
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_tiles_are_filled_up_with_zeros():
    tiles = packed(torch.ones(3, TILE + 2)).view(2, 3, TILE)
    assert tiles[0].eq(1).all() and tiles[1, :, :2].eq(1).all() and tiles[1, :, 2:].eq(0).all()
