"""Pooling over time: against the unmasked rows, on empty rows, and in the order of time."""

import pytest
import torch
from torch import nn

from hf_lnlm.nn.pooling import (
    MaskedBatchNorm,
    MaskedGroupNorm,
    k_max_over_time,
    local_max,
    max_over_time,
    mean_over_time,
)

LENGTHS = (7, 4, 1, 0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(4, 3, 7) - 5.0, mask  # negative, so that a zero of padding would win


@pytest.mark.parametrize("pool", [max_over_time, mean_over_time])
def test_padding_is_left_out(pool, batch):
    features, mask = batch
    pooled = pool(features, mask)
    for row, length in enumerate(LENGTHS[:3]):
        torch.testing.assert_close(pooled[row], pool(features[row : row + 1, :, :length])[0])
    assert torch.equal(pooled[3], torch.zeros(3))


@pytest.mark.parametrize(
    "pool",
    [max_over_time, mean_over_time, lambda f, m: k_max_over_time(f, m, 2), lambda f, m: local_max(f, m, 3, 2, 1)],
)
def test_gradients_are_finite_and_spare_padding(pool, batch):
    features, mask = batch
    features.requires_grad_()
    pool(features, mask).sum().backward()
    assert torch.isfinite(features.grad).all()
    assert not features.grad.masked_select(~mask[:, None]).any()


def test_k_max_keeps_the_order_of_time():
    features = torch.tensor([[[3.0, 9.0, 1.0, 7.0, 8.0]]])
    assert k_max_over_time(features, None, 3).tolist() == [[[9.0, 7.0, 8.0]]]


def test_k_max_of_a_short_row_ends_in_zeros(batch):
    features, mask = batch
    kept = k_max_over_time(features, mask, 5)
    torch.testing.assert_close(kept[1, :, :4], features[1, :, :4])
    assert not kept[1, :, 4:].any()
    assert not kept[3].any()


def test_k_max_of_equal_values_takes_the_earlier():
    features = torch.tensor([[[0.0, 5.0, 0.0, 0.0, 0.0]]])
    assert k_max_over_time(features, None, 3).tolist() == [[[0.0, 5.0, 0.0]]]


def test_k_max_more_than_there_are_frames():
    assert k_max_over_time(torch.ones(1, 2, 3), None, 5).tolist() == [[[1.0, 1.0, 1.0, 0.0, 0.0]] * 2]


def test_each_row_keeps_its_own_number():
    features = torch.tensor([[[3.0, 9.0, 1.0, 7.0]], [[3.0, 9.0, 1.0, 7.0]]])
    kept = k_max_over_time(features, None, 2, torch.tensor([1, 2]))
    assert kept.tolist() == [[[9.0, 0.0]], [[9.0, 7.0]]]


def test_local_max_equals_that_of_the_row_alone(batch):
    features, mask = batch
    pooled = local_max(features, mask, 3, 2, 1)
    for row, length in enumerate(LENGTHS[:3]):
        alone = local_max(features[row : row + 1, :, :length], None, 3, 2, 1)[0]
        torch.testing.assert_close(pooled[row, :, : alone.shape[1]], alone)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_padding_is_torch_s(training):
    ours, peer = MaskedBatchNorm(3).train(training), nn.BatchNorm1d(3).train(training)
    features = torch.randn(4, 3, 7)
    torch.testing.assert_close(ours(features, torch.ones(4, 7, dtype=torch.bool)), peer(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, peer.running_mean)
    torch.testing.assert_close(ours.running_var, peer.running_var)
    assert ours.num_batches_tracked == peer.num_batches_tracked


def test_batch_norm_takes_statistics_of_real_frames_only(batch):
    features, mask = batch
    ours, peer = MaskedBatchNorm(3).train(), nn.BatchNorm1d(3).train()
    real = features.mT[mask]  # (frames, channels)
    torch.testing.assert_close(ours(features * mask[:, None], mask).mT[mask], peer(real), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_var, peer.running_var)


def test_group_norm_equals_that_of_the_row_alone(batch):
    features, mask = batch
    norm = MaskedGroupNorm(3, 3)
    normal = norm(features * mask[:, None], mask)
    for row, length in enumerate(LENGTHS[:2]):
        alone = norm(features[row : row + 1, :, :length])[0]
        torch.testing.assert_close(normal[row, :, :length], alone, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(normal).all()
