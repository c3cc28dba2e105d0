"""Rows and blocks: whatever the mask and the documents, every token is where it belongs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lnlm.nn.ragged import (
    batch_state,
    document_starts,
    gather_blocks,
    gather_rows,
    row_blocks,
    row_layout,
    rows_state,
    scatter_blocks,
    scatter_rows,
)


@st.composite
def patterns(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Any mask and any starts, `(batch, length)`; often long rows, so that blocks become many."""
    batch, length = draw(st.integers(1, 6)), draw(st.integers(1, 14))
    cells = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    mask = torch.tensor(draw(cells)).view(batch, length)
    if draw(st.booleans()):
        mask[:] = True
    starts = torch.tensor(draw(cells)).view(batch, length)
    return mask, starts & torch.tensor(draw(cells)).view(batch, length)


def documents_of(mask: torch.Tensor, starts: torch.Tensor) -> list[list[tuple[int, int]]]:
    """The definition: source cells of each document, batch row after batch row."""
    documents: list[list[tuple[int, int]]] = []
    for row in range(mask.shape[0]):
        fresh = True
        for column in range(mask.shape[1]):
            if not mask[row, column]:
                continue
            if fresh or starts[row, column]:
                documents.append([])
            documents[-1].append((row, column))
            fresh = False
    return documents


def cells(index: torch.Tensor, length: int) -> list[tuple[int, int]]:
    return [divmod(int(flat), length) for flat in index]


@settings(max_examples=300)
@given(pattern=patterns())
def test_rows_hold_the_documents(pattern):
    mask, starts = pattern
    layout = row_layout(mask, starts)
    if layout is None:
        assert mask.all()
        assert not starts.any()
        return
    documents, length = documents_of(mask, starts), mask.shape[1]
    assert layout.lengths.tolist() == [len(document) for document in documents]
    for row, document in enumerate(documents):
        assert cells(layout.gather_index[row, : len(document)], length) == document
        assert cells(layout.reversed_gather_index[row, : len(document)], length) == document[::-1]
    for row in range(mask.shape[0]):
        mine = [number for number, document in enumerate(documents) if document[0][0] == row]
        assert layout.last_row[row] == (mine[-1] if mine else -1)
        goes_on = mine and not starts[documents[mine[0]][0]]
        assert layout.first_row[row] == (mine[0] if goes_on else -1)


@settings(max_examples=300)
def _both_ways(plan):
    forward = plan.gather_index, plan.scatter_index
    return forward, (plan.reversed_gather_index, plan.reversed_scatter_index)


@given(pattern=patterns())
def test_scattering_undoes_gathering(pattern):
    mask, starts = pattern
    values = torch.randn(*mask.shape, 3)
    wanted = values * mask[..., None]
    layout = row_layout(mask, starts)
    if layout is None:
        return
    for index, place in _both_ways(layout):
        assert torch.equal(scatter_rows(gather_rows(values, index), place, mask), wanted)
    for exact in (False, True):
        blocks = row_blocks(layout, exact)
        for index, place in _both_ways(blocks):
            tokens = torch.cat([gather_blocks(values, index), torch.zeros(1, 3)])
            assert torch.equal(scatter_blocks(tokens, place), wanted)


@settings(max_examples=300)
@given(pattern=patterns(), exact=st.booleans())
def test_blocks_hold_the_rows(pattern, exact):
    mask, starts = pattern
    layout = row_layout(mask, starts)
    if layout is None:
        return
    blocks = row_blocks(layout, exact)
    documents, length = documents_of(mask, starts), mask.shape[1]
    assert sum(rows * steps for rows, steps in blocks.sizes) == blocks.gather_index.numel()
    rows_of_blocks = [rows for rows, _ in blocks.sizes]
    assert rows_of_blocks == sorted(rows_of_blocks, reverse=True)
    assert len(blocks.sizes) <= 8 or blocks.batch_sizes.tolist() == rows_of_blocks
    if exact:
        ends, start = set(), 0
        for _, steps in blocks.sizes:
            start += steps
            ends.add(start)
        assert set(layout.lengths.tolist()) <= ends
    start, offset = 0, 0
    for rows, steps in blocks.sizes:
        block = blocks.gather_index[offset : offset + rows * steps].view(rows, steps)
        for rank in range(rows):
            document = documents[int(blocks.order[rank])][start : start + steps]
            assert cells(block[rank, : len(document)], length) == document
        start, offset = start + steps, offset + rows * steps


def test_nothing_to_do_is_none():
    full = torch.ones(2, 3, dtype=torch.bool)
    assert row_layout(full, None) is None
    assert row_layout(full, torch.zeros_like(full)) is None


def test_no_token_at_all():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    layout = row_layout(mask, None)
    assert layout.lengths.numel() == 0
    state = torch.ones(2, 4)
    assert torch.equal(batch_state(torch.zeros(0, 4), state, layout), state)
    assert not scatter_rows(torch.zeros(0, 1, 5), layout.scatter_index, mask).any()
    for exact in (False, True):
        assert row_blocks(layout, exact).sizes == ()


def test_states_go_to_first_rows_and_come_from_last_ones():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    starts = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    layout = row_layout(mask, starts)  # rows: 0 = tokens 0-1 of row 0, 1 = token 2 of row 0, 2 = row 2, fresh
    carried = torch.tensor([[1.0], [2.0], [3.0]])
    assert rows_state(carried, torch.zeros(1), layout).tolist() == [[1], [0], [0]]
    assert rows_state(carried, torch.full((1,), 9.0), layout).tolist() == [[1], [9], [9]]
    assert batch_state(torch.tensor([[10.0], [11], [12]]), carried, layout).tolist() == [[11], [2], [12]]


def test_only_right_padding_is_aligned():
    assert row_layout(torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), None).aligned
    assert not row_layout(torch.tensor([[0, 1, 1], [1, 1, 1]]).bool(), None).aligned
    assert not row_layout(torch.tensor([[1, 0, 1], [1, 1, 1]]).bool(), None).aligned
    assert not row_layout(torch.tensor([[0, 0, 0], [1, 1, 1]]).bool(), None).aligned


def test_document_starts():
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    positions = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 2, 0]])
    assert document_starts(None, None, mask) is None
    assert document_starts(positions, None, mask).int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]]
    numbers = torch.tensor([[4, 4, 4, 5, 5], [1, 1, 2, 2, 3]])
    assert document_starts(None, numbers, mask).int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 1, 0, 1]]
    both = document_starts(positions, numbers, mask)
    assert both.int().tolist() == [[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]]
    assert document_starts(positions[:1], None, mask).shape == mask.shape
