"""Causal depthwise convolution in plain torch: one fused multiply-add a tap.

`(batch, length, channel)` throughout: no transposition, which `F.conv1d` would need twice. The backward pass recomputes
the pre-activation, so that only the input is kept. Without a gather index, positions run in chunks that stay in the
cache: over the whole sequence at once, every one of the two dozen operations would wait for memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .inputs import INPUTS

CHUNK = 64


class Chunks:
    """The input as each tap sees it, chunk by chunk, where every tap reads its neighbour.

    Attributes:
        carried: `(B, K - 1, E)`, the inputs before the first.
        bounds: first and last position of each chunk.
    """

    def __init__(self, call: dict[str, Any]) -> None:
        x, weight = call["x"], call["weight"]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.kernel = x.to(self.dtype), weight.shape[1]
        self.weights = weight.to(self.dtype).t().contiguous().unbind(0)
        bias = call["bias"]
        self.bias = self.x.new_zeros(x.shape[2]) if bias is None else bias.to(self.dtype)
        shape = (x.shape[0], self.kernel - 1, x.shape[2])
        self.carried = self.x.new_zeros(shape) if call["state"] is None else call["state"].to(self.dtype)
        self.bounds = [(t, min(x.shape[1], t + CHUNK)) for t in range(0, x.shape[1], CHUNK)]

    def windows(self, first: int, last: int) -> list[torch.Tensor]:
        """What each tap, the oldest first, reads at positions `first ≤ t < last`: views `(B, T, E)`."""
        before = self.kernel - 1
        if first >= before:
            rows = self.x[:, first - before : last]
        else:
            rows = torch.cat([self.carried[:, first:], self.x[:, :last]], 1)
        return [rows[:, tap : tap + last - first] for tap in range(self.kernel)]

    def total(self, windows: list[torch.Tensor]) -> torch.Tensor:
        """The convolution before its activation, `(B, T, E)`."""
        out = torch.addcmul(self.bias, windows[-1], self.weights[-1])
        for window, weight in zip(windows[:-1], self.weights):
            out.addcmul_(window, weight)
        return out

    def last(self) -> torch.Tensor:
        """The next state, `(B, K - 1, E)`."""
        missing = max(0, self.kernel - 1 - self.x.shape[1])
        kept = self.x[:, self.x.shape[1] - (self.kernel - 1 - missing) :]
        return torch.cat([self.carried[:, self.kernel - 1 - missing :], kept], 1) if missing else kept.clone()


def _forward_chunks(call: dict[str, Any], activation: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_conv_eager` where every tap reads its neighbour."""
    c = Chunks(call)
    y = c.x.new_empty(c.x.shape)
    for first, last in c.bounds:
        total = c.total(c.windows(first, last))
        if activation:
            torch.ops.aten.silu.out(total, out=y[:, first:last])
        else:
            y[:, first:last] = total
    return y, c.last()


def _backward_chunks(
    grad_y: torch.Tensor, grad_state: torch.Tensor, call: dict[str, Any], activation: bool, into: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """`causal_conv_eager_backward` where every tap reads its neighbour."""
    c = Chunks(call)
    dx = c.x.new_empty(c.x.shape) if into is None else into
    dstate = c.carried.new_zeros(c.carried.shape)
    # Sums over the whole batch are kept in float64: their terms are sums over a chunk.
    sums = torch.zeros(c.kernel + 1, c.x.shape[2], dtype=torch.float64, device=c.x.device)
    for first, last in c.bounds:
        windows, grad = c.windows(first, last), grad_y[:, first:last].to(c.dtype)
        if activation:
            grad = torch.ops.aten.silu_backward(grad, c.total(windows))
        parts = [(grad * window).sum((0, 1)) for window in windows]
        sums += torch.stack([*parts, grad.sum((0, 1))])
        torch.mul(grad, c.weights[-1], out=dx[:, first:last])
        for tap, weight in enumerate(c.weights[:-1]):
            _give(dx, dstate, grad, weight, first, tap)
    missing = max(0, c.kernel - 1 - c.x.shape[1])  # rows of the next state that are the old one's
    dstate[:, c.x.shape[1] : c.x.shape[1] + missing] += grad_state[:, :missing]
    dx[:, c.x.shape[1] - (c.kernel - 1 - missing) :] += grad_state[:, missing:]
    sums = sums.to(c.dtype)
    return {"x": dx, "weight": sums[:-1].t().contiguous(), "bias": sums[-1].clone(), "state": dstate}


def _give(
    dx: torch.Tensor, dstate: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, first: int, tap: int
) -> None:
    """Add `grad` `(B, T, E)` of positions from `first` on, times a tap's weight, to the rows that the tap had read."""
    count, shift = grad.shape[1], dstate.shape[1] - tap
    carried = min(max(0, shift - first), count)  # positions that had read the state
    if carried:
        dstate[:, first + tap : first + tap + carried].addcmul_(grad[:, :carried], weight)
    if carried < count:
        dx[:, first + carried - shift : first + count - shift].addcmul_(grad[:, carried:], weight)


class Windows:
    """The input as each tap sees it, by a gather index.

    Attributes:
        rows: `(B, 1 + K - 1 + L, E)`: a zero row, the state, the input.
    """

    def __init__(self, call: dict[str, Any]) -> None:
        x = call["x"]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.kernel = call["weight"].shape[1]
        self.length = x.shape[1]
        self.gather_index = call["gather_index"]
        carried = x.new_zeros(x.shape[0], self.kernel, x.shape[2], dtype=self.dtype)
        if call["state"] is not None:
            carried[:, 1:] = call["state"]
        self.rows = torch.cat([carried, x.to(self.dtype)], 1)
        self.weight = call["weight"].to(self.dtype)
        self.bias = None if call["bias"] is None else call["bias"].to(self.dtype)

    def index(self, tap: int, channels: int) -> torch.Tensor:
        """Row of every position's tap, `(B, L, E)`."""
        return self.gather_index[:, : self.length, tap].unsqueeze(2).expand(-1, -1, channels)

    def window(self, tap: int) -> torch.Tensor:
        """`(B, L, E)`: what tap `tap` (0 the oldest, `K - 1` the current position) reads at every position."""
        if tap == self.kernel - 1:
            return self.rows[:, tap + 1 : tap + 1 + self.length]
        return self.rows.gather(1, self.index(tap, self.rows.shape[2]))

    def total(self) -> torch.Tensor:
        """The convolution before its activation, `(B, L, E)`."""
        out = self.window(self.kernel - 1) * self.weight[:, -1]
        out = out if self.bias is None else out.add_(self.bias)
        for tap in range(self.kernel - 1):
            out.addcmul_(self.window(tap), self.weight[:, tap])
        return out

    def spread(self, into: torch.Tensor, grad: torch.Tensor, tap: int) -> None:
        """Add `grad` `(B, L, E)` to the rows `into` that tap `tap` had read."""
        if tap == self.kernel - 1:
            into[:, tap + 1 : tap + 1 + self.length].add_(grad)
        else:
            into.scatter_add_(1, self.index(tap, grad.shape[2]), grad)

    def last(self) -> torch.Tensor:
        """Rows of the next state, `(B, K - 1, E)`."""
        return self.gather_index[:, -1].unsqueeze(2).expand(-1, -1, self.rows.shape[2])


def causal_conv_eager(*values: Any) -> tuple[torch.Tensor, ...]:
    """Forward pass.

    Args:
        values: the tensors of `INPUTS`, absent ones None; whether SiLU follows; whether a backward pass does.

    Returns:
        `y` `(B, L, E)`, the next state `(B, K - 1, E)`, float32 (float64 for float64 input), and nothing to keep.
    """
    call, (activation, _save) = INPUTS.split(values)
    if call["gather_index"] is None:
        y, last = _forward_chunks(call, activation)
    else:
        w = Windows(call)
        total = w.total()
        y, last = (F.silu(total, inplace=True) if activation else total), w.rows.gather(1, w.last())
    return y, last, y.new_empty(0)


def causal_conv_eager_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, _kept: Any, *values: Any, into: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Backward pass.

    Args:
        grad_y: `(B, L, E)`.
        grad_state: `(B, K - 1, E)`, gradient of the next state.
        values: as in the forward pass, but the last.
        into: where to write the input's gradient, `(B, L, E)` of the computation's dtype with evenly spaced rows; None
            for a new tensor.

    Returns:
        Gradients by argument name.
    """
    call, (activation,) = INPUTS.split(values)
    if call["gather_index"] is None:
        return _backward_chunks(grad_y, grad_state, call, activation, into)
    w = Windows(call)
    grad = grad_y.to(w.dtype)
    if activation:
        total = w.total()
        s = torch.sigmoid(total)
        grad = grad * s * (1 + total * (1 - s))
    rows = torch.zeros_like(w.rows)
    rows.scatter_add_(1, w.last(), grad_state.to(w.dtype))
    dw = torch.empty_like(w.weight)
    for tap in range(w.kernel):
        dw[:, tap] = (grad * w.window(tap)).sum((0, 1))
        w.spread(rows, grad * w.weight[:, tap], tap)
    bias = grad.sum((0, 1))
    dx = rows[:, w.kernel :]
    return {
        "x": dx.clone() if into is None else into.copy_(dx),
        "weight": dw,
        "bias": bias,
        "state": rows[:, 1 : w.kernel].clone(),
    }
