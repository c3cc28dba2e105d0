"""Outputs of sparse mixtures: the stock ones, and what the routers did."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from ...ops.mixture.routing import RouterTotals


@dataclass
class RouterOutput(ModelOutput):
    """What the routers did.

    Args:
        aux_loss: their weighted losses, part of `loss`; while training.
        router_totals: sums over the real tokens, a row a sparse layer; while training.
        router_logits: for each sparse layer the scores `(batch * length, num_experts)`, if `output_router_logits`.
    """

    aux_loss: torch.Tensor | None = None
    router_totals: RouterTotals | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseMoEModelOutput(RouterOutput, BaseModelOutputWithPast):
    """Of the base model."""


@dataclass
class SparseMoECausalLMOutput(RouterOutput, CausalLMOutputWithPast):
    """Of the causal language model."""


@dataclass
class SparseMoEMaskedLMOutput(RouterOutput, MaskedLMOutput):
    """Of the masked language model."""


@dataclass
class SparseMoESequenceClassifierOutput(RouterOutput, SequenceClassifierOutputWithPast):
    """Of the text classifier."""


@dataclass
class SparseMoETokenClassifierOutput(RouterOutput, TokenClassifierOutput):
    """Of the tagger."""
