"""Every index set as a few disjoint batches of dense tiles.

Tokens are laid out as `(rows, blocks, l, head_dim)`, rows = batch × heads. A tile batch ("part") is a view of that
layout, so reading needs no copy and gradients accumulate straight into the view:

* block: queries and keys of one block;
* window: the queries of a block against the blocks around it, under one small bias;
* column: position `a` of every block, which the transposed layout makes neighbours (the published kernels' trick);
* summary: queries against the last `c` keys of other blocks, gathered once into `(rows, blocks · c, head_dim)`.
  Blocks are taken in groups: inside a group under one bias, against all earlier groups without.

Complexity, causal, in scores per head: window `2 n l`, column `n²/2l`, block `n l`, summary `n² c / 2l`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from .pattern import SparsePattern

GROUP_QUERIES = 1024
"""Queries in one group of blocks of the summary step: enough to fill a fused tile (a tuning value, no effect on
results)."""

View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One batch of tiles.

    Args:
        queries: takes `(rows, blocks, l, width)` to the tiles' queries `(rows, tiles, queries, width)`, as a view.
        keys: takes the key layout to the tiles' keys `(rows, tiles, keys, width)`, as a view.
        causal: query `a` of a tile sees its keys `0 … a`.
        bias: added to the scores, or None.
        from_summary: keys come from the gathered summary `(rows, blocks, c, width)` instead of the tokens.
        first: no earlier part covers these queries, so there is nothing to merge with.
        fold: adds a gradient of the keys to its accumulator where the view overlaps itself.
    """

    queries: View
    keys: View
    causal: bool = False
    bias: torch.Tensor | None = None
    from_summary: bool = False
    first: bool = False
    fold: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def add_key_gradient(self, accumulator: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds `gradient` of the tiles' keys to `accumulator`, laid out as the keys' source."""
        if self.fold is None:
            self.keys(accumulator).add_(gradient)
        else:
            self.fold(accumulator, gradient)


def parts_of(pattern: SparsePattern, blocks: int, like: torch.Tensor) -> tuple[Part, ...]:
    """The disjoint parts of an index set over `blocks` blocks of `pattern.stride` tokens.

    Args:
        pattern: any kind but "full".
        blocks: number of blocks.
        like: gives dtype and device of the biases.
    """
    return _cached_parts(pattern, blocks, max(1, GROUP_QUERIES // pattern.stride), like.dtype, like.device)


@lru_cache(maxsize=32)
def _cached_parts(
    pattern: SparsePattern, blocks: int, group: int, dtype: torch.dtype, device: torch.device
) -> tuple[Part, ...]:
    """Kept between calls: making the biases takes a noticeable share of the time of short inputs."""
    with torch.inference_mode(False):  # a bias made in inference mode could not be used in training later
        return tuple(_parts(pattern, blocks, group, torch.empty(0, dtype=dtype, device=device)))


def _parts(pattern: SparsePattern, blocks: int, group: int, like: torch.Tensor) -> Iterator[Part]:
    kind, causal = pattern.kind, pattern.causal
    if kind in ("local", "strided"):
        yield from _window_parts(pattern.stride, blocks, causal, like)
    if kind == "strided" and blocks > 1:
        yield _other_columns(blocks, causal, like)
    if kind == "column":
        yield Part(_columns, _columns, causal, first=True)
    if kind in ("block", "fixed"):
        yield from _block_parts(pattern, causal)
    if kind == "summary" and causal:
        tail = slice(pattern.stride - pattern.summary, None)
        yield Part(lambda x: x[:, :, tail], lambda x: x[:, :, tail], True, first=True)
    if kind in ("summary", "fixed"):
        yield from _summary_parts(pattern, blocks, min(blocks, group), like)


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).unsqueeze(1)


def _columns(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _block_parts(pattern: SparsePattern, causal: bool) -> Iterator[Part]:
    """Own block; without its summary columns where the bidirectional fixed set sees those of every block together."""
    if pattern.kind == "block" or causal:
        yield Part(_whole, _whole, causal, first=True)
    elif pattern.summary < pattern.stride:
        head = slice(0, pattern.stride - pattern.summary)
        yield Part(_whole, lambda x: _whole(x)[:, :, head], first=True)


def blocking_bias(allowed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bias `(1, 1, queries, keys)` in the dtype and on the device of `like`: 0 where `allowed`, else -inf."""
    bias = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~allowed, float("-inf"))[None, None]


def _other_columns(blocks: int, causal: bool, like: torch.Tensor) -> Part:
    """The column of a query in every block but its own, where the window has it already."""
    if causal:
        return Part(lambda x: x[:, 1:].transpose(1, 2), lambda x: x[:, :-1].transpose(1, 2), True)
    other = ~torch.eye(blocks, dtype=torch.bool, device=like.device)
    return Part(_columns, _columns, False, blocking_bias(other, like))


def _window_parts(stride: int, blocks: int, causal: bool, like: torch.Tensor) -> Iterator[Part]:
    """Blocks against their neighbourhood, `|i - j| < l`: the ends of the sequence have fewer neighbours, so they
    are tiles of their own."""
    first_end = 0 if causal else min(1, blocks - 1)
    yield _window(stride, 0, 1, 0, first_end, causal, like)
    if blocks == 1:
        return
    if causal:
        yield _window(stride, 1, blocks, -1, 0, causal, like)
        return
    if blocks > 2:
        yield _window(stride, 1, blocks - 1, -1, 1, causal, like)
    yield _window(stride, blocks - 1, blocks, -1, 0, causal, like)


def _window(stride: int, first: int, end: int, before: int, after: int, causal: bool, like: torch.Tensor) -> Part:
    """Blocks `first … end - 1`, each against blocks `+before … +after` around it."""
    span = after - before + 1
    query = torch.arange(stride, device=like.device).unsqueeze(1) - before * stride
    distance = query - torch.arange(span * stride, device=like.device)
    allowed = (distance.abs() < stride) & ((distance >= 0) | (not causal))

    def queries(x: torch.Tensor) -> torch.Tensor:
        return x[:, first:end]

    def keys(x: torch.Tensor) -> torch.Tensor:
        near = x[:, first + before : end + after]
        size = (near.shape[0], end - first, span * stride, near.shape[3])
        return near.as_strided(size, near.stride(), near.storage_offset())

    def fold(accumulator: torch.Tensor, gradient: torch.Tensor) -> None:
        for i in range(span):
            start = first + before + i
            piece = gradient[:, :, i * stride : (i + 1) * stride]
            accumulator[:, start : start + end - first].add_(piece)

    bias = None if allowed.all() else blocking_bias(allowed, like)
    return Part(queries, keys, bias=bias, first=True, fold=fold)


def _flat(x: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Blocks `start … end - 1` as one tile `(rows, 1, tokens, width)`."""
    return x[:, start:end].flatten(1, 2).unsqueeze(1)


def _summary_parts(pattern: SparsePattern, blocks: int, group: int, like: torch.Tensor) -> Iterator[Part]:
    """Queries against the summaries of other blocks (bidirectional: of all blocks), causal ones `group` blocks at a
    time."""
    if not pattern.causal:
        alone = pattern.kind == "summary" or pattern.summary == pattern.stride
        yield Part(lambda x: _flat(x, 0, blocks), lambda x: _flat(x, 0, blocks), from_summary=True, first=alone)
        return
    whole = blocks - blocks % group
    if group > 1 and whole:
        yield _inside_groups(pattern, 0, whole, group, like)
    if blocks - whole > 1:
        yield _inside_groups(pattern, whole, blocks, blocks - whole, like)
    for start in range(group, blocks, group):
        yield _earlier_groups(start, min(start + group, blocks))


def _earlier_groups(start: int, end: int) -> Part:
    return Part(lambda x: _flat(x, start, end), lambda x: _flat(x, 0, start), from_summary=True)


def _inside_groups(pattern: SparsePattern, start: int, end: int, group: int, like: torch.Tensor) -> Part:
    """Blocks `1 …` of each group against the summaries of the blocks before them in the same group."""
    seeing = torch.arange(1, group, device=like.device).repeat_interleave(pattern.stride).unsqueeze(1)
    seen = torch.arange(group - 1, device=like.device).repeat_interleave(pattern.summary)
    bias = None if group == 2 else blocking_bias(seen < seeing, like)

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return x[:, start:end].unflatten(1, (-1, group))

    def queries(x: torch.Tensor) -> torch.Tensor:
        return grouped(x)[:, :, 1:].flatten(2, 3)

    def keys(x: torch.Tensor) -> torch.Tensor:
        return grouped(x)[:, :, :-1].flatten(2, 3)

    return Part(queries, keys, False, bias, True)
