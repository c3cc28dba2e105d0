"""State space duality's recurrence, one token at a time in float64: the oracle of the other backends.

References:
    [1] Dao, Gu: "Transformers are SSMs", arXiv:2405.21060, equation (1) with scalar `A_t` per head.
    [2] Lahoti et al.: "Mamba-3", arXiv:2603.15569: the same recurrence with other coefficients.
"""

from __future__ import annotations

import torch


def ssd_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    diagonal: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `h_t = exp(log_decay_t) h_{t-1} + scale_t x_t ⊗ B_t`, `y_t = h_t C_t + D x_t`; arguments as in `ssd`."""
    x, scale, log_decay = x.double(), scale.double(), log_decay.double()
    batch, length, heads, width = x.shape
    repeats = heads // B.shape[2]
    B, C = (t.double().repeat_interleave(repeats, 2) for t in (B, C))
    state = x.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state.double()
    outputs = []
    for t in range(length):
        decay = torch.exp(log_decay[:, t])
        if reset is not None:
            decay = torch.where(reset[:, t, None], 0.0, decay)
        source = (scale[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        before = decay[..., None, None] * state
        state = before + source
        seen = state if diagonal is None else before + source * diagonal.double()[:, t, :, None, None]
        outputs.append((seen * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    return (y if D is None else y + x * D.double()[:, None]), state
