"""One softmax over disjoint parts: forward by log-sum-exp merging, exact backward.

For parts `p` of a query's keys with outputs `o_p` and log-sum-exps `s_p`: `s = logaddexp_p s_p`, `o = Σ_p exp(s_p -
s) o_p`. Given `o` and `s`, the softmax gradient of each part needs nothing of the others. No `n × n` tensor is ever
built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .parts import Part, parts_of
from .pattern import SparsePattern, Tokens
from .tiles import tile_backward, tile_forward

CHUNK_NUMBERS, CHUNK_NUMBERS_ELSEWHERE = 2**19, 2**24
"""Numbers of a query tensor taken at once on a CPU, and on other devices, which need more to be busy (tuning values, no
effect on results)."""

SEEDS_A_CHUNK = 2**20
"""Seeds of dropped weights set apart for each chunk of rows, one for each part."""


class Settings(NamedTuple):
    """What a call says beside its tokens: the index set, the scores' factor, and what is dropped by which seed."""

    pattern: SparsePattern
    scale: float
    dropout: float
    seed: int


class MergedAttention(torch.autograd.Function):
    """Sparse self-attention over tokens laid out as `(rows, blocks, l, head_dim)`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: Settings
    ) -> torch.Tensor:
        """Returns the output, laid out as the query; a query that sees nothing gets zeros."""
        out, lse = _forward((query, key, value), settings)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        saved = (grad.contiguous(), *ctx.saved_tensors)
        grads = [torch.zeros_like(x) for x in saved[1:4]]
        for chunk, rows in _row_chunks(saved[1]):
            _backward_rows([x[rows] for x in grads], [x[rows] for x in saved], ctx.settings, chunk)
        return *grads, None


def _summary(x: torch.Tensor, pattern: SparsePattern) -> torch.Tensor | None:
    """The last `c` tokens of every block, gathered: `(rows, blocks, c, head_dim)`."""
    if pattern.kind not in ("summary", "fixed"):
        return None
    return x[:, :, pattern.stride - pattern.summary :].contiguous()


def _source(part: Part, tokens: torch.Tensor, summary: torch.Tensor | None) -> torch.Tensor:
    return part.keys(summary if part.from_summary and summary is not None else tokens)


def _row_chunks(x: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Rows taken at once, numbered: as few as fill `CHUNK_NUMBERS`, so that what a part returns stays in the cache."""
    most = CHUNK_NUMBERS if x.device.type == "cpu" else CHUNK_NUMBERS_ELSEWHERE
    step = max(1, most * x.shape[0] // max(1, x.numel()))
    return enumerate(slice(start, start + step) for start in range(0, x.shape[0], step))


def _forward(tokens: Tokens, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    query = tokens[0]
    out = torch.empty_like(query)
    lse = query.new_empty((*query.shape[:3], 1), dtype=torch.promote_types(query.dtype, torch.float32))
    for chunk, rows in _row_chunks(query):
        _forward_rows(out[rows], lse[rows], [x[rows] for x in tokens], settings, chunk)
    return out, lse


def _forward_rows(
    out: torch.Tensor, lse: torch.Tensor, tokens: list[torch.Tensor], settings: Settings, chunk: int
) -> None:
    """Fill `out` and `lse` of a few rows."""
    (query, key, value), (pattern, scale, dropout, seed) = tokens, settings
    parts = parts_of(pattern, query.shape[1], query)
    if pattern.kind == "summary":  # its first part does not cover every query
        out.zero_()
        lse.fill_(float("-inf"))
    key_summary, value_summary = _summary(key, pattern), _summary(value, pattern)
    for index, part in enumerate(parts):
        keys, values = _source(part, key, key_summary), _source(part, value, value_summary)
        drawn = seed + SEEDS_A_CHUNK * chunk + index
        piece, piece_lse = tile_forward(
            part.queries(query), keys, values, scale, part.causal, part.bias, dropout, drawn
        )
        _merge(part.queries(out), part.queries(lse), piece, piece_lse.unsqueeze(-1), overwrite=part.first)


def _merge(out: torch.Tensor, lse: torch.Tensor, piece: torch.Tensor, piece_lse: torch.Tensor, overwrite: bool) -> None:
    """Folds one part into `out` and `lse` in place."""
    if overwrite:
        out.copy_(piece)
        lse.copy_(piece_lse)
        return
    total = torch.logaddexp(lse, piece_lse)
    out.mul_((lse - total).exp_().to(out.dtype)).addcmul_(piece, (piece_lse - total).exp_().to(out.dtype))
    lse.copy_(total)


def _backward_rows(grads: list[torch.Tensor], saved: list[torch.Tensor], settings: Settings, chunk: int) -> None:
    """Add to the gradients of query, key and value of a few rows; `saved` is grad, query, key, value, out and lse."""
    grad, query, key, value, out, lse = saved
    pattern, scale, dropout, seed = settings
    summaries = [_summary(x, pattern) for x in (key, value)]
    summary_grads = [None if x is None else torch.zeros_like(x) for x in summaries]
    for index, part in enumerate(parts_of(pattern, query.shape[1], query)):
        keys, values = _source(part, key, summaries[0]), _source(part, value, summaries[1])
        at = part.queries
        pieces = tile_backward(
            at(grad), at(query), keys, values, at(out), at(lse).squeeze(-1), scale, part.causal, part.bias,
            dropout, seed + SEEDS_A_CHUNK * chunk + index,
        )  # fmt: skip
        at(grads[0]).add_(pieces[0])
        for tokens, gathered, piece in zip(grads[1:], summary_grads, pieces[1:], strict=True):
            part.add_key_gradient(gathered if part.from_summary and gathered is not None else tokens, piece)
        del pieces, piece
    for tokens, gathered in zip(grads[1:], summary_grads, strict=True):
        if gathered is not None:
            tokens[:, :, pattern.stride - pattern.summary :].add_(gathered)
