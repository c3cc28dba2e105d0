"""The passes of convolution and scan that a backend has, for gradients that are written where they belong."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ..causal_conv.eager import causal_conv_eager, causal_conv_eager_backward
from ..selective_scan.eager import selective_scan_eager, selective_scan_eager_backward


class Passes(NamedTuple):
    """Functions of one backend.

    Attributes:
        conv: `(call, activation)` → output and next state.
        conv_backward: `(gradients, call, activation, into)` → gradients by name.
        scan: `(call, save, into)` → output, final state, states at the blocks' entries.
        scan_backward: `(gradients, call, entries, into)` → gradients by name.
    """

    conv: Any
    conv_backward: Any
    scan: Any
    scan_backward: Any


def _eager_scan(call: dict[str, Any], save: bool, into: Any) -> Any:
    return selective_scan_eager(call, True, save, into)


def _eager_scan_backward(grad_y: Any, grad_state: Any, call: dict[str, Any], entries: Any, into: Any) -> Any:
    return selective_scan_eager_backward(grad_y, grad_state, call, entries, True, into)


@cache
def passes(backend: str) -> Passes:
    """Return the passes of `eager` or `cpu`."""
    if backend == "eager":
        return Passes(causal_conv_eager, causal_conv_eager_backward, _eager_scan, _eager_scan_backward)
    from ..causal_conv.cpu import causal_conv_cpu, causal_conv_cpu_backward
    from ..selective_scan.cpu import selective_scan_cpu, selective_scan_cpu_backward

    return Passes(causal_conv_cpu, causal_conv_cpu_backward, selective_scan_cpu, selective_scan_cpu_backward)
