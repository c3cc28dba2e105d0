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

DENSE_ROWS, DENSE_SPLIT, LOCAL_ROWS = 256, (350, 600), 128
"""Queries attended at once where the length lies in `DENSE_SPLIT` (else all are), and those of the local pattern
(tuning values, no effect on results)."""

LONG_STRIDE = 96
"""From this stride on the first block, which sees all of its past, is attended to without a bias of its own."""

LONGEST_DENSE = 4096
"""Longest sequence that may be attended to densely: its bias takes 64 MiB in float32."""

LOCAL_STRIDES, LOCAL_LENGTH = 8, 256
"""Causal local attention is cheaper row by row than in blocks up to so many strides, and up to this length."""

_WINDOW, _BLOCK, _BASE, _COLUMN, _SUMMARY, _CAUSAL = 0.58, 0.8, 60.0, 100.0, 80.0, 48.0
"""Measured times of the blocks path for one query, in keys attended to by dense attention in the same time: for each
key of a window, for each key of a block, at all, for merging a column, for merging summaries; and what a causal query
attends to in vain in dense attention."""


@lru_cache(maxsize=256)
def dense_is_cheaper(pattern: SparsePattern, length: int) -> bool:
    """Whether dense attention under a mask beats the blocks, by measured times for each query.

    Args:
        pattern: the index set.
        length: number of tokens.
    """
    stride, blocks = pattern.stride, -(-length // pattern.stride)
    if length == stride or empty_queries(pattern) >= length:
        return False
    if pattern.kind == "local" and pattern.causal:
        return length < max(LOCAL_LENGTH, LOCAL_STRIDES * stride)
    half, keys = (0.5, 0.0) if pattern.causal else (1.0, 0.0)
    if pattern.kind in ("local", "strided"):
        keys += _BASE + _WINDOW * (2 if pattern.causal else 3) * stride
    if pattern.kind in ("block", "fixed"):
        keys += _BASE + _BLOCK * stride
    if pattern.kind in ("column", "strided"):
        keys += _COLUMN + half * blocks
    if pattern.kind in ("summary", "fixed"):
        keys += _SUMMARY + half * blocks * pattern.summary
    return length <= LONGEST_DENSE and keys * blocks * stride > (half * length + _CAUSAL) * length


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
    bounds, rows = _row_bounds(pattern, length), []
    for first, end in itertools.pairwise(bounds):
        start = max(0, first - pattern.stride + 1) if pattern.kind == "local" and pattern.causal else 0
        at = query, key, value
        if len(bounds) > 2 or first:
            at = query[:, :, first:end], key[:, :, start:end], value[:, :, start:end]
        if first == 0 and pattern.causal and pattern.is_dense(end):
            rows.append(F.scaled_dot_product_attention(*at, dropout_p=dropout, is_causal=True, scale=scale))
            continue
        bias = _bias(pattern, first - start, end - start, query.dtype, query.device)
        if fused and pattern.causal and start == first:
            rows.append(fused_causal_attention(*at, bias, scale))
        else:
            rows.append(F.scaled_dot_product_attention(*at, attn_mask=bias, dropout_p=dropout, scale=scale))
    blind = empty_queries(pattern) if pattern.causal else 0
    if blind:
        rows.insert(0, query.new_zeros((*query.shape[:2], blind, query.shape[3])))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)


@lru_cache(maxsize=256)
def _row_bounds(pattern: SparsePattern, length: int) -> list[int]:
    """Where the rows of queries that are attended at once begin and end."""
    if not pattern.causal:
        return [0, length]
    start, at_once, head = empty_queries(pattern), length, []
    if pattern.kind == "local":
        at_once = LOCAL_ROWS
    elif DENSE_SPLIT[0] <= length < DENSE_SPLIT[1]:
        at_once = DENSE_ROWS
    if pattern.stride >= LONG_STRIDE and length > 2.2 * pattern.stride and pattern.is_dense(pattern.stride):
        start, head, at_once = pattern.stride, [0], min(at_once, max(DENSE_ROWS, LOCAL_ROWS))
    pieces = max(1, round((length - start) / at_once))
    return [*head, *(start + (length - start) * i // pieces for i in range(pieces + 1))]


@lru_cache(maxsize=16)
def _bias(pattern: SparsePattern, first: int, end: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Bias `(1, 1, end - first, end)` of the queries `first … end - 1` over the keys `0 … end - 1`; the local pattern
    depends on their distance alone, so that its rows share one."""
    with torch.inference_mode(False):  # a bias made in inference mode could not be used in training later
        positions = torch.arange(end, device=device)
        return blocking_bias(pattern.visible(positions[first:], positions), torch.empty(0, dtype=dtype, device=device))
