"""Attention of one rectangular tile, forward and backward, with the log-sum-exp of its scores exposed.

The tiles of a sparse pattern are disjoint, so their results merge exactly by log-sum-exp; and because the softmax
gradient needs of other tiles only the *merged* output and log-sum-exp, the backward pass of a tile is exact when it
is given those two.

On a CPU the tile is PyTorch's fused flash operator (private, so its presence and signature are probed at the first
use); everywhere else, and with dropout, it is written out in matrix products. Complexity: time `O(queries · keys)`;
memory `O(queries)` fused, `O(queries · keys)` written out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@cache
def _fused() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The fused operator and its gradient: as functions of `torch`, which are called in half the time, or as operators.

    Raises:
        AttributeError: PyTorch has neither.
    """
    name = "_scaled_dot_product_flash_attention_for_cpu"
    found = [getattr(torch, name + end, None) or getattr(torch.ops.aten, name + end) for end in ("", "_backward")]
    return found[0], found[1]


@cache
def fused_tile_available() -> bool:
    """True where PyTorch's fused CPU operator exists and answers a probe as documented."""
    try:
        forward, backward = _fused()
        probe = torch.ones(1, 1, 2, 8)
        out, lse = forward(probe, probe, probe, 0.0, True, scale=1.0)
        grads = backward(probe, probe, probe, probe, out, lse, 0.0, True, scale=1.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    expected = torch.tensor([8.0, 8.0 + 0.6931471805599453])
    return len(grads) == 3 and lse.shape == (1, 1, 2) and torch.allclose(lse[0, 0].float(), expected)


def _is_fused(query: torch.Tensor, dropout: float) -> bool:
    return dropout == 0.0 and query.device.type == "cpu" and query.dtype in _FUSED_DTYPES and fused_tile_available()


def tile_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one batch of tiles.

    Args:
        query: `(batch, tiles, queries, head_dim)`.
        key: `(batch, tiles, keys, head_dim)`.
        value: as `key`.
        scale: factor of the scores.
        causal: query `a` sees keys `0 … a` (aligned at the top left).
        bias: added to the scores, broadcastable to `(batch, tiles, queries, keys)`; no row may be entirely `-inf`.
        dropout: probability of dropping a weight; the log-sum-exp is that of the undropped scores.
        seed: what the dropped weights are drawn from.

    Returns:
        output `(batch, tiles, queries, head_dim)` and log-sum-exp `(batch, tiles, queries)` (float32 at least).
    """
    if _is_fused(query, dropout):
        return _fused()[0](query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    scores = _scores(query, key, scale, causal, bias)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp_() * _kept(scores, dropout, seed)
    return (weights @ value.to(weights.dtype)).to(query.dtype), lse


def tile_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one batch of tiles within a merged softmax.

    Args:
        grad: gradient of the merged output, `(batch, tiles, queries, head_dim)`.
        query: as in `tile_forward`, like `key`, `value`, `scale`, `causal`, `bias`, `dropout` and `seed`.
        out: the *merged* output, shaped as `grad`.
        lse: the *merged* log-sum-exp `(batch, tiles, queries)`.

    Returns:
        this tile's part of the gradients of query, key and value.
    """
    if _is_fused(query, dropout):
        lse = lse.contiguous()
        return _fused()[1](grad, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    probabilities = (_scores(query, key, scale, causal, bias) - lse.unsqueeze(-1)).exp_()
    compute, kept = probabilities.dtype, _kept(probabilities, dropout, seed)
    grad, out, wide_query, wide_key, wide_value = (x.to(compute) for x in (grad, out, query, key, value))
    grad_value = (probabilities * kept).transpose(-1, -2) @ grad
    grad_weights = (grad @ wide_value.transpose(-1, -2)) * kept
    grad_scores = probabilities * (grad_weights - (grad * out).sum(-1, keepdim=True)) * scale
    grads = grad_scores @ wide_key, grad_scores.transpose(-1, -2) @ wide_query, grad_value
    return grads[0].to(query.dtype), grads[1].to(query.dtype), grads[2].to(query.dtype)


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, causal: bool, bias: torch.Tensor | None
) -> torch.Tensor:
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def _kept(like: torch.Tensor, dropout: float, seed: int) -> torch.Tensor | float:
    """The inverted-dropout factors of one tile, the same in both passes."""
    if dropout == 0.0:
        return 1.0
    generator = torch.Generator(device=like.device).manual_seed(seed)
    drawn = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return (drawn >= dropout).to(like.dtype) / (1.0 - dropout)
