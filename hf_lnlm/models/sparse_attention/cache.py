"""Keys and values of sparse attention as a layer of transformers' own `DynamicCache`.

Each entry carries its logical position (how many real tokens came before it), so left, right and inner padding are the
same thing: padding is never stored. After every step the layer drops what no later query can see:

    pattern                 entries a row keeps after n tokens
    local (banded), l       at most l - 1
    block                   at most l - 1
    fixed, l and c          at most l - 1 + c * floor(n / l)
    summary                 at most c * (floor(n / l) + 1)
    column, strided, full   n (every residue comes back; a step gathers only the keys that it sees)

While no token was padding all rows are alike (`even`): positions then follow from the number of tokens, and are worked out
only when asked for. Without gradients keys and values are appended in memory taken ahead; what was written is never
changed, so that whoever holds on to earlier keys keeps them.

A layer that is told to (`activate_past_recording`, as transformers' assisted and prompt-lookup decoding do) drops nothing
before `crop`, which takes back tokens.

The layer type carries a hash of this file and of its base class's, so that checkpoints with different revisions of the
code can live in one process.
"""

import hashlib
from pathlib import Path

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from ...nn.state import RECURRENT_LAYER_TYPE, StateLayer
from ...ops.sparse_attention.pattern import SparsePattern, kept_by
from ...ops.sparse_attention.step import compact_slots, take_slots

_CODE = Path(__file__).read_bytes() + RECURRENT_LAYER_TYPE.encode()
SPARSE_LAYER_TYPE = "lnlm_sparse_attention_" + hashlib.sha256(_CODE).hexdigest()[:12]

SPARE_ENTRIES = 64
"""Entries that memory is taken ahead for, at least; else a quarter of what there is (a tuning value)."""


class Room:
    """Memory taken ahead, and how much of it is written.

    Two copies of a layer may share it: only the one that wrote last goes on in it.

    Args:
        keys, values: `(batch, heads, size, head_dim)`.
        end: entries that are written.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        self.keys, self.values, self.end = keys, values, end

    def fits(self, key: torch.Tensor, end: int) -> bool:
        """Tell whether the tokens of a step can be written behind `end` entries."""
        return (
            self.end == end
            and end + key.shape[2] <= self.keys.shape[2]
            and self.keys.dtype == key.dtype
            and self.keys.is_inference() == key.is_inference()
        )


class SparseAttentionCacheLayer(StateLayer):
    """One layer's keys and values, bounded by what its patterns can still see.

    Attributes:
        keys, values: `(batch, heads, entries, head_dim)`, or None while empty.
        patterns: those that the entries were dropped by, or None before the first step.
        record_past: nothing is dropped before `crop`.
    """

    lnlm_layer_type = SPARSE_LAYER_TYPE
    is_croppable = True

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.patterns: tuple[SparsePattern, ...] | None = None
        self.record_past = False
        self._positions: torch.Tensor | None = None  # None while even, as `_counts`
        self._counts: torch.Tensor | None = None
        self._pruned_at = 0  # tokens seen when entries were last dropped
        self._kept: SparsePattern | None = None  # of which the entries are all that is seen; None where there is none
        self._room: Room | None = None
        self._end = 0  # where this layer's entries end in the room

    @property
    def even(self) -> bool:
        """Whether every row holds the same tokens, none of them padding."""
        return self._positions is None

    @property
    def entries(self) -> int:
        """Keys of a row."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def positions(self) -> torch.Tensor | None:
        """`(batch, entries)` logical positions, -1 in unused slots, or None while empty."""
        if self._positions is not None or self.keys is None:
            return self._positions
        seen = torch.arange(self.seen_tokens, device=self.keys.device)
        past = seen[: self._pruned_at]
        if self.patterns is not None:
            past = past[self._needed(seen.new_tensor(self._pruned_at), past)]
        return torch.cat([past, seen[self._pruned_at :]]).expand(self.keys.shape[0], -1)

    @property
    def counts(self) -> torch.Tensor | None:
        """`(batch,)` real tokens so far, or None while empty."""
        if self._counts is not None or self.keys is None:
            return self._counts
        return torch.full((self.keys.shape[0],), self.seen_tokens, device=self.keys.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return keys and values, and positions and counts where rows differ; empty while the layer is."""
        held = {"keys": self.keys, "values": self.values, "positions": self._positions, "counts": self._counts}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def keep(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hold `tensors` in place of the present ones."""
        self._room = None
        self.keys, self.values = tensors.get("keys"), tensors.get("values")
        self._positions, self._counts = tensors.get("positions"), tensors.get("counts")

    def extend(self, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor | None) -> None:
        """Append the tokens of one step.

        Args:
            key: `(batch, heads, length, head_dim)`.
            value: as `key`.
            real: `(batch, length)` true at real tokens; None if all are.

        Raises:
            ValueError: the cache belongs to another batch or another model.
        """
        self._check(key)
        length = key.shape[2]
        if real is not None or not self.even:
            self._extend_positions(key, real)
        if self.keys is None or self.values is None:
            self.keys, self.values = key, value
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._room = None
            self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        else:
            self._append(key, value)
        self.seen_tokens += length
        self.is_initialized = True

    def _extend_positions(self, key: torch.Tensor, real: torch.Tensor | None) -> None:
        batch, length = key.shape[0], key.shape[2]
        counts = key.new_zeros(batch, dtype=torch.long) if self.counts is None else self.counts
        if real is None:
            added = counts.unsqueeze(1) + torch.arange(length, device=key.device)
        else:
            added = torch.where(real, counts.unsqueeze(1) + real.long().cumsum(1) - 1, -1)
        held = self.positions
        self._positions = added if held is None else torch.cat([held, added], dim=1)
        self._counts = counts + (length if real is None else real.sum(1))

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write behind the present entries, where there is room; else move them to where there is."""
        held, length, room = self.entries, key.shape[2], self._room
        if room is None or not room.fits(key, self._end):
            room = self._make_room(key, held + length)
        start, end = room.end, room.end + length
        room.keys.narrow(2, start, length).copy_(key)
        room.values.narrow(2, start, length).copy_(value)
        self.keys, self.values = room.keys[:, :, start - held : end], room.values[:, :, start - held : end]
        self._end = room.end = end

    def _make_room(self, like: torch.Tensor, entries: int) -> Room:
        rows, heads, _, width = like.shape
        size = entries + max(SPARE_ENTRIES, entries // 4)
        made = []
        for states in (self.keys, self.values):
            made.append(like.new_zeros(rows, heads, size, width))
            if states is not None:
                made[-1][:, :, : self.entries] = states
        self._room = Room(made[0], made[1], self.entries)
        return self._room

    def prune(self, patterns: tuple[SparsePattern, ...]) -> None:
        """Drop the entries that no query after the present ones can see under any of `patterns`."""
        if patterns is not self.patterns:
            self.patterns, self._kept = patterns, kept_by(patterns)
        if self.record_past or self.keys is None:
            return
        if self.even:
            self._prune_even()
        else:
            self._prune_rows()
        self._pruned_at = self.seen_tokens

    def _prune_rows(self) -> None:
        positions, counts = self._positions, self._counts
        if positions is None or counts is None:
            return
        kept = (positions >= 0) & self._needed(counts.unsqueeze(1), positions)
        if bool(kept.all()):
            return
        slots = compact_slots(kept)
        self._select(slots)
        self._positions = positions.gather(1, slots).masked_fill(~kept.gather(1, slots), -1)

    def _needed(self, following: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Which entries a query at `following` or any later one sees."""
        needed = [pattern.needed_from(following, positions) for pattern in self.patterns or ()]
        return torch.stack(needed).any(0)

    def _prune_even(self) -> None:
        """The same where rows are alike: how many are kept follows from the number of tokens."""
        wanted = None if self._kept is None else self._kept.kept_after(self.seen_tokens)
        positions = None if wanted == self.entries else self.positions
        if self._kept is not None and wanted is not None and self._kept.kind == "local" and wanted < self.entries:
            self._keep_last(wanted)
        elif positions is not None:
            needed = self._needed(positions.new_tensor(self.seen_tokens), positions[0])
            self._select(needed.nonzero().view(1, -1))

    def _select(self, slots: torch.Tensor) -> None:
        self._room = None
        self.keys, self.values = take_slots(self.keys, slots), take_slots(self.values, slots)  # type: ignore[arg-type]

    def _keep_last(self, wanted: int) -> None:
        """Keep a window: in its room, unless that is a long text's."""
        if self.keys is None or self.values is None:
            return
        first = self.entries - wanted
        self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]
        if first > wanted + SPARE_ENTRIES:
            self._room = None
            self.keys, self.values = self.keys.clone(), self.values.clone()

    @property
    def exact(self) -> bool:
        """Whether a single new token sees every entry that its pattern allows, and the layer holds no others."""
        whole = self._kept is not None and self._kept.kind == "full"
        return self.even and (whole or self._pruned_at == self.seen_tokens - 1)

    def activate_past_recording(self) -> None:
        """Drop nothing from here on, so that `crop` can take back what comes."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, then drop what is not needed.

        Args:
            tokens_to_remove: their number as transformers gives it, negated; masked ones count.

        Raises:
            ValueError: for a positive number, or tokens before which entries have been dropped already.
        """
        removed = -tokens_to_remove
        if removed < 0:
            raise ValueError(
                f"past_key_values cannot be cropped to a length: crop(-n) takes back n tokens, got crop({tokens_to_remove})"
            )
        if self.keys is None or self.values is None:
            return
        if removed:
            self._take_back(min(removed, self.seen_tokens))
        if self.record_past and self.patterns is not None:
            self.record_past = False
            self.prune(self.patterns)
            self.record_past = True

    def _take_back(self, removed: int) -> None:
        whole = self.even and (self.patterns is None or (self._kept is not None and self._kept.kind == "full"))
        if not whole and self.seen_tokens - removed < self._pruned_at:
            raise ValueError(
                f"past_key_values cannot be cropped by {removed} of {self.seen_tokens} tokens: keys have been dropped "
                "since (call activate_past_recording() before they come)"
            )
        left, self._room = self.entries - removed, None
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        if self._positions is not None and self._counts is not None:
            self._counts = self._counts - (self._positions[:, left:] >= 0).sum(1)
            self._positions = self._positions[:, :left]
        self.seen_tokens -= removed
        self._pruned_at = min(self._pruned_at, self.seen_tokens)

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
