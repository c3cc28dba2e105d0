"""Causal sparse self-attention inside a decoder: padding, packed documents, caches and tracing.

A forward pass works out once where the real tokens are (`AttentionPlan`), and every layer attends by the same plan:

* no cached past: each document's real tokens become a left-aligned row, so that right padding is all that is left,
  which a causal pattern never sees;
* cached past: queries and keys carry logical positions and meet under a small mask;
* traced (torch.compile, torch.export) or with attention weights asked for: one dense mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from ...nn.inputs import Batch
from ...nn.masks import SegmentInfo, continuing_tokens
from ...nn.ragged import RowLayout, gather_heads, scatter_heads
from ...ops.sparse_attention.attention import sparse_attention
from ...ops.sparse_attention.pattern import SparsePattern, Tokens, logical_positions
from ...ops.sparse_attention.reference import masked_attention_weights
from ...ops.sparse_attention.step import attend_cached_heads, attend_newest, repeat_heads
from .cache import SparseAttentionCacheLayer


class AttentionPlan(NamedTuple):
    """What every layer of one forward pass needs to know about the batch.

    Attributes:
        segments: rows of real tokens.
        real: `(batch, length)` true at real tokens of the present step; None if all are.
        documents: `(batch, length)` number of each token's document in its row; None if each row is one.
        positions: `(batch, length)` position of each token in its document, for position embeddings; 0 at padding.
        dense: compute under a dense mask (traced, eager implementation, or attention weights wanted).
        weights: attention weights are wanted.
    """

    segments: SegmentInfo
    real: torch.Tensor | None
    documents: torch.Tensor | None
    positions: torch.Tensor
    dense: bool
    weights: bool


def plan_attention(batch: Batch, position_ids: torch.Tensor | None, dense: bool, weights: bool) -> AttentionPlan:
    """Work out the plan of one forward pass.

    Args:
        batch: the inputs.
        position_ids: `(batch, length)` as given, for position embeddings; counted over real tokens if None.
        dense: whether to compute under a dense mask.
        weights: whether attention weights are wanted.

    Raises:
        ValueError: a document begins inside a cached sequence.
    """
    segments = batch.segments
    starts, counts = segments.starts, cached_counts(batch.cache)
    if starts is not None and counts is not None and not segments.traced:
        real = torch.ones_like(starts) if segments.mask is None else segments.mask
        held = torch.as_tensor(counts, device=starts.device).expand(len(starts)) > 0
        starts = starts & ((real.cumsum(1) > 1) | held.unsqueeze(1))  # an empty row has nothing to begin after
        if bool(starts.any()):
            raise ValueError("a document cannot begin inside a cached sequence: start it with empty past_key_values")
        segments, starts = segments._replace(starts=None), None
    documents = None if starts is None else starts.long().cumsum(1)
    positions = _positions(batch.hidden, segments.mask, documents, position_ids, counts)
    return AttentionPlan(segments.in_rows(), segments.mask, documents, positions, dense or segments.traced, weights)


def _positions(
    hidden: torch.Tensor,
    real: torch.Tensor | None,
    documents: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    counts: torch.Tensor | int | None,
) -> torch.Tensor:
    """Position of each token in its document: as given, else counted over real tokens, cached ones included."""
    if position_ids is not None:
        return position_ids.expand(hidden.shape[:2])
    batch, length = hidden.shape[:2]
    counted = hidden.new_ones(batch, length, dtype=torch.long) if real is None else real.long()
    positions = counted.cumsum(1) - 1
    if counts is not None:
        positions = positions + (counts if isinstance(counts, int) else counts.unsqueeze(1))
    if documents is not None:
        first = torch.zeros_like(documents, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        positions = positions - torch.where(first, positions, 0).cummax(1).values
    return positions.clamp(min=0)


def cached_counts(cache: Cache | None) -> torch.Tensor | int | None:
    """Return the real tokens of each row that the cache has seen, `(batch,)`, or one number where rows are alike.

    None if it is empty.
    """
    if cache is None or not cache.layers:
        return None
    first: Any = cache.layers[0]
    if first.keys is None:
        return None
    return int(first.seen_tokens) if first.even else first.counts


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patterns: tuple[SparsePattern, ...],
    plan: AttentionPlan,
    layer: SparseAttentionCacheLayer | None,
    scale: float,
    dropout: float,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend under one pattern for all heads, or one for each equal group of heads.

    Args:
        query: `(batch, heads, length, head_dim)`.
        key: `(batch, key_heads, length, head_dim)`.
        value: as `key`.
        patterns: causal patterns.
        plan: of this forward pass.
        layer: this layer's cache; extended and pruned. None for none.
        scale: factor of the scores.
        dropout: probability of dropping an attention weight (0 outside training).
        backend: of `sparse_attention`.

    Returns:
        `(batch, length, heads * head_dim)`, zero at padding, and the weights `(batch, heads, length, keys)` if wanted.
    """
    past = layer is not None and layer.seen_tokens > 0
    if layer is not None:
        layer.check_patterns(patterns)
        layer.extend(key, value, continuing_tokens(plan.real, plan.documents))
    weights = None
    if plan.dense:
        held = (query, layer.keys, layer.values) if past else (query, key, value)  # type: ignore[union-attr]
        visible = _dense_visible(patterns, plan, layer if past else None, query)
        out, weights = _dense(held, visible, scale, dropout)  # type: ignore[arg-type]
    elif layer is not None and past:
        out = _attend_cached(query, patterns, layer, scale, dropout)
    else:
        options: Any = {"scale": scale, "dropout": dropout, "backend": backend}
        run = partial(sparse_attention, patterns=patterns, **options)
        out = in_rows(run, (query, key, value), plan.segments.layout)
    if layer is not None and not plan.segments.traced:
        layer.prune(patterns)
    return out.transpose(1, 2).flatten(2), weights if plan.weights else None


def _attend_cached(
    query: torch.Tensor, patterns: tuple[SparsePattern, ...], layer: Any, scale: float, dropout: float
) -> torch.Tensor:
    """Attend over a cache that holds this step's tokens already."""
    simple = len(patterns) == 1 and query.shape[2] == 1 and patterns[0].kind != "summary"
    if simple and layer.exact:
        return attend_newest(query, layer.keys, layer.values, patterns[0], scale, dropout)
    positions = layer.positions
    at = (positions[:, -query.shape[2] :], positions)
    return attend_cached_heads(query, layer.keys, layer.values, patterns, *at, scale, dropout)


def attend_both_ways(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float, dropout: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to all real tokens of the same document; padding sees itself, and nothing sees it.

    Args:
        query, key, value: `(batch, heads, length, head_dim)`.
        plan: of this forward pass.
        scale: factor of the scores.
        dropout: probability of dropping an attention weight (0 outside training).

    Returns:
        `(batch, length, heads * head_dim)`, and the weights `(batch, heads, length, length)` if wanted.
    """
    visible = None
    if plan.real is not None or plan.documents is not None or plan.weights:
        itself = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
        visible = torch.ones_like(itself).unsqueeze(0)
        if plan.documents is not None:
            visible = plan.documents.unsqueeze(2) == plan.documents.unsqueeze(1)
        if plan.real is not None:
            visible = visible & plan.real.unsqueeze(1) & plan.real.unsqueeze(2) | itself
        visible = visible.unsqueeze(1)
    if plan.weights:
        out, weights = _dense((query, key, value), visible, scale, dropout)  # type: ignore[arg-type]
        return out.transpose(1, 2).flatten(2), weights
    out = scaled_dot_product_attention(query, key, value, visible, dropout, scale=scale)
    return out.transpose(1, 2).flatten(2), None


def in_rows(
    function: Callable[..., torch.Tensor], states: tuple[torch.Tensor, ...], layout: RowLayout | None
) -> torch.Tensor:
    """Run a causal function of queries, keys and values with every document in a row of its own, tokens first.

    Args:
        function: takes tensors `(rows, heads, row length, head_dim)` to one of the shape of the first.
        states: tensors `(batch, heads, length, head_dim)`.
        layout: where the real tokens are; None if the rows are the batch.

    Returns:
        `(batch, heads, length, head_dim)`, zero at padding.
    """
    if layout is None:
        return function(*states)
    if layout.lengths.numel() == 0:
        return torch.zeros_like(states[0])
    return scatter_heads(function(*(gather_heads(x, layout.gather_index) for x in states)), layout)


def _dense(tokens: Tokens, visible: torch.Tensor, scale: float, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its weights `(batch, heads, queries, keys)` under a dense mask."""
    query, key, value = tokens
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    weights = masked_attention_weights(query, key, visible, scale)
    return drop(weights, dropout, training=dropout > 0.0) @ value, weights


def _dense_visible(
    patterns: tuple[SparsePattern, ...], plan: AttentionPlan, layer: Any, query: torch.Tensor
) -> torch.Tensor:
    """Which keys each query of each head sees: `(batch, heads, queries, keys)`, or 1 head where all are alike."""
    if layer is not None:
        key_positions = layer.positions
        query_positions = key_positions[:, -query.shape[2] :]
        same = torch.ones((), dtype=torch.bool, device=query.device)
    else:
        length = query.shape[2]
        real = plan.real if plan.real is not None else query.new_ones(query.shape[0], length, dtype=torch.bool)
        documents = torch.zeros_like(real, dtype=torch.long) if plan.documents is None else plan.documents
        same = documents.unsqueeze(2) == documents.unsqueeze(1)
        query_positions = key_positions = _within_documents(real, documents)
    seen = [p.visible(query_positions, key_positions) & same & (query_positions >= 0).unsqueeze(-1) for p in patterns]
    if len(seen) == 1:
        return seen[0].unsqueeze(1)
    return torch.stack(seen, dim=1).repeat_interleave(query.shape[1] // len(seen), dim=1)


def _within_documents(real: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Logical position of each token in its document; -1 at padding."""
    counted = logical_positions(real)
    begins = torch.zeros_like(real)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    offset = torch.where(begins & real, counted, 0).cummax(1).values
    return torch.where(real, counted - offset, -1)
