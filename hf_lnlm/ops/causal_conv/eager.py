"""Causal depthwise convolution in plain torch: one fused multiply-add a tap over the whole sequence.

`(batch, length, channel)` throughout: no transposition, which `F.conv1d` would need twice. The backward pass recomputes
the pre-activation, so that only the input is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class Windows:
    """The input as each tap sees it.

    Attributes:
        rows: `(B, 1 + K - 1 + L, E)`: a zero row, the state, the input.
    """

    def __init__(self, call: dict[str, Any]) -> None:
        x = call["x"]
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.kernel = call["weight"].shape[1]
        self.length = x.shape[1]
        self.taps = call["taps"]
        carried = x.new_zeros(x.shape[0], self.kernel, x.shape[2], dtype=self.dtype)
        if call["state"] is not None:
            carried[:, 1:] = call["state"]
        self.rows = torch.cat([carried, x.to(self.dtype)], 1)
        self.weight = call["weight"].to(self.dtype)
        self.bias = None if call["bias"] is None else call["bias"].to(self.dtype)

    def index(self, tap: int, channels: int) -> torch.Tensor:
        """Row of every position's tap, `(B, L, E)`."""
        return self.taps[:, : self.length, tap].unsqueeze(2).expand(-1, -1, channels)

    def window(self, tap: int) -> torch.Tensor:
        """`(B, L, E)`: what tap `tap` (0 the oldest, `K - 1` the current position) reads at every position."""
        if self.taps is None or tap == self.kernel - 1:
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
        if self.taps is None or tap == self.kernel - 1:
            into[:, tap + 1 : tap + 1 + self.length].add_(grad)
        else:
            into.scatter_add_(1, self.index(tap, grad.shape[2]), grad)

    def last(self) -> torch.Tensor | None:
        """Rows of the next state `(B, K - 1, E)`, or None when they are simply the last ones."""
        return None if self.taps is None else self.taps[:, -1].unsqueeze(2).expand(-1, -1, self.rows.shape[2])


def causal_conv_eager(call: dict[str, Any], activation: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass.

    Args:
        call: the operator's tensors by name (see `causal_conv`), absent ones None.
        activation: whether SiLU follows.

    Returns:
        `y` `(B, L, E)` and the next state `(B, K - 1, E)`, float32 (float64 for float64 input).
    """
    w = Windows(call)
    total = w.total()
    index = w.last()
    state = w.rows[:, w.length + 1 :].clone() if index is None else w.rows.gather(1, index)
    return (F.silu(total, inplace=True) if activation else total), state


def causal_conv_eager_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, call: dict[str, Any], activation: bool
) -> dict[str, torch.Tensor]:
    """Backward pass.

    Args:
        grad_y: `(B, L, E)`.
        grad_state: `(B, K - 1, E)`, gradient of the next state.
        call: the forward pass's tensors by name.
        activation: as in the forward pass.

    Returns:
        Gradients by argument name.
    """
    w = Windows(call)
    grad = grad_y.to(w.dtype)
    if activation:
        total = w.total()
        s = torch.sigmoid(total)
        grad = grad * s * (1 + total * (1 - s))
    rows = torch.zeros_like(w.rows)
    index = w.last()
    if index is None:
        rows[:, w.length + 1 :].add_(grad_state)
    else:
        rows.scatter_add_(1, index, grad_state.to(w.dtype))
    dw = torch.empty_like(w.weight)
    for tap in range(w.kernel):
        dw[:, tap] = (grad * w.window(tap)).sum((0, 1))
        w.spread(rows, grad * w.weight[:, tap], tap)
    bias = grad.sum((0, 1))
    return {
        "x": rows[:, w.kernel :].clone(),
        "weight": dw,
        "bias": bias,
        "state": rows[:, 1 : w.kernel].clone(),
    }
