"""Selective scan in plain torch: blocks of tokens, one fused multiply-add a token, recomputed backward pass.

Within a block every decay `exp(Δ A)` and source `Δ u B` is made by one operation each; the recurrence itself is one
`addcmul` a token in place; outputs and gradients are matrix products over the block. Everything else (step sizes, gate,
skip connection) is made block by block too: what a block needs then still lies in the cache, where operations on whole
sequences would wait for memory. Layout is `(time, batch, state, channel)`: channels innermost. Only the states at the
blocks' entries are kept for the backward pass.

Complexity: O(B · L · E · N) time, O(B · L · E · N / BLOCK) memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 16

_LOG2E = 1.4426950408889634

# Blocks whose sums over tokens stay in the computation's dtype before they are added in float64.
_BLOCKS = 8

Block = dict[str, torch.Tensor]  # tensors by name, of which the first dimension is time
Rows = tuple[torch.Tensor, ...]


def _cut(parts: Block, first: int, count: int) -> Block:
    """A block's part of every tensor."""
    return {name: part.narrow(0, first, count) for name, part in parts.items()}


class Operands:
    """The operation's tensors in the computation's dtype, time-major.

    Attributes:
        parts: by name `u`, `dt`, `z`, `grad` `(T, B, 1, E)`, `b`, `c` `(T, B, N, 1)`, `mask` `(T, B, 1, 1)`, and `keep`
            `(T, B, 1, 1)`, 0 where the state is reset.
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

    def steps(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """`dt + bias` and `Δ` of a block, `(T, B, 1, E)`."""
        raw = block["dt"] if self.bias is None else block["dt"] + self.bias
        delta = F.softplus(raw, threshold=30.0) if self.softplus else raw
        return raw, delta * block["mask"] if "mask" in block else delta

    def slope(self, block: Block, raw: torch.Tensor) -> torch.Tensor:
        """Derivative of `Δ` with respect to `dt`, given `dt + bias`."""
        slope = torch.sigmoid(raw) if self.softplus else torch.ones_like(raw)
        return slope.mul_(block["mask"]) if "mask" in block else slope

    def decays(self, block: Block, delta: torch.Tensor, out: torch.Tensor) -> None:
        """Write `exp(Δ A)` of a block into `out` `(T, B, N, E)`."""
        torch.mul(delta, self.binary_a, out=out)
        # Powers of two: torch's vectorised exp is biased by 2e-9 near 0, which adds up over thousands of tokens.
        out.exp2_()
        if "keep" in block:
            out.mul_(block["keep"])

    def skipped(self, y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Add `D u` to a block's outputs in place."""
        return y if self.skip is None else y.addcmul_(u, self.skip)


def _kept(reset: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    if reset is None:
        return None
    return ~(reset if mask is None else reset & (mask != 0))


def selective_scan_eager(call: dict[str, Any], softplus: bool, save: bool) -> tuple[torch.Tensor, ...]:
    """Forward pass; arguments and results as in `selective_scan_cpu`."""
    size = BLOCK if save else 2 * BLOCK
    o = Operands(call, softplus)
    shape = (o.batch, *o.a.shape)
    state = o.a.new_zeros(shape) if call["initial_state"] is None else call["initial_state"].to(o.dtype).contiguous()
    entries = o.a.new_empty((-(-o.length // size) if save else 0, *shape))
    decay, states = o.a.new_empty((size, *shape)), o.a.new_empty((size, *shape))
    rows, factors = states.unbind(0), decay.unbind(0)
    y = o.a.new_empty(call["u"].shape)
    parts = o.parts | {"y": y.transpose(0, 1).unsqueeze(2)}
    for first in range(0, o.length, size):
        if save:
            entries[first // size].copy_(state)
        count = min(size, o.length - first)
        block = _cut(parts, first, count)
        delta = o.steps(block)[1]
        o.decays(block, delta, decay[:count])
        torch.mul(block["b"], delta * block["u"], out=states[:count])
        state = _run(rows[:count], factors, state)
        value = o.skipped(torch.matmul(block["c"].mT, states[:count]), block["u"])
        torch.mul(value, F.silu(block["z"]), out=block["y"]) if "z" in block else block["y"].copy_(value)
        state = state.clone()
    return y, state, entries


def _run(rows: Rows, factors: Rows, state: torch.Tensor) -> torch.Tensor:
    """`rows[t] += factors[t] · rows[t - 1]` in place; return the last one."""
    for row, factor in zip(rows, factors):
        state = row.addcmul_(factor, state)
    return state


class Workspace:
    """Buffers and sums of one backward pass, by the gradients' names."""

    def __init__(self, o: Operands, call: dict[str, Any], into: torch.Tensor | None) -> None:
        shape = (o.batch, *o.a.shape)
        new = o.a.new_empty
        self.decay, self.states, self.adjoint = new(BLOCK, *shape), new(BLOCK + 1, *shape), new(BLOCK, *shape)
        self.rows = {name: getattr(self, name).unbind(0) for name in ("decay", "states", "adjoint")}
        self.b, self.c = (new(o.length, o.batch, 1, shape[1]) for _ in range(2))
        gated = call["z"] is not None
        self.u, self.dt, self.z = (
            new(call["u"].shape if wanted else 0) for wanted in (True, True, gated and into is None)
        )
        self.z = self.z if into is None else into
        self.parts = {"b": self.b, "c": self.c}
        for name in ("u", "dt", "z") if gated else ("u", "dt"):
            self.parts[name] = getattr(self, name).transpose(0, 1).unsqueeze(2)
        self.block_a, self.block_skip = torch.zeros_like(o.a), new(BLOCK, o.batch, 1, o.a.shape[1]).zero_()
        # Sums over the whole batch are kept in float64: their terms are sums over some blocks.
        self.a = torch.zeros_like(o.a, dtype=torch.float64)
        self.skip = self.a.new_zeros(o.a.shape[1])

    def flush(self) -> None:
        """Move the blocks' sums to the whole batch's."""
        self.a += self.block_a
        self.skip += self.block_skip.sum((0, 1, 2))
        self.block_a.zero_(), self.block_skip.zero_()


def selective_scan_eager_backward(
    grad_y: torch.Tensor,
    grad_state: torch.Tensor,
    call: dict[str, Any],
    entries: torch.Tensor,
    softplus: bool,
    into: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `selective_scan_cpu_backward`."""
    o = Operands(call, softplus, grad_y)
    w = Workspace(o, call, into)
    carry = grad_state.to(o.dtype).contiguous()
    for k in range(entries.shape[0] - 1, -1, -1):
        first, count = k * BLOCK, min(BLOCK, o.length - k * BLOCK)
        carry = _backward_block(o, w, _cut(o.parts, first, count), _cut(w.parts, first, count), entries[k], carry)
        if k % _BLOCKS == 0:
            w.flush()
    grads = {"u": w.u, "dt": w.dt, "z": w.z, "A": w.a.t().to(o.dtype).contiguous(), "D": w.skip.to(o.dtype)}
    grads |= {name: getattr(w, name.lower()).squeeze(2).transpose(0, 1).contiguous() for name in ("B", "C")}
    return grads | {"dt_bias": w.dt.sum((0, 1)), "initial_state": carry}


def _backward_block(
    o: Operands, w: Workspace, block: Block, out: Block, entry: torch.Tensor, carry: torch.Tensor
) -> torch.Tensor:
    """Replay a block from the state at its entry, then retreat through it; returns that state's gradient."""
    raw, delta = o.steps(block)
    source = delta * block["u"]
    _replay(o, w, block, delta, source, entry)
    grad = _through_gate(o, w, block, out)
    gain, pull, carry = _retreat(o, w, block, out, (delta, source, grad), carry)
    torch.mul(gain, delta, out=out["u"])
    if o.skip is not None:
        out["u"].addcmul_(grad, o.skip)
        w.block_skip[: grad.shape[0]].addcmul_(grad, block["u"])
    torch.mul(pull.addcmul_(gain, block["u"]), o.slope(block, raw), out=out["dt"])
    return carry


def _replay(
    o: Operands, w: Workspace, block: Block, delta: torch.Tensor, source: torch.Tensor, entry: torch.Tensor
) -> None:
    """Recompute decays and states of a block; `w.states[0]` is the state at its entry."""
    count = delta.shape[0]
    o.decays(block, delta, w.decay[:count])
    w.states[0].copy_(entry)
    torch.mul(block["b"], source, out=w.states[1 : count + 1])
    _run(w.rows["states"][1 : count + 1], w.rows["decay"], w.rows["states"][0])


def _through_gate(o: Operands, w: Workspace, block: Block, out: Block) -> torch.Tensor:
    """Gradient before the gate, `(T, B, 1, E)`; writes the gate's own."""
    grad = block["grad"]
    if "z" not in block:
        return grad
    z = block["z"]
    y = o.skipped(torch.matmul(block["c"].mT, w.states[1 : grad.shape[0] + 1]), block["u"])
    torch.ops.aten.silu_backward.grad_input(y.mul_(grad), z, grad_input=out["z"])
    return grad * F.silu(z)


def _retreat(
    o: Operands, w: Workspace, block: Block, out: Block, values: Rows, carry: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adjoint recurrence of a block and its matrix products.

    Args:
        values: `Δ`, `Δ u` and the outputs' gradient before the gate, each `(T, B, 1, E)`.

    Returns:
        `Σ_n B g` and `Σ_n A exp(Δ A) h g`, `(T, B, 1, E)`, and the gradient of the state at the block's entry.
    """
    delta, source, grad = values
    count = grad.shape[0]
    adjoint, decay, states = w.adjoint[:count], w.decay[:count], w.states[: count + 1]
    torch.mul(block["c"], grad, out=adjoint)
    rows, factors = w.rows["adjoint"], w.rows["decay"]
    later = rows[count - 1].add_(carry)
    for t in range(count - 2, -1, -1):
        later = rows[t].addcmul_(factors[t + 1], later)
    carry = factors[0] * rows[0]
    # As rows times matrices: columns would cost four times as much.
    torch.matmul(grad, states[1:].mT, out=out["c"])
    torch.matmul(source, adjoint.mT, out=out["b"])
    gain = torch.matmul(block["b"].mT, adjoint)
    decay.mul_(adjoint).mul_(states[:-1])
    pull = torch.mul(decay, o.a, out=adjoint).sum(2, keepdim=True)
    w.block_a += decay.mul_(delta).sum((0, 1))
    return gain, pull, carry
