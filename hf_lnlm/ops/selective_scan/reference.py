"""Selective scan, the paper's equations one token at a time: the oracle of the other backends.

References:
    [1] Gu, Dao: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, equations
        (2)-(4), algorithm 2.

Glossary: Δ ↔ `delta`, `Ā = exp(Δ A)` ↔ `decay`, `B̄ u = Δ B u` (Euler, as in the authors' code) ↔ `source`,
`h` ↔ `state`.

Complexity: O(B · L · E · N) time and, under autograd, as much memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def selective_scan_reference(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    softplus: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence in float64; arguments and results as in `selective_scan`, without `reverse`."""
    u, dt, A, B, C = u.double(), dt.double(), A.double(), B.double(), C.double()
    raw = dt if dt_bias is None else dt + dt_bias.double()
    delta = F.softplus(raw) if softplus else raw
    if mask is not None:
        delta = delta * mask.double().unsqueeze(-1)
    state = u.new_zeros(u.shape[0], A.shape[1], A.shape[0]) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, None, :] * A.t())
        if reset is not None:
            fresh = reset[:, t] if mask is None else reset[:, t] & (mask[:, t] != 0)
            decay = torch.where(fresh[:, None, None], 0.0, decay)
        source = (delta[:, t] * u[:, t])[:, None, :] * B[:, t, :, None]
        state = decay * state + source
        outputs.append((state * C[:, t, :, None]).sum(1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + u * D.double()
    return (y if z is None else y * F.silu(z.double())), state
