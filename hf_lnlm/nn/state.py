"""Recurrent state as a layer of transformers' own `DynamicCache`.

A recurrent model's memory of the past is a few tensors of fixed size a layer (an LSTM's `h` and `c`, a convolution's last
frames, an external memory), not keys and values that grow. `RecurrentStateLayer` keeps them in the cache object that
`generate` makes, reorders for beam search and hands back, so that greedy decoding, sampling, beams, chunked prefill and
truncated back-propagation through time are one mechanism.

The layer is registered under its own layer type. transformers' own "linear_attention" layer does not fit: its state reads
as absent until a convolution state is written, and a cache made of it alone has no sequence length.

The layer type carries a hash of this file, so that checkpoints with different revisions of the code can live in one
process, each finding its own class.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

States = dict[str, torch.Tensor]
StateCache = Any
"""A `Cache` with layers of ours, or None; transformers' annotation closes the list of layers with its own."""

RECURRENT_LAYER_TYPE = "lnlm_recurrent_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


class StateLayer(CacheLayerMixin):
    """What the package's cache layers share: who wrote them, how many positions they saw, and whole rows.

    A subclass holds its tensors where `tensors` and `keep` say, batch first.

    Attributes:
        kind: what wrote the layer, such as "lstm"; None while empty.
        seen_tokens: number of positions (masked ones included) that have passed.
    """

    lnlm_layer_type: ClassVar[str]
    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False
    survives_recomputing: ClassVar[bool] = False
    """Whether a model's layer may run twice with it: gradient checkpointing does so."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.reset()

    def tensors(self) -> States:
        """Return what the layer holds, name → tensor `(batch, ...)`; empty while it is."""
        raise NotImplementedError(f"{type(self).__name__} must say what it holds")

    def keep(self, tensors: States) -> None:
        """Hold `tensors` in place of the present ones, with the same names."""
        raise NotImplementedError(f"{type(self).__name__} must say where it holds tensors")

    def reset(self) -> None:
        """Forget everything."""
        self.kind: str | None = None
        self.seen_tokens = 0
        self.is_initialized = False
        self._home: torch.device | None = None

    def check_kind(self, kind: str) -> None:
        """Refuse a layer that something else wrote.

        Raises:
            ValueError: naming both.
        """
        if self.kind not in (None, kind):
            raise ValueError(f"past_key_values holds the state of a {self.kind!r} layer, this is a {kind!r} layer")

    def update(self, key_states: Any = None, value_states: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Do nothing: a model fills this layer by other methods. Present because `DynamicCache` may call it with None."""
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

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.keep({name: function(tensor) for name, tensor in self.tensors().items()})

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give row i the state of row `beam_idx[i]`; `beam_idx` is `(batch,)`."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, a `(rows,)` tensor of indices or booleans."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def detach_(self) -> None:
        """Cut the graph: truncated back-propagation through time keeps the values and drops their history."""
        self._map(lambda tensor: tensor.detach())

    def crop(self, max_length: int) -> None:
        """Refuse to shorten: what was folded in or dropped cannot come back.

        Raises:
            ValueError: unless there is nothing to remove.
        """
        if max_length not in (0, self.seen_tokens):
            raise ValueError(f"a {self.kind} state cannot be cropped to {max_length} of {self.seen_tokens} tokens")

    def offload(self) -> None:
        """Move the state to the CPU, remembering where it was."""
        self._home = self.device
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the state back to where it was before `offload`."""
        home, self._home = self._home, None
        if home is not None:
            self._map(lambda tensor: tensor.to(home, non_blocking=True))

    @property
    def device(self) -> torch.device | None:
        """Where the state is computed with, wherever it is kept meanwhile; None while it is empty."""
        return self._home or next((tensor.device for tensor in self.tensors().values()), None)

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the state's first floating-point tensor, or None while it is empty."""
        return next((tensor.dtype for tensor in self.tensors().values() if tensor.is_floating_point()), None)

    @property
    def batch_size(self) -> int | None:
        """Rows of the state, or None while it is empty."""
        return next((tensor.shape[0] for tensor in self.tensors().values()), None)


class RecurrentStateLayer(StateLayer):
    """One layer's recurrent state: named tensors, batch first, and how many positions made them.

    An empty layer means the model's *initial* state, which need not be zero. States are written whole, with the name of
    what wrote them (`kind`), and are refused when read by anything else.

    Attributes:
        states: name → tensor of shape `(batch, ...)`; empty before the first write and after `reset`.
    """

    lnlm_layer_type = RECURRENT_LAYER_TYPE
    survives_recomputing = True  # states are written after the layer has run

    def reset(self) -> None:
        """Forget everything: the next read gives the initial state."""
        super().reset()
        self.states: States = {}

    def tensors(self) -> States:
        """Return the states."""
        return self.states

    def keep(self, tensors: States) -> None:
        """Hold `tensors` in place of the present states."""
        self.states = tensors

    def read(self, kind: str, batch_size: int, shapes: Mapping[str, tuple[int, ...]]) -> States | None:
        """Return the state, or None when the sequence has only begun and the initial state applies.

        Args:
            kind: what is about to read, such as "lstm".
            batch_size: rows of the input.
            shapes: name → shape of one row's state, without the batch dimension.

        Returns:
            name → tensor `(batch_size, *shape)`, or None.

        Raises:
            ValueError: the state was written by another kind of layer, for another batch size or another config.
        """
        if not self.states:
            return None
        self.check_kind(kind)
        if set(self.states) != set(shapes):
            raise ValueError(f"past_key_values holds states {sorted(self.states)}, expected {sorted(shapes)}")
        for name, shape in shapes.items():
            found = tuple(self.states[name].shape)
            if found[0] != batch_size:
                raise ValueError(f"past_key_values holds the state of {found[0]} rows, the input has {batch_size}")
            if found[1:] != tuple(shape):
                raise ValueError(f"past_key_values: state {name!r} has shape {found[1:]} a row, expected {shape}")
        return {name: self.states[name] for name in shapes}  # a file keeps names in an order of its own

    def write(self, kind: str, states: States, num_tokens: int) -> None:
        """Replace the state.

        Args:
            kind: what writes, such as "lstm".
            states: name → tensor `(batch, ...)`. Kept as they are, with their graph if they have one.
            num_tokens: positions this step consumed.
        """
        self.kind = kind
        self.states = dict(states)
        self.seen_tokens += num_tokens
        self.is_initialized = True

    def take_rows(self, other: "RecurrentStateLayer", rows: torch.Tensor) -> None:
        """Replace some rows by another state's.

        Args:
            other: with the same names and as many rows.
            rows: `(batch,)` booleans.
        """
        for name, tensor in self.states.items():
            chosen = rows.reshape(-1, *[1] * (tensor.dim() - 1))
            self.states[name] = torch.where(chosen, other.states[name].to(tensor.dtype), tensor)


DYNAMIC_LAYER_TYPE_MAPPING.setdefault(RECURRENT_LAYER_TYPE, RecurrentStateLayer)
STATIC_LAYER_TYPE_MAPPING.setdefault(RECURRENT_LAYER_TYPE, RecurrentStateLayer)
