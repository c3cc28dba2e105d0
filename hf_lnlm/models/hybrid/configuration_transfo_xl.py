"""Configuration of Transformer-XL models."""

import math
from itertools import pairwise
from typing import Any, ClassVar

from ...ops.backend import Operation
from ...ops.relative_attention import RELATIVE_ATTENTION
from ..base import LanguageModelConfig, check_choice, check_cutoffs, strict_config
from .segment_memory import SEGMENT_LAYER_TYPE, Reach

MEMORY_STARTS = ("empty", "zeros")


@strict_config
class TransformerXLConfig(LanguageModelConfig):
    """Configuration of `TransformerXLModel` and its heads (Dai et al. 2019).

    `mem_len`, `clamp_len` and `same_length` may be set on a loaded model, or given to `from_pretrained`: the paper
    evaluates with a longer memory than it trains with.

    Args:
        hidden_size: width of the hidden states; even, since half of a distance's encoding are sines.
        embedding_size: width of the token embeddings; `hidden_size` if None.
        num_attention_heads: heads of a layer.
        head_dim: width of a head; `hidden_size / num_attention_heads` if None.
        intermediate_size: width of the feed-forward layer; `4 * hidden_size` if None.
        mem_len: tokens before the present segment that each layer remembers; 0 for none.
        mem_init: how a memory begins: `empty`, or `mem_len` `zeros` that are attended to, as in transformers' checkpoints.
        clamp_len: distances above it count as it; None for no bound.
        same_length: every query sees the last `mem_len` tokens, itself included, and no more, wherever segments begin, so
            that a text in pieces gives what it gives whole. If false a query sees all of its segment and `mem_len` tokens
            before that, as the paper trains.
        untie_r: whether each layer has biases u and v of its own.
        pre_norm: whether a sublayer's input is normalised, in place of its sum with the output.
        loss_head: as in every language model; `adaptive` makes the embeddings adaptive too (Baevski and Auli 2019).
        adaptive_div_value: factor by which each cluster's embeddings and softmax narrow; 1 for one table of all words.
            Its powers must divide `embedding_size`.
        tie_word_embeddings: whether the softmax has the embeddings' weights, in each cluster.
        tie_projections: for the shortlist and each cluster, whether the softmax's projection is the embeddings', where
            those are tied; all but the shortlist's if None.
        dropout: of embeddings, encodings of distances, sublayers and the output.
        attention_dropout: of attention weights; takes a slower path.
        classifier_dropout: dropout before the classifier.
        initializer_range: standard deviation of initial embeddings, softmax and classifier. Layers start with Glorot's.
        layer_norm_epsilon: added to the variance in layer norms.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_transfo_xl"
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _operations: ClassVar[tuple[Operation, ...]] = (RELATIVE_ATTENTION,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "mem_len": (0, 2**24),
        "clamp_len": (1, 2**24),
        "layer_norm_epsilon": (0.0, 1.0),
    }

    num_attention_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int | None = None
    embedding_size: int | None = None
    mem_len: int = 512
    mem_init: str = "empty"
    clamp_len: int | None = None
    same_length: bool = True
    untie_r: bool = True
    pre_norm: bool = False
    tie_projections: list[bool] | tuple[bool, ...] | None = None
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    layer_norm_epsilon: float | int = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("mem_init", self.mem_init, MEMORY_STARTS)
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even, for sines and cosines of a distance, got {self.hidden_size}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}) unless head_dim is given, "
                f"got {self.num_attention_heads}"
            )
        if self.same_length and not self.mem_len:
            raise ValueError(
                "same_length lets a query see mem_len tokens: mem_len must be at least 1, or same_length false, got 0"
            )
        if self.tie_projections is not None:
            self._check_projections(self.tie_projections)

    def _check_projections(self, given: list[bool] | tuple[bool, ...]) -> None:
        if self.loss_head != "adaptive" or not self.tie_word_embeddings:
            raise ValueError("tie_projections is for loss_head='adaptive' with tied embeddings: it must be None")
        wanted = 1 + len(self.adaptive_cutoffs or [])
        if len(given) != wanted:
            raise ValueError(
                f"tie_projections must say so for {wanted} clusters, the shortlist first, got {len(given)}"
            )

    def check_adaptive(self) -> None:
        """Check the fields of adaptive embeddings and softmax.

        Raises:
            ValueError: cutoffs that are no clusters, or widths that don't come out whole.
        """
        clusters, width = check_cutoffs(self), int(self.embedding_size or self.hidden_size)
        hopeless = clusters * math.log2(self.adaptive_div_value) > 64  # asked first: the power might not fit
        if hopeless or self.adaptive_div_value % 1 or width % int(self.adaptive_div_value) ** clusters:
            raise ValueError(
                f"adaptive_div_value must be a whole number whose powers up to {clusters} divide "
                f"embedding_size ({width}), got {self.adaptive_div_value}"
            )

    @property
    def cluster_sizes(self) -> list[int]:
        """Words of the shortlist and of each cluster; one entry where the embeddings are not adaptive."""
        edges = [0, *(self.adaptive_cutoffs or []), self.vocab_size] if self.loss_head == "adaptive" else []
        return [high - low for low, high in pairwise(edges)] or [self.vocab_size]

    @property
    def cluster_widths(self) -> list[int]:
        """Width of the embeddings of the shortlist and of each cluster."""
        width, factor = int(self.embedding_size or self.hidden_size), int(self.adaptive_div_value)
        return [width // (factor**i if self.has_adaptive_embeddings else 1) for i in range(len(self.cluster_sizes))]

    @property
    def has_adaptive_embeddings(self) -> bool:
        """Whether clusters have embeddings of their own widths."""
        return self.loss_head == "adaptive" and self.adaptive_div_value > 1

    @property
    def input_width(self) -> int:
        """Width of `inputs_embeds`: what `get_input_embeddings()` gives."""
        return int(self.hidden_size if self.has_adaptive_embeddings else self.embedding_size or self.hidden_size)

    @property
    def reach(self) -> Reach:
        """How far back a query looks."""
        return Reach(self.mem_len, self.clamp_len, self.same_length)

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of each layer, for `DynamicCache(config=...)`."""
        return [SEGMENT_LAYER_TYPE] * self.num_hidden_layers
