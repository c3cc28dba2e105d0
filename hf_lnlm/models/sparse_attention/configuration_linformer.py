"""Configuration of Linformer models."""

from typing import ClassVar

from transformers.activations import ACT2FN

from ..base import check_bound, check_choice, strict_config
from .sparse_config import SparseConfig

SHARINGS = ("none", "headwise", "key_value", "layerwise")
PROJECTIONS = ("learned", "mean_pool", "convolution")
BIAS_ORDERS = ("fairseq", "paper")
CAUSAL_VARIANTS = ("segment",)


@strict_config
class LinformerConfig(SparseConfig):
    """Configuration of `LinformerModel` and its heads. Fields without a word here are `SparseConfig`\'s.

    Args:
        max_position_embeddings: n, the longest input, in tokens, at least 16; shorter ones use the first rows of E and F.
        type_vocab_size: number of segment types.
        projected_size: k, the slots that keys and values are projected to: one number, or one for each layer; at most
            n. A quarter of n if None.
        sharing: who has an E and an F of their own: `none` every head of every layer, `headwise` every layer,
            `key_value` every layer with E = F, `layerwise` one E = F for the whole model.
        projection: `learned` E and F, `mean_pool` over windows of n/k, or `convolution` with a learned kernel of n/k.
        bias_order: where the key's and value's bias goes: `fairseq` (E x)W + b, cheaper, or `paper` E(xW + b).
        is_decoder: causal; only with `causal_variant`, since a plain E mixes every position into every slot.
        causal_variant: `segment` (exact attention within a segment, learned summaries of the completed ones), or None. It
            has summaries of its own: `projected_size`, `projection` and `bias_order` are for the encoder.
        segment_size: tokens of a segment of the causal variant; an eighth of n if None.
        segment_summaries: slots that a completed segment is summed up in; a quarter of the segment if None.
        hidden_act: name of the MLP's activation in transformers' ACT2FN.
        embedding_dropout, hidden_dropout, attention_dropout: as in BERT.
        classifier_dropout: dropout before the classifiers.
        layer_norm_epsilon: added to the variance in layer norms.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_linformer"
    base_model_fsdp_plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight"}
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "projected_size": (1, 2**24),
        "segment_size": (1, 2**24),
        "segment_summaries": (1, 2**24),
    }

    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    projected_size: int | list[int] | tuple[int, ...] | None = None
    sharing: str = "headwise"
    projection: str = "learned"
    bias_order: str = "fairseq"
    is_decoder: bool = False
    causal_variant: str | None = "segment"
    segment_size: int | None = None
    segment_summaries: int | None = None
    hidden_act: str = "gelu"
    embedding_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    classifier_dropout: float | int = 0.1
    layer_norm_epsilon: float | int = 1e-12

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        check_choice("sharing", self.sharing, SHARINGS)
        check_choice("projection", self.projection, PROJECTIONS)
        check_choice("bias_order", self.bias_order, BIAS_ORDERS)
        if self.causal_variant is not None:
            check_choice("causal_variant", self.causal_variant, CAUSAL_VARIANTS)
        self._check_causality()
        self._check_projection()

    def unread(self) -> dict[str, str]:
        """What the causal variant has summaries of its own for; see `LNLMConfig.unread`."""
        encoder = ("projection", "bias_order") if self.is_decoder else ()
        return super().unread() | dict.fromkeys(encoder, "a bidirectional Linformer, not the causal variant")

    def _check_causality(self) -> None:
        if not self.is_decoder:
            return
        if self.causal_variant is None:
            raise ValueError(
                "is_decoder needs causal_variant='segment', got None: a plain Linformer cannot be causal, since every "
                "projected slot mixes all positions, so no mask over slots hides the future"
            )
        size, summaries = self.segment
        if summaries > size:
            raise ValueError(f"segment_summaries must be at most segment_size ({size}), got {summaries}")

    def _check_projection(self) -> None:
        sizes, longest = self.projected_size, self.max_position_embeddings
        if isinstance(sizes, (list, tuple)):
            if len(sizes) != self.num_hidden_layers:
                raise ValueError(
                    f"projected_size must name one size for each of num_hidden_layers ({self.num_hidden_layers}), "
                    f"got {len(sizes)}"
                )
            if self.sharing == "layerwise" and len(set(sizes)) > 1:
                raise ValueError(f"sharing='layerwise' needs one projected_size for all layers, got {list(sizes)}")
        for layer in range(self.num_hidden_layers if isinstance(sizes, (list, tuple)) else 1):
            check_bound("projected_size", self.projected(layer), (1, longest))
            if self.projection != "learned" and longest % self.projected(layer):
                raise ValueError(
                    f"projection={self.projection!r} needs a projected_size that divides max_position_embeddings "
                    f"({longest}), got {self.projected(layer)}"
                )

    def projected(self, layer: int) -> int:
        """Return k, the number of slots of a layer, counted from 0."""
        if self.projected_size is None:
            return max(1, self.max_position_embeddings // 4)
        return self.projected_size if isinstance(self.projected_size, int) else self.projected_size[layer]

    @property
    def segment(self) -> tuple[int, int]:
        """Tokens of a segment of the causal variant, and the slots that it is summed up in."""
        size = max(1, self.max_position_embeddings // 8) if self.segment_size is None else self.segment_size
        return size, max(1, size // 4) if self.segment_summaries is None else self.segment_summaries

    @property
    def reads_both_ways(self) -> bool:
        """Whether a token's output depends on what follows it."""
        return not self.is_decoder
