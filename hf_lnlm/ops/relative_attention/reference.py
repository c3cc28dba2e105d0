"""Relative attention as the paper writes it: each score looks up the encoding of its own distance."""

import torch
from torch.nn.functional import dropout as drop


def plain_distance(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Return how far each key lies before each query, `(1, queries, keys)`, where the last query is the last key.

    Args:
        queries, keys: how many there are.
        device: of the result.
    """
    place = torch.arange(keys, device=device)
    return (place[keys - queries :].unsqueeze(1) - place).unsqueeze(0)


def relative_attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    relative: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor],
    unseen: torch.Tensor | None,
    scale: float,
    distance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax of `((q_i + u) . k_j + (q_i + v) . r_{i-j}) * scale` (Dai et al. 2019, section 3.3, terms a to d).

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, heads, keys, head_dim)`.
        relative: `(heads, distances, head_dim)`, the encodings of the distances `distances - 1` down to 0.
        biases: u and v, `(heads, head_dim)` each.
        unseen: bool, broadcast to `(batch, heads, queries, keys)`, true where a query must not look; None for nowhere.
        scale: factor of the scores.
        distance: `(batch, queries, keys)` how far each key lies before each query; None where the last query is the last
            key. Keys that lie after a query must be among the unseen.

    Returns:
        `(batch, heads, queries, keys)`; zeros for a query that sees nothing.
    """
    content_bias, position_bias = (bias.unsqueeze(1) for bias in biases)
    if distance is None:
        distance = plain_distance(query.shape[2], key.shape[2], query.device)
    known = relative.shape[1]
    place = known - 1 - distance.clamp(0, known - 1)
    by_distance = (query + position_bias) @ relative.mT
    index = place.unsqueeze(1).expand(*query.shape[:3], key.shape[2])
    scores = ((query + content_bias) @ key.mT + by_distance.gather(-1, index)) * scale
    if unseen is None:
        return scores.softmax(-1)
    return scores.masked_fill(unseen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(unseen, 0.0)


def relative_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    relative: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor],
    unseen: torch.Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend; arguments and result as in `relative_attention`."""
    weights = relative_attention_weights(query, key, relative, biases, unseen, scale)
    return drop(weights, dropout, training=dropout > 0.0) @ value
