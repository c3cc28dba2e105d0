"""Attention of a few new queries over cached keys: only the keys that a pattern lets them see are read.

Complexity: `O(keys)` comparisons and `O(visible keys · head_dim)` arithmetic for one query; several queries share
one masked softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .pattern import SparsePattern


def attend_cached(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention over a cache under one index set.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: cached and new keys `(batch, heads, keys, head_dim)`, in any order.
        value: as `key`.
        pattern: the index set.
        query_positions: logical positions `(batch, queries)`; -1 = padding.
        key_positions: logical positions `(batch, keys)`; -1 = not a token.
        scale: factor of the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        `(batch, heads, queries, head_dim)`, zero where a query is padding or sees nothing.
    """
    visible = pattern.visible(query_positions, key_positions) & (query_positions >= 0).unsqueeze(-1)
    if query.shape[2] == 1 and pattern.kind != "full":
        key, value, visible = gather_visible(key, value, visible)
    some = visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=(visible | ~some).unsqueeze(1), dropout_p=dropout, scale=scale
    )
    return out.masked_fill(~some.unsqueeze(1), 0.0)


def attend_cached_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patterns: tuple[SparsePattern, ...],
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`attend_cached` with grouped key heads, and one pattern for all heads or one for each equal group of them."""
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    at = (query_positions, key_positions)
    groups = zip(*(x.chunk(len(patterns), dim=1) for x in (query, key, value)), patterns, strict=True)
    return torch.cat([attend_cached(q, k, v, pattern, *at, scale, dropout) for q, k, v, pattern in groups], dim=1)


def attend_newest(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of one new token a row where all rows are alike and the keys are those that `pattern` keeps: no mask.

    Args:
        query: `(batch, heads, 1, head_dim)`, of the last key's token.
        key: `(batch, key_heads, keys, head_dim)` in order; all keys so far, or of a local, block or fixed set those that
            the token sees.
        value: as `key`.
        pattern: the index set.
        scale: factor of the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        `(batch, heads, 1, head_dim)`; zeros where the token sees nothing.
    """
    if pattern.kind in ("column", "strided"):
        key, value = _strided(key, pattern), _strided(value, pattern)
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[3])  # heads that share keys are queries of them
    out = F.scaled_dot_product_attention(grouped, key, value, dropout_p=dropout, scale=scale)
    return out.view(query.shape)


def _strided(states: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    """Of all entries those that the last one sees: its column, and its window before it if the set has one."""
    last, stride = states.shape[2] - 1, pattern.stride
    if pattern.kind == "column":
        return states[:, :, last % stride :: stride]
    if last < stride:
        return states
    near = last - stride + 1
    return torch.cat([states[:, :, last % stride : near : stride], states[:, :, near:]], dim=2)


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat grouped key or value heads `(batch, key_heads, length, head_dim)` to `heads`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def gather_visible(
    key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keeps the keys that one query of each row sees.

    Args:
        key: `(batch, heads, keys, head_dim)`.
        value: as `key`.
        visible: bool `(batch, 1, keys)`.

    Returns:
        key, value and visible, cut to the most keys that any row sees (at least one).
    """
    seen = visible[:, 0]
    slots = compact_slots(seen)
    return take_slots(key, slots), take_slots(value, slots), seen.gather(1, slots).unsqueeze(1)


def compact_slots(kept: torch.Tensor) -> torch.Tensor:
    """Indices of the kept slots of each row, in order; rows that keep fewer are filled with slots that are not kept.

    Args:
        kept: bool `(batch, slots)`.

    Returns:
        int64 `(batch, most)`, `most` ≥ 1 the largest number that any row keeps.
    """
    most = max(1, int(kept.sum(-1).max()))
    if kept.shape[0] == 1 and bool(kept.any()):
        return kept[0].nonzero().view(1, -1)
    return (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]


def take_slots(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, slots, width)` at the given slots `(batch, most)` of each row."""
    if slots.shape[0] == 1:
        return x.index_select(2, slots[0])
    index = slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
