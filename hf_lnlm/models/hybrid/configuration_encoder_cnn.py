"""Configuration of a convolutional head on an encoder."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from ..base import LanguageModelConfig, check_bound, check_choice, strict_config
from ..parts import NestedConfig, hidden_width

MODES = ("last", "last_n", "all_cls", "scalar_mix")


@strict_config
class EncoderCNNConfig(NestedConfig, LanguageModelConfig):
    """Configuration of `EncoderCNNModel` and its heads: an encoder of any kind and convolutions over its output.

    Args:
        encoder: the encoder's config, or its fields with `model_type`; None for a BERT of the sizes below, without
            dropout.
        vocab_size, hidden_size, num_hidden_layers: those of the encoder, whatever is given beside `encoder`.
        mode: what the windows slide over: the `last` layer; the `last_n` layers as so many input channels (the published
            BERT-CNN); `all_cls`, the first token's state in all layers, one frame a layer; or the `scalar_mix` of all.
        num_layers: layers that `last_n` reads; None for 4, or all if there are fewer.
        filter_sizes: frames that the windows see.
        num_filters: feature maps for each of `filter_sizes`.
        dropout: dropout of the features before the classifier, or before what fills masks.
        tie_word_embeddings: whether a masked language model's softmax has the encoder's embeddings as its weights.

    Raises:
        ValueError: a field is out of range, `last_n` asks for more layers than the encoder has, or the encoder's model
            type is unknown.
    """

    model_type = "lnlm_encoder_cnn"
    sub_configs_defaults = {"encoder": SubConfigSpec(config_class=AutoConfig, model_type="bert")}
    main_part: ClassVar[str] = "encoder"
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "num_filters": (1, 2**20),
        "filter_sizes": (1, 2**12),
    }

    encoder: PreTrainedConfig | dict | None = None
    mode: str = "last"
    num_layers: int | None = None
    filter_sizes: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5)
    num_filters: int = 32
    dropout: float | int = 0.1
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_layers is None:
            self.num_layers = min(4, self.num_hidden_layers)

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("mode", self.mode, MODES)
        check_bound("len(filter_sizes)", len(self.filter_sizes), (1, 64))
        if self.num_layers is not None and self.num_layers > self.num_hidden_layers:
            raise ValueError(
                f"num_layers must be at most the encoder's {self.num_hidden_layers} layers, got {self.num_layers}"
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the encoder's config, which embeddings and their number of tokens belong to."""
        inner: Any = self.encoder
        return self if inner is None else inner

    @property
    def encoder_size(self) -> int:
        """Width of the encoder's hidden states."""
        inner = self.parts.get("encoder")
        return self.hidden_size if inner is None else hidden_width(inner)

    @property
    def head_width(self) -> int:
        """Width of the hidden states that reach the softmax."""
        return self.encoder_size

    @property
    def embedding_size(self) -> int:
        """Width of the encoder's token embeddings."""
        return int(getattr(self.encoder, "embedding_size", None) or self.hidden_size)

    @property
    def output_size(self) -> int:
        """Width of the pooled features."""
        return self.num_filters * len(self.filter_sizes)
