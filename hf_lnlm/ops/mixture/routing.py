"""Which experts each token goes to, with what weight, and what the router's losses and figures are made of.

References:
    [1] Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer".
    [2] Fedus, Zoph and Shazeer 2021, "Switch Transformers", section 2.
    [3] Zoph et al. 2022, "ST-MoE", section 3.1.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import one_hot


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        experts: `(tokens, k)` the experts of each token, best first.
        gates: `(tokens, k)` weight of what each makes of it; 0 at padding and where the token was dropped.
        kept: `(tokens, k)` false at padding and where the token was dropped; None if all are kept.
    """

    experts: torch.Tensor
    gates: torch.Tensor
    kept: torch.Tensor | None


class RouterTotals(NamedTuple):
    """What a router did to a batch's real tokens, as sums, so that those of micro-batches and processes add up.

    Attributes:
        load: `(experts,)` choices that fell on each expert, dropped ones included.
        importance: `(experts,)` sums of the probabilities; differentiable.
        square: sum of the squared log partition functions; differentiable.
        entropy: sum of the entropies of the probabilities, nats.
        dropped: choices that a full expert turned away.
        tokens: real tokens.
    """

    load: torch.Tensor
    importance: torch.Tensor
    square: torch.Tensor
    entropy: torch.Tensor
    dropped: torch.Tensor
    tokens: torch.Tensor


def route(
    logits: torch.Tensor,
    k: int,
    normalize: bool,
    groups: torch.Tensor | None = None,
    factor: float | None = None,
) -> Routing:
    """Choose the experts of each token.

    Args:
        logits: `(tokens, experts)`, in float32 or more.
        k: experts a token.
        normalize: whether the gates of a token add up to 1, else they are the router's probabilities.
        groups: `(tokens,)` number of each token's group, below the number of tokens; -1 at padding. None: all tokens
            are real and of one group.
        factor: capacity factor: in each group, an expert takes at most `ceil(factor * k * tokens / experts)` tokens,
            the most probable first. None drops nothing.
    """
    chosen, experts = logits.softmax(-1).topk(k, dim=-1)
    gates = chosen / chosen.sum(-1, keepdim=True) if normalize else chosen
    kept = None if groups is None else (groups >= 0).unsqueeze(1).expand_as(experts)
    if factor is not None:
        if groups is None:
            groups = torch.zeros_like(experts[:, 0])
        kept = _within_capacity(chosen.detach(), experts, groups, factor, logits.shape[1])
    return Routing(experts, gates if kept is None else gates * kept, kept)


def _within_capacity(
    probabilities: torch.Tensor, experts: torch.Tensor, groups: torch.Tensor, factor: float, count: int
) -> torch.Tensor:
    """Tell which choices `(tokens, k)` find room, those of highest probability first [2, equation 3]."""
    tokens, k = experts.shape
    real = groups >= 0
    sizes = torch.bincount(groups[real], minlength=tokens)
    capacity = (sizes.double() * (factor * k / count)).ceil().long()
    queue = torch.where(real.unsqueeze(1), groups.unsqueeze(1) * count + experts, tokens * count).flatten()
    by_merit = probabilities.flatten().argsort(descending=True, stable=True)
    order = by_merit[queue[by_merit].argsort(stable=True)]
    ahead = torch.searchsorted(queue[order], queue[order])  # where each queue begins
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - ahead
    limit = capacity[groups.clamp(min=0)].unsqueeze(1)
    return (rank.view(tokens, k) < limit) & real.unsqueeze(1)


def router_totals(logits: torch.Tensor, routing: Routing, real: torch.Tensor | None) -> RouterTotals:
    """Sum up what the router's losses and figures are made of.

    Args:
        logits: `(tokens, experts)`.
        routing: made of them.
        real: `(tokens,)` false at padding; None if all are real.
    """
    counted = logits.new_ones(logits.shape[0]) if real is None else real.to(logits.dtype)
    log_all = logits.logsumexp(-1)
    logs = logits - log_all.unsqueeze(-1)
    probabilities = logs.exp()
    load = (one_hot(routing.experts, logits.shape[1]).sum(1) * counted.unsqueeze(1)).sum(0)
    tokens = counted.sum()
    kept = load.sum() if routing.kept is None else routing.kept.sum()
    entropy = -((probabilities * logs).sum(-1) * counted).sum()
    square = (log_all.square() * counted).sum()
    importance = (probabilities * counted.unsqueeze(1)).sum(0)
    return RouterTotals(load.detach(), importance, square, entropy.detach(), (load.sum() - kept).detach(), tokens)


def stacked(totals: list[RouterTotals]) -> RouterTotals:
    """Return the totals of several layers as one, the layer being the first dimension; the tokens are the same in all."""
    fields = [torch.stack(values) for values in zip(*totals, strict=True)]
    return RouterTotals(*fields)._replace(tokens=totals[0].tokens)


def router_loss(totals: RouterTotals, load: torch.Tensor | None, balance: float, z: float) -> torch.Tensor:
    """Return the router's losses, each a mean over real tokens, summed over layers; 0 without any real token.

    balance * E * sum_i f_i P_i [2, equations 4 to 6] + z * mean of the squared log partition function [3, equation 5].

    Args:
        totals: of the batch, stacked over the layers.
        load: `(layers, experts)` choices of the whole global batch, of which this is a part; None: this is all of it.
        balance: weight of the load-balancing loss.
        z: weight of the z loss.
    """
    load = totals.load if load is None else load.to(totals.load)
    shares = load / load.sum(-1, keepdim=True).clamp(min=1)
    unbalance = load.shape[-1] * (shares * totals.importance).sum(-1)
    return (balance * unbalance + z * totals.square).sum() / totals.tokens.clamp(min=1)
