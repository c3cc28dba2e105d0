"""A sparse mixture of experts, token by token: the papers' equations, in any precision, with no care for speed.

References:
    [1] Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer".
    [2] Fedus, Zoph and Shazeer 2021, "Switch Transformers", section 2.
    [3] Zoph et al. 2022, "ST-MoE", section 3.1.

Glossary: x token's hidden state; E number of experts; k experts a token; p = softmax(x W_r) router's probabilities; C
capacity.
"""

import math
from collections.abc import Callable

import torch


def chosen_experts(logits: torch.Tensor, k: int, normalize: bool) -> list[list[tuple[int, torch.Tensor]]]:
    """Return for each token its k most probable experts, best first, with their gates.

    The gate is p_i [2, equation 2], or p_i over the sum of the k chosen ones, which is the softmax over the k best
    logits [1, equations 3 to 5, without noise].

    Args:
        logits: `(tokens, E)`.
        k: experts a token.
        normalize: whether the k gates of a token add up to 1.
    """
    chosen = []
    for row in logits.softmax(-1):
        order = sorted(range(len(row)), key=lambda expert: (-row[expert].item(), expert))[:k]
        whole = (
            sum((row[expert] for expert in order), torch.zeros_like(row[0])) if normalize else torch.ones_like(row[0])
        )
        chosen.append([(expert, row[expert] / whole) for expert in order])
    return chosen


def kept_choices(logits: torch.Tensor, groups: list[int | None], k: int, factor: float | None) -> set[tuple[int, int]]:
    """Return the pairs (token, expert) that are computed.

    In each group an expert takes the C = ceil(factor * k * n / E) pairs of highest probability, of equal ones the
    earlier, n being the group's tokens [2, equation 3, which rounds down and goes by position].

    Args:
        logits: `(tokens, E)`.
        groups: group of each token; None for padding, which goes nowhere.
        k: experts a token.
        factor: capacity factor; None keeps all pairs.
    """
    probabilities, experts = logits.softmax(-1), logits.shape[1]
    asked: dict[tuple[int, int], list[int]] = {}
    for token, choices in enumerate(chosen_experts(logits, k, False)):
        group = groups[token]
        for expert, _ in choices if group is not None else ():
            asked.setdefault((group or 0, expert), []).append(token)
    kept = set()
    for (group, expert), tokens in asked.items():
        capacity = len(tokens) if factor is None else math.ceil(factor * k * groups.count(group) / experts)
        tokens.sort(key=lambda token: (-probabilities[token, expert].item(), token))
        kept |= {(token, expert) for token in tokens[:capacity]}
    return kept


def mixture(
    x: torch.Tensor,
    logits: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    groups: list[int | None],
    k: int,
    normalize: bool,
    factor: float | None = None,
) -> torch.Tensor:
    """Return y = sum over the chosen experts of gate_i * W_out_i f(W_in_i x) [1, equation 1]; zero where none computes.

    Args:
        x: `(tokens, width)`.
        logits: `(tokens, E)`.
        w_in: `(E, width, inner)`.
        w_out: `(E, inner, width)`.
        activation: f.
        groups, k, factor: see `kept_choices`.
        normalize: see `chosen_experts`.
    """
    kept, rows = kept_choices(logits, groups, k, factor), []
    for token, choices in enumerate(chosen_experts(logits, k, normalize)):
        row = torch.zeros_like(x[token])
        for expert, gate in choices:
            if (token, expert) in kept:
                row = row + gate * (activation(x[token] @ w_in[expert]) @ w_out[expert])
        rows.append(row)
    return torch.stack(rows)


def balance_loss(logits: torch.Tensor, groups: list[int | None], k: int) -> torch.Tensor:
    """Return E * sum_i f_i P_i over real tokens: 1 where balanced, E where one expert gets all [2, equation 4].

    f_i is the share of choices that fell on expert i, P_i the mean of its probability.

    Args:
        logits: `(tokens, E)`.
        groups, k: see `kept_choices`.
    """
    real = [token for token, group in enumerate(groups) if group is not None]
    probabilities, experts = logits[real].softmax(-1), logits.shape[1]
    choices = [expert for row in chosen_experts(logits[real], k, False) for expert, _ in row]
    shares = [choices.count(expert) / len(choices) for expert in range(experts)]
    return experts * sum((share * probabilities[:, i].mean() for i, share in enumerate(shares)), logits.new_zeros(()))


def z_loss(logits: torch.Tensor, groups: list[int | None]) -> torch.Tensor:
    """Return the mean over real tokens of (log sum_i exp logit_i)^2 [3, equation 5].

    Args:
        logits: `(tokens, E)`.
        groups: None for padding.
    """
    real = [token for token, group in enumerate(groups) if group is not None]
    return torch.stack([logits[token].exp().sum().log() ** 2 for token in real]).mean()
