"""Configuration of sparse mixtures of experts."""

from typing import Any, ClassVar

from transformers.activations import ACT2FN

from ...ops.backend import Operation
from ...ops.sparse_attention.attention import SPARSE_ATTENTION
from ...ops.sparse_attention.pattern import SparsePattern
from ..base import MAX_LAYERS, check_choice, strict_config
from ..sparse_attention.sparse_config import SparseConfig

MAX_EXPERTS = 4096
MAX_EXPERT_WEIGHTS = 2**40


@strict_config
class SparseMoEConfig(SparseConfig):
    """Configuration of `SparseMoEModel` and its heads. Fields without a word here are `SparseConfig`\'s.

    Args:
        bidirectional: whether tokens also attend to what follows; the head decides if None (masked language models do).
        num_experts: experts of a sparse layer; at most 4096.
        num_experts_per_tok: experts that a token goes to; at most `num_experts`.
        moe_intermediate_size: inner width of an expert; if None, `intermediate_size` over the experts a token, so that
            as many parameters are active as in a dense layer.
        shared_expert_intermediate_size: inner width of an expert that every token goes to besides; None for none.
        intermediate_size: inner width of the dense layers' MLP; `4 * hidden_size` if None.
        sparse_step: every how manieth layer is sparse, the last of each `sparse_step`; the others are dense.
        norm_topk_prob: whether a token's gates add up to 1, as in Mixtral, else they are the router's probabilities, as
            in Switch; if None, with more than one expert a token. With one they are what the router learns from.
        router_jitter_noise: while training, the router's input is multiplied by numbers between 1 - this and 1 + this;
            the experts' is not.
        router_aux_loss_coef: weight of the load-balancing loss in the training loss, for each sparse layer.
        router_z_loss_coef: weight of the z loss in the training loss, for each sparse layer.
        capacity_factor: while training, an expert takes at most `ceil(this * k * tokens / experts)` of a document's
            tokens, those of highest probability; the others pass by it. None: all are taken, as always in evaluation.
        expert_dropout: dropout inside the experts.
        activation_function: name of the MLPs' and experts' activation in transformers' ACT2FN.
        attention_bias: whether queries, keys and values have a bias.
        embedding_dropout, residual_dropout, attention_dropout: as in GPT-2; attention dropout takes a slower path.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    model_type = "lnlm_sparse_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_logits"]
    _operations: ClassVar[tuple[Operation, ...]] = (SPARSE_ATTENTION,)
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "num_experts": (1, MAX_EXPERTS),
        "num_experts_per_tok": (1, MAX_EXPERTS),
        "sparse_step": (1, MAX_LAYERS),
        "router_jitter_noise": (0.0, 1.0 - 1e-6),
        "router_aux_loss_coef": (0.0, 1e6),
        "router_z_loss_coef": (0.0, 1e6),
        "capacity_factor": (1e-3, 1e6),
    }

    bidirectional: bool | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    sparse_step: int = 1
    norm_topk_prob: bool | None = None
    router_jitter_noise: float | int = 0.0
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    capacity_factor: float | int | None = None
    expert_dropout: float | int = 0.0
    activation_function: str = "gelu_new"
    attention_bias: bool = True
    residual_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = int(self.intermediate_size or 0) // self.num_experts_per_tok
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        super().check_bounds()
        check_choice("activation_function", self.activation_function, tuple(ACT2FN))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts ({self.num_experts}), got {self.num_experts_per_tok}"
            )
        if self.sparse_step > self.num_hidden_layers:
            raise ValueError(
                f"sparse_step must be at most num_hidden_layers ({self.num_hidden_layers}), or no layer is sparse, "
                f"got {self.sparse_step}"
            )
        if self.norm_topk_prob and self.num_experts_per_tok == 1:
            raise ValueError(
                "norm_topk_prob with num_experts_per_tok=1 makes every gate 1, from which no router learns: "
                "it must be false or null, got true"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        inner = self.intermediate_size or 4 * self.hidden_size
        if self.moe_intermediate_size is None and inner < self.num_experts_per_tok:
            raise ValueError(
                f"moe_intermediate_size must be given where intermediate_size ({inner}) is below num_experts_per_tok "
                f"({self.num_experts_per_tok}), got None"
            )
        width = self.moe_intermediate_size or inner // self.num_experts_per_tok
        weights = self.num_experts * self.hidden_size * width
        if weights > MAX_EXPERT_WEIGHTS:
            raise ValueError(
                f"num_experts * hidden_size * moe_intermediate_size must be at most {MAX_EXPERT_WEIGHTS}, got {weights}"
            )

    def is_sparse(self, layer: int) -> bool:
        """Tell whether a layer, counted from 0, has experts."""
        return (layer + 1) % self.sparse_step == 0

    @property
    def reads_both_ways(self) -> bool:
        """Whether a position's output depends on what follows it."""
        return bool(self.bidirectional)

    def patterns(self, layer: int) -> tuple[SparsePattern, ...]:
        """Return the index set of a layer that reads forwards, counted from 0."""
        return (SparsePattern("full", 1),)
