"""Attention with relative positions: what a query makes of a key depends on both and on the distance between them.

References:
    [1] Dai et al. 2019, Transformer-XL: Attentive Language Models beyond a Fixed-Length Context, section 3.3, appendix B.

Complexity: O(queries * keys * head_dim) a head; the scores by distance are one product a layer, not one a key.
"""

import torch

from ..backend import Operation
from .eager import relative_attention_eager
from .reference import relative_attention_reference

RELATIVE_ATTENTION = Operation(
    "relative_attention", reference=relative_attention_reference, eager=relative_attention_eager
)


def relative_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    relative: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor],
    unseen: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend with the scores `((q_i + u) . k_j + (q_i + v) . r_{i-j}) * scale`; the last query is the last key.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key: `(batch, heads, keys, head_dim)`, at least as many as queries.
        value: as `key`.
        relative: `(heads, distances, head_dim)`, encodings of the distances `distances - 1` down to 0, at least `keys`.
        biases: u and v, `(heads, head_dim)` each.
        unseen: bool, broadcast to `(batch, 1, queries, keys)`, true where a query must not look: all later keys, and what
            else. None where there is nothing to hide. Each query must see a key.
        scale: factor of the scores; `1/sqrt(head_dim)` if None.
        dropout: probability of dropping an attention weight (0 outside training).
        backend: `auto`, `reference` or `eager`.

    Returns:
        `(batch, heads, queries, head_dim)`.

    Raises:
        ValueError: shapes that do not fit, or a backend outside the above.
    """
    shapes = (tuple(query.shape), tuple(key.shape), tuple(value.shape), tuple(relative.shape))
    rows, heads, queries, width = shapes[0]
    keys = shapes[1][2]
    if shapes[1] != shapes[2] or shapes[1] != (rows, heads, keys, width) or queries > keys:
        raise ValueError(f"key and value must be (batch, heads, keys, head_dim) with keys >= queries, got {shapes[:3]}")
    if relative.dim() != 3 or (shapes[3][0], shapes[3][2]) != (heads, width) or shapes[3][1] < keys:
        raise ValueError(f"relative must be ({heads}, at least {keys}, {width}), got {shapes[3]}")
    attend = RELATIVE_ATTENTION.load(RELATIVE_ATTENTION.pick(backend, query.device))
    return attend(query, key, value, relative, biases, unseen, width**-0.5 if scale is None else scale, dropout)
