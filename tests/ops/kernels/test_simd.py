"""The kernels' power of two, by each of the ways in which processors can be asked for it."""

import numpy as np
import pytest
import torch
from numba import njit

from hf_lnlm.ops.kernels import simd

WAYS = [simd._decay, simd._wide_decay] if simd.has_avx512() else [simd._decay]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_powers_of_two(way):
    power = simd._operation(way, 1)

    @njit
    def run(x, y, count):
        for at in range(0, count, simd.WIDTH):
            simd.store(y, at, power(simd.load(x, at)))

    x = torch.cat(
        [-torch.logspace(-30, 2.1, 500), torch.linspace(-126, 0, 492), torch.tensor([0.0, -127.0, -1e6, -3e38])]
    )
    x = torch.cat([x, torch.tensor([-torch.inf, torch.nan, -126.0, -1.5]), torch.zeros(-(x.numel() + 4) % simd.WIDTH)])
    y = torch.empty_like(x)
    run(x.data_ptr(), y.data_ptr(), x.numel())
    exact = np.exp2(x.double().numpy())
    exact[x.numpy() < -126] = 0.0
    large = ~(x.numpy() < -100)  # flushing subtracts the smallest number, which smaller results feel
    np.testing.assert_allclose(y.numpy()[large], exact[large], rtol=1.2e-7)
    np.testing.assert_allclose(y.numpy(), exact, rtol=1.2e-7, atol=2.0**-125)
    assert (y[x < -126] == 0).all() and (y[x == 0] == 1).all()
