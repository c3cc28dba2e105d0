"""Linformer's projections E and F: from tokens, indexed by their position, to k slots.

Every projection is a module with one interface: `slots(tokens)` takes tokens laid out by position (zeros where there is
no token) to slots. Since the projections are linear along the sequence, zeroing a token is the same as leaving out its
row of E; and since tokens are laid out by *position*, left padding changes nothing.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling

from .configuration_linformer import LinformerConfig


class TokenPlan(NamedTuple):
    """Where the tokens of a batch are, worked out once a forward pass.

    Attributes:
        real: `(batch, length)` true at real tokens; None if all are.
        positions: `(batch, length)` position of each token, for the position embeddings.
        moved: positions differ from the columns, so tokens must be moved to be laid out by position.
        length: number of positions that the layout spans.
        dense: compute attention by the eager implementation.
        weights: attention weights are wanted.
    """

    real: torch.Tensor | None
    positions: torch.Tensor
    moved: bool
    length: int
    dense: bool
    weights: bool

    def by_position(self, tokens: torch.Tensor) -> torch.Tensor:
        """Lay `(batch, length, width)` out by position, zeros where there is no token."""
        if self.real is not None:
            tokens = tokens.masked_fill(~self.real.unsqueeze(-1), 0.0)
        if not self.moved:
            return tokens
        places = self.positions.clamp(0, self.length - 1).unsqueeze(-1).expand_as(tokens)
        return tokens.new_zeros(tokens.shape[0], self.length, tokens.shape[2]).scatter_add(1, places, tokens)

    def occupied(self, like: torch.Tensor) -> torch.Tensor:
        """Return `(batch, positions, 1)` ones where a position holds a token, in the dtype of `like`."""
        return self.by_position(like.new_ones(like.shape[0], like.shape[1], 1))


def plan_tokens(
    hidden: torch.Tensor,
    real: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    longest: int,
    dense: bool,
    weights: bool,
) -> TokenPlan:
    """Work out the plan of a batch.

    Args:
        hidden: `(batch, length, width)`.
        real: `(batch, length)` true at real tokens; None if all are.
        position_ids: `(batch, length)`; counted over real tokens if None.
        longest: n, the model's longest input.
        dense: compute attention by the eager implementation.
        weights: attention weights are wanted.

    Raises:
        ValueError: the input is longer than the model, or two tokens of a row share a
            position.
    """
    batch, length = hidden.shape[:2]
    traced = is_torchdynamo_compiling()
    columns = torch.arange(length, device=hidden.device).expand(batch, length)
    if position_ids is None:
        positions = columns if real is None else (real.long().cumsum(1) - 1).clamp(min=0)
        span = length
    else:
        positions = position_ids.expand(batch, length)
        span = longest if traced else _span(positions, real)
    if not traced:
        _check_length(positions, real, longest)
    elif length > longest:
        raise ValueError(_too_long(length, longest))
    moved = traced or not _in_place(positions, columns, real)
    if position_ids is not None and moved and not traced:
        _check_distinct(positions, real)
    return TokenPlan(real, positions, moved, span if moved else length, dense or weights, weights)


def _in_place(positions: torch.Tensor, columns: torch.Tensor, real: torch.Tensor | None) -> bool:
    same = positions == columns
    return bool(same.all() if real is None else (same | ~real).all())


def _span(positions: torch.Tensor, real: torch.Tensor | None) -> int:
    kept = positions if real is None else positions[real]
    return int(kept.max()) + 1 if kept.numel() else 1


def _too_long(length: int, longest: int) -> str:
    return (
        f"max_position_embeddings is {longest}, the input has {length} positions: E and F have one row for each of them; "
        f"model.resize_position_embeddings({length}) makes room"
    )


def _check_length(positions: torch.Tensor, real: torch.Tensor | None, longest: int) -> None:
    needed = _span(positions, real)
    if needed > longest:
        raise ValueError(_too_long(needed, longest))
    if int(positions.min()) < 0:
        raise ValueError(f"position_ids must not be negative, got {int(positions.min())}")


def _check_distinct(positions: torch.Tensor, real: torch.Tensor | None) -> None:
    marked = (
        positions if real is None else torch.where(real, positions, -1 - torch.arange(positions.shape[1]).to(positions))
    )
    ordered = marked.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError(
            "position_ids must differ within a row: a Linformer reads one text a row, packed rows are not supported"
        )


class LearnedProjection(nn.Module):
    """E as free parameters: row i is what the token at position i adds to each slot.

    Args:
        longest: n, number of positions.
        slots: k, number of slots.
        heads: one matrix for each of this many heads; 1 for one that all heads share.
    """

    def __init__(self, longest: int, slots: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        shape = (longest, slots) if heads == 1 else (heads, longest, slots)
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, tokens: torch.Tensor, occupied: torch.Tensor | None = None) -> torch.Tensor:
        """Project `(batch, [heads,] positions, width)` to `(batch, [heads,] slots, width)`; `occupied` is not
        needed."""
        rows = self.weight[..., : tokens.shape[-2], :].transpose(-1, -2)
        # Expanded here: left to itself, torch.matmul folds the batch or not by which operand needs a gradient, and a
        # model whose weights are frozen would round differently.
        return rows.expand(*tokens.shape[:-2], -1, -1) @ tokens

    def filled(self, occupied: torch.Tensor) -> torch.Tensor | None:
        """Return None: every slot mixes all positions, so none is ever empty."""
        return None

    def resize(self, longest: int) -> None:
        """Interpolate the weight along the positions to another n; its sums over them stay the same."""
        self.weight = _interpolated(self.weight, longest, dim=-2)


def _interpolated(weight: torch.Tensor, size: int, dim: int) -> nn.Parameter:
    """Stretch `dim` linearly to `size` entries that add up to what the old ones did."""
    last = weight.detach().movedim(dim, -1)
    wide = nn.functional.interpolate(last.reshape(1, -1, last.shape[-1]), size, mode="linear", align_corners=False)
    wide = wide.view(*last.shape[:-1], size) * (last.shape[-1] / size)
    return nn.Parameter(wide.movedim(-1, dim).contiguous(), requires_grad=weight.requires_grad)


def resized_embedding(embedding: nn.Embedding, longest: int) -> nn.Embedding:
    """Stretch position embeddings linearly to `longest` positions."""
    table = embedding.weight.detach().T.unsqueeze(0)
    wide = nn.functional.interpolate(table, longest, mode="linear", align_corners=False)[0].T
    return nn.Embedding.from_pretrained(wide.contiguous(), freeze=not embedding.weight.requires_grad)


class WindowProjection(nn.Module):
    """E as windows of n/k positions: their mean, or a convolution with one learned kernel (kernel = stride = n/k).

    Args:
        longest: n, number of positions.
        slots: k, number of slots; divides n.
        heads: one kernel for each of this many heads; 1 for one that all heads share.
        learned: whether the kernel is a parameter; else windows are averaged over the tokens that are there.
    """

    def __init__(self, longest: int, slots: int, heads: int = 1, learned: bool = False) -> None:
        super().__init__()
        self.window, self.slots, self.heads = longest // slots, slots, heads
        shape = (self.window,) if heads == 1 else (heads, self.window)
        self.weight = nn.Parameter(torch.empty(shape)) if learned else None

    def _windows(self, tokens: torch.Tensor) -> torch.Tensor:
        missing = -tokens.shape[-2] % self.window
        return nn.functional.pad(tokens, (0, 0, 0, missing)).unflatten(-2, (-1, self.window))

    def forward(self, tokens: torch.Tensor, occupied: torch.Tensor) -> torch.Tensor:
        """Project `(batch, [heads,] positions, width)` to `(batch, [heads,] slots, width)`.

        Args:
            tokens: by position, zeros where there is none.
            occupied: `(batch, [1,] positions, 1)` ones where there is one.
        """
        windows = self._windows(tokens)
        if self.weight is None:
            return windows.sum(-2) / self._windows(occupied).sum(-2).clamp(min=1.0)
        kernel = self.weight.unsqueeze(-2).unsqueeze(-1) if self.heads > 1 else self.weight.unsqueeze(-1)
        return (windows * kernel).sum(-2)

    def filled(self, occupied: torch.Tensor) -> torch.Tensor | None:
        """Return `(batch, slots)` true where a window holds a token; attention must not look at the others."""
        return self._windows(occupied).sum(-2).squeeze(-1) > 0

    def resize(self, longest: int) -> None:
        """Stretch the windows to another n; a learned kernel is interpolated, its sum stays the same."""
        self.window = longest // self.slots
        if self.weight is not None:
            self.weight = _interpolated(self.weight, self.window, dim=-1)


def build_projection(config: LinformerConfig, layer: int) -> LearnedProjection | WindowProjection:
    """Make one E (or F) of a layer, as `config.projection` says; with `sharing="none"` one for each head."""
    heads = config.num_attention_heads if config.sharing == "none" else 1
    longest, slots = config.max_position_embeddings, config.projected(layer)
    if config.projection == "learned":
        return LearnedProjection(longest, slots, heads)
    return WindowProjection(longest, slots, heads, learned=config.projection == "convolution")
