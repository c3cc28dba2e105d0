"""The Differentiable Neural Computer as its paper writes it: the oracle of every faster implementation.

References:
    [1] Graves et al. 2016, Hybrid computing using a neural network with dynamic external memory, Nature 538, Methods
    [2] Csordás, Schmidhuber 2019, arXiv 1904.10278 (masking, de-allocation, sharpness)

Glossary: M memory · u usage · ψ `retention` · φ order of usage · a `allocation` · w^w, w^r weightings · L link · p
precedence · f forward, b backward weighting · g^a, g^w allocation and write gate · π read modes · β strength · e erase ·
v write vector.

Deliberate choices: usage is ε + (1−ε)u inside the allocation (ε = 1e-6). Slots are filled in the order of u[n] + n·1.6e-6,
which is that of their usage, and among (nearly) equal ones that of their index: many slots are equal but for rounding, such
as those nobody has written to, and rounding must not choose among them. The order is not differentiated; w^w_{t−1} in the
usage *is* differentiated (others stop that gradient); cosine has ε² = 1e-12 inside its roots. Several write heads follow
google-deepmind/dnc: each has its own links, and the next one sees the usage raised by what the earlier ones allocate.

Complexity: a Python loop over time, samples and heads, O(N²) a step; for any float dtype, float64 in the tests.
"""

import torch
from torch.nn.functional import softplus

from ..layer import MemoryWeights, controller_step, walk
from .layout import SEEN, DNCOptions, DNCOutputs, DNCState, gate_history, named_outputs, places

FLOOR = 1e-12
USAGE_FLOOR = 1e-6
TIE = 1.6e-6


def content(key: torch.Tensor, strength: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """C(M, k, β)[n] = softmax_n(β cos(k, M[n])), with the mask m of [2]: cos(k∘m, M∘m).

    Args:
        key: `(B, W)`.
        strength: β ≥ 1, `(B, 1)`.
        memory: `(B, N, W)`.
        mask: `(B, W)` or None.
    """
    if mask is not None:
        key, memory = key * mask, memory * mask[:, None]
    key = key / (key.square().sum(-1, keepdim=True) + FLOOR).sqrt()
    memory = memory / (memory.square().sum(-1, keepdim=True) + FLOOR).sqrt()
    return (strength * torch.einsum("bw,bnw->bn", key, memory)).softmax(-1)


def allocation(usage: torch.Tensor) -> torch.Tensor:
    """a[φ_j] = (1 − u[φ_j]) Π_{i<j} u[φ_i], φ the slots from least to most used: by u[n] + n·1.6e-6, see above.

    Args:
        usage: `(B, N)`.
    """
    ranks = usage.detach() + TIE * torch.arange(usage.shape[1], dtype=usage.dtype, device=usage.device)
    order = ranks.sort(dim=-1, stable=True).indices
    floored = USAGE_FLOOR + (1 - USAGE_FLOOR) * usage.gather(1, order)
    before = torch.cat([torch.ones_like(floored[:, :1]), floored[:, :-1]], 1).cumprod(1)
    return torch.zeros_like(usage).scatter(1, order, (1 - floored) * before)


def sharpened(weighting: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """S(d, s) of [2]: d^s, scaled to sum 1, relative to the largest entry.

    Args:
        weighting: `(B, N)`.
        power: s ≥ 1, `(B, 1)`.
    """
    relative = (weighting + USAGE_FLOOR) / (weighting + USAGE_FLOOR).max(-1, keepdim=True).values
    return relative**power / (relative**power).sum(-1, keepdim=True)


def next_usage(state: DNCState, free_gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """u_t = (u_{t−1} + (1 − u_{t−1})(1 − Π(1 − w^w_{t−1}))) ∘ ψ_t and the retention ψ_t = Π_i (1 − f^i w^{r,i}_{t−1}).

    Args:
        state: of the step before.
        free_gates: f, `(B, R)`.
    """
    written = 1 - (1 - state.write_weightings).prod(1)
    retention = (1 - free_gates[..., None] * state.read_weightings).prod(1)
    return (state.usage + (1 - state.usage) * written) * retention, retention


def next_links(state: DNCState, weightings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L_t[i,j] = (1 − w[i] − w[j]) L_{t−1}[i,j] + w[i] p_{t−1}[j], diagonal zero; then p_t = (1 − Σw) p_{t−1} + w.

    Args:
        state: of the step before.
        weightings: w^w_t, `(B, K, N)`.
    """
    to, source = weightings[..., :, None], weightings[..., None, :]
    link = (1 - to - source) * state.link + to * state.precedence[..., None, :]
    link = link * (1 - torch.eye(link.shape[-1], dtype=link.dtype, device=link.device))
    return link, (1 - weightings.sum(-1, keepdim=True)) * state.precedence + weightings


class _Interface:
    """The interface vector by the names of [1]; raw numbers are clipped."""

    def __init__(self, raw: torch.Tensor, options: DNCOptions, width: int) -> None:
        at = places(options, width)
        reads, writes = options.num_read_heads, options.num_write_heads
        raw = raw.clamp(-options.interface_clip, options.interface_clip)
        self.read_keys = raw[:, : at.read_strengths].unflatten(1, (reads, width))
        self.read_strengths = 1 + softplus(raw[:, at.read_strengths : at.write_keys])
        self.write_keys = raw[:, at.write_keys : at.write_strengths].unflatten(1, (writes, width))
        self.write_strengths = 1 + softplus(raw[:, at.write_strengths : at.erases])
        self.erases = raw[:, at.erases : at.adds].sigmoid().unflatten(1, (writes, width))
        self.adds = raw[:, at.adds : at.free_gates].unflatten(1, (writes, width))
        self.free_gates, self.allocation_gates, self.write_gates, self.modes = gate_history(raw, options, at)
        self.read_masks: torch.Tensor | None = None
        self.write_masks: torch.Tensor | None = None
        if options.masking:
            masks = options.mask_min + (1 - options.mask_min) * raw[:, at.read_masks : at.sharpness].sigmoid()
            self.read_masks, self.write_masks = masks.unflatten(1, (reads + writes, width)).split([reads, writes], 1)
        self.sharpness = 1 + softplus(raw[:, at.sharpness :])

    def mask(self, masks: torch.Tensor | None, head: int) -> torch.Tensor | None:
        """The mask of one head, if there are masks."""
        return None if masks is None else masks[:, head]


def write_weightings(inner: _Interface, usage: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """w^w_t = g^w (g^a a_t + (1 − g^a) c^w_t) of every write head, `(B, K, N)`.

    Args:
        inner: the interface.
        usage: u_t, `(B, N)`.
        memory: M_{t−1}, `(B, N, W)`.
    """
    heads = []
    for i in range(inner.write_keys.shape[1]):
        mask = inner.mask(inner.write_masks, i)
        by_content = content(inner.write_keys[:, i], inner.write_strengths[:, i : i + 1], memory, mask)
        free = allocation(usage)
        gate, write = inner.allocation_gates[:, i : i + 1], inner.write_gates[:, i : i + 1]
        heads.append(write * (gate * free + (1 - gate) * by_content))
        usage = usage + (1 - usage) * gate * write * free
    return torch.stack(heads, 1)


def read_weightings(inner: _Interface, state: DNCState, link: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """w^{r,i}_t = π1 b + π2 c + π3 f of every read head, `(B, R, N)`.

    Args:
        inner: the interface.
        state: of the step before: its read weightings are followed along the links.
        link: L_t, `(B, K, N, N)`.
        memory: M_t, `(B, N, W)`.
    """
    heads, writes = [], link.shape[1]
    for i in range(inner.read_keys.shape[1]):
        mask = inner.mask(inner.read_masks, i)
        by_content = content(inner.read_keys[:, i], inner.read_strengths[:, i : i + 1], memory, mask)
        before = state.read_weightings[:, i]
        backward = [torch.einsum("bnj,bn->bj", link[:, k], before) for k in range(writes)]
        forward = [torch.einsum("bnj,bj->bn", link[:, k], before) for k in range(writes)]
        if inner.sharpness.shape[1]:
            powers = inner.sharpness.unflatten(1, (-1, 2 * writes))[:, i]
            backward = [sharpened(b, powers[:, k : k + 1]) for k, b in enumerate(backward)]
            forward = [sharpened(f, powers[:, writes + k : writes + k + 1]) for k, f in enumerate(forward)]
        modes = torch.stack([*backward, by_content, *forward], 1)
        heads.append(torch.einsum("bm,bmn->bn", inner.modes[:, i], modes))
    return torch.stack(heads, 1)


def memory_step(raw: torch.Tensor, state: DNCState, options: DNCOptions) -> DNCState:
    """One step of the memory.

    Args:
        raw: interface vector, `(B, I)`.
        state: of the step before; `hidden` and `cells` are passed through.
        options: settings.
    """
    inner = _Interface(raw, options, state.memory.shape[-1])
    usage, retention = next_usage(state, inner.free_gates)
    weightings = write_weightings(inner, usage, state.memory)
    memory = state.memory
    for i in range(weightings.shape[1]):
        memory = memory * (1 - weightings[:, i, :, None] * inner.erases[:, i, None])
    if options.deallocation:
        memory = memory * retention[..., None]
    memory = memory + torch.einsum("bkn,bkw->bnw", weightings, inner.adds)
    link, precedence = state.link, state.precedence
    if options.temporal_links:
        link, precedence = next_links(state, weightings)
    reading = read_weightings(inner, state, link, memory)
    read = torch.einsum("brn,bnw->brw", reading, memory).flatten(1)
    return DNCState(state.hidden, state.cells, read, memory, usage, precedence, link, weightings, reading)


def dnc_memory_reference(
    inputs: torch.Tensor,
    weights: MemoryWeights,
    state: DNCState,
    options: DNCOptions,
    mask: torch.Tensor | None = None,
) -> DNCOutputs:
    """Runs one memory layer over a sequence, step by step.

    Args:
        inputs: `(B, T, D)`.
        weights: of the layer.
        state: before the first step.
        options: settings.
        mask: `(B, T)` bool; a false step leaves the whole state unchanged and outputs zero.

    Returns:
        Outputs `(B, T, H + R·W)`, final state, addressing.
    """

    def step(projected: torch.Tensor, state: DNCState) -> tuple[torch.Tensor, DNCState]:
        hidden, cells = controller_step(projected, weights, state, options)
        raw = hidden @ weights.interface.T + weights.interface_bias
        return raw, memory_step(raw, state._replace(hidden=hidden, cells=cells), options)

    rows = (inputs[:, t] @ weights.inputs.T + weights.inputs_bias for t in range(inputs.shape[1]))
    return named_outputs(*walk(step, rows, state, mask, SEEN), options, mask)
