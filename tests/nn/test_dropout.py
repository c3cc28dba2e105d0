"""Locked and embedding dropout: what is dropped together, and how what is kept is scaled."""

from __future__ import annotations

import torch

from hf_lnlm.nn.dropout import EmbeddingDropout, LockedDropout


def test_locked_dropout_drops_the_same_features_at_every_step():
    dropped = LockedDropout(0.5).train()(torch.ones(4, 7, 50))
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(dropped[0], dropped[1]), "rows have masks of their own"
    assert 0.3 < (dropped == 0).float().mean() < 0.7


def test_embedding_dropout_drops_whole_words_everywhere():
    ids = torch.tensor([[1, 2, 3, 1], [3, 1, 2, 2]])
    drawn = []
    for _ in range(40):
        dropped = EmbeddingDropout(0.5).train()(torch.ones(2, 4, 6), ids, 5)
        for word in (1, 2, 3):
            rows = dropped[ids == word]
            assert torch.equal(rows, rows[:1].expand_as(rows))
            drawn.append(rows[0, 0].item())
    assert set(drawn) == {0.0, 2.0}


def test_identity_in_evaluation_and_at_zero():
    ids, values = torch.tensor([[1, 2]]), torch.randn(1, 2, 3)
    assert LockedDropout(0.5).eval()(values) is values
    assert LockedDropout(0.0).train()(values) is values
    assert EmbeddingDropout(0.5).eval()(values, ids, 5) is values
    assert EmbeddingDropout(0.0).train()(values, ids, 5) is values


def test_gradients_follow_the_mask():
    values = torch.ones(2, 3, 8, requires_grad=True)
    dropped = LockedDropout(0.5).train()(values)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())
