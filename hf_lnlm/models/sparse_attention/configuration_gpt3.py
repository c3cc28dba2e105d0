"""Configuration of GPT-3 models: GPT-2 blocks with alternating dense and locally banded attention."""

# Copyright 2026 The hf_lnlm authors. Licensed under the Apache License, Version 2.0.

from typing import Any, ClassVar

from transformers.activations import ACT2FN

from ...ops.sparse_attention.pattern import SparsePattern
from ..base import LNLMConfig, check_choice, strict_config
from .cache import SPARSE_LAYER_TYPE

ATTENTION_KINDS = ("dense", "banded")


@strict_config
class GPT3Config(LNLMConfig):
    """Configuration of `GPT3Model` and its heads.

    The paper (section 2.1) says that dense and banded layers alternate; the width of the band and which kind comes
    first are not public. Both are our choice here: 256 tokens, and dense first, as in GPT-Neo.

    Args:
        num_attention_heads: heads of a layer; must divide `hidden_size`.
        intermediate_size: width of the MLP; `4 * hidden_size` if None.
        max_position_embeddings: longest sequence, in tokens, at least 16.
        attention_layers: `dense` or `banded` for each layer; alternating, dense first, if None.
        band_size: keys that a query of a banded layer sees, itself included.
        activation_function: name of the MLP's activation in transformers' ACT2FN.
        scale_attention: whether scores are divided by the square root of the head's width (GPT-Neo's are not).
        attention_bias: whether queries, keys and values have a bias (GPT-Neo's have none).
        embedding_dropout, residual_dropout, attention_dropout: as in GPT-2; attention dropout takes a slower path.
        classifier_dropout: dropout before the classifier.
        layer_norm_epsilon: added to the variance in layer norms.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_gpt3"
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "layer_norm_epsilon": (0.0, 1.0),
        "band_size": (1, 2**24),
        "max_position_embeddings": (16, 2**24),
    }

    num_attention_heads: int = 4
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    attention_layers: list[str] | tuple[str, ...] | None = None
    band_size: int = 256
    activation_function: str = "gelu_new"
    scale_attention: bool = True
    attention_bias: bool = True
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("activation_function", self.activation_function, tuple(ACT2FN))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}), got {self.num_attention_heads}"
            )
        if self.attention_layers is None:
            return
        if len(self.attention_layers) != self.num_hidden_layers:
            raise ValueError(
                f"attention_layers must name num_hidden_layers ({self.num_hidden_layers}) layers, "
                f"got {len(self.attention_layers)}"
            )
        for kind in self.attention_layers:
            check_choice("attention_layers", kind, ATTENTION_KINDS)

    def patterns(self, layer: int) -> tuple[SparsePattern, ...]:
        """Return the index set of a layer, counted from 0."""
        kinds = self.attention_layers
        kind = ATTENTION_KINDS[layer % 2] if kinds is None else kinds[layer]
        return (SparsePattern("local" if kind == "banded" else "full", self.band_size),)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return (self.hidden_size // self.num_attention_heads) ** -0.5 if self.scale_attention else 1.0

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of each layer, for `DynamicCache(config=...)`."""
        return [SPARSE_LAYER_TYPE] * self.num_hidden_layers
