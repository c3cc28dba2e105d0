"""Sparse mixtures of experts: transformers whose feed-forward layers send each token to a few of many experts.

References:
    [1] Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer".
    [2] Fedus, Zoph and Shazeer 2021, "Switch Transformers: Scaling to Trillion Parameter Models".
    [3] Zoph et al. 2022, "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (z loss).
    [4] Jiang et al. 2024, "Mixtral of Experts" (dropless top-k, gates that add up to 1).
    [5] Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2: blocks and initialisation).

Glossary (paper term: variable): W_r: `router.weight`; experts E_i: `experts.w_in`, `experts.w_out`; N:
`num_experts`; k: `num_experts_per_tok`; alpha: `router_aux_loss_coef`; f_i, P_i: `RouterTotals.load`, `.importance`.

Deliberate deviations:
    * Nothing is dropped unless `capacity_factor` is given, and then while training only: what a model computes of a
      text never depends on its neighbours in the batch, its padding, or how it is cut for a cache. Under a capacity,
      the tokens of highest probability stay [2: the first ones], counted by document, so that which tokens of a causal
      model are trained on depends on later ones.
    * Padding goes to no expert and counts for no loss. Router losses are means over the real tokens of a batch, and of
      the whole global batch where a trainer says what that is (`set_global_load`, `loss_items`, `loss_sums`).
    * Router losses are in the loss while training only, so that losses of evaluation compare with other families'.
    * Experts have no biases. Experts may be shared [DeepSeekMoE: Dai et al. 2024], without a gate.

Complexity: a sparse layer O(length * k * width * inner) for `num_experts * width * inner` weights; attention
O(length^2).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from ...nn.loss_heads import IGNORED, normalised
from ...ops.mixture.routing import RouterTotals, router_loss, stacked
from ..heads import CausalLMHead, MaskedLMHead, TokenClassificationHead
from ..sparse_attention.attention import AttentionPlan, attend_both_ways
from ..sparse_attention.decoder import (
    SparseDecoderForSequenceClassification,
    SparseDecoderModel,
    SparseDecoderPreTrainedModel,
)
from ..sparse_attention.gpt2_parts import GPT3MLP, GPT3Attention
from .configuration_sparse_moe import SparseMoEConfig
from .outputs import (
    SparseMoECausalLMOutput,
    SparseMoEMaskedLMOutput,
    SparseMoEModelOutput,
    SparseMoESequenceClassifierOutput,
    SparseMoETokenClassifierOutput,
)
from .router import Experts, Router, SharedExpert, SparseMLP, document_groups

logger = logging.get_logger(__name__)


class SparseMoEAttention(GPT3Attention):
    """Multi-head attention to what came before, or to the whole document.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: SparseMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.both_ways = config.reads_both_ways

    def attend_heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: AttentionPlan,
        past_key_values: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split `(batch, length, hidden_size)` projections into heads and attend."""
        if not self.both_ways:
            return super().attend_heads(query, key, value, plan, past_key_values)
        heads = [x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value)]
        return attend_both_ways(heads[0], heads[1], heads[2], plan, self.scale, self._dropout())

    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0


class SparseMoEBlock(GradientCheckpointingLayer):
    """Pre-norm attention, then experts or an MLP, each with a residual connection.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: SparseMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = SparseMoEAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.sparse = config.is_sparse(layer_idx)
        self.mlp = SparseMLP(config) if self.sparse else GPT3MLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
        groups: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Run the block over `(batch, length, hidden_size)`; the fields of `RouterTotals` follow while a router trains."""
        attended, _ = self.attn(self.ln_1(hidden_states), plan, past_key_values)
        hidden_states = hidden_states + self.dropout(attended)
        normed = self.ln_2(hidden_states)
        mixed, totals = self.mlp(normed, groups) if self.sparse else (self.mlp(normed), None)
        return hidden_states + self.dropout(mixed), *(totals or ())  # flat: reentrant checkpoints look no deeper


class SparseMoEPreTrainedModel(SparseDecoderPreTrainedModel):
    """Weight initialisation and traits that the sparse mixtures share."""

    config: SparseMoEConfig
    _no_split_modules = ["SparseMoEBlock"]
    _can_record_outputs = {
        "hidden_states": SparseMoEBlock,
        "attentions": SparseMoEAttention,
        "router_logits": OutputRecorder(Router, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        shrunk = std / (2 * self.config.num_hidden_layers) ** 0.5  # [5]: residual paths shrink with depth
        if isinstance(module, (GPT3Attention, GPT3MLP, SharedExpert)):
            init.normal_(module.c_proj.weight, std=shrunk)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.w_in, std=std)
            init.normal_(module.w_out, std=shrunk)


class SparseMoEModel(SparseMoEPreTrainedModel, SparseDecoderModel):
    """Embeddings, blocks and a final norm, without a head.

    Args:
        config: the model's configuration. `bidirectional=None` becomes false.
    """

    output_class = SparseMoEModelOutput

    def __init__(self, config: SparseMoEConfig) -> None:
        config.bidirectional = bool(config.bidirectional)  # so that a checkpoint says which it is
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([SparseMoEBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.global_load: torch.Tensor | None = None
        self.gradient_checkpointing = False
        self.post_init()

    def position_embeddings(self, positions: torch.Tensor) -> torch.Tensor:
        """Return `(batch, length, hidden_size)` embeddings of positions `(batch, length)`."""
        return self.embed_positions(positions)

    def run_layers(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, cache: Cache | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Run the layers; while training, the routers' losses and sums are further outputs."""
        limited = self.training and self.config.capacity_factor is not None
        groups = None if plan.real is None and not limited else document_groups(plan, hidden_states.shape)
        found = []
        for layer in self.layers:
            hidden_states, *totals = layer(hidden_states, plan=plan, past_key_values=cache, groups=groups)
            found.append(totals)
        routers = [RouterTotals(*totals) for totals in found if totals]
        if not routers:
            return hidden_states, {}
        whole = stacked(routers)
        weights = self.config.router_aux_loss_coef, self.config.router_z_loss_coef
        return hidden_states, {"aux_loss": router_loss(whole, self.global_load, *weights), "router_totals": whole}


class RoutedHead:
    """What a head of a sparse mixture adds: the routers' losses, and what a trainer must know of them."""

    config: Any
    model: Any
    load_options: ClassVar[dict[str, Any]] = {}  # of a call that only counts the load

    def penalty(self, outputs: Any, targets: torch.Tensor, items: Any) -> torch.Tensor | float:
        """The routers' losses; of a part of a batch of `items` labels, by the part's share of these."""
        if outputs.aux_loss is None:
            return 0.0
        count = (targets != IGNORED).sum().to(outputs.aux_loss.device)
        return outputs.aux_loss if items is None else normalised(outputs.aux_loss * count, count, items)

    def set_global_load(self, load: torch.Tensor | None) -> None:
        """Say how many choices fell on each expert in the whole global batch, of which the next ones are parts.

        Args:
            load: `(sparse layers, experts)`; None where each batch is all of it.
        """
        self.model.global_load = load

    def counts_load(self) -> bool:
        """Tell whether the loss of a part of a batch depends on the load of the whole."""
        return bool(self.config.router_aux_loss_coef)

    def loss_items(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return what the loss is a mean over: labels, and real tokens, from a batch alone."""
        first = inputs.get("input_ids", inputs.get("inputs_embeds"))
        mask, shape = inputs.get("attention_mask"), first.shape[:2]
        tokens = torch.tensor(shape.numel()) if mask is None else (mask[:, -shape[1] :] != 0).sum()
        return {"labels": self.count_labels(inputs).to(tokens.device), "router": tokens}

    def count_labels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return how many labels of a batch count, 0-dimensional."""
        return (inputs["labels"] != IGNORED).sum()

    def loss_sums(self, outputs: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the sums that the items of `loss_items` divide: of the labels' losses and of the routers'."""
        items, aux = self.loss_items(inputs), outputs.aux_loss
        if not int(items["labels"]):
            nothing = [value.float().sum() * 0 for value in (outputs.logits, aux) if value is not None]
            labelled = sum(nothing, torch.zeros(()))
        else:
            labelled = (outputs.loss if aux is None else outputs.loss - aux) * items["labels"]
        routed = labelled.detach() * 0 if aux is None else aux * items["router"]
        return {"labels": labelled, "router": routed}

    def measured_sums(self, outputs: Any) -> dict[str, torch.Tensor]:
        """Return the sums behind `measured_summary` of a batch; nothing in evaluation."""
        totals = outputs.get("router_totals")
        if totals is None:
            return {}
        wanted = ("load", "entropy", "dropped", "tokens")
        return {f"router_{name}": getattr(totals, name).detach().double() for name in wanted}

    def measured_summary(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the routers' figures.

        Args:
            sums: over batches and processes.

        Returns:
            router_load: choices of the busiest expert of any layer, over those of an even load; 1 where balanced.
            router_entropy: of the probabilities, nats, mean over tokens and layers.
            router_dropped: share of the choices that a full expert turned away.
        """
        load, tokens = sums["router_load"], sums["router_tokens"].clamp(min=1)
        busiest = (load / load.sum(-1, keepdim=True).clamp(min=1)).max() * load.shape[-1]
        return {
            "router_load": float(busiest),
            "router_entropy": float((sums["router_entropy"] / tokens).mean()),
            "router_dropped": float(sums["router_dropped"].sum() / load.sum().clamp(min=1)),
        }


class SparseMoEForCausalLM(RoutedHead, CausalLMHead, SparseMoEPreTrainedModel, GenerationMixin):
    """Sparse mixture that predicts the next token.

    Args:
        config: the model's configuration, not bidirectional.

    Raises:
        ValueError: the config is bidirectional: attention would read the tokens to be predicted.
    """

    body_class = SparseMoEModel
    output_class = SparseMoECausalLMOutput
    load_options: ClassVar[dict[str, Any]] = {"logits_to_keep": 1}

    def __init__(self, config: SparseMoEConfig) -> None:
        if config.bidirectional:
            raise ValueError(
                "a causal language model cannot be bidirectional: config.bidirectional must be False, got True"
            )
        super().__init__(config)

    def count_labels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return how many tokens of a batch are predicted."""
        shifted = inputs.get("shift_labels")
        return ((inputs["labels"][:, 1:] if shifted is None else shifted) != IGNORED).sum()


class SparseMoEForMaskedLM(RoutedHead, MaskedLMHead, SparseMoEPreTrainedModel):
    """Sparse mixture that fills masks.

    Args:
        config: the model's configuration. `bidirectional=None` becomes true; false, as in a checkpoint that was made
            to read one way, is taken with a warning: a mask's right-hand side is not seen.
    """

    body_class = SparseMoEModel
    output_class = SparseMoEMaskedLMOutput

    def __init__(self, config: SparseMoEConfig) -> None:
        config.bidirectional = config.bidirectional is not False
        if not config.bidirectional:
            logger.warning("SparseMoEForMaskedLM with bidirectional=False does not see what follows a mask")
        super().__init__(config)


class SparseMoEForSequenceClassification(RoutedHead, SparseMoEPreTrainedModel, SparseDecoderForSequenceClassification):
    """Text classifier or regressor over the last real token."""

    body_class = SparseMoEModel
    output_class = SparseMoESequenceClassifierOutput


class SparseMoEForTokenClassification(RoutedHead, TokenClassificationHead, SparseMoEPreTrainedModel):
    """Tagger; `bidirectional=True` lets a token's tag depend on what follows it."""

    body_class = SparseMoEModel
    output_class = SparseMoETokenClassifierOutput


__all__ = [
    "SparseMoEForCausalLM",
    "SparseMoEForMaskedLM",
    "SparseMoEForSequenceClassification",
    "SparseMoEForTokenClassification",
    "SparseMoEModel",
    "SparseMoEPreTrainedModel",
]
