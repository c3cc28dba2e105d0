"""Selective scan in plain torch: blocks of tokens, one fused multiply-add a token, recomputed backward pass.

Within a block every decay `exp(Δ A)` and source `Δ u B` is made by one operation each; the recurrence itself is one
`addcmul` a token in place; outputs and gradients are matrix products over the block. Layout is `(time, batch, state,
channel)`: channels innermost. Only the states at the blocks' entries are kept for the backward pass.

Complexity: O(B · L · E · N) time, O(B · L · E · N / BLOCK) memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 16

_LOG2E = 1.4426950408889634


class Operands:
    """The operation's tensors, time-major, in the computation's dtype.

    Attributes:
        u, delta, slope: `(L, B, 1, E)`; `slope` is the derivative of `delta` with respect to `dt`.
        b, c: `(L, B, N, 1)`.
        a, binary_a: `(N, E)`, and the same times log2(e).
        keep: `(L, B, 1, 1)`, 0 where the state is reset, or None.
    """

    def __init__(self, call: dict[str, Any], softplus: bool) -> None:
        u = call["u"]
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        raw = call["dt"].to(dtype)
        raw = raw if call["dt_bias"] is None else raw + call["dt_bias"].to(dtype)
        delta = F.softplus(raw, threshold=30.0) if softplus else raw
        slope = torch.sigmoid(raw) if softplus else torch.ones_like(raw)
        mask = call["mask"]
        if mask is not None:
            weight = mask.to(dtype).unsqueeze(-1)
            delta, slope = delta * weight, slope * weight
        self.dtype = dtype
        self.u, self.delta, self.slope = (self._time_major(t.to(dtype)).unsqueeze(2) for t in (u, delta, slope))
        self.b, self.c = (self._time_major(call[name].to(dtype)).unsqueeze(3) for name in ("B", "C"))
        self.a = call["A"].to(dtype).t().contiguous()
        self.binary_a = self.a * _LOG2E
        self.source = self.delta * self.u
        self.keep = self._keep(call["reset"], mask)

    @staticmethod
    def _time_major(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, 1).contiguous()

    def _keep(self, reset: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
        if reset is None:
            return None
        fresh = reset if mask is None else reset & (mask != 0)
        return (~fresh).t().to(self.dtype)[:, :, None, None]

    def decays(self, first: int, last: int, out: torch.Tensor) -> torch.Tensor:
        """Write `exp(Δ A)` of tokens `first ≤ t < last` into `out` `(last - first, B, N, E)`."""
        torch.mul(self.delta[first:last], self.binary_a, out=out)
        # Powers of two: torch's vectorised exp is biased by 2e-9 near 0, which adds up over thousands of tokens.
        out.exp2_()
        return out if self.keep is None else out.mul_(self.keep[first:last])


def selective_scan_eager(call: dict[str, Any], softplus: bool, save: bool) -> tuple[torch.Tensor, ...]:
    """Forward pass; arguments and results as in `selective_scan_cpu`."""
    o = Operands(call, softplus)
    length, batch, _, channels = o.u.shape
    shape = (batch, o.a.shape[0], channels)
    state = o.u.new_zeros(shape) if call["initial_state"] is None else call["initial_state"].to(o.dtype).contiguous()
    block = BLOCK if save else 2 * BLOCK
    entries = o.u.new_empty((-(-length // block) if save else 0, *shape))
    decay, states = o.u.new_empty((block, *shape)), o.u.new_empty((block, *shape))
    y = o.u.new_empty(length, batch, 1, channels)
    for first in range(0, length, block):
        last = min(length, first + block)
        if save:
            entries[first // block].copy_(state)
        o.decays(first, last, decay[: last - first])
        torch.mul(o.b[first:last], o.source[first:last], out=states[: last - first])
        state = _run(states, decay, state, last - first)
        torch.matmul(o.c[first:last].transpose(2, 3), states[: last - first], out=y[first:last])
        state = state.clone()
    return _finish(y, call, o), state, entries


def _run(states: torch.Tensor, decay: torch.Tensor, state: torch.Tensor, count: int) -> torch.Tensor:
    """`states[t] += decay[t] · states[t - 1]` in place; return the last one."""
    for current, factor in zip(states.unbind(0)[:count], decay.unbind(0)):
        torch.addcmul(current, factor, state, out=current)
        state = current
    return state


def _finish(y: torch.Tensor, call: dict[str, Any], o: Operands) -> torch.Tensor:
    """Add `D u`, apply the gate, and return to `(B, L, E)`."""
    out = y.squeeze(2).transpose(0, 1)
    if call["D"] is not None:
        out = torch.addcmul(out, call["u"].to(o.dtype), call["D"].to(o.dtype))
    return (out if call["z"] is None else out * F.silu(call["z"].to(o.dtype))).contiguous()


class Workspace:
    """Buffers and sums of one backward pass, by the gradients' names."""

    def __init__(self, o: Operands) -> None:
        _length, batch, _, channels = o.u.shape
        count = o.a.shape[0]
        self.decay = o.u.new_empty(BLOCK, batch, count, channels)
        self.states = o.u.new_empty(BLOCK + 1, batch, count, channels)
        self.adjoint = o.u.new_empty(BLOCK, batch, count, channels)
        self.gain, self.pull = torch.empty_like(o.u), torch.empty_like(o.u)
        self.b, self.c = torch.empty_like(o.b), torch.empty_like(o.c)
        self.a = torch.zeros_like(o.a, dtype=torch.float64)


def selective_scan_eager_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, call: dict[str, Any], entries: torch.Tensor, softplus: bool
) -> dict[str, torch.Tensor]:
    """Backward pass; arguments and results as in `selective_scan_cpu_backward`."""
    o = Operands(call, softplus)
    grad, before_gate = _through_gate(grad_y.to(o.dtype), call)
    time_grad = Operands._time_major(grad).unsqueeze(2)
    w = Workspace(o)
    y = torch.empty_like(o.u) if call["z"] is not None else None
    carry = grad_state.to(o.dtype).contiguous()
    for k in reversed(range(entries.shape[0])):
        first, last = k * BLOCK, min(o.u.shape[0], (k + 1) * BLOCK)
        _replay(o, w, entries[k], first, last)
        if y is not None:
            torch.matmul(o.c[first:last].transpose(2, 3), w.states[1 : last - first + 1], out=y[first:last])
        carry = _retreat(o, w, time_grad, carry, first, last)
    return _collect(o, w, call, grad, y, before_gate) | {"initial_state": carry}


def _through_gate(grad: torch.Tensor, call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient before the gate, and the factor that turns the ungated output into the gate's gradient."""
    if call["z"] is None:
        return grad, None
    z = call["z"].to(grad.dtype)
    s = torch.sigmoid(z)
    return grad * z * s, grad * s * (1 + z * (1 - s))


def _replay(o: Operands, w: Workspace, entry: torch.Tensor, first: int, last: int) -> None:
    """Recompute decays and states of a block; `w.states[0]` is the state at its entry."""
    count = last - first
    o.decays(first, last, w.decay[:count])
    w.states[0].copy_(entry)
    torch.mul(o.b[first:last], o.source[first:last], out=w.states[1 : count + 1])
    _run(w.states[1:], w.decay, w.states[0], count)


def _retreat(o: Operands, w: Workspace, grad: torch.Tensor, carry: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Adjoint recurrence of a block and its matrix products; returns the gradient of the state at its entry."""
    count = last - first
    adjoint, decay, states = w.adjoint[:count], w.decay[:count], w.states[: count + 1]
    torch.mul(o.c[first:last], grad[first:last], out=adjoint)
    rows, factors = adjoint.unbind(0), decay.unbind(0)
    rows[-1].add_(carry)
    for t in range(count - 2, -1, -1):
        torch.addcmul(rows[t], factors[t + 1], rows[t + 1], out=rows[t])
    carry = factors[0] * rows[0]
    torch.matmul(states[1:], grad[first:last].transpose(2, 3), out=w.c[first:last])
    torch.matmul(adjoint, o.source[first:last].transpose(2, 3), out=w.b[first:last])
    torch.matmul(o.b[first:last].transpose(2, 3), adjoint, out=w.gain[first:last])
    decay.mul_(adjoint).mul_(states[:-1])
    torch.mul(decay, o.a, out=adjoint)
    torch.sum(adjoint, 2, keepdim=True, out=w.pull[first:last])
    w.a += decay.mul_(o.delta[first:last]).sum((0, 1))
    return carry


def _collect(
    o: Operands,
    w: Workspace,
    call: dict[str, Any],
    grad: torch.Tensor,
    y: torch.Tensor | None,
    gate_factor: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Assemble the gradients of the operation's arguments, `(B, L, ...)`."""
    u = call["u"].to(o.dtype)
    du = (w.gain * o.delta).squeeze(2).transpose(0, 1)
    ddt = ((w.gain * o.u + w.pull) * o.slope).squeeze(2).transpose(0, 1).contiguous()
    out = {"dt": ddt, "A": w.a.t().to(o.dtype).contiguous(), "dt_bias": ddt.sum((0, 1))}
    out |= {name: getattr(w, name.lower()).squeeze(3).transpose(0, 1).contiguous() for name in ("B", "C")}
    skip = call["D"]
    if skip is not None:
        du = torch.addcmul(du, grad, skip.to(o.dtype))
        out["D"] = (grad * u).sum((0, 1))
    out["u"] = du.contiguous()
    if y is not None and gate_factor is not None:
        ungated = y.squeeze(2).transpose(0, 1)
        ungated = ungated if skip is None else torch.addcmul(ungated, u, skip.to(o.dtype))
        out["z"] = (gate_factor * ungated).contiguous()
    return out
