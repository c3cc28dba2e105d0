"""Relative attention without a lookup: scores by distance are laid out so that another stride reads them by key.

Row i of `(q + v) . r` holds the scores of the distances `keys - 1` down to 0, and key j of query i lies `keys - queries +
i - j` before it. Written `keys + 1` apart and read `keys` apart from place `queries` on, the same memory holds them by key
(the paper's appendix B, without its copies). What is read past a row's end belongs to keys after the query, unseen anyway.

Without gradients the content term, the softmax and the product with the values are torch's fused attention. With them one
autograd function keeps the weights and nothing else of that size.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from ..backend import own_precision


def relative_attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    relative: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor],
    unseen: torch.Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend; arguments and result as in `relative_attention`. Dropout of the weights takes a slower path."""
    relative = relative[:, relative.shape[1] - key.shape[2] :]
    biases = (biases[0].to(query.dtype), biases[1].to(query.dtype))
    tensors = (query, key, value, relative, *biases)
    smooth = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with own_precision(query.device):
        if smooth and dropout == 0.0:
            found: Any = _RelativeAttention.apply(*tensors, unseen, scale)
            return found
        content, position = (query + bias.unsqueeze(1) for bias in biases)
        if smooth:
            scores = shifted(position @ relative.mT) * scale
        else:
            scores = _scores_by_key(position, relative)[1].transpose(0, 1).mul_(scale)
        if unseen is not None:
            scores = scores.masked_fill(unseen, -torch.inf) if smooth else scores.masked_fill_(unseen, -torch.inf)
        return scaled_dot_product_attention(content, key, value, attn_mask=scores, dropout_p=dropout, scale=scale)


def shifted(scores: torch.Tensor) -> torch.Tensor:
    """Return scores `(..., queries, keys)` by distance, from `keys - 1` down to 0, as scores by key.

    Those of keys after the query are other queries' and must not be looked at.
    """
    queries, keys = scores.shape[-2:]
    return pad(scores, (1, 0)).flatten(-2)[..., queries:].unflatten(-1, (queries, keys))


def _scores_by_key(position: torch.Tensor, relative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(q + v)`, `(heads, batch * queries, head_dim)`, and the scores of its distances, read by key.

    Args:
        position: `(batch, heads, queries, head_dim)`.
        relative: `(heads, keys, head_dim)`.

    Returns:
        the second one `(heads, batch, queries, keys)`, not contiguous.
    """
    batch, heads, queries, width = position.shape
    keys = relative.shape[1]
    rows = position.transpose(0, 1).reshape(heads, batch * queries, width)
    laid_out = rows.new_empty(heads, batch * queries, keys + 1)
    torch.bmm(rows, relative.mT, out=laid_out[..., 1:])
    by_key = laid_out.view(heads, batch, queries * (keys + 1))[..., queries:].view(heads, batch, queries, keys)
    return rows, by_key


class _RelativeAttention(torch.autograd.Function):
    """Arguments: query, key, value, relative, u, v, what is unseen, scale."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        relative: torch.Tensor,
        content_bias: torch.Tensor,
        position_bias: torch.Tensor,
        unseen: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Return `(batch, heads, queries, head_dim)`; heads come first inside, since they share `relative`."""
        batch, heads, queries, width = query.shape
        content, keys, values = (
            states.transpose(0, 1).reshape(heads * batch, -1, width)
            for states in (query + content_bias.unsqueeze(1), key, value)
        )
        position, by_key = _scores_by_key(query + position_bias.unsqueeze(1), relative)
        scores = by_key.view(heads * batch, queries, -1)
        scores.baddbmm_(content, keys.mT, beta=scale, alpha=scale)
        if unseen is not None:
            by_key.masked_fill_(unseen.transpose(0, 1), -torch.inf)
        weights = scores.softmax(-1)
        out = weights @ values
        ctx.save_for_backward(content, keys, values, position, relative, weights, out)
        ctx.shape, ctx.scale = (heads, batch, queries, width), scale
        return out.view(ctx.shape).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the tensors."""
        content, keys, values, position, relative, weights, out = ctx.saved_tensors
        heads, batch, queries, width = ctx.shape
        gradient = grad_output.transpose(0, 1).reshape(heads * batch, queries, width)
        with own_precision(gradient.device):
            of_values = weights.mT @ gradient
            of_scores = gradient @ values.mT
            of_scores.sub_((gradient * out).sum(-1, keepdim=True)).mul_(weights)
            of_content = (of_scores @ keys).view(heads, batch, queries, width)
            of_keys = (of_scores.mT @ content).mul_(ctx.scale)
            laid_out = _by_distance(of_scores, heads)
            of_position = (laid_out @ relative).view(heads, batch, queries, width)
            of_relative = (laid_out.mT @ position).mul_(ctx.scale)
        of_query = (of_content + of_position).mul_(ctx.scale)
        sums = [of.sum((1, 2)).mul_(ctx.scale) for of in (of_content, of_position)]
        states = [of.view(heads, batch, -1, width).transpose(0, 1) for of in (of_query, of_keys, of_values)]
        return *states, of_relative, *sums, None, None


def _by_distance(of_scores: torch.Tensor, heads: int) -> torch.Tensor:
    """Gradients by key `(heads * batch, queries, keys)` as gradients by distance `(heads, batch * queries, keys)`."""
    rows, queries, keys = of_scores.shape
    laid_out = of_scores.new_empty(rows, queries * (keys + 1))
    laid_out[:, :queries] = 0.0
    laid_out[:, queries:] = of_scores.flatten(1)
    return laid_out.view(heads, -1, keys + 1)[..., 1:]
