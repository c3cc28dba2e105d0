"""What the scans need to know about a batch's positions, worked out once a forward pass and shared by all layers."""

from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_torchdynamo_compiling

from ...ops.causal_conv.taps import tap_table


class ScanMarks(NamedTuple):
    """Which positions are real, and where documents begin.

    Attributes:
        mask: `(batch, length)` true at real tokens; None if all are.
        starts: `(batch, length)` true at a real token that begins a document; None if none does.
        taps: sources of the convolution's taps (see `tap_table`); None if every tap reads its neighbour.
        kernel: the convolution's width.
        length: number of positions.
    """

    mask: torch.Tensor | None
    starts: torch.Tensor | None
    taps: torch.Tensor | None
    kernel: int
    length: int

    def reversed(self) -> "ScanMarks":
        """The marks of the batch read from its end: a document then begins at its last token."""
        if self.mask is None and self.starts is None:
            return self
        mask = None if self.mask is None else self.mask.flip(1)
        starts = None
        if self.starts is not None:
            number = self.starts.cumsum(1).flip(1)
            starts = torch.zeros_like(self.starts)
            starts[:, 1:] = number[:, 1:] != number[:, :-1]
            # A masked token may carry the change: it belongs to the next real one, which starts the document.
            starts = starts if mask is None else _at_next_real(starts, mask)
        return _with_taps(mask, starts, self.kernel, self.length)

    def next_real(self) -> torch.Tensor:
        """`(batch, length)`: position of the next real token after each one, `length` where there is none.

        Raises:
            ValueError: there is no mask.
        """
        if self.mask is None:
            raise ValueError("next_real needs a mask, got None")
        places = torch.arange(self.length, device=self.mask.device).expand(self.mask.shape)
        after = torch.where(self.mask, places, self.length).flip(1).cummin(1).values.flip(1)
        return torch.cat([after[:, 1:], after.new_full((after.shape[0], 1), self.length)], 1)


def _at_next_real(starts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Move marks at masked positions to the next real one."""
    pending = starts.cumsum(1)
    real = torch.where(mask, pending, 0).cummax(1).values
    before = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], 1)
    return mask & (pending > before)


def _with_taps(mask: torch.Tensor | None, starts: torch.Tensor | None, kernel: int, length: int) -> ScanMarks:
    if mask is None and starts is None:
        return ScanMarks(None, None, None, kernel, length)
    real = mask if mask is not None else torch.ones_like(starts)  # type: ignore[arg-type]
    return ScanMarks(mask, starts, tap_table(real, starts, kernel), kernel, length)


def scan_marks(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    past: int,
    kernel: int,
) -> ScanMarks:
    """Work out the marks of a batch.

    Args:
        inputs: `(batch, length, width)`.
        attention_mask: `(batch, length)` or `(batch, past + length)`, of zeros and ones; None for no padding.
        position_ids: `(batch, length)`; a real token at position 0 begins a document.
        seq_idx: `(batch, length)` document numbers, never decreasing.
        cu_seq_lens: `(documents + 1,)` offsets of the documents of a single packed row.
        past: positions seen before.
        kernel: the convolution's width.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    batch, length = inputs.shape[:2]
    mask = _current_mask(attention_mask, batch, length, past)
    goes_on = length == 1 and past > 0 and seq_idx is None and not is_torchdynamo_compiling()
    if goes_on and position_ids is not None and bool(position_ids.all()):  # a decoded token that begins no document
        position_ids = None
    starts = _document_starts(inputs, mask, position_ids, seq_idx, cu_seq_lens)
    if not is_torchdynamo_compiling():
        if mask is not None and bool(mask.all()):
            mask = None
        if starts is not None and past == 0:
            real = torch.ones_like(starts) if mask is None else mask
            starts = starts & (real.cumsum(1) > 1)  # nothing is carried in: a start at the first token changes nothing
        if starts is not None and not bool(starts.any()):
            starts = None
    return _with_taps(mask, starts, kernel, length)


def _current_mask(attention_mask: Any, batch: int, length: int, past: int) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or shape[0] != batch or shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask must have shape (batch, length) = ({batch}, {length}) or, with the {past} cached positions, "
            f"({batch}, {past + length}), got {shape}"
        )
    checkable = attention_mask.dtype != torch.bool and not is_torchdynamo_compiling()
    if checkable and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must hold only 0 and 1, got other values")
    return attention_mask[:, -length:].to(torch.bool)


def _document_starts(
    inputs: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> torch.Tensor | None:
    batch, length = inputs.shape[:2]
    if cu_seq_lens is not None and seq_idx is None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q is for a single packed row, got a batch of {batch}")
        columns = torch.arange(length, device=inputs.device)
        seq_idx = torch.bucketize(columns, cu_seq_lens.to(columns.device)[1:], right=True).unsqueeze(0)
    if position_ids is None and seq_idx is None:
        return None
    real = inputs.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    starts = torch.zeros_like(real)
    if position_ids is not None:
        starts = starts | ((_fitting("position_ids", position_ids, batch, length) == 0) & real)
    if seq_idx is not None:
        number = _fitting("seq_idx", seq_idx, batch, length)
        change = torch.cat([torch.zeros_like(real[:, :1]), number[:, 1:] != number[:, :-1]], 1)
        if not is_torchdynamo_compiling() and bool((number[:, 1:] < number[:, :-1]).any()):
            raise ValueError("seq_idx must never decrease within a row, got a smaller number after a larger one")
        starts = starts | (change & real if mask is None else _at_next_real(change, real))
    return starts


def _fitting(name: str, tensor: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    if tensor.dim() != 2 or tensor.shape[1] != length or tensor.shape[0] not in (1, batch):
        raise ValueError(f"{name} must have shape (batch, length) = ({batch}, {length}), got {tuple(tensor.shape)}")
    return tensor.expand(batch, length)
