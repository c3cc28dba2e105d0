"""State space duality in plain torch: matrix products within chunks, a recurrence between them, recomputed backward.

Within a chunk of `Q` tokens the recurrence is a masked, decayed attention (`Y = (W ∘ C Bᵀ) X`); the state crosses
chunks.
`C Bᵀ` is computed per group, not per head, nothing is repeated over heads, and the products with the state act on all
heads of a group at once. Log decays are summed in float64, so that differences of large sums stay exact; their size is
only `(B, L, H)`.

References:
    [1] Dao, Gu: "Transformers are SSMs", arXiv:2405.21060, section 6 and listing 1.

Glossary: `S` ↔ `total` (cumulative log decay within the chunk), `W_ls = exp(S_l - S_s)` for `l ≥ s` ↔ `weights`,
`exp(S_l)` ↔ `onward`, `exp(S_Q - S_s)` ↔ `remaining`, `h` ↔ `state`. Axes: b batch, q token, g group, r head in group,
p head width, n state size.

Complexity: O(L · (Q (G N + H P) + H P N)) multiply-adds a row; memory of one chunk plus the states between chunks.
"""

from __future__ import annotations

from typing import Any

import torch

from .inputs import INPUTS

# Added to the log decay where a document begins: exp(-1e4) is 0, and float64 sums keep ten digits beside it.
_FORGET = -1.0e4
# Smaller decays are zero: denormal operands make matrix products thirty times slower.
_NEGLIGIBLE = 1.0e-30


class Chunk:
    """One chunk's operands, in the computation's dtype.

    Attributes:
        x, values: `(b, q, g, r, p)`, the input and the input times its scale.
        scale: `(b, q, g, r)`.
        b, c: `(b, g, q, n)`.
        weights: `(b, g, r, q, q)`; products `scores = c bᵀ` are `(b, g, q, q)`.
        onward, remaining: `(b, q, g, r)`.
        whole: `(b, g, r)`, decay over the whole chunk.
    """

    def __init__(self, call: dict[str, Any], first: int, last: int) -> None:
        x, b = call["x"][:, first:last], call["B"][:, first:last]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        batch, count, heads, width = x.shape
        self.groups, self.ratio = b.shape[2], heads // b.shape[2]
        self.x = x.to(self.dtype).reshape(batch, count, self.groups, self.ratio, width)
        self.scale = self._per_head(call["scale"][:, first:last].to(self.dtype))
        self.values = self.x * self.scale.unsqueeze(-1)
        self.b = b.to(self.dtype).transpose(1, 2)
        self.c = call["C"][:, first:last].to(self.dtype).transpose(1, 2)
        self._decay(call, first, last)
        if call["diagonal"] is not None:
            own = self._per_head(call["diagonal"][:, first:last].to(self.dtype)).permute(0, 2, 3, 1)
            self.weights.diagonal(dim1=-2, dim2=-1).copy_(own)
        self.scores = self.c @ self.b.mT

    def _per_head(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(2, (self.groups, self.ratio))

    def _decay(self, call: dict[str, Any], first: int, last: int) -> None:
        log_decay = call["log_decay"][:, first:last].double()
        if call["reset"] is not None:
            log_decay = torch.where(call["reset"][:, first:last].unsqueeze(2), _FORGET, log_decay)
        total = self._per_head(log_decay.cumsum(1))
        rows = total.permute(0, 2, 3, 1)
        difference = (rows.unsqueeze(-1) - rows.unsqueeze(-2)).to(self.dtype)
        future = torch.ones(last - first, last - first, dtype=torch.bool, device=total.device).triu(1)
        self.weights = torch.threshold_(difference.masked_fill_(future, float("-inf")).exp_(), _NEGLIGIBLE, 0.0)
        self.onward = self._exp(total)
        self.remaining = self._exp(total[:, -1:] - total)
        self.whole = self.onward[:, -1]

    def _exp(self, total: torch.Tensor) -> torch.Tensor:
        return torch.threshold_(total.exp().to(self.dtype), _NEGLIGIBLE, 0.0)

    def attention(self) -> torch.Tensor:
        """`W ∘ C Bᵀ`, `(b, g, r, q, q)`."""
        return self.weights * self.scores.unsqueeze(2)


def by_head(tensor: torch.Tensor) -> torch.Tensor:
    """`(b, q, g, r, p)` as `(b, g, r, q, p)`."""
    return tensor.permute(0, 2, 3, 1, 4)


def by_token(tensor: torch.Tensor) -> torch.Tensor:
    """`(b, g, r, q, p)` as `(b, q, g, r, p)`."""
    return tensor.permute(0, 3, 1, 2, 4)


def by_group(tensor: torch.Tensor) -> torch.Tensor:
    """`(b, q, g, r, p)` as `(b, g, q, r · p)`."""
    return tensor.flatten(3).transpose(1, 2)


def from_group(tensor: torch.Tensor, ratio: int) -> torch.Tensor:
    """`(b, g, q, r · p)` as `(b, q, g, r, p)`."""
    return tensor.transpose(1, 2).unflatten(3, (ratio, -1))


def _group_state(state: torch.Tensor, groups: int) -> torch.Tensor:
    """`(b, heads, p, n)` as `(b, g, r · p, n)`."""
    return state.unflatten(1, (groups, -1)).flatten(2, 3)


def _decayed(state: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`(b, g, r · p, n)` times each head's decay over the chunk `(b, g, r)`."""
    return (state.unflatten(2, (whole.shape[2], -1)) * whole[..., None, None]).flatten(2, 3)


def ssd_eager(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass.

    Args:
        values: the tensors of `INPUTS`, absent ones None; tokens of a chunk; whether to return the states between chunks
            for the backward pass.

    Returns:
        `y` `(B, L, H, P)`, final state `(B, H, P, N)`, states at the chunks' entries `(chunks, B, H, P, N)` or empty.
    """
    call, (chunk_size, save) = INPUTS.split(values)
    x, groups = call["x"], call["B"].shape[2]
    batch, length, heads, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (batch, heads, width, call["B"].shape[3])
    initial = call["initial_state"]
    state = _group_state(x.new_zeros(shape, dtype=dtype) if initial is None else initial.to(dtype), groups)
    y = x.new_empty(x.shape, dtype=dtype)
    starts = range(0, length, chunk_size)
    entries = x.new_empty((len(starts) if save else 0, *shape), dtype=dtype)
    for k, first in enumerate(starts):
        chunk = Chunk(call, first, min(length, first + chunk_size))
        if save:
            entries[k] = state.view(shape)
        out = from_group(chunk.c @ state.mT, chunk.ratio) * chunk.onward.unsqueeze(-1)
        out += by_token(chunk.attention() @ by_head(chunk.values))
        state = _decayed(state, chunk.whole)
        state += by_group(chunk.values * chunk.remaining.unsqueeze(-1)).mT @ chunk.b
        y[:, first : first + chunk_size] = out.flatten(2, 3)
    if call["D"] is not None:
        y.addcmul_(x.to(dtype), call["D"].to(dtype)[:, None])
    return y, state.reshape(shape), entries


class Gradients:
    """Gradient buffers of one backward pass by argument name."""

    def __init__(self, call: dict[str, Any], dtype: torch.dtype) -> None:
        self.x, self.B, self.C = (
            torch.empty_like(call[name], dtype=dtype, memory_format=torch.contiguous_format) for name in ("x", "B", "C")
        )
        self.scale = torch.empty(call["scale"].shape, dtype=dtype, device=call["scale"].device)
        self.log_decay, self.diagonal = torch.empty_like(self.scale), torch.empty_like(self.scale)


def ssd_eager_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, entries: torch.Tensor, *values: Any
) -> dict[str, torch.Tensor]:
    """Backward pass.

    Args:
        grad_y: `(B, L, H, P)`.
        grad_state: `(B, H, P, N)`, gradient of the final state.
        entries: the states between chunks that the forward pass returned.
        values: as in the forward pass, but the last.

    Returns:
        Gradients by argument name.
    """
    call, (chunk_size,) = INPUTS.split(values)
    dtype = entries.dtype
    grad_y = grad_y.to(dtype)
    groups, length = call["B"].shape[2], grad_y.shape[1]
    grads = Gradients(call, dtype)
    carry = _group_state(grad_state.to(dtype), groups)
    for k in reversed(range(entries.shape[0])):
        first, last = k * chunk_size, min(length, (k + 1) * chunk_size)
        chunk = Chunk(call, first, last)
        carry = _retreat(chunk, grads, grad_y[:, first:last], _group_state(entries[k], groups), carry, first, last)
    out = {name: getattr(grads, name) for name in ("x", "scale", "log_decay", "B", "C", "diagonal")}
    if call["D"] is not None:
        out["x"].addcmul_(grad_y, call["D"].to(dtype)[:, None])
        out["D"] = (grad_y * call["x"].to(dtype)).sum((0, 1, 3))
    return out | {"initial_state": carry.reshape(grad_state.shape)}


def _retreat(
    chunk: Chunk,
    grads: Gradients,
    grad_y: torch.Tensor,
    state: torch.Tensor,
    carry: torch.Tensor,
    first: int,
    last: int,
) -> torch.Tensor:
    """Write one chunk's gradients and return the entry state's; `state` and `carry` are `(b, g, r · p, n)`."""
    dy = grad_y.reshape(chunk.x.shape)
    attention = chunk.attention()
    d_attention = by_head(dy) @ by_head(chunk.values).mT
    from_state = from_group(chunk.c @ state.mT, chunk.ratio)  # what the entry state contributes, before `onward`
    to_state = from_group(chunk.b @ carry.mT, chunk.ratio)  # gradient of each token's contribution to the exit state
    kept = chunk.values * chunk.remaining.unsqueeze(-1)
    ahead = dy * chunk.onward.unsqueeze(-1)
    dvalues = by_token(attention.mT @ by_head(dy)) + to_state * chunk.remaining.unsqueeze(-1)
    dscores = (d_attention * chunk.weights).sum(2)
    grads.C[:, first:last] = (dscores @ chunk.b + by_group(ahead) @ state).transpose(1, 2)
    grads.B[:, first:last] = (dscores.mT @ chunk.c + by_group(kept) @ carry).transpose(1, 2)
    grads.x[:, first:last] = (dvalues * chunk.scale.unsqueeze(-1)).flatten(2, 3)
    grads.scale[:, first:last] = (dvalues * chunk.x).sum(-1).flatten(2)
    own = (d_attention * chunk.scores.unsqueeze(2)).diagonal(dim1=-2, dim2=-1)
    grads.diagonal[:, first:last] = own.permute(0, 3, 1, 2).flatten(2)
    whole = (carry * state).unflatten(2, (chunk.ratio, -1)).sum((3, 4)) * chunk.whole
    slope = _decay_slope(attention * d_attention, (ahead * from_state).sum(-1), (kept * to_state).sum(-1), whole)
    grads.log_decay[:, first:last] = slope.flatten(2)
    return _decayed(carry, chunk.whole) + by_group(ahead).mT @ chunk.c


def _decay_slope(pairs: torch.Tensor, arrived: torch.Tensor, left: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Gradient of the log decays: the sum of all products that each one multiplies.

    Sums in float64: row and column sums of `pairs` nearly cancel.

    Args:
        pairs: `(b, g, r, l, s)`, gradient times value of each pair of tokens.
        arrived: `(b, q, g, r)`, of what the entry state gave to each token.
        left: `(b, q, g, r)`, of what each token gave to the exit state.
        whole: `(b, g, r)`, of what the entry state gave to the exit state.

    Returns:
        `(b, q, g, r)`, float64.
    """
    rows = pairs.sum(-1, dtype=torch.float64) - pairs.sum(-2, dtype=torch.float64)
    total = rows.permute(0, 3, 1, 2) + arrived.double() - left.double()
    total[:, -1] += left.sum(1, dtype=torch.float64) + whole.double()
    return total.flip(1).cumsum(1).flip(1)
