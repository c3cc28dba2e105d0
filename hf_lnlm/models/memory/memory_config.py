"""Configuration fields that the memory-augmented families share."""

import math
from typing import Any, ClassVar

from ..base import LanguageModelConfig, check_choice, strict_config

CONTROLLERS = ("lstm", "feedforward")
MAX_SLOTS, MAX_WIDTH = 2**16, 2**16
MAX_STATE = 2**28  # numbers of one row's memory in one layer, a gigabyte


@strict_config
class MemoryConfig(LanguageModelConfig):
    """Fields of `NTMConfig` and `DNCConfig`.

    Args:
        controller_type: `lstm` or `feedforward`.
        controller_size: width of the controller; `hidden_size` if None.
        memory_size: slots of each layer's memory; at most 65,536.
        memory_width: numbers in a slot; at most 65,536, and 2**28 in all slots.
        num_read_heads, num_write_heads: heads of each layer.
        interface_clip: bound of the controller's raw orders to the memory.
        residual: whether layers are pre-norm residual blocks, `x + W[h ; r]`; if false a layer's output is `W[h ; r]`
            alone, as in the papers.
        layer_norm: whether [h ; r] is normalised before its projection (Franke et al. 2018).
        bypass_dropout: dropout of h on its way past the memory to the output (Franke et al. 2018).
        hidden_dropout: dropout of the embeddings and of each layer's output.
        classifier_dropout: dropout before a classifier.
        bidirectional: whether each layer also reads backwards; outputs add up. None means what the head needs: true for
            masked language models, else false. Not for causal ones.
        input_size: width of continuous `inputs_embeds`; the model then has no token embeddings. None for tokens.
        output_size: bits a step of sequence transduction; `hidden_size` if None.
        recompute_states: whether training keeps only the state before every chunk of about √T steps and runs a chunk
            again for its gradients.
        output_addressing: whether weightings and gates are returned unless told otherwise.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "memory_size": (1, MAX_SLOTS),
        "memory_width": (1, MAX_WIDTH),
        "num_read_heads": (1, 1024),
        "num_write_heads": (1, 1024),
        "interface_clip": (1e-3, 1e4),
    }

    num_hidden_layers: int = 1
    controller_type: str = "lstm"
    controller_size: int | None = None
    memory_size: int = 128
    memory_width: int = 20
    num_read_heads: int = 1
    num_write_heads: int = 1
    interface_clip: float | int = 20.0
    residual: bool = True
    layer_norm: bool = False
    bypass_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    bidirectional: bool | None = None
    input_size: int | None = None
    output_size: int | None = None
    recompute_states: bool = False
    output_addressing: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.controller_size is None:
            self.controller_size = self.hidden_size
        if self.output_size is None:
            self.output_size = self.hidden_size

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("controller_type", self.controller_type, CONTROLLERS)
        for name in ("interface_clip", "bypass_dropout", "hidden_dropout", "classifier_dropout"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.memory_size * self.memory_width > MAX_STATE:
            raise ValueError(
                f"memory_width must be at most {MAX_STATE // self.memory_size} for memory_size {self.memory_size}, "
                f"got {self.memory_width}"
            )

    def _backend_facts(self) -> tuple[Any, ...]:
        return self.memory_size, self.memory_width, bool(getattr(self, "use_sharpness", False))

    @property
    def input_width(self) -> int:
        """Width of `inputs_embeds`."""
        return int(self.input_size or self.hidden_size)

    @property
    def reads_both_ways(self) -> bool:
        """Whether a token's output depends on what follows it."""
        return bool(self.bidirectional)

    def layer_sizes(self, layer: int, continuous: bool = False) -> tuple[int, int]:
        """Return `(input width, output width)` of a layer, counted from 0.

        Args:
            layer: its number.
            continuous: whether the model transduces continuous sequences, so that without residual blocks the first
                layer reads the inputs and the last one writes the outputs directly.
        """
        first = self.input_size if self.input_size is not None and not self.residual and layer == 0 else None
        last = self.output_size if continuous and not self.residual and layer == self.num_hidden_layers - 1 else None
        return int(first or self.hidden_size), int(last or self.hidden_size)
