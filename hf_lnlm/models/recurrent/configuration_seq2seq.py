"""Configuration of recurrent sequence-to-sequence models."""

from typing import Any, ClassVar

from ...ops.backend import Operation
from ...ops.recurrence import RECURRENCE, STATES
from ..base import MAX_VOCABULARY, LanguageModelConfig, check_choice, strict_config
from .layers import CELL_TYPES, POOLINGS
from .source_attention import ATTENTIONS

BRIDGES = ("linear", "tanh", "copy", "zero")


@strict_config
class RNNSeq2SeqConfig(LanguageModelConfig):
    """Configuration of `RNNSeq2SeqModel` and its heads.

    Args:
        vocab_size: target token ids, and source ones too unless `source_vocab_size` says otherwise.
        source_vocab_size: source token ids of a model with two vocabularies; `vocab_size` if None.
        share_embeddings: whether source and target tokens have one table of embeddings.
        tie_word_embeddings: whether the output projection shares the target embedding's weight.
        cell_type: `lstm` or `gru`.
        embedding_size: width of the token embeddings of both sides; `hidden_size` if None.
        project_embeddings: whether linear layers carry embeddings of another width to `hidden_size`. If false the first
            layers read them as they are, as fairseq's do.
        hidden_size: width of the decoder's layers.
        num_hidden_layers: layers of the decoder.
        encoder_layers: layers of the encoder; `num_hidden_layers` if None.
        encoder_hidden_size: width of one direction of the encoder; if None, what makes its output `hidden_size` wide.
        bidirectional: whether the encoder reads both ways, its outputs concatenated.
        reverse_source: whether an encoder of one direction reads from the last token to the first (Sutskever 2014).
        bridge: how the encoder's final states become the decoder's first ones: `linear`, `tanh` of a linear map, `copy`
            (widths must agree), or `zero`. A decoder layer reads the encoder layer beside it, counted from the top.
        attention: `none`; `dot`, `general`, `concat` (Luong 2015, of the present state) and `local_p` (its predicted
            window with general scores); `additive` (Bahdanau 2015, of the previous state, its context read by the cell).
        attention_size: width of the hidden layer of `concat`, `additive` and of `local_p`'s prediction; `hidden_size`
            if None.
        local_window: D of `local_p`, in tokens each way.
        input_feeding: whether the cell reads the attentional vector of the step before (Luong 2015, section 3.3).
        embedding_dropout: share of vocabulary rows dropped, on each side (Merity 2017, section 4.3).
        input_dropout, hidden_dropout, output_dropout: locked dropout of the embeddings, between layers, of the outputs.
        weight_dropout: share of recurrent weights dropped, one mask a forward pass (Merity 2017, section 2).
        forget_bias: initial bias of an LSTM's forget gate.
        decoder_start_token_id: what the decoder reads first; the first of `bos_token_id`, `eos_token_id`,
            `pad_token_id` that there is if None.
        is_encoder_decoder: always true.
        pooling: how sequence classification sums up a text: `last` token that was read, `mean` or `max`.
        classifier_dropout: dropout before the classifier.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_seq2seq"
    _operations: ClassVar[tuple[Operation, ...]] = (RECURRENCE,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "source_vocab_size": (1, MAX_VOCABULARY),
        "local_window": (1, 2**24),
        "forget_bias": (-100.0, 100.0),
    }

    source_vocab_size: int | None = None
    share_embeddings: bool = True
    cell_type: str = "lstm"
    embedding_size: int | None = None
    project_embeddings: bool = True
    encoder_layers: int | None = None
    encoder_hidden_size: int | None = None
    bidirectional: bool = True
    reverse_source: bool = False
    bridge: str = "linear"
    attention: str = "general"
    attention_size: int | None = None
    local_window: int = 10
    input_feeding: bool = False
    embedding_dropout: float | int = 0.0
    input_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    weight_dropout: float | int = 0.0
    forget_bias: float | int = 1.0
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True
    pooling: str = "last"
    classifier_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.attention_size is None:
            self.attention_size = self.hidden_size
        if self.encoder_layers is None:
            self.encoder_layers = self.num_hidden_layers
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = max(1, self.hidden_size // self.directions)
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self._first_special()
        self._check_widths()

    def _first_special(self) -> int | None:
        for given in (self.bos_token_id, self.eos_token_id, self.pad_token_id):
            first = given[0] if isinstance(given, list) and given else given
            if isinstance(first, int):
                return first
        return None

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("cell_type", self.cell_type, CELL_TYPES)
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("bridge", self.bridge, BRIDGES)
        check_choice("pooling", self.pooling, POOLINGS)
        if not self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder must be true: the model has both, got false")
        if self.bidirectional and self.reverse_source:
            raise ValueError("reverse_source is for an encoder of one direction: bidirectional must be false, got true")
        self._check_vocabularies()
        if self.encoder_hidden_size is not None:
            self._check_widths()

    def unread(self) -> dict[str, str]:
        """What is for another cell or attention; see `LNLMConfig.unread`."""
        found = super().unread() | ({"forget_bias": "cell_type='lstm'"} if self.cell_type == "gru" else {})
        return found | ({} if self.attention == "local_p" else {"local_window": "attention='local_p'"})

    def _check_vocabularies(self) -> None:
        if self.share_embeddings and self.source_vocabulary != self.vocab_size:
            raise ValueError(
                "share_embeddings needs one vocabulary: source_vocab_size must be vocab_size, "
                f"{self.vocab_size}, got {self.source_vocab_size}"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.source_vocabulary:
            raise ValueError(
                f"pad_token_id must be below source_vocab_size, {self.source_vocabulary}, got {self.pad_token_id}"
            )

    def _check_widths(self) -> None:
        for name, value, needs in (("attention", self.attention, "dot"), ("bridge", self.bridge, "copy")):
            if value == needs and self.source_width != self.hidden_size:
                raise ValueError(
                    f"{name}={needs!r} needs an encoder as wide as hidden_size, {self.hidden_size}: encoder_hidden_size "
                    f"times its {self.directions} directions is {self.source_width}"
                )

    @property
    def directions(self) -> int:
        """Directions that the encoder reads in: 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def source_vocabulary(self) -> int:
        """Number of source token ids."""
        return self.source_vocab_size or self.vocab_size

    @property
    def source_width(self) -> int:
        """Width of the encoder's output."""
        return int(self.encoder_hidden_size or 0) * self.directions

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of a cell's states."""
        return STATES[self.cell_type]

    @property
    def state_kind(self) -> str:
        """What a cache's states must have been written by to be read."""
        return f"{self.cell_type} decoder"

    def encoder_layer_sizes(self, layer: int) -> tuple[int, int]:
        """Return `(input width, hidden width of one direction)` of an encoder layer, counted from 0."""
        return self.token_width if layer == 0 else self.source_width, int(self.encoder_hidden_size or 0)

    def decoder_layer_sizes(self, layer: int) -> tuple[int, int]:
        """Return `(input width, hidden width)` of a decoder layer, counted from 0."""
        if layer:
            return self.hidden_size, self.hidden_size
        context = self.source_width if self.attention == "additive" else 0
        return self.token_width + context + self.fed_width, self.hidden_size

    @property
    def token_width(self) -> int:
        """Width of what the first layers read of a token."""
        return self.hidden_size if self.project_embeddings else int(self.embedding_size or 0)

    @property
    def fed_width(self) -> int:
        """Width of what input feeding adds to the cell's input."""
        return self.hidden_size if self.input_feeding else 0

    @property
    def reads_its_output(self) -> bool:
        """Whether a step needs the attention of the step before, so that a sequence must be run step by step."""
        return self.input_feeding or self.attention == "additive"

    def encoder_layer_beside(self, layer: int) -> int:
        """Return the encoder layer whose final state a decoder layer begins with, both counted from 0."""
        layers = int(self.encoder_layers or 1)
        return min(max(0, layers - self.num_hidden_layers) + layer, layers - 1)
