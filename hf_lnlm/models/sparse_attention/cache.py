"""Keys and values of sparse attention as a layer of transformers' own `DynamicCache`.

Each entry carries its logical position (how many real tokens came before it), so left, right and inner padding are the
same thing: padding is never stored. After every step the layer drops what no later query can see:

    pattern                 entries a row keeps after n tokens
    local (banded), l       at most l - 1
    block                   at most l - 1
    fixed, l and c          at most l - 1 + c * floor(n / l)
    summary                 at most c * (floor(n / l) + 1)
    column, strided, full   n (every residue comes back; a step gathers only the keys that it sees)

The layer type carries a hash of this file and of its base class's, so that checkpoints with different revisions of the
code can live in one process.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from ...nn.state import RECURRENT_LAYER_TYPE, StateLayer
from ...ops.sparse_attention.pattern import SparsePattern
from ...ops.sparse_attention.step import compact_slots, take_slots

_CODE = Path(__file__).read_bytes() + RECURRENT_LAYER_TYPE.encode()
SPARSE_LAYER_TYPE = "lnlm_sparse_attention_" + hashlib.sha256(_CODE).hexdigest()[:12]


class Extended(NamedTuple):
    """A cache joined with the tokens of one step.

    Attributes:
        key: `(batch, heads, entries, head_dim)`, cached entries first.
        value: as `key`.
        key_positions: `(batch, entries)` logical positions; -1 where there is no token.
        query_positions: `(batch, step length)` those of the step's tokens.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_positions: torch.Tensor
    query_positions: torch.Tensor


class SparseAttentionCacheLayer(StateLayer):
    """One layer's keys and values, bounded by what its patterns can still see.

    Attributes:
        keys, values: `(batch, heads, entries, head_dim)`, or None while empty.
        positions: `(batch, entries)` logical positions, -1 in unused slots, or None while empty.
        counts: `(batch,)` real tokens so far, or None while empty.
        patterns: those that the entries were dropped by, or None before the first step.
    """

    lnlm_layer_type = SPARSE_LAYER_TYPE

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self.patterns: tuple[SparsePattern, ...] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return keys, values, positions and counts, if there are any."""
        held = {name: getattr(self, name) for name in ("keys", "values", "positions", "counts")}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def keep(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hold `tensors` in place of the present ones."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def extend(self, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor | None) -> Extended:
        """Append the tokens of one step.

        Args:
            key: `(batch, heads, length, head_dim)`.
            value: as `key`.
            real: `(batch, length)` true at real tokens; None if all are.

        Returns:
            everything there is now, before `prune`.

        Raises:
            ValueError: the cache belongs to another batch or another model.
        """
        batch, length = key.shape[0], key.shape[2]
        self._check(key)
        counts = self.counts if self.counts is not None else key.new_zeros(batch, dtype=torch.long)
        if real is None:
            query_positions = counts.unsqueeze(1) + torch.arange(length, device=key.device)
        else:
            query_positions = torch.where(real, counts.unsqueeze(1) + real.long().cumsum(1) - 1, -1)
        if self.keys is None or self.values is None or self.positions is None:
            self.keys, self.values, self.positions = key, value, query_positions
        else:
            self.keys = torch.cat([self.keys, key], dim=2)
            self.values = torch.cat([self.values, value], dim=2)
            self.positions = torch.cat([self.positions, query_positions], dim=1)
        self.counts = counts + (length if real is None else real.sum(1))
        self.seen_tokens += length
        self.is_initialized = True
        return Extended(self.keys, self.values, self.positions, query_positions)

    def prune(self, patterns: tuple[SparsePattern, ...]) -> None:
        """Drop the entries that no query after the present ones can see under any of `patterns`."""
        self.patterns = patterns
        if self.keys is None or self.values is None or self.positions is None or self.counts is None:
            return
        following = self.counts.unsqueeze(1)
        kept = self.positions >= 0
        needed = [pattern.needed_from(following, self.positions) for pattern in patterns]
        kept = kept & torch.stack(needed).any(0)
        if bool(kept.all()):
            return
        slots = compact_slots(kept)
        self.keys, self.values = take_slots(self.keys, slots), take_slots(self.values, slots)
        self.positions = self.positions.gather(1, slots).masked_fill(~kept.gather(1, slots), -1)

    def check_patterns(self, patterns: tuple[SparsePattern, ...]) -> None:
        """Refuse to go on under other patterns than those that entries were dropped by.

        Raises:
            ValueError: naming both.
        """
        if self.patterns is not None and self.patterns != patterns:
            raise ValueError(f"past_key_values was filled under {self.patterns}, this layer attends by {patterns}")

    def _check(self, key: torch.Tensor) -> None:
        if self.keys is None:
            return
        if self.keys.shape[0] != key.shape[0]:
            raise ValueError(f"past_key_values holds {self.keys.shape[0]} rows, the input has {key.shape[0]}")
        if self.keys.shape[1] != key.shape[1] or self.keys.shape[3] != key.shape[3]:
            raise ValueError(
                f"past_key_values holds {self.keys.shape[1]} heads of {self.keys.shape[3]}, this layer has "
                f"{key.shape[1]} of {key.shape[3]}"
            )


DYNAMIC_LAYER_TYPE_MAPPING.setdefault(SPARSE_LAYER_TYPE, SparseAttentionCacheLayer)
STATIC_LAYER_TYPE_MAPPING.setdefault(SPARSE_LAYER_TYPE, SparseAttentionCacheLayer)
