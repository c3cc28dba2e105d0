"""Configuration of the gated convolutional language model."""

from typing import Any, ClassVar, NamedTuple

from ...ops.backend import Operation
from ...ops.time_conv import TIME_CONV
from ..base import LanguageModelConfig, check_bound, check_choice, strict_config

POOLINGS = ("last", "mean", "max")
Sizes = list[int] | tuple[int, ...]


class LayerShape(NamedTuple):
    """Shape of one layer.

    Attributes:
        in_size: channels in.
        size: channels out.
        kernel_size: frames that an output sees, itself included.
        bottleneck_size: channels of the wide convolution, or None if it runs at full width.
    """

    in_size: int
    size: int
    kernel_size: int
    bottleneck_size: int | None


@strict_config
class GatedCNNConfig(LanguageModelConfig):
    """Configuration of `GatedCNNModel` and its heads (Dauphin et al. 2017).

    Args:
        embedding_size: width of the token embeddings, carried to `hidden_size` by a linear map; `hidden_size` if None.
        hidden_size: channels of every layer, unless `layer_channels` says otherwise.
        kernel_width: frames that an output sees, itself included, unless `layer_kernels` says otherwise.
        layer_channels: channels of each layer.
        layer_kernels: kernel width of each layer.
        bottleneck_size: channels of the wide convolution in a bottleneck block (1, k, 1); None for plain blocks.
        weight_norm: learn the length and the direction of each filter apart (Salimans & Kingma 2016).
        dropout: dropout of every layer's input.
        pooling: how sequence classification sums up a text: `last` real token, `mean` or `max`.
        classifier_dropout: dropout before the classifier.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_gated_cnn"
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _operations: ClassVar[tuple[Operation, ...]] = (TIME_CONV,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "kernel_width": (1, 4096),
        "layer_kernels": (1, 4096),
        "layer_channels": (1, 2**24),
    }

    num_hidden_layers: int = 8
    embedding_size: int | None = None
    kernel_width: int = 5
    layer_channels: Sizes | None = None
    layer_kernels: Sizes | None = None
    bottleneck_size: int | None = None
    weight_norm: bool = True
    dropout: float | int = 0.0
    pooling: str = "max"
    classifier_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("pooling", self.pooling, POOLINGS)
        for name in ("layer_channels", "layer_kernels"):
            given = getattr(self, name)
            if given is not None:
                check_bound(f"len({name})", len(given), (self.num_hidden_layers, self.num_hidden_layers))

    def layer_shape(self, layer: int) -> LayerShape:
        """Return the shape of a layer, counted from 0."""
        channels = list(self.layer_channels or [self.hidden_size] * self.num_hidden_layers)
        kernels = list(self.layer_kernels or [self.kernel_width] * self.num_hidden_layers)
        return LayerShape(
            channels[layer - 1] if layer else self.hidden_size, channels[layer], kernels[layer], self.bottleneck_size
        )

    @property
    def state_kind(self) -> str:
        """What a cache's states must have been written by to be read."""
        return "gated_cnn"

    @property
    def head_width(self) -> int:
        """Width of the hidden states that reach the softmax."""
        return self.output_size

    @property
    def output_size(self) -> int:
        """Width of the base model's output."""
        return list(self.layer_channels or [self.hidden_size])[-1]

    @property
    def receptive_field(self) -> int:
        """Number of tokens, itself included, that a prediction can see."""
        return 1 + sum(self.layer_shape(layer).kernel_size - 1 for layer in range(self.num_hidden_layers))
