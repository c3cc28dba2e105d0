"""Configuration of Sparse Transformer models."""

import math
from typing import Any, ClassVar

from ...ops.backend import Operation
from ...ops.sparse_attention.attention import SPARSE_ATTENTION
from ...ops.sparse_attention.pattern import COMBINATIONS, FACTORS, SparsePattern, patterns_for_layer
from ..base import check_choice, strict_config
from .sparse_config import SparseConfig


@strict_config
class SparseTransformerConfig(SparseConfig):
    """Configuration of `SparseTransformerModel` and its heads. Fields without a word here are `SparseConfig`\'s.

    Args:
        num_key_value_heads: key and value heads, a divisor of `num_attention_heads`; as many if None.
        attention_pattern: `strided` (for data with a period, such as images), `fixed` (text), `local` or `full`.
        combination: `merged` (one softmax over the union), `interleaved` (a step a layer in turn) or `per_head`.
        stride: l of the paper, in tokens; longer than the input makes attention dense.
        summary_size: c of the paper, the columns of each block that everything later sees; at most `stride`.
        position_shape: extents whose mixed-radix digits index the learned position embeddings, slowest first, such as
            rows, columns and channels of an image; their product is at least `max_position_embeddings`. If None:
            (blocks, `stride`), the paper's embeddings for attention over text.
        residual_dropout: dropout at the end of each residual branch; the paper has no other.
        initializer_range: standard deviation of initial weights times the square root of their input width; 0.125 in the
            paper, whose models are wide and train long.
        zero_initial_logits: whether an untied head starts at zero, as in the paper: the first step then trains the
            head alone.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_sparse_transformer"
    _operations: ClassVar[tuple[Operation, ...]] = (SPARSE_ATTENTION,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "stride": (1, 2**24),
        "position_shape": (1, 2**24),
    }

    tie_word_embeddings: bool = False
    initializer_range: float | int = 0.125
    num_key_value_heads: int | None = None
    attention_pattern: str = "fixed"
    combination: str = "merged"
    stride: int = 128
    summary_size: int = 16
    position_shape: list[int] | tuple[int, ...] | None = None
    residual_dropout: float | int = 0.0
    zero_initial_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("attention_pattern", self.attention_pattern, tuple(FACTORS))
        check_choice("combination", self.combination, COMBINATIONS)
        self._check_heads()
        if self.attention_pattern == "fixed" and self.summary_size > self.stride:
            raise ValueError(f"summary_size must be at most stride ({self.stride}), got {self.summary_size}")
        if self.zero_initial_logits and self.loss_head == "adaptive":
            raise ValueError("zero_initial_logits is for loss_head='full' or 'chunked', got it with 'adaptive'")
        if self.zero_initial_logits and self.tie_word_embeddings:
            raise ValueError("zero_initial_logits is for an untied head: tie_word_embeddings must be false, got true")
        if self.position_shape is None:
            return
        if not self.position_shape or math.prod(self.position_shape) < self.max_position_embeddings:
            raise ValueError(
                "position_shape must hold at least max_position_embeddings "
                f"({self.max_position_embeddings}) positions, got {list(self.position_shape)}"
            )

    def _check_heads(self) -> None:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if shared is not None and heads % shared:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads ({heads}), got {shared}")
        steps = len(FACTORS[self.attention_pattern])
        if self.combination == "per_head" and heads % steps:
            raise ValueError(f"num_attention_heads must divide evenly over {steps} patterns, got {heads}")

    def patterns(self, layer: int) -> tuple[SparsePattern, ...]:
        """Return the index sets of a layer, counted from 0: one, or one for each group of heads."""
        return patterns_for_layer(
            self.attention_pattern,
            self.combination,
            layer,
            stride=self.stride,
            summary=min(self.summary_size, self.stride),
            causal=True,
        )

    @property
    def coordinates(self) -> tuple[int, ...]:
        """Extents of the position embeddings, slowest first."""
        if self.position_shape is not None:
            return tuple(self.position_shape)
        return (-(-self.max_position_embeddings // self.stride), min(self.stride, self.max_position_embeddings))
