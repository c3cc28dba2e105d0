"""Configuration of TextCNN."""

from typing import ClassVar

from ..base import LNLMConfig, check_bound, check_choice, strict_config

VARIANTS = ("rand", "static", "non-static", "multichannel")


@strict_config
class TextCNNConfig(LNLMConfig):
    """Configuration of `TextCNNModel` and `TextCNNForSequenceClassification` (Kim 2014).

    Args:
        hidden_size: width of the word vectors.
        num_hidden_layers: layers of window convolutions; the paper has 1. Every layer but the last hands its maps on
            to the next, the last one is pooled.
        variant: `rand` (word vectors learnt from a random start), `non-static` (the same, from imported vectors),
            `static` (imported vectors stay as they are) or `multichannel` (both: a learnt and a static channel, each
            filter applied to both and the results added).
        filter_sizes: words that the windows see.
        num_filters: feature maps for each of `filter_sizes`.
        dropout: dropout of the pooled features before the classifier.
        max_norm: greatest Euclidean length of the classifier's rows; None for no constraint.
        embedding_range: the word vectors start uniform in ± this.

    Raises:
        ValueError: a field is out of range.
    """

    model_type = "lnlm_text_cnn"
    base_model_fsdp_plan = {"embeddings.embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "num_filters": (1, 2**20),
        "filter_sizes": (1, 2**12),
        "max_norm": (1e-6, 1e6),
        "embedding_range": (0.0, 100.0),
    }

    hidden_size: int = 300
    num_hidden_layers: int = 1
    variant: str = "rand"
    filter_sizes: list[int] | tuple[int, ...] = (3, 4, 5)
    num_filters: int = 100
    dropout: float | int = 0.5
    max_norm: float | int | None = 3.0
    embedding_range: float | int = 0.25
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0

    def check_bounds(self) -> None:
        """Check ranges and choices; see the class for the fields."""
        super().check_bounds()
        check_choice("variant", self.variant, VARIANTS)
        check_bound("len(filter_sizes)", len(self.filter_sizes), (1, 64))

    @property
    def output_size(self) -> int:
        """Width of the pooled features."""
        return self.num_filters * len(self.filter_sizes)

    @property
    def reads_both_ways(self) -> bool:
        """Whether a position's output depends on what follows it."""
        return True
