"""Configuration of ELMo."""

from typing import Any, ClassVar

from ...nn.character_cnn import ACTIVATIONS
from ...ops.backend import Operation
from ...ops.projected_lstm import PROJECTED_LSTM
from ..base import LNLMConfig, check_bound, check_choice, strict_config
from .layers import POOLINGS

SYMBOLS = ("word_start_token_id", "word_end_token_id", "filler_token_id")
"""Fields of the ids that every word is spelled with: its begin, its end, and what fills it up."""


@strict_config
class ElmoConfig(LNLMConfig):
    """Configuration of `ElmoModel` and its heads (Peters et al. 2018); defaults are those of the published model.

    Ids are those of ELMo's characters: 0 at masked places, a byte's value + 1, and then five symbols.

    Args:
        vocab_size: number of character ids.
        embedding_size: width of a character's embedding.
        filter_sizes: places that the windows of the character CNN see.
        num_filters: maps of each of them, or one number for all.
        num_highways: highway layers over the maps.
        activation: of the maps, `relu` or `tanh`.
        max_word_length: places of a word's spelling, its begin and end symbols included; longer words are cut.
        hidden_size: width of a layer's output, both directions side by side; each is half as wide.
        cell_size: memory cells of each direction.
        num_hidden_layers: LSTM layers.
        cell_clip, projection_clip: greatest absolute value of a cell and of a projected output; None for no limit.
        use_skip_connections: whether each layer but the first adds its input to its output.
        dropout: of each LSTM layer's input.
        forget_bias: added to the forget gate's bias at each step, as TensorFlow does; the weights don't hold it.
        mix_layer_norm: whether the scalar mix of the heads first normalises each layer over the batch.
        pooling: how sequence classification sums up a text's words: `max`, `mean` or `last` (each direction's last).
        classifier_dropout: of the mixed layers, before the classifier.
        target_vocab_size: classes of the language models' softmax: words are hashed to them.
        loss_chunk_size: words a chunk of the language models' loss.
        bos_token_id, eos_token_id: a sentence's begin and end, words of one character; None for ELMo's own, 257 and 258,
            where the vocabulary has them.
        word_start_token_id, word_end_token_id, filler_token_id: a word's begin and end, and what fills its spelling up;
            None for ELMo's own, 259 to 261, and in a smaller vocabulary 3 to 5.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_elmo"
    attribute_map = {"intermediate_size": "cell_size"}
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}
    _operations: ClassVar[tuple[Operation, ...]] = (PROJECTED_LSTM,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "vocab_size": (6, 2**26),
        "hidden_size": (2, 2**24),
        "filter_sizes": (1, 2**12),
        "num_filters": (1, 2**20),
        "num_highways": (0, 10_000),
        "max_word_length": (3, 2**12),
        "cell_clip": (1e-6, 1e6),
        "projection_clip": (1e-6, 1e6),
        "forget_bias": (-100.0, 100.0),
        "target_vocab_size": (2, 2**26),
    }

    vocab_size: int = 262
    embedding_size: int = 16
    filter_sizes: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    num_filters: list[int] | tuple[int, ...] | int = (32, 32, 64, 128, 256, 512, 1024)
    num_highways: int = 2
    activation: str = "relu"
    max_word_length: int = 50
    hidden_size: int = 1024
    cell_size: int = 4096
    num_hidden_layers: int = 2
    cell_clip: float | int | None = 3.0
    projection_clip: float | int | None = 3.0
    use_skip_connections: bool = True
    dropout: float | int = 0.1
    forget_bias: float | int = 1.0
    mix_layer_norm: bool = False
    pooling: str = "max"
    classifier_dropout: float | int = 0.5
    target_vocab_size: int = 10_000
    loss_chunk_size: int = 256
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    word_start_token_id: int | None = None
    word_end_token_id: int | None = None
    filler_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.vocab_size >= 262:
            self.bos_token_id = 257 if self.bos_token_id is None else self.bos_token_id
            self.eos_token_id = 258 if self.eos_token_id is None else self.eos_token_id
        first = 259 if self.vocab_size >= 262 else 3
        for place, name in enumerate(SYMBOLS):
            if getattr(self, name) is None:
                setattr(self, name, first + place)
        self._check_symbols()

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("pooling", self.pooling, POOLINGS)
        check_bound("len(filter_sizes)", len(self.filter_sizes), (1, 64))
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size holds both directions: it must be even, got {self.hidden_size}")
        if not isinstance(self.num_filters, int) and len(self.num_filters) != len(self.filter_sizes):
            raise ValueError(
                f"num_filters must be one number or one for each of filter_sizes ({len(self.filter_sizes)}), "
                f"got {len(self.num_filters)}"
            )
        if max(self.filter_sizes) > self.max_word_length:
            raise ValueError(
                f"filter_sizes must not exceed max_word_length ({self.max_word_length}), got {max(self.filter_sizes)}"
            )
        self._check_symbols()

    def _check_symbols(self) -> None:
        """Check that no symbol of a word's spelling is another one, a sentence's begin or end, or padding."""
        taken = dict.fromkeys(self.single_ids, "bos_token_id and eos_token_id")
        if self.pad_token_id is not None:
            taken[self.pad_token_id] = "pad_token_id"
        for name in SYMBOLS:
            token = getattr(self, name)
            if token is not None and token in taken:
                raise ValueError(f"{name} must differ from {taken[token]}, got {token}")
            taken[token] = name

    @property
    def filters(self) -> list[tuple[int, int]]:
        """The (window, maps) pairs of the character CNN."""
        maps = self.num_filters
        each = [maps] * len(self.filter_sizes) if isinstance(maps, int) else list(maps)
        return list(zip(self.filter_sizes, each, strict=True))

    @property
    def projection_size(self) -> int:
        """Width of one direction's output, and of a word's vector."""
        return self.hidden_size // 2

    @property
    def single_ids(self) -> list[int]:
        """Ids that are words by themselves."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]
        return [token for token in (self.bos_token_id, *ends) if token is not None]

    @property
    def reads_both_ways(self) -> bool:
        """Whether a position's output depends on what follows it."""
        return True

    @property
    def predicts_both_ways(self) -> bool:
        """Whether the model for pre-training is a language model in both directions by itself."""
        return True

    @property
    def head_width(self) -> int:
        """Width of what a head reads."""
        return self.hidden_size
