"""Sparse attention as the paper writes it: a softmax over the keys that a dense mask allows. The oracle of every
other path.

[1] Child et al. 2019, arXiv 1904.10509, eq. 2–4. Complexity: `O(n²)` time and memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .pattern import SparsePattern


def masked_attention_weights(
    query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax weights over the visible keys; a query that sees nothing gets zeros.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, heads, keys, head_dim)`.
        visible: bool, broadcastable to `(batch, heads, queries, keys)`.
        scale: factor of the scores.

    Returns:
        `(batch, heads, queries, keys)` in the query's dtype; the softmax runs in float32 at least.
    """
    scores = (query @ key.transpose(-1, -2)) * scale
    compute = torch.promote_types(scores.dtype, torch.float32)
    lowest = torch.finfo(scores.dtype).min
    weights = torch.softmax(scores.masked_fill(~visible, lowest), dim=-1, dtype=compute)
    return weights.masked_fill(~visible, 0.0).to(query.dtype)


def sparse_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a dense mask.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, heads, keys, head_dim)`; as many heads as the query.
        value: as `key`.
        pattern: the index set.
        query_positions: logical positions `(batch or 1, queries)`; -1 = padding.
        key_positions: logical positions `(batch or 1, keys)`; -1 = padding.
        scale: factor of the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        the output `(batch, heads, queries, head_dim)`, zero where a query is padding or sees nothing, and the weights
        `(batch, heads, queries, keys)`.
    """
    visible = pattern.visible(query_positions, key_positions) & (query_positions >= 0).unsqueeze(-1)
    weights = masked_attention_weights(query, key, visible.unsqueeze(1), scale)
    weights = F.dropout(weights, dropout, training=dropout > 0.0)
    return weights @ value, weights
