"""Sparse self-attention in `O(n · l)` to `O(n · √n)` time, any device, no compiler.

Lays tokens out in blocks of `l` and runs `merge.MergedAttention`. Lengths that are not a multiple of `l` are padded
at the end, which a causal query never sees; bidirectional patterns exclude padding through one more dimension of the
heads, in which a padded key carries a score so low that its weight is exactly 0 (no mask of any part is needed).

Complexity: see `parts`. Memory `O(n)` beside the tiles' biases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .merge import MergedAttention, Settings
from .pattern import SparsePattern, Tokens

_EXTRA_DIMS = 8
"""Dimensions added to a head to carry the padding score: one is used, eight keep the rows aligned for the fused
tile."""


def sparse_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    scale: float,
    dropout: float = 0.0,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention under one index set, tokens first and padding last in every row.

    Args:
        query: `(batch, heads, length, head_dim)`; key and value alike, with as many heads.
        key: see query.
        value: see query.
        pattern: the index set, not "full".
        scale: factor of the scores.
        dropout: probability of dropping an attention weight.
        lengths: real tokens of each row `(batch,)`, or None where every row is full. Outputs beyond are unspecified
            but finite.

    Returns:
        `(batch, heads, length, head_dim)`.
    """
    length, width = query.shape[2], query.shape[3]
    padding = -length % pattern.stride
    if not pattern.causal and (padding or lengths is not None):
        query, key, value = _exclude_padding((query, key, value), lengths, padding, scale)
    elif padding:
        query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))
    seed = int(torch.randint(2**31, ())) if dropout > 0.0 else 0
    tokens = (_blocks(x, pattern.stride) for x in (query, key, value))
    out = MergedAttention.apply(*tokens, Settings(pattern, scale, dropout, seed))
    return out.view(query.shape)[:, :, :length, :width]


def _blocks(x: torch.Tensor, stride: int) -> torch.Tensor:
    """`(batch, heads, n, head_dim)` to `(rows, blocks, stride, head_dim)`."""
    return x.contiguous().view(x.shape[0] * x.shape[1], x.shape[2] // stride, stride, x.shape[3])


def _exclude_padding(tokens: Tokens, lengths: torch.Tensor | None, padding: int, scale: float) -> Tokens:
    """Pads to whole blocks and gives every padded key a score that no weight survives."""
    query = tokens[0]
    length = query.shape[2]
    ends = torch.full((query.shape[0], 1), length, device=query.device) if lengths is None else lengths.unsqueeze(1)
    is_padding = torch.arange(length + padding, device=query.device) >= ends
    low = max(-1e30, torch.finfo(query.dtype).min / 4)
    score = is_padding.to(query.dtype)[:, None, :, None] * low
    wide = [F.pad(x, (0, _EXTRA_DIMS, 0, padding)) for x in tokens]
    carrier = torch.zeros_like(wide[0])
    carrier[..., -1] = 1.0 if scale > 0 else -1.0
    column = torch.zeros_like(wide[1])
    column[..., -1:] = score
    return wide[0] + carrier, wide[1] + column, wide[2].masked_fill(is_padding[:, None, :, None], 0.0)
