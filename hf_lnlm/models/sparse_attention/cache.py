"""Keys and values of sparse attention as a layer of transformers' own `DynamicCache`.

Each entry carries its logical position (how many real tokens came before it), so left, right and inner padding are the
same thing: padding is never stored. After every step the layer drops what no later query can see:

    pattern                 entries a row keeps after n tokens
    local (banded), l       at most l - 1
    block                   at most l - 1
    fixed, l and c          at most l - 1 + c * floor(n / l)
    summary                 at most c * (floor(n / l) + 1)
    column, strided, full   n (every residue comes back; a step gathers only the keys that it sees)

The layer type carries a hash of this file, so that checkpoints with different revisions of the code can live in one
process.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from ...ops.sparse_attention.pattern import SparsePattern
from ...ops.sparse_attention.step import compact_slots, take_slots

SPARSE_LAYER_TYPE = "lnlm_sparse_attention_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


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


class SparseAttentionCacheLayer(CacheLayerMixin):
    """One layer's keys and values, bounded by what its patterns can still see.

    Attributes:
        keys, values: `(batch, heads, entries, head_dim)`, or None while empty.
        positions: `(batch, entries)` logical positions, -1 in unused slots, or None while empty.
        counts: `(batch,)` real tokens so far, or None while empty.
        seen_tokens: positions (masked ones included) that have passed.
        patterns: those that the entries were dropped by, or None before the first step.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self.seen_tokens = 0
        self.patterns: tuple[SparsePattern, ...] | None = None
        self.is_initialized = False

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

    def update(self, key_states: Any = None, value_states: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Do nothing: `extend` and `prune` fill this layer. Present because `DynamicCache` may call it with None."""
        return key_states, value_states

    def lazy_initialization(self, key_states: Any = None, value_states: Any = None) -> None:
        """Do nothing: an empty layer needs no tensors."""

    def get_seq_length(self) -> int:
        """Return the number of positions seen."""
        return self.seen_tokens

    def get_max_length(self) -> int:
        """Return -1: the sequence has no longest length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length of the mask that covers past and present, its offset)."""
        return self.seen_tokens + query_length, 0

    def _map(self, function: Any) -> None:
        for name in ("keys", "values", "positions", "counts"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else function(tensor))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give row i the entries of row `beam_idx[i]`; `beam_idx` is `(batch,)`."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, a `(rows,)` tensor of indices or booleans."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def detach_(self) -> None:
        """Cut the graph of keys and values."""
        self._map(lambda tensor: tensor.detach())

    def crop(self, max_length: int) -> None:
        """Refuse to shorten: dropped entries cannot come back.

        Raises:
            ValueError: unless there is nothing to remove.
        """
        if max_length not in (0, self.seen_tokens):
            raise ValueError(f"a pruned cache cannot be cropped to {max_length} of {self.seen_tokens} tokens")

    def offload(self) -> None:
        """Move the entries to the CPU, remembering where they were."""
        if self.keys is not None:
            self.device = self.keys.device
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the entries back to where they were before `offload`."""
        device = getattr(self, "device", None)
        if device is not None:
            self._map(lambda tensor: tensor.to(device, non_blocking=True))

    @property
    def batch_size(self) -> int | None:
        """Rows of the cache, or None while it is empty."""
        return None if self.keys is None else self.keys.shape[0]


DYNAMIC_LAYER_TYPE_MAPPING.setdefault(SPARSE_LAYER_TYPE, SparseAttentionCacheLayer)
STATIC_LAYER_TYPE_MAPPING.setdefault(SPARSE_LAYER_TYPE, SparseAttentionCacheLayer)
