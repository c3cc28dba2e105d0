"""Configuration of selective state space models."""

import math
from typing import Any, ClassVar

from ...nn.state import RECURRENT_LAYER_TYPE
from ...ops.backend import Operation
from ...ops.causal_conv import CAUSAL_CONV
from ...ops.rms_norm import RMS_NORM
from ...ops.selective_scan import SELECTIVE_SCAN
from ...ops.ssd import SSD
from ..base import LanguageModelConfig, check_choice, strict_config

MIXERS = ("mamba1", "mamba2", "mamba3")
DIRECTIONS = ("none", "add", "tied")
POOLINGS = ("last", "mean", "max", "first")
INIT_SCHEMES = ("random", "constant")
ATTENTION = "full_attention"
_OF_MIXERS = {
    ("mamba1",): ("time_step_scale", "time_step_init_scheme", "mixer_rms_norm", "mixer_rms_eps"),
    ("mamba1", "mamba2"): ("conv_kernel", "use_conv_bias"),
    ("mamba2",): ("time_step_limit",),
    ("mamba2", "mamba3"): ("n_groups", "num_heads"),
    ("mamba3",): ("rope_fraction",),
}
"""Mixers → fields that no other mixer reads."""


@strict_config
class SelectiveSSMConfig(LanguageModelConfig):
    """Configuration of `SelectiveSSMModel` and its heads.

    Args:
        mixer: `mamba1` (S6: one step size a channel, arXiv 2312.00752), `mamba2` (SSD: one a head, arXiv 2405.21060) or
            `mamba3` (exponential-trapezoidal, complex state, arXiv 2603.15569).
        state_size: state dimensions a channel; 16 for mamba1, else 128, if None.
        expand: inner width over `hidden_size`.
        conv_kernel: width of the short causal convolution (mamba1, mamba2).
        use_bias, use_conv_bias: biases of the in and out projections, and of the convolution.
        head_dim: channels a head (mamba2, mamba3).
        num_heads: number of heads; `expand * hidden_size / head_dim` if None. Must agree with it.
        n_groups: groups of heads that share B and C (mamba2, mamba3).
        chunk_size: tokens that mamba2 and mamba3 compute by matrix products at once; changes speed only.
        time_step_rank: rank of the step size's projection (mamba1); `ceil(hidden_size / 16)` if None or "auto".
        time_step_min, time_step_max, time_step_floor: range of the initial step sizes, and their least value.
        time_step_scale, time_step_init_scheme: of the step projection's initial weights, `random` or `constant`.
        time_step_limit: bounds of the step size itself (mamba2), applied while decoding too.
        mixer_rms_norm, mixer_rms_eps: normalise step, B and C, as Falcon Mamba does (mamba1).
        rope_fraction: share of the state dimensions that rotate (mamba3), 0.5 or 1.
        layer_norm_epsilon: of every RMS norm.
        residual_in_fp32: whether the residual stream stays in float32.
        rescale_prenorm_residual: whether output projections start smaller by `sqrt(num_hidden_layers)`.
        bidirectional: `none`; `add`, a second mixer that reads backwards; or `tied`, the same but sharing the in and
            out projections (Caduceus, arXiv 2403.03234). None means what the head needs: `tied` for masked language
            models, else `none`.
        attn_layer_indices: layers whose mixer is causal self-attention without positions, or None.
        num_attention_heads, num_key_value_heads: of those layers; as many key as query heads if None.
        attention_dropout: of those layers.
        pooling: how sequence classification sums up a text: `last` or `first` real token, `mean` or `max`. None means
            `last`, and `mean` for models that read both ways, whose last token has hardly been read backwards.
        classifier_dropout: dropout before a classifier.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_ssm"
    _operations: ClassVar[tuple[Operation, ...]] = (CAUSAL_CONV, RMS_NORM, SELECTIVE_SCAN, SSD)
    _compiled_variants: ClassVar[tuple[dict[str, str], ...]] = tuple({"mixer": mixer} for mixer in MIXERS)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "expand": (1, 64),
        "conv_kernel": (1, 1024),
        "n_groups": (1, 2**24),
        "chunk_size": (1, 2**16),
        "time_step_rank": (1, 2**24),
        "time_step_min": (1e-12, 1e6),
        "time_step_max": (1e-12, 1e6),
        "time_step_floor": (1e-12, 1e6),
        "time_step_scale": (0.0, 1e6),
        "mixer_rms_eps": (0.0, 1.0),
        "layer_norm_epsilon": (0.0, 1.0),
        "attn_layer_indices": (0, 10_000),
    }

    vocab_size: int = 50280
    hidden_size: int = 768
    num_hidden_layers: int = 24
    mixer: str = "mamba1"
    state_size: int | None = None
    expand: int = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    head_dim: int = 64
    num_heads: int | None = None
    n_groups: int = 1
    chunk_size: int = 64
    time_step_rank: int | str | None = None
    time_step_min: float | int = 0.001
    time_step_max: float | int = 0.1
    time_step_floor: float | int = 1e-4
    time_step_scale: float | int = 1.0
    time_step_init_scheme: str = "random"
    time_step_limit: list[float | int] | tuple[float | int, ...] | None = None
    mixer_rms_norm: bool = False
    mixer_rms_eps: float | int = 1e-6
    rope_fraction: float | int = 0.5
    layer_norm_epsilon: float | int = 1e-5
    residual_in_fp32: bool = True
    rescale_prenorm_residual: bool = True
    bidirectional: str | None = None
    attn_layer_indices: list[int] | tuple[int, ...] | None = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    attention_dropout: float | int = 0.0
    pooling: str | None = None
    classifier_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.state_size is None:
            self.state_size = 16 if self.mixer == "mamba1" else 128
        if self.time_step_rank in (None, "auto"):
            self.time_step_rank = math.ceil(self.hidden_size / 16)

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("mixer", self.mixer, MIXERS)
        check_choice("bidirectional", self.bidirectional or "none", DIRECTIONS)
        check_choice("pooling", self.pooling or "last", POOLINGS)
        check_choice("time_step_init_scheme", self.time_step_init_scheme, INIT_SCHEMES)
        if self.rope_fraction not in (0.5, 1):
            raise ValueError(f"rope_fraction must be 0.5 or 1, got {self.rope_fraction}")
        if isinstance(self.time_step_rank, str) and self.time_step_rank != "auto":
            raise ValueError(f"time_step_rank must be a number, 'auto' or None, got {self.time_step_rank!r}")
        self._check_time_steps()
        if self.mixer != "mamba1":
            self._check_heads()
        if self.attn_layer_indices:
            self._check_attention()

    def unread(self) -> dict[str, str]:
        """Fields of the other mixers, and of attention layers where there are none; see `LNLMConfig.unread`.

        Sizes that change nothing (`head_dim`, `time_step_rank`, `chunk_size`, numbers of heads) may stay for all mixers.
        """
        found: dict[str, str] = {}
        for mixers, names in _OF_MIXERS.items():
            if self.mixer not in mixers:
                found |= dict.fromkeys(names, "mixer=" + " or ".join(map(repr, mixers)))
        if not self.attn_layer_indices:
            found["attention_dropout"] = "attn_layer_indices"
        return super().unread() | found

    def _check_time_steps(self) -> None:
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                f"time_step_min must be at most time_step_max ({self.time_step_max}), got {self.time_step_min}"
            )
        limit = self.time_step_limit
        if limit is not None and (len(limit) != 2 or not 0 <= limit[0] <= limit[1]):
            raise ValueError(f"time_step_limit must be two numbers, 0 <= low <= high, got {limit}")

    def _check_heads(self) -> None:
        inner = self.expand * self.hidden_size
        if inner % self.head_dim:
            raise ValueError(f"head_dim must divide expand * hidden_size ({inner}), got {self.head_dim}")
        heads = inner // self.head_dim
        if self.num_heads not in (None, heads):
            raise ValueError(
                f"num_heads must be expand * hidden_size / head_dim ({inner} / {self.head_dim} = {heads}), "
                f"got {self.num_heads}"
            )
        if heads % self.n_groups:
            raise ValueError(f"n_groups must divide the number of heads ({heads}), got {self.n_groups}")
        if self.mixer == "mamba3" and self.state_size is not None and self.state_size * self.rope_fraction < 2:
            raise ValueError(
                f"state_size must be at least {2 / self.rope_fraction:.0f} for mamba3, got {self.state_size}"
            )

    def _check_attention(self) -> None:
        beyond = [i for i in self.attn_layer_indices or [] if i >= self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"attn_layer_indices must be below num_hidden_layers ({self.num_hidden_layers}), got {beyond}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}), got {self.num_attention_heads}"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}"
            )

    @property
    def intermediate_size(self) -> int:
        """Inner width of a mixer."""
        return self.expand * self.hidden_size

    @property
    def heads(self) -> int:
        """Number of heads of mamba2 and mamba3."""
        return self.intermediate_size // self.head_dim

    @property
    def reads_both_ways(self) -> bool:
        """Whether every layer also reads backwards."""
        return self.bidirectional not in (None, "none")

    @property
    def state_kind(self) -> str:
        """What a cache's states must have been written by to be read."""
        return self.mixer

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of each layer, for `DynamicCache(config=...)`."""
        attending = set(self.attn_layer_indices or [])
        return [ATTENTION if i in attending else RECURRENT_LAYER_TYPE for i in range(self.num_hidden_layers)]
