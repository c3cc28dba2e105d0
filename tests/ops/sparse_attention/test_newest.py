"""What a cache keeps, counted instead of looked up, and one new token over it without a mask."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_lnlm.ops.sparse_attention.pattern import KINDS, SparsePattern, kept_by
from hf_lnlm.ops.sparse_attention.step import attend_cached_heads, attend_newest

PATTERNS = [SparsePattern(kind, 5, 2) for kind in KINDS]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_kept_keys_are_counted_as_they_are_needed(pattern: SparsePattern):
    for seen in range(23):
        needed = pattern.needed_from(torch.tensor(seen), torch.arange(seen))
        assert pattern.kept_after(seen) == int(needed.sum())


def test_several_sets_keep_what_any_needs():
    for pair in itertools.product(PATTERNS, repeat=2):
        kept = kept_by(pair)
        for seen in range(17):
            needed = [p.needed_from(torch.tensor(seen), torch.arange(seen)) for p in pair]
            if kept is not None:
                assert torch.equal(kept.needed_from(torch.tensor(seen), torch.arange(seen)), needed[0] | needed[1])
    assert kept_by((SparsePattern("local", 5), SparsePattern("local", 6))) is None
    assert kept_by((SparsePattern("block", 5), SparsePattern("local", 5))) is None


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.kind != "summary"], ids=str)
def test_a_new_token_over_kept_keys_is_masked_attention(pattern: SparsePattern, shared: int):
    torch.manual_seed(0)
    for last in range(14):
        key, value = torch.randn(2, 2, shared, last + 1, 3, dtype=torch.float64)
        query, positions = torch.randn(2, 4, 1, 3, dtype=torch.float64), torch.arange(last + 1).expand(2, -1)
        wanted = attend_cached_heads(query, key, value, (pattern,), positions[:, -1:], positions, 0.7)
        kept = torch.cat(
            [pattern.needed_from(torch.tensor(last), positions[0, :last]), torch.ones(1, dtype=torch.bool)]
        )
        found = attend_newest(query, key[:, :, kept], value[:, :, kept], pattern, 0.7)
        assert (found - wanted).abs().max() <= 1e-14
