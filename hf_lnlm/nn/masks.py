"""What a recurrence needs to know about a batch's positions, worked out once a forward pass."""

from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_torchdynamo_compiling

from .ragged import RowLayout, document_starts, row_layout


class SequenceMarks(NamedTuple):
    """Which positions are real and where documents begin.

    Attributes:
        layout: rows to gather, or None when the whole batch is one unbroken run a row, or while tracing.
        mask: `(batch, length)` true at real tokens; None for all, kept only while tracing.
        starts: `(batch, length)` true where a document begins; None for nowhere, kept only while tracing.
        traced: whether torch.compile or torch.export is tracing: then positions cannot be gathered by value.
    """

    layout: RowLayout | None
    mask: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    traced: bool = False

    def reversed_starts(self) -> torch.Tensor | None:
        """Return the starts of the time-reversed batch: where a position's document differs from the one after it."""
        if self.starts is None:
            return None
        document = self.starts.cumsum(1).flip(1)
        change = torch.zeros_like(self.starts)
        change[:, 1:] = document[:, 1:] != document[:, :-1]
        return change


def sequence_marks(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cache: Any = None,
) -> SequenceMarks:
    """Work out the marks of a batch.

    Args:
        inputs: `(batch, length, width)`.
        attention_mask: `(batch, past + length)`; the last `length` columns count. None for no padding.
        position_ids: `(batch, length)`; a real token at position 0 begins a document.
        seq_idx: `(batch, length)` document numbers of packed rows.
        cache: the state so far, or None.

    Raises:
        ValueError: the mask's shape does not fit the input.
    """
    batch, length = inputs.shape[:2]
    mask = _current_mask(attention_mask, batch, length)
    markers = position_ids is not None or seq_idx is not None
    if mask is None and (not markers or _only_continues(position_ids, length, cache)):
        return SequenceMarks(None, traced=is_torchdynamo_compiling())
    real = inputs.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    starts = document_starts(position_ids, seq_idx, real) if markers else None
    if is_torchdynamo_compiling():
        return SequenceMarks(None, mask, starts, traced=True)
    if starts is not None and (cache is None or not cache.get_seq_length()):
        starts = starts & (real.cumsum(1) > 1)  # nothing is carried in: a start at the first token changes nothing
    return SequenceMarks(row_layout(real, starts))


def _only_continues(position_ids: torch.Tensor | None, length: int, cache: Any) -> bool:
    """Tell whether a call is one decoded token a row of running sequences, none of which begins a document."""
    if length != 1 or cache is None or not cache.get_seq_length() or is_torchdynamo_compiling():
        return False
    return position_ids is None or bool((position_ids != 0).all())


def _current_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(f"attention_mask must have shape (batch, past + length) = ({batch}, >= {length}), got {shape}")
    return attention_mask[:, -length:].bool()


def end_token(hidden: torch.Tensor, mask: torch.Tensor | None, first: bool = False) -> torch.Tensor:
    """Return the hidden state `(batch, width)` of each row's last (or first) real token; zeros if it has none.

    Args:
        hidden: `(batch, length, width)`.
        mask: `(batch, length)` booleans; None if every token is real.
        first: take the first real token instead.
    """
    if mask is None:
        return hidden[:, 0 if first else -1]
    length = hidden.shape[1]
    columns = torch.arange(length, device=hidden.device)
    chosen = torch.where(mask, columns, length).amin(1) if first else torch.where(mask, columns, -1).amax(1)
    rows = hidden.gather(1, chosen.clamp(0, length - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
    return rows.masked_fill(~mask.any(1, keepdim=True), 0.0)
