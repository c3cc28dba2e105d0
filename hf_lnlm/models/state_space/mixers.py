"""The three selective mixers: what turns a sequence into a sequence inside a layer.

Each has `in_proj`, `scan` (everything between the projections, with state) and `out_proj`; in a tied bidirectional layer
two scans run between one pair of projections.

References:
    [1] Gu, Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, algorithm 2.
    [2] Dao, Gu 2024, "Transformers are SSMs", arXiv 2405.21060, sections 6 and 7.
    [3] Lahoti et al. 2026, "Mamba-3", arXiv 2603.15569, section 3.

Glossary (paper symbol: variable): Δ: `dt` (after softplus `step`), A: `-exp(A_log)`, B, C: `b`, `c`, h: `ssm`;
of [3]: λ: `trapezoid`, θ: `angle`, α: `exp(log_decay)`, β and γ: inside `scale`.

Deliberate deviations:
    * States leave a masked token as they entered it; the convolution reads the last *real* tokens. So padding anywhere,
      packed documents, chunks and single tokens give what whole sequences give.
    * The exponential-trapezoidal rule of [3], `h_t = α_t h_{t-1} + β_t k_{t-1} v_{t-1} + γ_t k_t v_t`, is one call of the
      SSD operation: since `β_t = (1 - λ_t) Δ_t α_t`, a token's weight is `γ_t + (1 - λ_{t+1}) Δ_{t+1}`, of which its own
      output sees the first part only (the operation's `diagonal`).

Complexity: O(length) time; state of O(1) size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...nn.effective_weight import effective_weight, has_hooks
from ...nn.masks import SegmentInfo
from ...ops.causal_conv import causal_conv
from ...ops.decode_step import MOST_ROWS, decode_step
from ...ops.mamba_inner import MambaWeights, mamba_inner
from ...ops.selective_scan import selective_scan
from ...ops.ssd import ssd
from .configuration_ssm import SelectiveSSMConfig
from .layers import GatedRMSNorm, SSMRMSNorm, conv_filter, is_unwrapped

States = dict[str, torch.Tensor]
Fused = tuple[Any, tuple[torch.Tensor | None, ...]]  # what runs a fused operation, and its weights


class Mixer(nn.Module):
    """What the three mixers share.

    Args:
        config: the model's configuration.
        projections: whether it has its own in and out projections; a tied reverse mixer has not.

    Attributes:
        kind: name of the mixer, which its states carry.
        fuses: whether there are fused operations for it.
        reverse: a mixer without projections that scans the same projected sequence from its end, or None.
    """

    kind = ""
    fuses = False
    conv1d: nn.Conv1d

    def __init__(self, config: SelectiveSSMConfig, projections: bool = True) -> None:
        super().__init__()
        self.config = config
        self.projections = projections
        self.reverse: Mixer | None = None
        self.backend = config.backend
        self.inner = config.intermediate_size
        self.kernel = config.conv_kernel
        self.state_size = int(config.state_size or 0)
        if projections:
            self.in_proj = nn.Linear(config.hidden_size, self.projection_size(), bias=config.use_bias)
            self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.use_bias)

    def projection_size(self) -> int:
        """Width of the input projection."""
        raise NotImplementedError

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each state tensor of one row."""
        raise NotImplementedError

    def scan(
        self, projected: torch.Tensor, states: States | None, segments: SegmentInfo
    ) -> tuple[torch.Tensor, States]:
        """Mix along the sequence.

        Args:
            projected: `(batch, length, projection_size)`.
            states: what the last call returned, or None for zeros.
            segments: real tokens and documents.

        Returns:
            `(batch, length, intermediate_size)` and the new states.
        """
        raise NotImplementedError

    def forward(
        self, hidden: torch.Tensor, states: States | None, segments: SegmentInfo
    ) -> tuple[torch.Tensor, States]:
        """Project, scan, project back.

        Args:
            hidden: `(batch, length, hidden_size)`; what is already projected for a mixer without projections.
            states: what the last call returned, or None for zeros.
            segments: real tokens and documents.

        Returns:
            `(batch, length, hidden_size)`, or `intermediate_size` without projections, and the new states.
        """
        if not self.projections:
            return self.scan(hidden, states, segments)
        projected = self.in_proj(hidden)
        mixed, states = self.scan(projected, states, segments)
        if self.reverse is not None:
            mixed = mixed + self.reverse(projected.flip(1), None, segments.reversed())[0].flip(1)
        return self.out_proj(mixed.to(hidden.dtype)), states

    def _decodes(
        self, projected: torch.Tensor, states: States | None, segments: SegmentInfo, *more: torch.Tensor | None
    ) -> Fused | None:
        """What runs a single token, and its weights, without gradients, when nothing is wrapped, masked or begun."""
        if (
            projected.shape[1] != 1
            or torch.is_grad_enabled()
            or segments.mask is not None
            or segments.starts is not None
        ):
            return None
        if not self.fuses or not is_unwrapped(*self.fused_modules()):
            return None
        carried, weights = () if states is None else states.values(), self.fused_weights()
        step = decode_step(self.backend, projected, *carried, *weights, *more)
        return None if step is None else (step, weights)

    def token(
        self, hidden: torch.Tensor, norm: Any, states: States | None, segments: SegmentInfo
    ) -> tuple[torch.Tensor, States] | None:
        """Run the whole layer for one decoded token, if nothing in it is wrapped, masked or begun.

        Args:
            hidden: `(batch, 1, hidden_size)`.
            norm: the layer's norm.
            states: what the last call returned, or None for zeros.
            segments: real tokens and documents.

        Returns:
            the layer's output and the new states, or None when it must run as it is composed.
        """
        first, last = self.in_proj, self.out_proj
        if hidden.shape[0] > MOST_ROWS or has_hooks(self) or not is_unwrapped(norm, first, last):
            return None
        weights = (norm.weight, first.weight, first.bias, last.weight, last.bias)
        fused = self._decodes(hidden, states, segments, *weights)
        if fused is None:
            return None
        projected = fused[0].enter(hidden, norm.weight, norm.eps, first.weight, first.bias)
        mixed, states = self._token(projected, states, fused)
        return fused[0].leave(mixed, last.weight, last.bias, hidden), states

    def _token(self, projected: torch.Tensor, states: States | None, fused: Fused) -> tuple[torch.Tensor, States]:
        """Run one token between the projections with what `_decodes` found."""
        raise NotImplementedError

    def fused_modules(self) -> tuple[nn.Module, ...]:
        """Modules between the projections, which fused operations replace."""
        raise NotImplementedError

    def fused_weights(self) -> tuple[torch.Tensor | None, ...]:
        """Weights that fused operations read."""
        raise NotImplementedError

    def _make_conv(self, channels: int) -> nn.Conv1d:
        kernel, bias = self.config.conv_kernel, self.config.use_conv_bias
        return nn.Conv1d(channels, channels, kernel, groups=channels, padding=kernel - 1, bias=bias)


class S6Mixer(Mixer):
    """Mamba-1 [1]: a diagonal state a channel, step sizes from a low-rank projection."""

    kind = "mamba1"

    def __init__(self, config: SelectiveSSMConfig, projections: bool = True) -> None:
        super().__init__(config, projections)
        self.rank = int(config.time_step_rank or 0)
        self.norms_steps = config.mixer_rms_norm
        self.fuses = not self.norms_steps
        self.conv1d = self._make_conv(self.inner)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.empty(self.inner, self.state_size))
        self.D = nn.Parameter(torch.empty(self.inner))

    def projection_size(self) -> int:
        """Input and gate."""
        return 2 * self.inner

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The convolution's last inputs and the state, channels last."""
        return {"conv": (self.kernel - 1, self.inner), "ssm": (self.state_size, self.inner)}

    def fused_modules(self) -> tuple[nn.Module, ...]:
        """The convolution and the projections of step sizes, B and C."""
        return self.conv1d, self.x_proj, self.dt_proj

    def fused_weights(self) -> tuple[torch.Tensor | None, ...]:
        """Everything between the projections."""
        conv, step = self.conv1d, self.dt_proj
        return MambaWeights(conv.weight, conv.bias, self.x_proj.weight, step.weight, step.bias, self.A_log, self.D)

    def _token(self, projected: torch.Tensor, states: States | None, fused: Fused) -> tuple[torch.Tensor, States]:
        carried = (None, None) if states is None else (states["conv"], states["ssm"])
        y, conv, ssm = fused[0].mamba1(projected, *fused[1], *carried)
        return y, {"conv": conv, "ssm": ssm}

    def _trains(self, projected: torch.Tensor, states: States | None) -> Fused | None:
        """What runs a whole sequence with gradients, and its weights, when nothing is wrapped."""
        if not torch.is_grad_enabled() or not self.fuses or not is_unwrapped(*self.fused_modules()):
            return None
        carried, weights = () if states is None else states.values(), self.fused_weights()
        tensors = (projected, *weights, *carried)
        if not any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return None
        core = mamba_inner(self.backend, *tensors)
        return None if core is None else (core, weights)

    def scan(
        self, projected: torch.Tensor, states: States | None, segments: SegmentInfo
    ) -> tuple[torch.Tensor, States]:
        """Algorithm 2 of [1] between the projections."""
        fused = self._decodes(projected, states, segments)
        if fused is not None:
            return self._token(projected, states, fused)
        fused = self._trains(projected, states)
        if fused is not None:
            both = (None, None) if states is None else (states["conv"], states["ssm"])
            told = segments.gather_index, segments.mask, segments.starts
            y, conv, ssm = fused[0](told, projected, *fused[1], *both)
            return y, {"conv": conv, "ssm": ssm}
        x, z = projected.split(self.inner, dim=-1)
        window = None if states is None else states["conv"]
        weight, bias = conv_filter(self.conv1d, self.inner, self.kernel)
        x, conv = causal_conv(x, weight, bias, window, segments.gather_index, backend=self.backend)
        dt, b, c = self.x_proj(x).split([self.rank, self.state_size, self.state_size], dim=-1)
        if self.norms_steps:
            dt, b, c = (F.rms_norm(t, t.shape[-1:], None, self.config.mixer_rms_eps) for t in (dt, b, c))
        weight, bias = effective_weight(self.dt_proj, self.rank, dt.dtype, dt.device)
        y, ssm = selective_scan(
            x,
            F.linear(dt, weight),
            -torch.exp(self.A_log.float()),
            b,
            c,
            self.D,
            z,
            bias,
            None if states is None else states["ssm"],
            segments.mask,
            segments.starts,
            backend=self.backend,
        )
        return y, {"conv": conv, "ssm": ssm}


class SSDMixer(Mixer):
    """Mamba-2 [2]: one decay a head, a matrix state, a gated norm."""

    kind = "mamba2"
    fuses = True

    def __init__(self, config: SelectiveSSMConfig, projections: bool = True) -> None:
        self.heads, self.groups = config.heads, config.n_groups
        super().__init__(config, projections)
        bounds = config.time_step_limit
        self.limit = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        self.conv1d = self._make_conv(self.conv_size())
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm(self.inner, self.groups, config.layer_norm_epsilon, config.backend)

    def conv_size(self) -> int:
        """Channels of the convolution: input, B and C."""
        return self.config.intermediate_size + 2 * self.groups * int(self.config.state_size or 0)

    def projection_size(self) -> int:
        """Gate, convolved channels and step sizes."""
        return self.config.intermediate_size + self.conv_size() + self.heads

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The convolution's last inputs and the state."""
        conv = (self.kernel - 1, self.conv1d.in_channels)
        return {"conv": conv, "ssm": (self.heads, self.inner // self.heads, self.state_size)}

    def fused_modules(self) -> tuple[nn.Module, ...]:
        """The convolution and the gated norm."""
        return self.conv1d, self.norm

    def fused_weights(self) -> tuple[torch.Tensor | None, ...]:
        """Everything between the projections."""
        conv = self.conv1d
        return conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, self.norm.weight

    def _token(self, projected: torch.Tensor, states: States | None, fused: Fused) -> tuple[torch.Tensor, States]:
        carried = (None, None) if states is None else (states["conv"], states["ssm"])
        options = (self.norm.eps, self.groups, self.limit or (0.0, math.inf))
        y, conv, ssm = fused[0].mamba2(projected, *fused[1], *options, *carried)
        return y, {"conv": conv, "ssm": ssm}

    def scan(
        self, projected: torch.Tensor, states: States | None, segments: SegmentInfo
    ) -> tuple[torch.Tensor, States]:
        """Section 7 of [2] between the projections."""
        fused = self._decodes(projected, states, segments)
        if fused is not None:
            return self._token(projected, states, fused)
        z, xbc, dt = projected.split([self.inner, self.conv_size(), self.heads], dim=-1)
        carried = None if states is None else states["conv"]
        weight, bias = conv_filter(self.conv1d, xbc.shape[2], self.kernel)
        xbc, conv = causal_conv(xbc, weight, bias, carried, segments.gather_index, backend=self.backend)
        shared = self.groups * self.state_size
        x, b, c = xbc.split([self.inner, shared, shared], dim=-1)
        step = self._step(dt)
        y, ssm = ssd(
            x.unflatten(-1, (self.heads, -1)),
            step,
            step * -torch.exp(self.A_log.to(step.dtype)),
            b.unflatten(-1, (self.groups, -1)),
            c.unflatten(-1, (self.groups, -1)),
            self.D,
            None if states is None else states["ssm"],
            segments.mask,
            segments.starts,
            chunk_size=self.config.chunk_size,
            backend=self.backend,
        )
        return self.norm(y.flatten(2), z), {"conv": conv, "ssm": ssm}

    def _step(self, dt: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if dt.dtype == torch.float64 else torch.float32
        step = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        return step if self.limit is None else step.clamp(*self.limit)


class TrapezoidalMixer(Mixer):
    """Mamba-3 [3], one input one output: trapezoidal rule, rotating state, decay from the data; no convolution."""

    kind = "mamba3"

    def __init__(self, config: SelectiveSSMConfig, projections: bool = True) -> None:
        self.heads, self.groups = config.heads, config.n_groups
        self.angles = int(int(config.state_size or 0) * config.rope_fraction) // 2
        super().__init__(config, projections)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.B_bias = nn.Parameter(torch.empty(self.heads, self.state_size))
        self.C_bias = nn.Parameter(torch.empty(self.heads, self.state_size))
        self.B_norm = SSMRMSNorm(self.state_size, config.layer_norm_epsilon, config.backend)
        self.C_norm = SSMRMSNorm(self.state_size, config.layer_norm_epsilon, config.backend)
        self.D = nn.Parameter(torch.empty(self.heads))

    def _sizes(self) -> list[int]:
        inner, shared = self.config.intermediate_size, self.groups * int(self.config.state_size or 0)
        return [inner, inner, shared, shared, self.heads, self.heads, self.heads, self.angles]

    def projection_size(self) -> int:
        """Gate, input, B, C, step, decay, trapezoid and angles."""
        return sum(self._sizes())

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The rotation so far, the state, and the last token's key and value."""
        width, heads = self.config.head_dim, self.heads
        return {
            "angle": (heads, self.angles),
            "ssm": (heads, width, self.state_size),
            "key": (heads, self.state_size),
            "value": (heads, width),
        }

    def scan(
        self, projected: torch.Tensor, states: States | None, segments: SegmentInfo
    ) -> tuple[torch.Tensor, States]:
        """Section 3 of [3] between the projections."""
        dtype = torch.float64 if projected.dtype == torch.float64 else torch.float32
        z, x, b, c, dt, decay, trapezoid, angle = projected.split(self._sizes(), dim=-1)
        x = x.unflatten(-1, (self.heads, -1)).to(dtype)
        step = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
        step = step if segments.mask is None else step * segments.mask.unsqueeze(-1)
        log_decay = step * -F.softplus(decay.to(dtype)).clamp(min=1e-4)
        share = torch.sigmoid(trapezoid.to(dtype))
        total = self._rotation(angle.to(dtype), step, states)
        b, c = (t.unflatten(-1, (self.groups, -1)) for t in (b, c))
        key = self._rotate(self.B_norm(b), self.B_bias, total)
        query = self._rotate(self.C_norm(c), self.C_bias, total)
        late = (1 - share) * step  # what a token gives to its predecessor's contribution
        first, following = _successors(late, segments)
        own = share * step
        weight = own + following
        y, ssm = ssd(
            x,
            weight,
            log_decay,
            key,
            query,
            self.D,
            self._entry(states, first),
            segments.mask,
            segments.starts,
            own / weight.clamp(min=1e-30),
            chunk_size=self.config.chunk_size,
            backend=self.backend,
        )
        out = y.flatten(2) * F.silu(z.to(dtype))
        last = {"angle": total[:, -1].clone(), "ssm": ssm, "key": _last(key, states, "key", segments)}
        return out.to(projected.dtype), last | {"value": _last(x, states, "value", segments)}

    def _rotation(self, angle: torch.Tensor, step: torch.Tensor, states: States | None) -> torch.Tensor:
        """`(batch, length, heads, angles)`: the sum of `π tanh(θ) Δ` so far, modulo 2π."""
        turn = (torch.tanh(angle).unsqueeze(2) * step.unsqueeze(3) * math.pi).cumsum(1, dtype=torch.float64)
        turn = turn if states is None else turn + states["angle"].double().unsqueeze(1)
        return torch.remainder(turn, 2 * math.pi).to(angle.dtype)

    def _rotate(self, normal: torch.Tensor, bias: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """Share `(batch, length, groups, n)` among heads, add each one's bias, turn pairs: `(batch, length, heads, n)`."""
        shifted = normal.to(angle.dtype).repeat_interleave(self.heads // self.groups, 2) + bias.to(angle.dtype)
        turning, rest = shifted.split([2 * self.angles, self.state_size - 2 * self.angles], dim=-1)
        even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return torch.cat([turned, rest], -1)

    def _entry(self, states: States | None, first: torch.Tensor) -> torch.Tensor | None:
        """The carried state with the first token's share of its predecessor's contribution added."""
        if states is None:
            return None
        outer = states["value"].unsqueeze(-1) * states["key"].unsqueeze(-2)
        return states["ssm"] + first[:, :, None, None] * outer


def _successors(late: torch.Tensor, segments: SegmentInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the first real token `(batch, heads)`, and of each token's successor in its document, else 0."""
    if segments.starts is not None:
        late = late.masked_fill(segments.starts.unsqueeze(-1), 0.0)
    padded = F.pad(late, (0, 0, 0, 1))
    if segments.mask is None:
        return late[:, 0], padded[:, 1:]
    following = segments.next_real()
    begin = torch.where(segments.mask[:, :1], 0, following[:, :1])
    index = torch.cat([begin, following], 1).unsqueeze(-1).expand(-1, -1, late.shape[2])
    chosen = padded.gather(1, index)
    return chosen[:, 0], chosen[:, 1:]


def _last(values: torch.Tensor, states: States | None, name: str, segments: SegmentInfo) -> torch.Tensor:
    """Each row's value at its last real token; what was carried in if it has none. `(batch, length, ...)`."""
    if segments.mask is None:
        return values[:, -1].clone()  # a view would keep all positions alive
    places = torch.arange(1, values.shape[1] + 1, device=values.device)
    index = (segments.mask * places).amax(1)  # 0: no real token
    before = torch.zeros_like(values[:, 0]) if states is None else states[name].to(values.dtype)
    rows = torch.cat([before.unsqueeze(1), values], 1)
    return rows[torch.arange(rows.shape[0], device=rows.device), index]


MIXER_CLASSES: dict[str, Any] = {cls.kind: cls for cls in (S6Mixer, SSDMixer, TrapezoidalMixer)}
