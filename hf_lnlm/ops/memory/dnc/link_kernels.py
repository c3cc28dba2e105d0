"""Compiled loops of the neural computer over its temporal links and its order of usage.

A link matrix is visited row by row, and a visit does as much as it can with the row, since reading the matrix is what
costs.

Glossary: `row` L[i,:] · `precedence` p_{t−1} · `weighting` w^w_t · `reading` w^r_{t−1} · `along` b, the backward
weighting.

Complexity: O(N²) a link matrix and step; the order is repaired by insertion, O(N + inversions).
"""

from typing import Any

from ...kernels.compiled import inner
from ...kernels.rows import ONE, ZERO, add_scaled, add_weighted_rows, dot, fill_row, np

TIE = np.float32(1.6e-6)  # as `TIE` of the reference
USAGE_FLOOR = np.float32(1e-6)
USAGE_SCALE = np.float32(1 - 1e-6)


@inner
def _rank(usage: Any, slot: Any) -> Any:
    """What slots are sorted by: u[n] + n·`TIE`."""
    return usage[slot] + np.float32(slot) * TIE


@inner
def sort_slots(usage: Any, order: Any) -> None:
    """Sorts `order`, any permutation, by rank and then by index: insertion, because it is nearly sorted already."""
    for n in range(1, order.shape[0]):
        slot, j = order[n], n - 1
        rank = _rank(usage, slot)
        while j >= 0:
            other = _rank(usage, order[j])
            if not (other > rank or (other == rank and order[j] > slot)):
                break
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = slot


@inner
def allocate(usage: Any, order: Any, out: Any) -> None:
    """a[φ_j] = (1 − u[φ_j]) Π_{i<j} u[φ_i]."""
    product = ONE
    for n in range(order.shape[0]):
        slot = order[n]
        floored = USAGE_FLOOR + USAGE_SCALE * usage[slot]
        out[slot] = (ONE - floored) * product
        product *= floored


@inner
def allocate_backward(usage: Any, order: Any, d_allocation: Any, products: Any, d_usage: Any) -> None:
    """Adds to `d_usage`: du_j = −P_j da_j + (Σ_{m>j} da_m a_m) / u_j, by sums from the most used slot down."""
    product = ONE
    for n in range(order.shape[0]):
        products[n] = product
        product *= USAGE_FLOOR + USAGE_SCALE * usage[order[n]]
    suffix = ZERO
    for n in range(order.shape[0] - 1, -1, -1):
        slot = order[n]
        floored = USAGE_FLOOR + USAGE_SCALE * usage[slot]
        d_usage[slot] += USAGE_SCALE * (suffix / floored - d_allocation[slot] * products[n])
        suffix += d_allocation[slot] * (ONE - floored) * products[n]


@inner
def _advance_row(before: Any, precedence: Any, weighting: Any, own: Any, after: Any) -> None:
    """L_t[i,:] from L_{t−1}[i,:]; `own` is w[i]."""
    keep = ONE - own
    for j in range(before.shape[0]):
        after[j] = (keep - weighting[j]) * before[j] + own * precedence[j]


@inner
def _advance_and_follow(
    row: Any, precedence: Any, weighting: Any, own: Any, reading: Any, along: Any, here: Any
) -> Any:
    """`_advance_row`, then b += w^r[i] · L[i,:]; returns f[i] = L[i,:] · w^r."""
    keep, total = ONE - own, ZERO
    for j in range(row.shape[0]):
        value = (keep - weighting[j]) * row[j] + own * precedence[j]
        row[j] = value
        total += value * reading[j]
        along[j] += here * value
    return total


@inner
def _follow(row: Any, reading: Any, along: Any, here: Any) -> Any:
    """b += w^r[i] · L[i,:]; returns f[i] = L[i,:] · w^r."""
    total = ZERO
    for j in range(row.shape[0]):
        total += row[j] * reading[j]
        along[j] += here * row[j]
    return total


@inner
def advance_links(before: Any, precedence: Any, weighting: Any, after: Any) -> None:
    """L_t from L_{t−1}, elsewhere."""
    for i in range(before.shape[0]):
        _advance_row(before[i], precedence, weighting, weighting[i], after[i])
        after[i, i] = ZERO


@inner
def advance_and_follow_links(
    link: Any, precedence: Any, weighting: Any, readings: Any, forwards: Any, backwards: Any
) -> None:
    """L_t from L_{t−1} in place, and the forward and backward weighting of every read head, `(R, N)` each.

    The diagonal is removed after the row's visit: what it added to sum and products is taken off again.
    """
    for r in range(readings.shape[0]):
        fill_row(backwards[r], ZERO)
    for i in range(link.shape[0]):
        row, own = link[i], weighting[i]
        here = readings[0, i]
        total = _advance_and_follow(row, precedence, weighting, own, readings[0], backwards[0], here)
        wrong = row[i]
        row[i] = ZERO
        backwards[0, i] -= here * wrong
        forwards[0, i] = total - wrong * here
        for r in range(1, readings.shape[0]):
            forwards[r, i] = _follow(row, readings[r], backwards[r], readings[r, i])


@inner
def advance_precedence(before: Any, weighting: Any, after: Any) -> None:
    """p_t = (1 − Σ w) p_{t−1} + w."""
    total = ZERO
    for n in range(weighting.shape[0]):
        total += weighting[n]
    for n in range(weighting.shape[0]):
        after[n] = (ONE - total) * before[n] + weighting[n]


@inner
def precedence_backward(before: Any, weighting: Any, d_precedence: Any, d_weighting: Any) -> None:
    """`d_precedence` goes from p_t to p_{t−1}; adds to `d_weighting`."""
    total = ZERO
    for n in range(weighting.shape[0]):
        total += weighting[n]
    shared = dot(d_precedence, before)
    for n in range(weighting.shape[0]):
        d_weighting[n] += d_precedence[n] - shared
        d_precedence[n] *= ONE - total


@inner
def _add_two(target: Any, x: Any, y: Any, a: Any, b: Any) -> None:
    """target += a·x + b·y."""
    for j in range(target.shape[0]):
        target[j] += a * x[j] + b * y[j]


@inner
def follow_links_backward(
    gradient: Any, link: Any, readings: Any, d_forwards: Any, d_backwards: Any, d_readings: Any
) -> None:
    """Through f = L w^r and b = L^T w^r: adds to d(L_t) `(N, N)` and to `d_readings` `(R, N)`."""
    for r in range(readings.shape[0]):
        add_weighted_rows(link, d_forwards[r], ONE, d_readings[r])
        for i in range(link.shape[0]):
            d_readings[r, i] += dot(link[i], d_backwards[r])
            _add_two(gradient[i], readings[r], d_backwards[r], d_forwards[r, i], readings[r, i])
    for i in range(link.shape[0]):
        gradient[i, i] = ZERO


@inner
def _advance_backward(gradient: Any, row: Any, precedence: Any, weighting: Any, d_weighting: Any, own: Any) -> Any:
    """One row of `advance_links` backward; returns the gradient of w[i] as the row's own."""
    keep, total = ONE - own, ZERO
    for j in range(row.shape[0]):
        value = gradient[j]
        product = value * row[j]
        total += value * precedence[j] - product
        d_weighting[j] -= product
        gradient[j] = value * (keep - weighting[j])
    return total


@inner
def advance_links_backward(
    gradient: Any, before: Any, precedence: Any, weighting: Any, d_precedence: Any, d_weighting: Any
) -> None:
    """`gradient` goes from L_t to L_{t−1}; adds to d(p_{t−1}) and d(w)."""
    add_weighted_rows(gradient, weighting, ONE, d_precedence)
    for i in range(before.shape[0]):
        d_own = _advance_backward(gradient[i], before[i], precedence, weighting, d_weighting, weighting[i])
        d_weighting[i] += d_own


@inner
def combine(out: Any, weighting: Any, scale: Any, fresh: Any) -> None:
    """out = or += scale · weighting."""
    if fresh:
        fill_row(out, ZERO)
    add_scaled(out, weighting, scale)
