"""Which backend each operation would use on this machine, and why: `hf_lnlm.backends()`."""

from __future__ import annotations

import torch

from .causal_conv import CAUSAL_CONV
from .decode_step import DECODE_STEP
from .linear_cross_entropy import LINEAR_CROSS_ENTROPY
from .mamba_inner import MAMBA_INNER
from .memory.dnc import DNC_MEMORY
from .memory.ntm import NTM_MEMORY
from .projected_lstm import PROJECTED_LSTM
from .recompute import RECOMPUTE
from .recurrence import RECURRENCE
from .relative_attention import RELATIVE_ATTENTION
from .rms_norm import RMS_NORM
from .selective_scan import SELECTIVE_SCAN
from .sparse_attention.attention import SPARSE_ATTENTION
from .ssd import SSD
from .time_conv import TIME_CONV

OPERATIONS = (
    CAUSAL_CONV,
    DECODE_STEP,
    DNC_MEMORY,
    LINEAR_CROSS_ENTROPY,
    MAMBA_INNER,
    NTM_MEMORY,
    PROJECTED_LSTM,
    RECOMPUTE,
    RECURRENCE,
    RELATIVE_ATTENTION,
    RMS_NORM,
    SELECTIVE_SCAN,
    SPARSE_ATTENTION,
    SSD,
    TIME_CONV,
)


def backends(device: str | torch.device | None = None) -> dict[str, dict[str, str]]:
    """Tell, for every operation, which backend `backend="auto"` picks and what keeps the others from running.

    Args:
        device: where the tensors would be; the default is CUDA where there is one, else the CPU.

    Returns:
        operation → {"in use": backend, each backend it has: "can run", or why it is not taken, "limits": calls that
        another one serves, where there are such}.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return {operation.name: operation.row(kind) for operation in OPERATIONS}
