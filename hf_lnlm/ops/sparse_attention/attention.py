"""`sparse_attention`: checks its arguments, brings every row to logical positions and picks a path.

Padding may stand anywhere: rows are compacted (real tokens to the front, in order), attended, and scattered back, so
a pattern never depends on where the padding is. Paths: plain fused attention where the pattern allows everything,
`eager` (blocks or one dense mask, whichever is cheaper), `reference` (a dense mask; also what is traced by
torch.compile and torch.export).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..backend import Operation
from .dense import attend_rows, dense_plan
from .eager import sparse_attention_eager
from .pattern import SparsePattern, Tokens, logical_positions
from .reference import sparse_attention_reference
from .step import repeat_heads


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    patterns: SparsePattern | tuple[SparsePattern, ...],
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Exact softmax self-attention over the keys that a pattern lets each query see.

    Args:
        query: `(batch, heads, length, head_dim)`.
        key: `(batch, key_heads, length, head_dim)`, `key_heads` a divisor of `heads` (grouped queries).
        value: as `key`.
        patterns: one index set for all heads, or one for each equal group of heads.
        mask: bool `(batch, length)`, True at real tokens; None = all are real.
        scale: factor of the scores; `1/√head_dim` by default.
        dropout: probability of dropping an attention weight (0 outside training).
        backend: `auto`, `reference` or `eager`.

    Returns:
        `(batch, heads, length, head_dim)`, zero at padding and where a query sees no key.

    Raises:
        ValueError: for shapes, a mask, a dropout or a backend outside the above.
    """
    plain = mask is None and backend == "auto" and dropout == 0.0 and type(patterns) is SparsePattern
    if plain and not torch.compiler.is_compiling() and (shape := query.shape) == key.shape == value.shape:
        rows = dense_plan(patterns, shape, query.dtype, query.device)
        if rows is not None:  # the shortest way through: of a short text's time, every check is a share
            return attend_rows(query, key, value, rows, shape[3] ** -0.5 if scale is None else scale)
    patterns = (patterns,) if isinstance(patterns, SparsePattern) else tuple(patterns)
    _check((query, key, value), patterns, mask, dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    traced = torch.compiler.is_compiling()
    if not traced and mask is not None and bool(mask.all()):
        mask = None
    attend = SPARSE_ATTENTION.load("reference" if traced else SPARSE_ATTENTION.pick(backend, query.device))
    if len(patterns) == 1:
        return attend((query, key, value), patterns[0], mask, scale, dropout)
    groups = zip(*(x.chunk(len(patterns), dim=1) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*of, mask, scale, dropout) for of in zip(groups, patterns, strict=True)], dim=1)


def _reference(
    tokens: Tokens, pattern: SparsePattern, mask: torch.Tensor | None, scale: float, dropout: float
) -> torch.Tensor:
    positions = torch.arange(tokens[0].shape[2], device=tokens[0].device).unsqueeze(0)
    if mask is not None:
        positions = logical_positions(mask)
    return sparse_attention_reference(*tokens, pattern, positions, positions, scale, dropout)[0]


def _compacted(
    tokens: Tokens, pattern: SparsePattern, mask: torch.Tensor | None, scale: float, dropout: float
) -> torch.Tensor:
    """Moves padding to the end of every row, attends, and moves everything back."""
    if mask is None:
        return _attend(tokens, pattern, None, scale, dropout)
    if bool((mask[:, :-1] >= mask[:, 1:]).all()):
        out = _attend(tokens, pattern, mask.sum(-1), scale, dropout)
    else:
        order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
        query, key, value = (_take(x, order) for x in tokens)
        out = _take(_attend((query, key, value), pattern, mask.sum(-1), scale, dropout), order.argsort(dim=-1))
    return out.masked_fill(~mask[:, None, :, None], 0.0)


SPARSE_ATTENTION = Operation("sparse_attention", reference=_reference, eager=_compacted)


def _take(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _attend(
    tokens: Tokens, pattern: SparsePattern, lengths: torch.Tensor | None, scale: float, dropout: float
) -> torch.Tensor:
    query, key, value = tokens
    if pattern.causal or lengths is None:
        rows = dense_plan(pattern, query.shape, query.dtype, query.device)
        if rows is not None:
            return attend_rows(query, key, value, rows, scale, dropout)
    if not pattern.is_dense(query.shape[2]) or lengths is None:
        return sparse_attention_eager(query, key, value, pattern, scale, dropout, lengths)
    allowed = torch.arange(query.shape[2], device=query.device) < lengths.clamp(min=1)[:, None, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale)


def _check(tokens: Tokens, patterns: tuple[SparsePattern, ...], mask: torch.Tensor | None, dropout: float) -> None:
    query, key, value = tokens
    if query.dim() != 4 or query.shape != key.shape or key.shape != value.shape:
        _check_shapes(query, key, value)
    if not patterns or query.shape[1] % len(patterns):
        raise ValueError(f"heads must divide evenly over the patterns, got {query.shape[1]} and {len(patterns)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (query.shape[0], query.shape[2])):
        raise ValueError(f"mask must be bool (batch, length), got {mask.dtype} {tuple(mask.shape)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(f"query, key and value must be (batch, heads, length, head_dim), key like value, got {shapes}")
    if any(query.shape[i] != key.shape[i] for i in (0, 2, 3)) or query.shape[1] % key.shape[1]:
        raise ValueError(f"key must match query up to grouped heads, got {shapes}")
