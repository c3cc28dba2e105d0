"""Masked and packed batches for recurrences: every run of real tokens becomes a left-aligned row.

A recurrence must pass over masked positions as if they were not there, whether the padding is left, right or inside, and
must start afresh where a packed row begins a new document. Both are one operation here: gather the real tokens of each
document into a row of its own, run the recurrence on the rows, scatter the results back. It is exact, keeps the fused
kernels (which know no mask), and needs no arithmetic on masked positions.

Glossary: a *source* position is a cell of the `(batch, length)` input; a *row* is one document of one batch row.
Complexity: O(batch · length) index arithmetic and one copy in and out. Data-dependent shapes: not for torch.compile.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers.utils.import_utils import is_torchdynamo_compiling


@dataclass(frozen=True)
class RowLayout:
    """Where each real token goes.

    Attributes:
        gather_index: `(rows, width)` flat source position of each token; padding points at 0.
        reversed_gather_index: `(rows, width)` the same with each row's tokens in reverse order.
        lengths: `(rows,)` tokens in each row; at least 1.
        scatter_index: `(batch, length)` flat position in `(rows, width)` of each source position; 0 where masked.
        reversed_scatter_index: `(batch, length)` the same for the reversed rows.
        mask: `(batch, length)` true at real tokens.
        first_row: `(batch,)` the row that continues the state carried into the batch row, or -1 if none does.
        last_row: `(batch,)` the row whose final state is the batch row's final state, or -1 if it has no token.
        aligned: true if rows and batch rows coincide and tokens are already left-aligned (right padding only).
    """

    gather_index: torch.Tensor
    reversed_gather_index: torch.Tensor
    lengths: torch.Tensor
    scatter_index: torch.Tensor
    reversed_scatter_index: torch.Tensor
    mask: torch.Tensor
    first_row: torch.Tensor
    last_row: torch.Tensor
    aligned: bool


def document_starts(
    position_ids: torch.Tensor | None, seq_idx: torch.Tensor | None, mask: torch.Tensor
) -> torch.Tensor | None:
    """Mark the positions that begin a document, `(batch, length)` booleans, or None when no marker was given.

    Args:
        position_ids: `(batch, length)`; a real token at position 0 begins a document.
        seq_idx: `(batch, length)` document numbers, as transformers' flattening collator gives them.
        mask: `(batch, length)` true at real tokens.

    Raises:
        ValueError: a document number is smaller than that of the real token before it.
    """
    starts = None
    if position_ids is not None:
        starts = (position_ids.expand(mask.shape) == 0) & mask
    if seq_idx is not None:
        changes = _document_changes(seq_idx.expand(mask.shape), mask)
        starts = changes if starts is None else starts | changes
    return starts


def _document_changes(seq_idx: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mark the real tokens whose document is not that of the real token before them; masked ones may lie between."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    latest = torch.where(mask, columns, -1).cummax(1).values
    before = pad(latest, (1, 0), value=-1)[:, :-1]
    follows, number_before = mask & (before >= 0), seq_idx.gather(1, before.clamp(min=0))
    if not is_torchdynamo_compiling() and bool((follows & (seq_idx < number_before)).any()):
        raise ValueError("seq_idx must never decrease within a row, got a smaller number after a larger one")
    return follows & (seq_idx != number_before)


def row_layout(mask: torch.Tensor, starts: torch.Tensor | None) -> RowLayout | None:
    """Plan the rows of a batch, or return None when there is nothing to do (no masked token, no inner start).

    Args:
        mask: `(batch, length)` true at real tokens.
        starts: `(batch, length)` true where a document begins, or None. A batch row's first real token continues the
            carried state unless it is marked.
    """
    batch, length = mask.shape
    if bool(mask.all()) and (starts is None or not bool(starts.any())):
        return None
    starts = torch.zeros_like(mask) if starts is None else starts
    first_real = mask & (mask.cumsum(1) == 1)
    begins = (starts & mask) | first_real
    row_of = begins.reshape(-1).cumsum(0).view(batch, length) - 1  # row of each real token; garbage where masked
    lengths = torch.bincount(row_of[mask], minlength=int(begins.sum()))
    if lengths.numel() == 0:
        return _empty_layout(mask)
    offset_of_row = lengths.cumsum(0) - lengths
    column = mask.reshape(-1).cumsum(0).view(batch, length) - 1 - offset_of_row[row_of.clamp(min=0)]
    width = int(lengths.max())
    scatter_index = torch.where(mask, row_of * width + column, 0)
    mirrored = lengths[row_of.clamp(min=0)] - 1 - column
    reversed_scatter_index = torch.where(mask, row_of * width + mirrored, 0)
    return RowLayout(
        gather_index=_invert(scatter_index, mask, lengths.numel(), width),
        reversed_gather_index=_invert(reversed_scatter_index, mask, lengths.numel(), width),
        lengths=lengths,
        scatter_index=scatter_index,
        reversed_scatter_index=reversed_scatter_index,
        mask=mask,
        first_row=_row_at(first_real & ~starts, row_of),
        last_row=_row_at(mask & (mask.flip(1).cumsum(1).flip(1) == 1), row_of),
        aligned=lengths.numel() == batch and bool((mask[:, :1] & (mask == (mask.cumprod(1) > 0))).all()),
    )


def _invert(scatter_index: torch.Tensor, mask: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    source = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    gather_index = torch.zeros(rows * width, dtype=torch.long, device=mask.device)
    gather_index[scatter_index[mask]] = source[mask]
    return gather_index.view(rows, width)


def _row_at(chosen: torch.Tensor, row_of: torch.Tensor) -> torch.Tensor:
    """Row of the one chosen position of each batch row, `(batch,)`; -1 where nothing is chosen."""
    return torch.where(chosen, row_of, -1).amax(1)


def _empty_layout(mask: torch.Tensor) -> RowLayout:
    """Layout of a batch without any real token."""
    none = torch.zeros((0, 1), dtype=torch.long, device=mask.device)
    scatter_index = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)
    nowhere = torch.full((mask.shape[0],), -1, dtype=torch.long, device=mask.device)
    return RowLayout(none, none, none[:, 0], scatter_index, scatter_index, mask, nowhere, nowhere, False)


def gather_rows(tensor: torch.Tensor, gather_index: torch.Tensor) -> torch.Tensor:
    """Collect `(batch, length, width)` into rows `(rows, row width, width)` by a layout's `gather_index`."""
    return tensor.reshape(-1, tensor.shape[-1])[gather_index]


def gather_heads(states: torch.Tensor, gather_index: torch.Tensor) -> torch.Tensor:
    """Collect `(batch, heads, length, head_dim)` into rows `(rows, heads, row width, head_dim)`, as `gather_rows` does."""
    flat = gather_rows(states.transpose(1, 2).flatten(2), gather_index)
    return flat.unflatten(2, states.shape[1::2]).transpose(1, 2)


def scatter_heads(rows: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Undo `gather_heads`: `(batch, heads, length, head_dim)`, zero at padding."""
    shape = rows.shape[1::2]
    out = scatter_rows(rows.transpose(1, 2).flatten(2), layout.scatter_index, layout.mask)
    return out.unflatten(2, shape).transpose(1, 2)


def scatter_rows(rows: torch.Tensor, scatter_index: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Undo `gather_rows` by a layout's `scatter_index`; masked positions become zero."""
    if rows.shape[0] == 0:
        return rows.new_zeros((*mask.shape, rows.shape[-1]))
    values = rows.reshape(-1, rows.shape[-1])[scatter_index]
    return values.masked_fill(~mask.unsqueeze(-1), 0.0)


def rows_state(state: torch.Tensor, initial: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Return each row's state to begin with: the carried one for a batch row's first row, the initial one elsewhere.

    Args:
        state: `(batch, ...)` carried state.
        initial: `(...)` or `(1, ...)` initial state of a fresh document.
        layout: the plan.
    """
    fresh = initial.expand(layout.lengths.shape[0], *state.shape[1:])
    carried = layout.first_row >= 0
    return fresh.index_copy(0, layout.first_row[carried], state[carried])


def batch_state(final: torch.Tensor, state: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Return each batch row's final state `(batch, ...)`; rows without a real token keep `state`."""
    if final.shape[0] == 0:
        return state
    seen = (layout.last_row >= 0).view(-1, *[1] * (state.dim() - 1))
    return torch.where(seen, final[layout.last_row.clamp(min=0)], state)


MOST_BLOCKS = 4
MOST_EXACT_BLOCKS = 8


@dataclass(frozen=True)
class RowBlocks:
    """Rows sorted by length and cut into rectangles, so that a recurrence does next to no work on padding.

    The k-th block holds a few steps of the rows that are long enough to have them, `rows * steps` tokens that lie together.
    With more blocks than a kernel call is worth, tokens lie step by step instead, as torch's packed sequences have them.

    Attributes:
        gather_index, reversed_gather_index: `(total,)` flat source position of each token of all blocks; padding points
            at 0.
        scatter_index, reversed_scatter_index: `(batch, length)` where each source position lies; `total` where masked:
            one row more than there are, for zeros.
        sizes: (rows, steps) of each block; rows never grow.
        batch_sizes: `(steps,)` rows of each step, on the CPU, if the tokens lie step by step; else None.
        order: `(rows,)` which row of the layout comes first, second, ... in the blocks.
        layout: the rows.
    """

    gather_index: torch.Tensor
    reversed_gather_index: torch.Tensor
    scatter_index: torch.Tensor
    reversed_scatter_index: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    batch_sizes: torch.Tensor | None
    order: torch.Tensor
    layout: RowLayout


def row_blocks(layout: RowLayout, exact: bool) -> RowBlocks:
    """Cut the rows of a layout into blocks.

    Args:
        layout: the rows.
        exact: whether every row must end at the end of a block, so that its final state comes out of that block's run.
            Otherwise a few blocks are enough, the rows' ends rounded up.
    """
    lengths = layout.lengths.sort(descending=True)
    bounds = _block_bounds(lengths.values.tolist(), exact)
    packed = len(bounds) > MOST_EXACT_BLOCKS
    if packed:
        bounds = list(range(1, bounds[-1] + 1))
    sizes, offset, stride, total = _cut(bounds, lengths.values)
    columns = torch.arange(bounds[-1] if bounds else 1, device=offset.device)
    steps_of_column = torch.bucketize(columns, torch.tensor(bounds, device=offset.device), right=True)
    first = offset[steps_of_column] if bounds else offset
    rank = torch.empty_like(lengths.indices)
    rank[lengths.indices] = torch.arange(rank.numel(), device=rank.device)
    width = layout.gather_index.shape[1]

    def spread(scatter_index: torch.Tensor) -> torch.Tensor:
        if rank.numel() == 0:
            return torch.full_like(scatter_index, total)
        row, column = scatter_index // width, scatter_index % width
        flat = first[column] + column + rank[row] * stride[steps_of_column][column]
        return torch.where(layout.mask, flat, total)

    scatter_index, reversed_scatter_index = spread(layout.scatter_index), spread(layout.reversed_scatter_index)
    return RowBlocks(
        gather_index=_invert(scatter_index, layout.mask, 1, total)[0],
        reversed_gather_index=_invert(reversed_scatter_index, layout.mask, 1, total)[0],
        scatter_index=scatter_index,
        reversed_scatter_index=reversed_scatter_index,
        sizes=tuple(sizes),
        batch_sizes=torch.tensor([rows for rows, _ in sizes]) if packed else None,
        order=lengths.indices,
        layout=layout,
    )


def _block_bounds(lengths: list[int], exact: bool) -> list[int]:
    """Ends of the blocks in steps, ascending; `lengths` descend. Inexact ones cut the rows into groups of equal size."""
    if exact or len(set(lengths)) <= MOST_BLOCKS:
        return sorted(set(lengths))
    group = -(-len(lengths) // MOST_BLOCKS)
    return sorted({lengths[first] for first in range(0, len(lengths), group)})


def _cut(bounds: list[int], lengths: torch.Tensor) -> tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor, int]:
    """Sizes of the blocks, and for each its offset (less its first step) and stride in the flat order; the total."""
    sizes, offsets, start, total = [], [], 0, 0
    for bound in bounds:
        rows, steps = int((lengths > start).sum()), bound - start
        sizes.append((rows, steps))
        offsets.append(total - start)
        total += rows * steps
        start = bound
    device = lengths.device
    stride = torch.tensor([steps for _, steps in sizes] or [1], device=device)
    return sizes, torch.tensor(offsets or [0], device=device), stride, total


def gather_blocks(tensor: torch.Tensor, gather_index: torch.Tensor) -> torch.Tensor:
    """Collect `(batch, length, width)` into the tokens `(total, width)` of the blocks."""
    return tensor.reshape(-1, tensor.shape[-1])[gather_index]


def scatter_blocks(tokens: torch.Tensor, scatter_index: torch.Tensor) -> torch.Tensor:
    """Undo `gather_blocks`.

    Args:
        tokens: `(total + 1, width)`, the last row zero.
        scatter_index: `(batch, length)`.

    Returns:
        `(batch, length, width)`; masked positions are zero.
    """
    return tokens[scatter_index]
