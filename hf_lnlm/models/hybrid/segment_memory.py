"""Transformer-XL's memory as a layer of transformers' own `DynamicCache`.

A layer's memory is what the last `mem_len` tokens were when they reached it: its inputs, cut from their graph, from which
training makes keys and values anew with the present weights, so that these get their gradients from the memory too. Outside
training the keys and values themselves are kept beside, and the encodings of all distances: both are products that do not
change as long as the weights don't.

Rows are aligned to the right: the newest entry is in the last column, and `lengths` says how many of a row's columns count.
So padding is never stored, wherever it lies. What grows by a few tokens a call grows in place.

The layer type carries a hash of this file and of its base class's, so that checkpoints with different revisions of the
code can live in one process.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...nn.state import RECURRENT_LAYER_TYPE, StateLayer, States

_CODE = Path(__file__).read_bytes() + RECURRENT_LAYER_TYPE.encode()
SEGMENT_LAYER_TYPE = "lnlm_segment_attention_" + hashlib.sha256(_CODE).hexdigest()[:12]

_TIME = {"hidden": 1, "keys": 2, "values": 2}
"""Dimension of each tensor that counts the memory's columns."""


class Reach(NamedTuple):
    """How far back a query looks: what a memory must have been written by to be read.

    Attributes:
        mem_len: columns that are kept.
        clamp_len: largest distance that is told apart, or None.
        same_length: whether every query sees as many keys, `mem_len`.
    """

    mem_len: int
    clamp_len: int | None
    same_length: bool


class News(NamedTuple):
    """What of a call's tokens, and of what came before them, is remembered.

    Attributes:
        kept: `(batch, length)` tokens that are; None for all.
        fresh: `(batch,)` rows in which a new document has begun, so that the past is forgotten; None for none.
    """

    kept: torch.Tensor | None = None
    fresh: torch.Tensor | None = None


class SegmentMemoryLayer(StateLayer):
    """One layer's memory: inputs, and outside training keys and values, of the last tokens of each row.

    Attributes:
        lengths: `(batch,)` columns of each row that count, the last ones; None while empty.
        full: whether all columns of all rows count.
        reach: what it was written by, or None while empty.
        hidden: `(batch, columns, hidden_size)` inputs of the layer, or None while empty.
        keys, values: `(batch, heads, columns, head_dim)`, or None.
        relative: `(batch, heads, distances, head_dim)` encodings of the distances down to 0, all rows' the same; or None.
    """

    lnlm_layer_type = SEGMENT_LAYER_TYPE
    survives_recomputing = True  # training reads `hidden` and writes after the layer has run

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.hidden: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None
        self.relative: torch.Tensor | None = None
        self.full = True
        self.reach: Reach | None = None
        self._room: dict[str, int] = {}  # columns that a tensor's storage has behind its last one

    @property
    def columns(self) -> int:
        """Columns of the memory."""
        return 0 if self.hidden is None else self.hidden.shape[1]

    @property
    def states(self) -> States:
        """What the layer holds, as `tensors` gives it."""
        return self.tensors()

    def tensors(self) -> States:
        """Return inputs, keys, values and lengths, as far as there are any."""
        held = {name: getattr(self, name) for name in (*_TIME, "lengths")}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def keep(self, tensors: States) -> None:
        """Hold `tensors` in place of the present ones."""
        self._room = {}
        for name in (*_TIME, "lengths"):
            setattr(self, name, tensors.get(name))
        if self.relative is not None and self.hidden is not None:
            self.keep_relative(self.relative[0].to(self.hidden.device), len(self.hidden))

    def keep_relative(self, relative: torch.Tensor, rows: int) -> None:
        """Keep encodings of distances; every row has the same, in one place.

        Args:
            relative: `(heads, distances, head_dim)`.
            rows: of the batch.
        """
        self.relative = relative.detach().expand(rows, *relative.shape)

    def write(self, kind: str, states: States, num_tokens: int) -> None:
        """Replace everything by what `states` gave.

        Args:
            kind: what wrote it.
            states: tensors by name.
            num_tokens: positions seen since.
        """
        self.kind = kind
        self.keep(dict(states))
        self.full = self.lengths is None or bool((self.lengths == self.columns).all())
        self.seen_tokens += num_tokens
        self.is_initialized = True

    def check_reach(self, reach: Reach) -> None:
        """Refuse to go on with another reach than before.

        Raises:
            ValueError: naming both.
        """
        if self.reach not in (None, reach):
            raise ValueError(f"past_key_values was filled under {self.reach}, the config now says {reach}")
        if self.columns > reach.mem_len:
            raise ValueError(f"past_key_values holds {self.columns} columns, mem_len is {reach.mem_len}")
        self.reach = reach

    def begin(self, hidden: torch.Tensor) -> None:
        """Take initial entries, which count in every row; `hidden` is `(batch, columns, width)`."""
        self.hidden = hidden
        self.lengths = torch.full((hidden.shape[0],), hidden.shape[1], device=hidden.device)

    def extend(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Join a tensor of `(batch, columns, width)` or `(batch, heads, columns, head_dim)` with the present tokens'.

        Args:
            name: `hidden`, `keys` or `values`.
            new: the present tokens'.

        Returns:
            both, which the memory now holds.

        Raises:
            ValueError: the memory belongs to another model.
        """
        held, dim = getattr(self, name), _TIME[name]
        if held is not None:
            if held.shape[:dim] != new.shape[:dim] or held.shape[dim + 1 :] != new.shape[dim + 1 :]:
                raise ValueError(f"past_key_values holds {name} of shape {tuple(held.shape)}, got {tuple(new.shape)}")
            new = self._joined(name, held, new)
        setattr(self, name, new)
        return new

    def _joined(self, name: str, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """One behind the other: in the storage of `held` where that is safe, with room for more where few come a time."""
        dim, count, size = _TIME[name], new.shape[_TIME[name]], held.shape[_TIME[name]]
        tracked = torch.is_grad_enabled() or is_torchdynamo_compiling()
        if tracked or held.dtype != new.dtype or count > size:
            self._room.pop(name, None)
            return torch.cat([held, new], dim)
        shape = [*held.shape]
        shape[dim] = size + count
        frozen = held.is_inference() and not torch.is_inference_mode_enabled()
        if self._room.get(name, 0) < count or frozen:
            self._room[name] = count + max(64, size // 4)
            roomy = new.new_zeros([*shape[:dim], size + self._room[name], *shape[dim + 1 :]])
            held = roomy.narrow(dim, 0, size).copy_(held)
        self._room[name] -= count
        joined = held.as_strided(shape, held.stride(), held.storage_offset())
        joined.narrow(dim, size, count).copy_(new)
        return joined

    def _columns(self) -> States:
        """What has one entry a column."""
        return {name: tensor for name, tensor in self.tensors().items() if name in _TIME}

    def counted(self) -> torch.Tensor | None:
        """Return which columns count, `(batch, columns)` booleans; None if all do."""
        if self.full or self.lengths is None:
            return None
        places = torch.arange(self.columns - 1, -1, -1, device=self.lengths.device)
        return places < self.lengths.unsqueeze(1)

    def remember(self, hidden: torch.Tensor, news: News, initial: States | None = None) -> None:
        """Take the layer's inputs, and drop what lies beyond `mem_len` entries of each row.

        Args:
            hidden: `(batch, length, width)`, the layer's inputs; keys and values have been joined already, if they are.
            news: which of them are remembered, and what of the past is.
            initial: entries that a fresh row begins with, one column of each tensor; None for none.
        """
        length, before = hidden.shape[1], self.columns
        limit = hidden.shape[1] if self.reach is None else self.reach.mem_len
        counted = self.counted()
        self.extend("hidden", hidden.detach())
        if self.keys is not None and self.keys.shape[2] < self.columns:  # training made them anew and kept none
            self.keys = self.values = None
        if news.kept is None and news.fresh is None:
            lengths = (
                hidden.new_full(hidden.shape[:1], before, dtype=torch.long) if self.lengths is None else self.lengths
            )
            self.lengths = (lengths + length).clamp(max=limit)
            for name, tensor in self._columns().items():
                columns = min(limit, tensor.shape[_TIME[name]])
                setattr(self, name, tensor.narrow(_TIME[name], tensor.shape[_TIME[name]] - columns, columns))
        else:
            past = hidden.new_ones(len(hidden), before, dtype=torch.bool) if counted is None else counted
            past = past if news.fresh is None else past & ~news.fresh.unsqueeze(1)
            now = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if news.kept is None else news.kept
            self._compact(torch.cat([past, now], 1), limit, news.fresh, initial)
            self.full = False
        self.seen_tokens += length
        self.is_initialized = True
        if torch.is_grad_enabled():
            self.detach_()

    def _compact(self, counts: torch.Tensor, limit: int, fresh: torch.Tensor | None, initial: States | None) -> None:
        """Keep the last `limit` columns that count, `(batch, columns)`, of each row, aligned to the right."""
        lengths = counts.sum(1).clamp(max=limit)
        least = is_torchdynamo_compiling() or initial is not None
        columns = min(limit, counts.shape[1]) if least else int(lengths.max())
        order = counts.long().argsort(dim=1, stable=True)[:, counts.shape[1] - columns :]
        found = {name: _taken(tensor, _TIME[name], order) for name, tensor in self._columns().items()}
        if fresh is not None and initial is not None:
            places = torch.arange(columns - 1, -1, -1, device=counts.device)
            begun = (places >= lengths.unsqueeze(1)) & fresh.unsqueeze(1)
            for name, entry in initial.items():
                where = begun[:, :, None] if _TIME[name] == 1 else begun[:, None, :, None]
                found[name] = torch.where(where, entry.to(found[name].dtype), found[name])
            lengths = lengths.masked_fill(fresh, columns)
        self.keep({**found, "lengths": lengths})

    def take_rows(self, other: "SegmentMemoryLayer", rows: torch.Tensor) -> None:
        """Replace some rows by another memory's of the same kind.

        Args:
            other: with as many rows; what it lacks of this one's tensors is taken as nothing.
            rows: `(batch,)` booleans.
        """
        columns = max(self.columns, other.columns)
        found: States = {}
        for name, tensor in self._columns().items():
            own, given = _widened(tensor, _TIME[name], columns), getattr(other, name)
            new = torch.zeros_like(own) if given is None else _widened(given.to(own.dtype), _TIME[name], columns)
            found[name] = torch.where(rows.view(-1, *[1] * (own.dim() - 1)), new, own)
        theirs, mine = (torch.zeros_like(rows.long()) if it.lengths is None else it.lengths for it in (other, self))
        self.keep({**found, "lengths": torch.where(rows, theirs, mine)})
        self.full = False


def _taken(tensor: torch.Tensor, dim: int, order: torch.Tensor) -> torch.Tensor:
    """Columns of a tensor in an order, `(batch, columns)`."""
    index = order[:, :, None] if dim == 1 else order[:, None, :, None]
    return tensor.gather(dim, index.expand(*tensor.shape[:dim], order.shape[1], *tensor.shape[dim + 1 :]))


def _widened(tensor: torch.Tensor, dim: int, columns: int) -> torch.Tensor:
    """The tensor with empty columns before its own."""
    return pad(tensor, (0, 0, columns - tensor.shape[dim], 0))


DYNAMIC_LAYER_TYPE_MAPPING.setdefault(SEGMENT_LAYER_TYPE, SegmentMemoryLayer)
STATIC_LAYER_TYPE_MAPPING.setdefault(SEGMENT_LAYER_TYPE, SegmentMemoryLayer)
