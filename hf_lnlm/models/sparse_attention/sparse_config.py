"""What the configurations of the sparse-attention families share."""

from typing import Any, ClassVar

from ..base import LanguageModelConfig, strict_config
from .cache import SPARSE_LAYER_TYPE


@strict_config
class SparseConfig(LanguageModelConfig):
    """Fields of a transformer with attention of its own.

    Args:
        num_attention_heads: heads of a layer; must divide `hidden_size`.
        intermediate_size: width of the MLP; `4 * hidden_size` if None.
        max_position_embeddings: longest sequence, in tokens, at least 16.
        embedding_dropout: dropout of the embeddings.
        attention_dropout: dropout of attention weights; takes a slower path.
        classifier_dropout: dropout before the classifier.
        layer_norm_epsilon: added to the variance in layer norms.

    Raises:
        ValueError: a field is out of range, or heads don't divide the width.
    """

    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "layer_norm_epsilon": (0.0, 1.0),
        "max_position_embeddings": (16, 2**24),
    }

    num_attention_heads: int = 4
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    embedding_dropout: float | int = 0.0
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
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}), got {self.num_attention_heads}"
            )

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return (self.hidden_size // self.num_attention_heads) ** -0.5

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of each layer, for `DynamicCache(config=...)`."""
        return [SPARSE_LAYER_TYPE] * self.num_hidden_layers
