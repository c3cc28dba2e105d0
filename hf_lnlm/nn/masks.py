"""What a model needs to know about a batch's positions, worked out once a forward pass: real tokens and documents."""

from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..ops.causal_conv.gather_index import conv_gather_index
from .ragged import RowLayout, document_starts, row_layout


class SegmentInfo(NamedTuple):
    """Which positions are real and where documents begin.

    Attributes:
        length: number of positions.
        mask: `(batch, length)` true at real tokens; None if all are.
        starts: `(batch, length)` true at a real token that begins a document; None if none does.
        traced: whether torch.compile or torch.export is tracing: then positions cannot be gathered by value.
        layout: rows to gather, of families that gather; None when the whole batch is one unbroken run a row.
        kernel: width of the convolution that `gather_index` is for.
        gather_index: sources of that convolution's taps; None if every tap reads its neighbour.
    """

    length: int
    mask: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    traced: bool = False
    layout: RowLayout | None = None
    kernel: int = 0
    gather_index: torch.Tensor | None = None

    def in_rows(self) -> "SegmentInfo":
        """Return the same with the rows that a recurrence runs on; without them while tracing."""
        if self.traced or (self.mask is None and self.starts is None):
            return self
        return self._replace(layout=row_layout(_real(self.mask, self.starts), self.starts))

    def for_convolution(self, kernel: int) -> "SegmentInfo":
        """Return the same with the sources of a causal convolution's taps, `kernel` positions wide."""
        if self.mask is None and self.starts is None:
            return self._replace(kernel=kernel)
        index = conv_gather_index(_real(self.mask, self.starts), self.starts, kernel)
        return self._replace(kernel=kernel, gather_index=index)

    def reversed(self) -> "SegmentInfo":
        """Return what is known of the batch read from its end: a document then begins at its last token."""
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
        found = SegmentInfo(self.length, mask, starts, self.traced)
        return found.for_convolution(self.kernel) if self.kernel else found

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


def _real(mask: torch.Tensor | None, starts: torch.Tensor | None) -> torch.Tensor:
    return mask if mask is not None else torch.ones_like(starts)  # type: ignore[arg-type]


def _at_next_real(starts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Move marks at masked positions to the next real one."""
    pending = starts.cumsum(1)
    real = torch.where(mask, pending, 0).cummax(1).values
    before = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], 1)
    return mask & (pending > before)


def continuing_tokens(real: torch.Tensor | None, documents: torch.Tensor | None) -> torch.Tensor | None:
    """Return the real tokens whose document can still go on, those of each row's last one; None if all are.

    Args:
        real: `(batch, length)` true at real tokens; None if all are.
        documents: `(batch, length)` number of each token's document in its row; None if each row is one.
    """
    if documents is None:
        return real
    real = torch.ones_like(documents, dtype=torch.bool) if real is None else real
    last = documents.masked_fill(~real, -1).amax(1, keepdim=True)
    return real & (documents == last)


def segment_info(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    past: int = 0,
) -> SegmentInfo:
    """Work out what is known of a batch's positions.

    Args:
        inputs: `(batch, length, width)`.
        attention_mask: `(batch, length)` or `(batch, past + length)`, of zeros and ones; None for no padding.
        position_ids: `(batch, length)`; a real token at position 0 begins a document.
        seq_idx: `(batch, length)` document numbers of packed rows, never decreasing.
        cu_seq_lens: `(documents + 1,)` offsets of the documents of a single packed row.
        past: positions seen before.

    Raises:
        ValueError: shapes or values that do not fit the input or each other.
    """
    batch, length = inputs.shape[:2]
    mask = current_mask(attention_mask, batch, length, past)
    numbers = _document_numbers(seq_idx, cu_seq_lens, inputs)
    positions = None if position_ids is None else _fitting("position_ids", position_ids, batch, length)
    traced = is_torchdynamo_compiling()
    decodes = length == 1 and past > 0 and numbers is None and not traced
    if decodes and positions is not None and bool(positions.all()):  # a token that begins no document
        positions = None
    starts = None
    if positions is not None or numbers is not None:
        real = inputs.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
        starts = document_starts(positions, numbers, real)
    if traced:
        return SegmentInfo(length, mask, starts, traced=True)
    if starts is not None and past == 0:
        starts = starts & (real.cumsum(1) > 1)  # nothing is carried in: a start at the first token changes nothing
    if starts is not None and not bool(starts.any()):
        starts = None
    if mask is not None and bool(mask.all()):
        mask = None
    return SegmentInfo(length, mask, starts)


def current_mask(
    attention_mask: torch.Tensor | None, batch: int, length: int, past: int = 0, name: str = "attention_mask"
) -> torch.Tensor | None:
    """Return which positions of the input are real, `(batch, length)` booleans; None if there is no mask.

    Booleans and whole numbers 0 and 1 are a mask. So are floats 0 and 1 if every row has a 1: a row of floats that are
    all 0 hides nothing in an additive mask, and everything in one that is multiplied.

    Args:
        attention_mask: `(batch, length)`, or `(batch, past + length)`, of which the last `length` columns count.
        batch, length: shape of the input.
        past: positions seen before.
        name: the argument, for messages.

    Raises:
        ValueError: another shape, or other values.
    """
    if attention_mask is None:
        return None
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or shape[0] != batch or shape[1] not in (length, past + length):
        whole = f" or, with the {past} positions of the past, ({batch}, {past + length})" if past else ""
        raise ValueError(f"{name} must have shape (batch, length) = ({batch}, {length}){whole}, got {shape}")
    if attention_mask.dtype == torch.bool:
        return attention_mask[:, -length:]
    mask = attention_mask != 0
    if not is_torchdynamo_compiling():
        _check_mask_values(attention_mask, mask, name)
    return mask[:, -length:]


def _check_mask_values(attention_mask: torch.Tensor, mask: torch.Tensor, name: str) -> None:
    if not torch.equal(attention_mask, mask.to(attention_mask.dtype)):
        wrong = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        raise ValueError(f"{name} must hold only 0 and 1, 1 at real tokens, got {wrong[0].item()}")
    if attention_mask.is_floating_point() and not bool(mask.any(1).all()):
        raise ValueError(
            f"{name} has a row of floats that are all 0, which an additive mask would mean as nothing hidden: it must be "
            f"of booleans or whole numbers, or have a 1 in every row, got {attention_mask.dtype}"
        )


def _document_numbers(
    seq_idx: torch.Tensor | None, cu_seq_lens: torch.Tensor | None, inputs: torch.Tensor
) -> torch.Tensor | None:
    batch, length = inputs.shape[:2]
    if seq_idx is not None:
        return _fitting("seq_idx", seq_idx, batch, length)
    if cu_seq_lens is None:
        return None
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q is for a single packed row, got a batch of {batch}")
    offsets = cu_seq_lens.to(inputs.device)
    if offsets.dim() != 1 or offsets.numel() < 2 or offsets.is_floating_point():
        raise ValueError(f"cu_seq_lens_q must be whole numbers (documents + 1,), got {tuple(cu_seq_lens.shape)}")
    if not is_torchdynamo_compiling() and offsets.device.type == "cpu":
        ascends = bool((offsets[1:] >= offsets[:-1]).all())
        if not ascends or int(offsets[0]) != 0 or int(offsets[-1]) != length:
            raise ValueError(f"cu_seq_lens_q must ascend from 0 to the row's length {length}, got {offsets.tolist()}")
    columns = torch.arange(length, device=inputs.device)
    return torch.bucketize(columns, offsets[1:], right=True).unsqueeze(0)


def _fitting(name: str, tensor: Any, batch: int, length: int) -> torch.Tensor:
    shape = tuple(getattr(tensor, "shape", ()))
    if len(shape) != 2 or shape[1] != length or shape[0] not in (1, batch):
        raise ValueError(f"{name} must have shape (batch, length) = ({batch}, {length}), got {shape}")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers, got {tensor.dtype}")
    return tensor.expand(batch, length)


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
