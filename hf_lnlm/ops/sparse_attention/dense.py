"""Sparse attention as one dense masked attention, for sequences so short that blocks don't pay.

Complexity: `O(n²)` time. The unseen half of causal scores is not computed: queries are taken in rows of about
`DENSE_ROWS`, and PyTorch's fused CPU operator takes a causal flag *beside* a bias.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F

from .parts import blocking_bias
from .pattern import SparsePattern
from .tiles import fused_attention_available, fused_causal_attention

DENSE_ROWS, LOCAL_ROWS = 256, 128
"""Queries attended at once, and those of the local pattern (tuning values, no effect on results)."""

_KEYS_PER_QUERY, _KEYS_PER_COLUMN_MERGE, _KEYS_PER_SUMMARY_MERGE = 40.0, 120.0, 100.0
"""Measured overheads of the blocks path for one query, in keys attended to by the dense path in the same time."""

_SCORES_PER_CALL = 150_000.0
"""Measured overhead of one call of the blocks path, in scores computed by the dense path in the same time."""


def dense_is_cheaper(pattern: SparsePattern, length: int, rows: int = 1) -> bool:
    """Whether one dense masked attention beats the blocks, by keys per query and measured costs of merging.

    Args:
        pattern: the index set.
        length: number of tokens.
        rows: batch × heads.
    """
    if length == pattern.stride or empty_queries(pattern) >= length:
        return False
    blocks = -(-length // pattern.stride)
    half = 0.5 if pattern.causal else 1.0
    keys = _KEYS_PER_QUERY + _SCORES_PER_CALL / (rows * length)
    if pattern.kind in ("local", "strided"):
        keys += (2 if pattern.causal else 3) * pattern.stride
    if pattern.kind in ("block", "fixed"):
        keys += pattern.stride
    if pattern.kind in ("column", "strided"):
        keys += half * blocks + _KEYS_PER_COLUMN_MERGE
    if pattern.kind in ("summary", "fixed"):
        keys += half * blocks * pattern.summary + _KEYS_PER_SUMMARY_MERGE
    return keys * blocks * pattern.stride > 1.1 * half * length**2


def empty_queries(pattern: SparsePattern) -> int:
    """How many tokens at the start see nothing (causal) or must be exceeded for any to see something
    (bidirectional)."""
    return pattern.stride - pattern.summary if pattern.kind == "summary" else 0


def sparse_attention_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Self-attention under one index set, without padding.

    Args:
        query: `(batch, heads, length, head_dim)`; key and value alike, with as many heads.
        key: see query.
        value: see query.
        pattern: the index set; `length > empty_queries(pattern)`.
        scale: factor of the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        `(batch, heads, length, head_dim)`.
    """
    length, fused = query.shape[2], dropout == 0.0 and fused_attention_available(query)
    bias = _dense_bias(pattern, length, query.dtype, query.device)
    rows = []
    for first, end in itertools.pairwise(_row_bounds(pattern, length)):
        seen = slice(max(0, first - pattern.stride + 1) if pattern.kind == "local" else 0, end)
        at = query[:, :, first:end], key[:, :, seen], value[:, :, seen], bias[:, :, first:end, seen]
        if fused and pattern.causal and seen.start == first:
            rows.append(fused_causal_attention(*at, scale))
        else:
            rows.append(F.scaled_dot_product_attention(*at, dropout_p=dropout, scale=scale))
    blind = empty_queries(pattern) if pattern.causal else 0
    if blind:
        rows.insert(0, query.new_zeros((*query.shape[:2], blind, query.shape[3])))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)


def _row_bounds(pattern: SparsePattern, length: int) -> list[int]:
    """Where the rows of queries that are attended at once begin and end."""
    if not pattern.causal:
        return [0, length]
    start = empty_queries(pattern)
    if pattern.kind == "local":
        pieces = max(1, length // LOCAL_ROWS)
    else:
        pieces = max(1, round((length - start) / DENSE_ROWS))
    return [start + (length - start) * i // pieces for i in range(pieces + 1)]


@lru_cache(maxsize=16)
def _dense_bias(pattern: SparsePattern, length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a bias made in inference mode could not be used in training later
        positions = torch.arange(length, device=device)
        return blocking_bias(pattern.visible(positions, positions), torch.empty(0, dtype=dtype, device=device))
