"""The feed-forward part of a sparse layer: a router, its experts and, if wanted, an expert that all tokens go to."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.utils.generic import maybe_autocast

from ...ops.mixture.experts import mix
from ...ops.mixture.routing import RouterTotals, Routing, route, router_totals
from ..sparse_attention.attention import AttentionPlan


class Router(nn.Module):
    """Scores each expert for each token, in float32 whatever the model is in [2, section 2.4 of the model's file].

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.jitter, self.factor = config.router_jitter_noise, config.capacity_factor

    def forward(self, tokens: torch.Tensor, groups: torch.Tensor | None) -> tuple[torch.Tensor, Routing]:
        """Return the scores `(tokens, experts)` and where the tokens go.

        Args:
            tokens: `(tokens, hidden_size)`.
            groups: `(tokens,)` group of each, -1 at padding; None if all are real and of one group.
        """
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with maybe_autocast(tokens.device.type, enabled=False):
            scored = tokens.to(dtype)
            if self.training and self.jitter:
                scored = scored * torch.empty_like(scored).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = functional.linear(scored, self.weight.to(dtype))
            return logits, route(logits, self.k, self.normalize, groups, self.factor if self.training else None)


class Experts(nn.Module):
    """Two matrices an expert, without biases, all experts' in one parameter each.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.w_out = nn.Parameter(torch.empty(config.num_experts, config.moe_intermediate_size, config.hidden_size))
        self.activation = ACT2FN[config.activation_function]
        self.dropout = config.expert_dropout

    def forward(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return `(tokens, hidden_size)`, zero where no expert computes."""
        return mix(tokens, routing, self.w_in, self.w_out, self.activation, self.dropout if self.training else 0.0)


class SharedExpert(nn.Module):
    """An expert that every token goes to.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.shared_expert_intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.shared_expert_intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.activation_function]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Transform `(tokens, hidden_size)`."""
        return self.c_proj(self.activation(self.c_fc(tokens)))


class SparseMLP(nn.Module):
    """Router and experts.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_expert = None if config.shared_expert_intermediate_size is None else SharedExpert(config)

    def forward(
        self, hidden_states: torch.Tensor, groups: torch.Tensor | None
    ) -> tuple[torch.Tensor, RouterTotals | None]:
        """Transform `(batch, length, hidden_size)`; while training, say what the router did.

        Args:
            hidden_states: `(batch, length, hidden_size)`.
            groups: `(batch, length)`, see `document_groups`.
        """
        tokens = hidden_states.flatten(0, 1)
        flat = None if groups is None else groups.flatten()
        logits, routing = self.router(tokens, flat)
        mixed = self.experts(tokens, routing).to(hidden_states.dtype)
        if self.shared_expert is not None:
            mixed = mixed + self.shared_expert(tokens)
        totals = router_totals(logits, routing, None if flat is None else flat >= 0) if self.training else None
        return mixed.view(hidden_states.shape), totals


def document_groups(plan: AttentionPlan, shape: torch.Size) -> torch.Tensor | None:
    """Return the group of each token, `(batch, length)`: its document, within which experts have a capacity.

    Args:
        plan: of the forward pass.
        shape: of the hidden states.

    Returns:
        numbers below `batch * length`, -1 at padding.
    """
    first = torch.arange(shape[0], device=plan.positions.device).unsqueeze(1) * shape[1]
    groups = first.expand(shape[:2])
    if plan.documents is not None:
        groups = groups + plan.documents - plan.documents[:, :1]
    return groups if plan.real is None else groups.masked_fill(~plan.real, -1)
