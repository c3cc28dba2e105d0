"""Selective scan on the CPU: numba kernels, forward and backward, fused with softplus, skip connection and gate.

Tensors keep the `(batch, length, channel)` layout that the projections around the scan read and write. Channels are the
vector lanes; a tile of `TILE` channels keeps its `N · TILE` state in the first-level cache while time runs. The forward
pass stores the state at the entry of every block of `BLOCK` tokens; the backward pass recomputes a block from there, so
that nothing of size `L · N · E` ever exists.

Kernels see flat arrays and row strides: a slice of a fused projection is read in place.

Complexity: O(B · L · E · N) time, O(B · L · E · N / BLOCK) memory when gradients are wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..causal_conv.fast_math import LANES, LOG2E, STRICT, compiled, decayf, sigmoidf, softplusf
from ..causal_conv.flat import bytes_of, flat_rows, flat_vector

BLOCK = 16
TILE = 256

Array = Any  # numba's own array types: kernels are compiled for float32
Operands = Any  # (u, stride, dt, stride, z, stride, A, B, stride, C, stride, D, dt_bias, mask, reset)
Sizes = Any  # (batch, length, channels, states, tile, block)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LN2 = np.float32(0.6931471805599453)


@compiled(STRICT)
def _copy(source: Array, source_at: int, target: Array, target_at: int, width: int) -> None:
    """Copy columns of a `(states, ...)` array."""
    for n in range(target.shape[0]):
        for e in range(width):
            target[n, target_at + e] = source[n, source_at + e]


@compiled(STRICT)
def _load_decay(operands: Operands, start: int, width: int, a: Array) -> None:
    """Load a tile of `A`, as powers of two."""
    source = operands[6]
    for n in range(a.shape[0]):
        for e in range(width):
            a[n, e] = source[n, start + e] * LOG2E


@compiled(STRICT)
def _weight(operands: Operands, i: int) -> Any:
    """0 at a masked token."""
    mask = operands[13]
    return mask[i] if mask.size > 0 else _ONE


@compiled(STRICT)
def _fresh(operands: Operands, i: int) -> Any:
    """Whether token `i` forgets the state before it."""
    reset = operands[14]
    return reset.size > 0 and reset[i] != 0 and _weight(operands, i) != _ZERO


@compiled(STRICT)
def _discretise(operands: Operands, i: int, start: int, width: int, delta: Array, slope: Array, source: Array) -> None:
    """`Δ = softplus(dt + bias) · mask`, its derivative with respect to `dt`, and `Δ u`, for one token of a tile."""
    u, us, dt, ds = operands[0], operands[1], operands[2], operands[3]
    bias = operands[12]
    weight = _weight(operands, i)
    at, u_at = i * ds + start, i * us + start
    for e in range(width):
        raw = dt[at + e] + bias[start + e]
        step = softplusf(raw) * weight
        delta[e] = step
        source[e] = step * u[u_at + e]
    for e in range(width):
        slope[e] = sigmoidf(dt[at + e] + bias[start + e]) * weight


@compiled(STRICT)
def _advance(delta: Array, source: Array, a: Array, b: Array, c: Array, h: Array, y: Array, width: int) -> None:
    """One token: `h ← exp(Δ A) h + Δ u B` in place and `y = Σ_n h C`, for one tile."""
    for e in range(width):
        y[e] = _ZERO
    for n in range(a.shape[0]):
        bn = b[n]
        cn = c[n]
        for e in range(width):
            x = decayf(delta[e] * a[n, e]) * h[n, e] + source[e] * bn
            h[n, e] = x
            y[e] += x * cn


@compiled(STRICT)
def _emit(operands: Operands, i: int, start: int, width: int, row: Array, y: Array, at: int) -> None:
    """Write `(y + D u) · silu(z)` of one token of a tile."""
    u, us, z, zs, skip = operands[0], operands[1], operands[4], operands[5], operands[11]
    u_at, z_at = i * us + start, i * zs + start
    if z.size > 0:
        for e in range(width):
            gate = z[z_at + e]
            y[at + e] = (row[e] + skip[start + e] * u[u_at + e]) * gate * sigmoidf(gate)
    else:
        for e in range(width):
            y[at + e] = row[e] + skip[start + e] * u[u_at + e]


@compiled(STRICT)
def _forward(operands: Operands, h: Array, y: Array, entries: Array, sizes: Sizes) -> None:
    """All tiles, rows and tokens; `h` `(B, N, E)` enters as the initial and leaves as the final state."""
    batch, length, channels, states, tile, block = sizes
    b, bs, c, cs = operands[7], operands[8], operands[9], operands[10]
    scratch = np.empty((4, tile), np.float32)
    delta, slope, source, row = scratch[0], scratch[1], scratch[2], scratch[3]
    state, a = np.empty((states, tile), np.float32), np.empty((states, tile), np.float32)
    for start in range(0, channels, tile):
        width = min(tile, channels - start)
        _load_decay(operands, start, width, a)
        for r in range(batch):
            _copy(h[r], start, state, 0, width)
            for t in range(length):
                i = r * length + t
                if entries.size > 0 and t % block == 0:
                    _copy(state, 0, entries[t // block, r], start, width)
                if _fresh(operands, i):
                    state[:] = _ZERO
                _discretise(operands, i, start, width, delta, slope, source)
                _advance(delta, source, a, b[i * bs :], c[i * cs :], state, row, width)
                _emit(operands, i, start, width, row, y, i * channels + start)
            _copy(state, 0, h[r], start, width)


@compiled(STRICT)
def _replay(
    delta: Array, source: Array, a: Array, b: Array, c: Array, decay: Array, before: Array, after: Array, y: Array,
    fresh: bool, width: int,
) -> None:  # fmt: skip
    """One token of a block again, keeping the decays and the states this time."""
    for e in range(width):
        y[e] = _ZERO
    for n in range(a.shape[0]):
        bn = b[n]
        cn = c[n]
        for e in range(width):
            p = decayf(delta[e] * a[n, e])
            x = p * before[n, e] + source[e] * bn
            decay[n, e] = p
            after[n, e] = x
            y[e] += x * cn
        if fresh:
            for e in range(width):
                y[e] += (source[e] * bn - after[n, e]) * cn
                after[n, e] = source[e] * bn
                decay[n, e] = _ZERO


@compiled(STRICT)
def _ungate(
    operands: Operands, i: int, start: int, width: int, row: Array, dy: Array, dz: Array, at: int, grad: Array
) -> None:
    """Gradient before the gate into `grad`, and the gate's own into `dz`."""
    u, us, z, zs, skip = operands[0], operands[1], operands[4], operands[5], operands[11]
    u_at, z_at = i * us + start, i * zs + start
    if z.size > 0:
        for e in range(width):
            gate = z[z_at + e]
            s = sigmoidf(gate)
            g = dy[at + e] * s
            dz[at + e] = g * (row[e] + skip[start + e] * u[u_at + e]) * (_ONE + gate * (_ONE - s))
            grad[e] = g * gate
    else:
        for e in range(width):
            grad[e] = dy[at + e]


@compiled(LANES)
def _retreat(
    grad: Array, delta: Array, source: Array, a: Array, b: Array, c: Array, decay: Array, before: Array, after: Array,
    carry: Array, gain: Array, pull: Array, da: Array, db: Array, dc: Array, width: int,
) -> None:  # fmt: skip
    """One token of the adjoint recurrence `g ← exp(Δ_{t+1} A) g + C_t ∂y_t` and its part of every gradient."""
    for e in range(width):
        gain[e] = _ZERO
        pull[e] = _ZERO
    for n in range(a.shape[0]):
        bn = b[n]
        cn = c[n]
        to_b = _ZERO
        to_c = _ZERO
        for e in range(width):
            g = carry[n, e] + cn * grad[e]
            to_c += after[n, e] * grad[e]
            to_b += g * source[e]
            gain[e] += g * bn
            back = g * decay[n, e]
            through = back * before[n, e]
            pull[e] += through * a[n, e]
            da[n, e] += through * delta[e]
            carry[n, e] = back
        db[n] += to_b
        dc[n] += to_c


@compiled(STRICT)
def _write(
    operands: Operands, i: int, at: int, start: int, width: int, grad: Array, delta: Array, slope: Array, gain: Array,
    pull: Array, du: Array, ddt: Array, sums: Array,
) -> None:  # fmt: skip
    """One token's gradients of `u` and `dt`, and its part of those of `D` and `dt_bias`."""
    u, us, skip = operands[0], operands[1], operands[11]
    u_at = i * us + start
    for e in range(width):
        v = u[u_at + e]
        slant = (gain[e] * v + pull[e] * _LN2) * slope[e]  # `A` is in powers of two
        ddt[at + e] = slant
        du[at + e] = gain[e] * delta[e] + skip[start + e] * grad[e]
        sums[0, e] += grad[e] * v
        sums[1, e] += slant


@compiled(STRICT)
def _flush(part: Array, total: Array, start: int, width: int) -> None:
    """Move a block's float32 sums into the float64 totals."""
    for n in range(part.shape[0]):
        for e in range(width):
            total[n, start + e] += part[n, e]
            part[n, e] = _ZERO


@compiled(STRICT)
def _backward_block(
    operands: Operands, r: int, k: int, start: int, width: int, sizes: Sizes, a: Array, carry: Array, history: Array,
    decays: Array, rows: Array, parts: Any, dy: Array, out: Any,
) -> None:  # fmt: skip
    """Replay a block of tokens, then retreat through it; `rows` is scratch, `(8, block, tile)`."""
    _batch, length, channels, _states, _tile, block = sizes
    b, bs, c, cs = operands[7], operands[8], operands[9], operands[10]
    delta, slope, source, grad = rows[0], rows[1], rows[2], rows[3]
    row, gain, pull = rows[4, 0], rows[5, 0], rows[6, 0]
    du, ddt, dz, db, dc = out
    count = min(block, length - k * block)
    for j in range(count):
        i = r * length + k * block + j
        at = i * channels + start
        _discretise(operands, i, start, width, delta[j], slope[j], source[j])
        _replay(delta[j], source[j], a, b[i * bs :], c[i * cs :], decays[j], history[j], history[j + 1], row,
                _fresh(operands, i), width)  # fmt: skip
        _ungate(operands, i, start, width, row, dy, dz, at, grad[j])
    for j in range(count - 1, -1, -1):
        i = r * length + k * block + j
        at = i * channels + start
        _retreat(grad[j], delta[j], source[j], a, b[i * bs :], c[i * cs :], decays[j], history[j], history[j + 1],
                 carry, gain, pull, parts[0], db[i], dc[i], width)  # fmt: skip
        _write(operands, i, at, start, width, grad[j], delta[j], slope[j], gain, pull, du, ddt, parts[1])


@compiled(STRICT)
def _backward(
    operands: Operands, entries: Array, dy: Array, dh: Array, da: Array, sums: Array, out: Any, sizes: Sizes
) -> None:
    """Blocks from last to first. `dh` enters as ∂final and leaves as ∂initial state; `sums` is ∂D and ∂dt_bias."""
    batch, length, channels, states, tile, block = sizes
    rows = np.empty((7, block, tile), np.float32)
    decays = np.empty((block, states, tile), np.float32)
    history = np.empty((block + 1, states, tile), np.float32)
    carry, a = np.empty((states, tile), np.float32), np.empty((states, tile), np.float32)
    parts = (np.zeros((states, tile), np.float32), np.zeros((2, tile), np.float32))
    for start in range(0, channels, tile):
        width = min(tile, channels - start)
        _load_decay(operands, start, width, a)
        for r in range(batch):
            _copy(dh[r], start, carry, 0, width)
            for k in range((length + block - 1) // block - 1, -1, -1):
                _copy(entries[k, r], start, history[0], 0, width)
                _backward_block(operands, r, k, start, width, sizes, a, carry, history, decays, rows, parts, dy, out)
                _flush(parts[0], da, start, width)
                _flush(parts[1], sums, start, width)
            _copy(carry, 0, dh[r], start, width)


def _operands(call: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Turn the operator's tensors into the kernels' operands and sizes."""
    u, a = call["u"], call["A"]
    batch, length, channels = u.shape
    operands: list[Any] = []
    for name in ("u", "dt", "z"):
        operands.extend(flat_rows(call[name]))
    operands.append(a.detach().float().t().contiguous().numpy())
    for name in ("B", "C"):
        operands.extend(flat_rows(call[name]))
    operands.extend(flat_vector(call[name], channels) for name in ("D", "dt_bias"))
    operands.extend((flat_rows(call["mask"])[0], bytes_of(call["reset"])))
    return tuple(operands), (batch, length, channels, a.shape[1], min(TILE, channels), BLOCK)


def _writable(state: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 copy."""
    return state.detach().float().clone(memory_format=torch.contiguous_format)


def selective_scan_cpu(call: dict[str, Any], save: bool) -> tuple[torch.Tensor, ...]:
    """Forward pass, with `Δ = softplus(dt + dt_bias)` and `A ≤ 0`.

    Args:
        call: the operator's tensors by name (see `selective_scan`), absent ones None.
        save: whether to return the states at the blocks' entries for the backward pass.

    Returns:
        `y` `(B, L, E)` float32, final state `(B, N, E)` float32, entry states `(blocks, B, N, E)` or empty.
    """
    operands, sizes = _operands(call)
    batch, length, channels, states = sizes[:4]
    shape = (batch, states, channels)
    final = torch.zeros(shape) if call["initial_state"] is None else _writable(call["initial_state"])
    y = torch.empty(batch, length, channels)
    entries = torch.empty((-(-length // BLOCK) if save else 0, *shape))
    _forward(operands, final.numpy(), y.numpy().reshape(-1), entries.numpy(), sizes)
    return y, final, entries


def selective_scan_cpu_backward(
    grad_y: torch.Tensor, grad_state: torch.Tensor, call: dict[str, Any], entries: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Backward pass.

    Args:
        grad_y: `(B, L, E)`.
        grad_state: `(B, N, E)`, gradient of the final state.
        call: the forward pass's tensors by name.
        entries: the entry states that the forward pass returned.

    Returns:
        Gradients by argument name, float32; `A`'s as `(E, N)`.
    """
    operands, sizes = _operands(call)
    batch, length, channels, states = sizes[:4]
    rows = (batch, length, channels)
    du, ddt, dz = torch.empty(rows), torch.empty(rows), torch.empty(rows if call["z"] is not None else 0)
    db, dc = torch.zeros(batch * length, states), torch.zeros(batch * length, states)
    # Sums over the whole batch are kept in float64: their terms are block sums in float32.
    da = torch.zeros(states, channels, dtype=torch.float64)
    sums = torch.zeros(2, channels, dtype=torch.float64)
    dh = _writable(grad_state)
    dy, _ = flat_rows(grad_y.contiguous())
    out = (du.view(-1).numpy(), ddt.view(-1).numpy(), dz.view(-1).numpy(), db.numpy(), dc.numpy())
    _backward(operands, entries.numpy(), dy, dh.numpy(), da.numpy(), sums.numpy(), out, sizes)
    grads = {"u": du, "dt": ddt, "z": dz, "A": da.t().float(), "D": sums[0].float(), "dt_bias": sums[1].float()}
    grads |= {"B": db.view(batch, length, states), "C": dc.view(batch, length, states), "initial_state": dh}
    return grads
