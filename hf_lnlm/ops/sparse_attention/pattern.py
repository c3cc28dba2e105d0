"""The index sets of sparse attention: which keys `j` a query `i` sees.

Glossary (paper [1] symbol ↔ name): `l` ↔ `stride`, `c` ↔ `summary`, `A¹`/`A²` of the strided pattern ↔
"local"/"column", of the fixed pattern ↔ "block"/"summary"; their unions are "strided" and "fixed".

Deviations: the paper's local set has `l + 1` members; ours has exactly `l`, as in the authors' published code. Sets
are defined on
*logical positions* (the number of real tokens before a token), so padding never shifts a pattern.

[1] Child et al., Generating Long Sequences with Sparse Transformers, 2019, arXiv 1904.10509, §4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

KINDS = ("full", "local", "column", "strided", "block", "summary", "fixed")
"""Every index set; `strided = local ∪ column`, `fixed = block ∪ summary`."""

FACTORS = {"full": ("full",), "local": ("local",), "strided": ("local", "column"), "fixed": ("block", "summary")}
"""A configurable pattern and the attention steps `A¹, A²` it is factorised into."""

COMBINATIONS = ("merged", "interleaved", "per_head")
"""How the steps of a pattern are combined (§5.2 of the paper)."""


Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value, `(batch, heads, length, head_dim)` each."""


@dataclass(frozen=True)
class SparsePattern:
    """One index set.

    Args:
        kind: one of `KINDS`.
        stride: `l`, in tokens, at least 1.
        summary: `c`, the number of summary columns at the end of each block, `1 ≤ c ≤ l`; only "summary" and "fixed"
            read it.
        causal: a query sees no key after itself.

    Raises:
        ValueError: for a value outside its range.
    """

    kind: str
    stride: int = 128
    summary: int = 8
    causal: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.kind in ("summary", "fixed") and not 1 <= self.summary <= self.stride:
            raise ValueError(f"summary must lie in 1 … stride = {self.stride}, got {self.summary}")

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees.

        Args:
            query_positions: logical positions `(…, queries)`.
            key_positions: logical positions `(…, keys)`; negative = not a token, never seen.

        Returns:
            bool `(…, queries, keys)`.
        """
        query, key = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
        seen = self._member(query, key) & (key >= 0)
        return seen & (key <= query) if self.causal else seen

    def _member(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        stride = self.stride
        if self.kind == "full":
            return torch.ones_like(query - key, dtype=torch.bool)
        if self.kind in ("local", "column", "strided"):
            distance = query - key
            local, column = distance.abs() < stride, distance % stride == 0
            return {"local": local, "column": column, "strided": local | column}[self.kind]
        block = query.div(stride, rounding_mode="floor") == key.div(stride, rounding_mode="floor")
        summary = (key % stride >= stride - self.summary) & (query >= 0)
        return {"block": block, "summary": summary, "fixed": block | summary}[self.kind]

    def needed_from(self, position: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Which keys a causal query at `position` or any later one sees.

        Args:
            position: int64, broadcastable to `key_positions`.
            key_positions: logical positions `(…, keys)`, all before `position`.

        Returns:
            bool, shaped as `key_positions`.
        """
        if self.kind in ("full", "column", "strided"):
            return torch.ones_like(key_positions, dtype=torch.bool)
        needed = torch.zeros_like(key_positions, dtype=torch.bool)
        if self.kind == "local":
            needed = position - key_positions < self.stride
        if self.kind in ("block", "fixed"):
            needed = key_positions >= position - position % self.stride
        if self.kind in ("summary", "fixed"):
            needed = needed | (key_positions % self.stride >= self.stride - self.summary)
        return needed

    def kept_after(self, seen: int) -> int:
        """How many of `seen` keys a causal query at position `seen` or any later one sees; see `needed_from`."""
        if self.kind in ("full", "column", "strided"):
            return seen
        if self.kind == "local":
            return min(seen, self.stride - 1)
        blocks, begun = divmod(seen, self.stride)
        if self.kind == "block":
            return begun
        return blocks * self.summary + (begun if self.kind == "fixed" else max(0, begun - self.stride + self.summary))

    def is_dense(self, length: int) -> bool:
        """True where the set of every query among `length` tokens is all that `causal` allows."""
        return self.kind == "full" or (self.kind in ("local", "strided", "block", "fixed") and length <= self.stride)


@lru_cache
def kept_by(patterns: tuple[SparsePattern, ...]) -> SparsePattern | None:
    """The index set whose `needed_from` is that of several together; None where there is none."""
    if any(pattern.kind in ("full", "column", "strided") for pattern in patterns):
        return SparsePattern("full")
    first = patterns[0]
    if len(set(patterns)) == 1:
        return first
    sizes = {(pattern.stride, pattern.summary) for pattern in patterns}
    fixed = {pattern.kind for pattern in patterns} <= {"block", "summary", "fixed"} and len(sizes) == 1
    return SparsePattern("fixed", first.stride, first.summary) if fixed else None


def patterns_for_layer(
    pattern: str, combination: str, layer: int, *, stride: int, summary: int, causal: bool
) -> tuple[SparsePattern, ...]:
    """The index sets of one layer: one for all heads, or (for "per_head") one for each equal group of heads.

    Args:
        pattern: a key of `FACTORS`.
        combination: "merged" (the union under one softmax), "interleaved" (layer `r` uses step `r mod p`),
            "per_head" (the heads are split evenly over the steps).
        layer: index of the layer, from 0.
        stride: `l`, in tokens.
        summary: `c`, in tokens.
        causal: whether queries see only the past.

    Raises:
        ValueError: for an unknown pattern or combination.
    """
    if pattern not in FACTORS:
        raise ValueError(f"pattern must be one of {', '.join(FACTORS)}, got {pattern!r}")
    if combination not in COMBINATIONS:
        raise ValueError(f"combination must be one of {', '.join(COMBINATIONS)}, got {combination!r}")
    steps = FACTORS[pattern]
    kinds = {"merged": (pattern,), "interleaved": (steps[layer % len(steps)],), "per_head": steps}[combination]
    return tuple(SparsePattern(kind, stride, summary, causal) for kind in kinds)


def logical_positions(mask: torch.Tensor) -> torch.Tensor:
    """Number of real tokens before each real token, and -1 at padding.

    Args:
        mask: bool `(batch, length)`, True at real tokens.

    Returns:
        int64 `(batch, length)`.
    """
    return torch.where(mask, mask.long().cumsum(-1) - 1, -1)
