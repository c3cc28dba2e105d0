"""Selective scan in plain torch: blocks of tokens, one fused multiply-add a token, recomputed backward pass.

Within a block every decay `exp(Δ A)` and source `Δ u B` is made by one operation each; the recurrence itself is one
`addcmul` a token in place; outputs and gradients are matrix products over the block. Everything else (step sizes, gate,
skip connection), which has no states, is made for a span of blocks at once: it then still lies in the cache, where
operations on whole sequences would wait for memory. Layout is `(time, batch, state, channel)`: channels innermost. Only
the states at the blocks' entries are kept for the backward pass.

Complexity: O(B · L · E · N) time, O(B · L · E · N / BLOCK) memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .inputs import INPUTS

BLOCK = 16
# Tokens whose operations without states are done at once, and whose sums are added in float64.
SPAN = 4 * BLOCK

_LOG2E = 1.4426950408889634

Block = dict[str, torch.Tensor]  # tensors by name, of which the first dimension is time
Rows = tuple[torch.Tensor, ...]


def _cut(parts: Block, first: int, count: int) -> Block:
    """The part of every tensor that begins at token `first`."""
    return {name: part.narrow(0, first, count) for name, part in parts.items()}


class Operands:
    """The operation's tensors in the computation's dtype, time-major.

    Attributes:
        parts: by name `u`, `dt`, `z`, `grad` `(L, B, 1, E)`, `b`, `c` `(L, B, N, 1)`, `mask` `(L, B, 1, 1)`, and `keep`
            `(L, B, 1, 1)`, 0 where the state is reset; absent ones are left out.
        a, binary_a: `(N, E)`, and the same times log2(e).
        bias, skip: `(E,)` or None.
    """

    def __init__(self, call: dict[str, Any], softplus: bool, grad_y: torch.Tensor | None = None) -> None:
        u = call["u"]
        self.dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.softplus = softplus
        self.length, self.batch = u.shape[1], u.shape[0]
        self.a = call["A"].to(self.dtype).t().contiguous()
        self.binary_a = self.a * _LOG2E
        self.bias, self.skip = (None if call[n] is None else call[n].to(self.dtype) for n in ("dt_bias", "D"))
        rows = {"u": u, "dt": call["dt"], "z": call["z"], "grad": grad_y}
        parts = {n: self._time_major(t).unsqueeze(2) for n, t in rows.items() if t is not None}
        parts |= {n.lower(): self._time_major(call[n]).contiguous().unsqueeze(3) for n in ("B", "C")}
        for name, mark in (("mask", call["mask"]), ("keep", _kept(call["reset"], call["mask"]))):
            if mark is not None:
                parts[name] = self._time_major(mark)[:, :, None, None]
        self.parts = parts

    def _time_major(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype).transpose(0, 1)

    def span(self, first: int) -> Block:
        """Everything of the span that begins at token `first`, with `raw`, `dt + bias`, `delta`, Δ, and `source`, Δ u."""
        span = _cut(self.parts, first, min(SPAN, self.length - first))
        raw = span["dt"] if self.bias is None else span["dt"] + self.bias
        delta = F.softplus(raw, threshold=30.0) if self.softplus else raw
        delta = delta * span["mask"] if "mask" in span else delta
        return span | {"raw": raw, "delta": delta, "source": delta * span["u"]}

    def slope(self, span: Block) -> torch.Tensor:
        """Derivative of `Δ` with respect to `dt`."""
        slope = torch.sigmoid(span["raw"]) if self.softplus else torch.ones_like(span["raw"])
        return slope.mul_(span["mask"]) if "mask" in span else slope

    def decays(self, block: Block, out: torch.Tensor) -> None:
        """Write `exp(Δ A)` of a block into `out` `(T, B, N, E)`."""
        torch.mul(block["delta"], self.binary_a, out=out)
        # Powers of two: torch's vectorised exp is biased by 2e-9 near 0, which adds up over thousands of tokens.
        out.exp2_()
        if "keep" in block:
            out.mul_(block["keep"])

    def skipped(self, y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Add `D u` to outputs in place."""
        return y if self.skip is None else y.addcmul_(u, self.skip)


def _kept(reset: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    if reset is None:
        return None
    return ~(reset if mask is None else reset & (mask != 0))


def _blocks(span: Block, size: int, *names: str) -> list[Block]:
    """A span's tensors of these names, where there, cut into blocks."""
    parts = {name: span[name] for name in names if name in span}
    length = span["delta"].shape[0]
    return [_cut(parts, first, min(size, length - first)) for first in range(0, length, size)]


def selective_scan_eager(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass.

    Args:
        values: the tensors of `INPUTS`, absent ones None; whether step sizes go through softplus; whether to return the
            states at the blocks' entries for the backward pass; memory for outputs and entry states, of the right sizes,
            if they are to be written there.

    Returns:
        `y` `(B, L, E)`, final state `(B, N, E)`, entry states `(blocks, B, N, E)` or empty, in the computation's dtype.
    """
    call, (softplus, save, *into) = INPUTS.split(values)
    size = BLOCK if save else 2 * BLOCK
    o = Operands(call, softplus)
    shape = (o.batch, *o.a.shape)
    state = o.a.new_zeros(shape) if call["initial_state"] is None else call["initial_state"].to(o.dtype).contiguous()
    decay, states = o.a.new_empty((size, *shape)), o.a.new_empty((size, *shape))
    rows, factors = states.unbind(0), decay.unbind(0)
    y, entries = into or (o.a.new_empty(call["u"].shape), o.a.new_empty((-(-o.length // size) if save else 0, *shape)))
    o.parts["out"] = y.transpose(0, 1).unsqueeze(2)
    value = o.a.new_empty(SPAN, o.batch, 1, shape[2])
    for begin in range(0, o.length, SPAN):
        span = o.span(begin)
        span["value"] = value[: span["delta"].shape[0]]
        for k, block in enumerate(_blocks(span, size, "delta", "source", "b", "c", "keep", "value"), begin // size):
            if save:
                entries[k].copy_(state)
            count = block["delta"].shape[0]
            o.decays(block, decay[:count])
            torch.mul(block["b"], block["source"], out=states[:count])
            state = _run(rows[:count], factors, state)
            torch.matmul(block["c"].mT, states[:count], out=block["value"])
            state = state.clone()
        gate = F.silu(span["z"]) if "z" in span else 1.0
        torch.mul(o.skipped(span["value"], span["u"]), gate, out=span["out"])
    return y, state, entries


def _run(rows: Rows, factors: Rows, state: torch.Tensor) -> torch.Tensor:
    """`rows[t] += factors[t] · rows[t - 1]` in place; return the last one."""
    for row, factor in zip(rows, factors):
        state = row.addcmul_(factor, state)
    return state


class Workspace:
    """Buffers and sums of one backward pass.

    Attributes:
        decay, adjoint, states: a block's decays, adjoint states and states; the last begin with that at its entry.
        rows: their rows by name.
        spans: a span's outputs before skip connection and gate, `y`, `Σ_n B g`, `gain`, and `Σ_n A exp(Δ A) h g`,
            `pull`, each `(T, B, 1, E)`.
        parts: gradients by name, time-major.
        a, skip: sums of the gradients of A and D, in float64.
    """

    def __init__(self, o: Operands, call: dict[str, Any], into: torch.Tensor | None) -> None:
        shape = (o.batch, *o.a.shape)
        new, wide = o.a.new_empty, call["u"].shape
        self.decay, self.states, self.adjoint = new(BLOCK, *shape), new(BLOCK + 1, *shape), new(BLOCK, *shape)
        self.rows = {name: getattr(self, name).unbind(0) for name in ("decay", "states", "adjoint")}
        self.spans = {name: new(SPAN, o.batch, 1, shape[2]) for name in ("y", "gain", "pull")}
        self.grads = {"u": new(wide), "dt": new(wide)}
        if call["z"] is not None:
            self.grads["z"] = new(wide) if into is None else into
        self.parts = {f"d{name}": grad.transpose(0, 1).unsqueeze(2) for name, grad in self.grads.items()}
        self.parts |= {name: new(o.length, o.batch, 1, shape[1]) for name in ("db", "dc")}
        self.block_a = torch.zeros_like(o.a)
        self.a = torch.zeros_like(o.a, dtype=torch.float64)
        self.skip = self.a.new_zeros(o.a.shape[1])


def selective_scan_eager_backward(
    grad_y: torch.Tensor,
    grad_state: torch.Tensor,
    entries: torch.Tensor,
    *values: Any,
    into: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Backward pass.

    Args:
        grad_y: `(B, L, E)`.
        grad_state: `(B, N, E)`, gradient of the final state.
        entries: the entry states that the forward pass returned.
        values: as in the forward pass, but the last.
        into: where to write the gate's gradient, `(B, L, E)` with evenly spaced rows; None for a new tensor.

    Returns:
        Gradients by argument name, in the computation's dtype; `A`'s as `(E, N)`.
    """
    call, (softplus,) = INPUTS.split(values)
    o = Operands(call, softplus, grad_y)
    w = Workspace(o, call, into)
    o.parts |= w.parts
    carry = grad_state.to(o.dtype).contiguous()
    for begin in range((o.length - 1) // SPAN * SPAN, -1, -SPAN):
        carry = _backward_span(o, w, o.span(begin), entries[begin // BLOCK :], carry)
    grads = w.grads | {"A": w.a.t().to(o.dtype).contiguous(), "D": w.skip.to(o.dtype)}
    grads |= {name: w.parts[f"d{name.lower()}"].squeeze(2).transpose(0, 1).contiguous() for name in ("B", "C")}
    return grads | {"dt_bias": grads["dt"].sum((0, 1)), "initial_state": carry}


def _backward_span(o: Operands, w: Workspace, span: Block, entries: torch.Tensor, carry: torch.Tensor) -> torch.Tensor:
    """All gradients of a span, blocks from last to first; returns that of the state at its entry."""
    count = span["delta"].shape[0]
    span |= {name: buffer[:count] for name, buffer in w.spans.items()}
    gate = F.silu(span["z"]) if "z" in span else None
    before = span["grad"] if gate is None else span["grad"] * gate
    span["before"] = before
    names = ("delta", "source", "b", "c", "keep", "before", "y", "gain", "pull", "db", "dc")
    for block, entry in reversed(list(zip(_blocks(span, BLOCK, *names), entries))):
        _replay(o, w, block, entry, gate is not None)
        carry = _retreat(o, w, block, carry)
    if gate is not None:
        y = o.skipped(span["y"], span["u"]).mul_(span["grad"])
        torch.ops.aten.silu_backward.grad_input(y, span["z"], grad_input=span["dz"])
    torch.mul(span["gain"], span["delta"], out=span["du"])
    if o.skip is not None:
        span["du"].addcmul_(before, o.skip)
        w.skip += (before * span["u"]).sum((0, 1, 2))
    torch.mul(span["pull"].addcmul_(span["gain"], span["u"]), o.slope(span), out=span["ddt"])
    # Sums over the whole batch are kept in float64: their terms are sums over a span.
    w.a += w.block_a
    w.block_a.zero_()
    return carry


def _replay(o: Operands, w: Workspace, block: Block, entry: torch.Tensor, gated: bool) -> None:
    """Recompute decays and states of a block and, for the gate's gradient, its outputs."""
    count = block["delta"].shape[0]
    o.decays(block, w.decay[:count])
    w.states[0].copy_(entry)
    states = w.states[1 : count + 1]
    torch.mul(block["b"], block["source"], out=states)
    _run(w.rows["states"][1 : count + 1], w.rows["decay"], w.rows["states"][0])
    if gated:
        torch.matmul(block["c"].mT, states, out=block["y"])


def _retreat(o: Operands, w: Workspace, block: Block, carry: torch.Tensor) -> torch.Tensor:
    """Adjoint recurrence of a block and its matrix products; returns the gradient of the state at its entry."""
    grad = block["before"]
    count = grad.shape[0]
    adjoint, decay, states = w.adjoint[:count], w.decay[:count], w.states[: count + 1]
    torch.mul(block["c"], grad, out=adjoint)
    rows, factors = w.rows["adjoint"], w.rows["decay"]
    later = rows[count - 1].add_(carry)
    for t in range(count - 2, -1, -1):
        later = rows[t].addcmul_(factors[t + 1], later)
    carry = factors[0] * rows[0]
    # As rows times matrices: columns would cost four times as much.
    torch.matmul(grad, states[1:].mT, out=block["dc"])
    torch.matmul(block["source"], adjoint.mT, out=block["db"])
    torch.matmul(block["b"].mT, adjoint, out=block["gain"])
    decay.mul_(adjoint).mul_(states[:-1])
    torch.sum(torch.mul(decay, o.a, out=adjoint), 2, keepdim=True, out=block["pull"])
    w.block_a += decay.mul_(block["delta"]).sum((0, 1))
    return carry
