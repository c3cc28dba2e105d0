"""Configuration of GPT-3 models: GPT-2 blocks with alternating dense and locally banded attention."""

from typing import ClassVar

from transformers.activations import ACT2FN

from ...ops.backend import Operation
from ...ops.sparse_attention.attention import SPARSE_ATTENTION
from ...ops.sparse_attention.pattern import SparsePattern
from ..base import check_choice, strict_config
from .sparse_config import SparseConfig

ATTENTION_KINDS = ("dense", "banded")


@strict_config
class GPT3Config(SparseConfig):
    """Configuration of `GPT3Model` and its heads. Fields without a word here are `SparseConfig`\'s.

    The paper (section 2.1) says that dense and banded layers alternate; the width of the band and which kind comes
    first are not public. Both are our choice here: 256 tokens, and dense first, as in GPT-Neo.

    Args:
        attention_layers: `dense` or `banded` for each layer; alternating, dense first, if None.
        band_size: keys that a query of a banded layer sees, itself included.
        activation_function: name of the MLP's activation in transformers' ACT2FN.
        scale_attention: whether scores are divided by the square root of the head's width (GPT-Neo's are not).
        attention_bias: whether queries, keys and values have a bias (GPT-Neo's have none).
        embedding_dropout, residual_dropout, attention_dropout: as in GPT-2; attention dropout takes a slower path.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_gpt3"
    _operations: ClassVar[tuple[Operation, ...]] = (SPARSE_ATTENTION,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "band_size": (1, 2**24),
    }

    attention_layers: list[str] | tuple[str, ...] | None = None
    band_size: int = 256
    activation_function: str = "gelu_new"
    scale_attention: bool = True
    attention_bias: bool = True
    residual_dropout: float | int = 0.0

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("activation_function", self.activation_function, tuple(ACT2FN))
        if self.attention_layers is None:
            return
        if len(self.attention_layers) != self.num_hidden_layers:
            raise ValueError(
                f"attention_layers must name num_hidden_layers ({self.num_hidden_layers}) layers, "
                f"got {len(self.attention_layers)}"
            )
        for kind in self.attention_layers:
            check_choice("attention_layers", kind, ATTENTION_KINDS)

    def unread(self) -> dict[str, str]:
        """The band, where all layers are said to be dense; see `LNLMConfig.unread`."""
        dense = self.attention_layers and "banded" not in self.attention_layers
        return super().unread() | ({"band_size": "attention_layers with 'banded' ones"} if dense else {})

    def patterns(self, layer: int) -> tuple[SparsePattern, ...]:
        """Return the index set of a layer, counted from 0."""
        kinds = self.attention_layers
        kind = ATTENTION_KINDS[layer % 2] if kinds is None else kinds[layer]
        return (SparsePattern("local" if kind == "banded" else "full", self.band_size),)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return super().attention_scale if self.scale_attention else 1.0
