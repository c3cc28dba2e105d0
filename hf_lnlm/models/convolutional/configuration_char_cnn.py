"""Configuration of the character-level convolutional classifier."""

from typing import Any, ClassVar

from ..base import LNLMConfig, check_bound, check_choice, strict_config

QUANTIZATIONS = ("one-hot", "learned")
Numbers = list[int] | tuple[int, ...]


@strict_config
class CharCNNConfig(LNLMConfig):
    """Configuration of `CharCNNModel` and `CharCNNForSequenceClassification` (Zhang, Zhao & LeCun 2015).

    The defaults are the paper's small network; `num_filters=1024, intermediate_size=2048, initializer_range=0.02` make
    its large one.

    Args:
        vocab_size: special tokens and characters, in this order (see `hf_lnlm.data.characters`).
        hidden_size: channels of a quantised character: the size of the alphabet, or the width of learned vectors.
        quantization: `one-hot` (a character is its own channel; special tokens and characters beyond `hidden_size`
            are blank) or `learned` vectors.
        num_special_tokens: ids before the first character of the alphabet.
        backwards: read texts from the last character to the first, as the paper does.
        max_position_embeddings: characters read; longer texts are cut, shorter ones followed by blanks.
        num_hidden_layers: convolutional layers.
        kernel_sizes: frames a window sees in each layer; None: 7 in the first two, 3 in the others.
        pooled_layers: layers followed by pooling, counted from 0; None: the first two and the last.
        pool_size: frames that pooling makes one.
        num_filters: feature maps of each convolution.
        intermediate_size: units of the two fully connected layers.
        dropout: dropout after each of them.

    Raises:
        ValueError: a field is out of range, or no frame is left after the last layer.
    """

    model_type = "lnlm_char_cnn"
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "num_special_tokens": (0, 2**20),
        "kernel_sizes": (1, 4096),
        "pooled_layers": (0, 9_999),
        "pool_size": (1, 4096),
        "num_filters": (1, 2**20),
        "max_position_embeddings": (1, 2**20),
    }

    vocab_size: int = 77
    hidden_size: int = 70
    quantization: str = "one-hot"
    num_special_tokens: int = 7
    backwards: bool = True
    max_position_embeddings: int = 1014
    num_hidden_layers: int = 6
    kernel_sizes: Numbers | None = None
    pooled_layers: Numbers | None = None
    pool_size: int = 3
    num_filters: int = 256
    intermediate_size: int = 1024
    dropout: float | int = 0.5
    initializer_range: float | int = 0.05
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.frames(self.max_position_embeddings)

    def check_bounds(self) -> None:
        """Check ranges and choices; see the class for the fields."""
        super().check_bounds()
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.kernel_sizes is not None:
            layers = self.num_hidden_layers
            check_bound("len(kernel_sizes)", len(self.kernel_sizes), (layers, layers))

    def kernel_size(self, layer: int) -> int:
        """Return the frames a window of a layer sees."""
        if self.kernel_sizes is not None:
            return self.kernel_sizes[layer]
        return 7 if layer < 2 else 3

    def pool(self, layer: int) -> int:
        """Return the frames that pooling after a layer makes one; 1 for none."""
        pooled = (0, 1, self.num_hidden_layers - 1) if self.pooled_layers is None else self.pooled_layers
        return self.pool_size if layer in pooled else 1

    def frames(self, length: int) -> int:
        """Return the frames left of `length` characters after the last layer.

        Raises:
            ValueError: none is left.
        """
        left = length
        for layer in range(self.num_hidden_layers):
            left = (left - self.kernel_size(layer) + 1) // self.pool(layer)
            if left < 1:
                raise ValueError(
                    f"max_position_embeddings is too small for {self.num_hidden_layers} layers: no frame is left after "
                    f"layer {layer}, got {length}"
                )
        return left

    def shortest_blank(self) -> tuple[int, int]:
        """Return (frames in the receptive field of one last frame, characters from one last frame to the next)."""
        field, step = 1, 1
        for layer in range(self.num_hidden_layers):
            field += (self.kernel_size(layer) - 1) * step
            field += (self.pool(layer) - 1) * step
            step *= self.pool(layer)
        return field, step

    @property
    def reads_both_ways(self) -> bool:
        """Whether a position's output depends on what follows it."""
        return True
