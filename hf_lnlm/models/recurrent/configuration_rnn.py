"""Configuration of LSTM and GRU models."""

import math
from typing import Any, ClassVar

from ...ops.backend import Operation
from ...ops.recurrence import RECURRENCE
from ..base import LanguageModelConfig, check_choice, strict_config
from .layers import CELL_TYPES, POOLINGS


@strict_config
class RNNConfig(LanguageModelConfig):
    """Configuration of `RNNModel` and its heads.

    Args:
        cell_type: `lstm` or `gru`.
        embedding_size: width of the token embeddings; `hidden_size` if None.
        embedding_scale: factor by which the first layer reads the table of embeddings, which a tied softmax reads as it
            is; the root of their width if None, for a GRU twice that. Configs saved before there was this field mean 1.
        last_hidden_size: width of the last layer; `hidden_size` if None.
        project_embeddings: whether a linear layer carries embeddings of another width to `hidden_size`, and the last
            layer's output back for tied embeddings. If false the first layer reads the embeddings as they are, as in
            AWD-LSTM and PyTorch's word_language_model.
        project_output: whether a linear layer stands before a tied softmax even where the widths agree (the projection of
            Press and Wolf 2017), which learns faster at first; TRL's trainers can't align a model with it.
        bidirectional: whether each layer also reads backwards; its output is both directions, concatenated, so
            twice as wide. None becomes true in a masked language model and false in all others.
        embedding_dropout: share of vocabulary rows dropped (Merity 2017, section 4.3).
        input_dropout, hidden_dropout, output_dropout: locked dropout of the embeddings, between layers, of the output.
        weight_dropout: share of recurrent weights dropped, one mask a forward pass (Merity 2017, section 2).
        activation_penalty: AR, weight of the mean square of the dropped output (Merity 2017, section 4.5).
        temporal_penalty: TAR, weight of the mean square of the change of the raw output.
        forget_bias: initial bias of an LSTM's forget gate.
        initializer_range: standard deviation of the initial classifier and untied LM head. Embeddings start with standard
            deviation 1 as the first layer reads them (a GRU's at scale 1: 0.25), gates Glorot-uniform and orthogonal
            (recurrence).
        pooling: how sequence classification sums up a text: `last` real token (of the backward direction: the
            first), `mean` or `max`.
        classifier_dropout: dropout before the classifier.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_rnn"
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _operations: ClassVar[tuple[Operation, ...]] = (RECURRENCE,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "activation_penalty": (0.0, 1e6),
        "temporal_penalty": (0.0, 1e6),
        "forget_bias": (-100.0, 100.0),
        "embedding_scale": (1e-3, 1e6),
    }
    _later_fields: ClassVar[dict[str, Any]] = {"embedding_scale": 1.0}

    cell_type: str = "lstm"
    embedding_size: int | None = None
    embedding_scale: float | int | None = None
    project_output: bool = False
    last_hidden_size: int | None = None
    project_embeddings: bool = True
    bidirectional: bool | None = None
    embedding_dropout: float | int = 0.0
    input_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    weight_dropout: float | int = 0.0
    activation_penalty: float | int = 0.0
    temporal_penalty: float | int = 0.0
    forget_bias: float | int = 1.0
    pooling: str = "last"
    classifier_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.last_hidden_size is None:
            self.last_hidden_size = self.hidden_size

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("cell_type", self.cell_type, CELL_TYPES)
        check_choice("pooling", self.pooling, POOLINGS)
        self._check_tying()

    def unread(self) -> dict[str, str]:
        """A GRU has no forget gate; see `LNLMConfig.unread`."""
        return super().unread() | ({"forget_bias": "cell_type='lstm'"} if self.cell_type == "gru" else {})

    def _check_tying(self) -> None:
        if not self.project_embeddings and self.project_output:
            raise ValueError("project_output needs project_embeddings: it must be false, got True")
        if self.bidirectional or not self.tie_word_embeddings or self.project_embeddings:
            return
        embedding, last = self.embedding_size or self.hidden_size, self.last_hidden_size or self.hidden_size
        if embedding != last:
            raise ValueError(
                "tie_word_embeddings without project_embeddings needs embedding_size == last_hidden_size, "
                f"got {embedding} and {last}"
            )

    @property
    def reads_both_ways(self) -> bool:
        """Whether a token's output depends on what follows it."""
        return bool(self.bidirectional)

    @property
    def input_scale(self) -> float:
        """Factor between the table of embeddings and what the first layer reads."""
        if self.embedding_scale is not None:
            return float(self.embedding_scale)
        return math.sqrt(self.input_width) * (2 if self.cell_type == "gru" else 1)  # a GRU's output is larger at first

    @property
    def state_kind(self) -> str:
        """What a cache's states must have been written by to be read."""
        return self.cell_type

    @property
    def head_width(self) -> int:
        """Width of the hidden states that reach the softmax."""
        return self.output_size

    @property
    def output_size(self) -> int:
        """Width of the base model's output."""
        return (self.last_hidden_size or self.hidden_size) * (2 if self.bidirectional else 1)

    def layer_sizes(self, layer: int) -> tuple[int, int]:
        """Return `(input width, hidden width of one direction)` of a layer, counted from 0."""
        directions = 2 if self.bidirectional else 1
        embedding = self.hidden_size if self.project_embeddings else self.embedding_size
        inputs = embedding if layer == 0 else self.hidden_size * directions
        last = layer == self.num_hidden_layers - 1
        return int(inputs or 0), int(self.last_hidden_size or 0) if last else self.hidden_size
