"""Sparse attention as dense masked attention, for sequences so short that blocks don't pay.

Complexity: `O(n²)` time. Queries are taken in few rows. Where one row holds them all, this is one call of PyTorch, and
everything that goes before it is looked up in one step, because a short text takes no longer than a few such steps. Else
the rows are one step of the graph: left to autograd, the gradient of every row would be as large as that of all.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .parts import blocking_bias
from .pattern import SparsePattern
from .tiles import tile_backward, tile_forward

WHOLE, ROWS = 350, 128
"""Up to which length all queries are attended at once, and how many in longer texts (tuning values, no effect on results).
In short ones the scores that are not causal cost less than leaving them out; in longer ones a row sees no key behind its
last query."""

LONGEST_DENSE = 4096
"""Longest sequence that may be attended to densely: its bias takes 64 MiB in float32."""

BIAS_STEP = 64
"""Biases are made for multiples of so many tokens, long ones for powers of two, and cut to length."""

LOCAL_STRIDES, LOCAL_LENGTH = 8, 256
"""Causal local attention is cheaper row by row than in blocks up to so many strides, and up to this length."""

_WINDOW, _BLOCK, _BASE, _COLUMN, _SUMMARY, _CAUSAL = 0.58, 0.8, 60.0, 100.0, 80.0, 48.0
"""Measured times of the blocks path for one query, in keys attended to by dense attention in the same time: for each
key of a window, for each key of a block, at all, for merging a column, for merging summaries; and what a causal query
attends to in vain in dense attention."""


class Rows(NamedTuple):
    """Queries attended at once.

    Attributes:
        first, end: the queries are `first … end - 1`.
        start: they see keys among `start … end - 1`.
        causal: query `first + a` sees the keys up to `start + a`, all of them.
        bias: `(1, 1, end - first, end - start)`, 0 at visible keys, else -inf; None if all are seen that `causal` allows.
    """

    first: int
    end: int
    start: int
    causal: bool
    bias: torch.Tensor | None

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return these queries of `(batch, heads, length, …)`."""
        return x[:, :, self.first : self.end]

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return these keys of `(batch, heads, length, …)`."""
        return x[:, :, self.start : self.end]


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


@lru_cache(maxsize=32)
def dense_plan(
    pattern: SparsePattern, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Rows, ...] | None:
    """How to attend densely, where that is cheaper, to queries and keys of one shape without padding; None elsewhere.

    Args:
        pattern: the index set.
        shape: `(batch, heads, length, head_dim)`; None is also the answer to any other shape.
        dtype: of the queries.
        device: of the queries.
    """
    if len(shape) != 4:
        return None
    if pattern.is_dense(shape[2]):
        return (Rows(0, shape[2], 0, pattern.causal, None),)
    return _rows(pattern, shape[2], dtype, device) if dense_is_cheaper(pattern, shape[2]) else None


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: tuple[Rows, ...],
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Self-attention by a plan of `dense_plan`.

    Args:
        query: `(batch, heads, length, head_dim)`; key and value alike, with as many heads.
        key: see query.
        value: see query.
        rows: the plan.
        scale: factor of the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        `(batch, heads, length, head_dim)`.
    """
    first = rows[0]
    if first.first or len(rows) > 1:
        seed = int(torch.randint(2**31, ())) if dropout > 0.0 else 0
        return _AttendedRows.apply(query, key, value, rows, scale, dropout, seed)
    return F.scaled_dot_product_attention(query, key, value, first.bias, dropout, first.causal, scale=scale)


def sparse_attention_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`attend_rows` whether that is cheap or not; `pattern` is not "full" and `length > empty_queries(pattern)`."""
    rows = _rows(pattern, query.shape[2], query.dtype, query.device)
    return attend_rows(query, key, value, rows, scale, dropout)


class _AttendedRows(torch.autograd.Function):
    """Attention row by row; queries before the first row see nothing and get zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: tuple[Rows, ...],
        scale: float,
        dropout: float,
        seed: int,
    ) -> torch.Tensor:
        """Returns the output, token by token in memory, as PyTorch's operator does."""
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width).transpose(1, 2)
        out[:, :, : rows[0].first] = 0.0
        sums = []
        for index, row in enumerate(rows):
            at = row.queries(query), row.keys(key), row.keys(value), scale
            piece, lse = tile_forward(*at, row.causal, row.bias, dropout, seed + index)
            row.queries(out).copy_(piece)
            sums.append(lse)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.settings = rows, scale, dropout, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, *sums = ctx.saved_tensors
        rows, scale, dropout, seed = ctx.settings
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = [torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        grads[0][:, :, : rows[0].first] = 0.0
        for index, (row, lse) in enumerate(zip(rows, sums, strict=True)):
            at = row.queries(grad), row.queries(query), row.keys(key), row.keys(value), row.queries(out), lse, scale
            pieces = tile_backward(*at, row.causal, row.bias, dropout, seed + index)
            row.queries(grads[0]).copy_(pieces[0])
            row.keys(grads[1]).add_(pieces[1])
            row.keys(grads[2]).add_(pieces[2])
        return *grads, None, None, None, None


def _rows(pattern: SparsePattern, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Rows, ...]:
    near = pattern.kind == "local" and pattern.causal
    found = []
    for first, end in itertools.pairwise(_row_bounds(pattern, length)):
        start = max(0, first - pattern.stride + 1) if near else 0
        if first == 0 and pattern.causal and pattern.is_dense(end):
            found.append(Rows(0, end, 0, True, None))
        else:
            bias = _bias(pattern, first - start, end - start, dtype, device)
            found.append(Rows(first, end, start, False, bias))
    return tuple(found)


def _row_bounds(pattern: SparsePattern, length: int) -> list[int]:
    """Where the rows of queries that are attended at once begin and end; the last is not much smaller than the others."""
    if not pattern.causal:
        return [0, length]
    start = empty_queries(pattern)
    if length <= WHOLE:
        return [start, length]
    return [*range(start, max(start + 1, length - ROWS // 2), ROWS), length]


def _bias(pattern: SparsePattern, first: int, end: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Bias `(1, 1, end - first, end)` of the queries `first … end - 1` over the keys `0 … end - 1`, cut from a larger one,
    so that texts of all lengths share a few."""
    if pattern.kind == "local":  # what a row sees depends on distances alone: all rows share one, whose keys begin at 0
        return _wide_bias(pattern, first, _wide(end), dtype, device)[..., : end - first, :end]
    return _wide_bias(pattern, 0, _wide(end), dtype, device)[..., first:end, :end]


def _wide(end: int) -> int:
    return -(-end // BIAS_STEP) * BIAS_STEP if end <= 8 * BIAS_STEP else 1 << (end - 1).bit_length()


@lru_cache(maxsize=16)
def _wide_bias(pattern: SparsePattern, first: int, end: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a bias made in inference mode could not be used in training later
        positions = torch.arange(end, device=device)
        return blocking_bias(pattern.visible(positions[first:], positions), torch.empty(0, dtype=dtype, device=device))
