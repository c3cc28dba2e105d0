"""Transformer-XL's layers: what one call's queries may see, attention with relative positions, and the block around it."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad
from transformers.modeling_layers import GradientCheckpointingLayer

from ...nn.inputs import Batch
from ...nn.masks import continuing_tokens
from ...nn.ragged import RowLayout, gather_heads, scatter_heads
from ...ops.relative_attention import relative_attention
from ...ops.relative_attention.reference import relative_attention_weights
from .configuration_transfo_xl import TransformerXLConfig
from .segment_memory import News, Reach, SegmentMemoryLayer

Biases = tuple[torch.Tensor, torch.Tensor]


class SegmentPlan(NamedTuple):
    """What every layer of one forward pass needs to know about the segment and the memory before it.

    Attributes:
        unseen: `(rows, 1, queries, keys)` or `(1, 1, queries, keys)` bool, true where a query must not look; None for
            nowhere.
        distance: `(batch, queries, keys)` how far keys lie before queries, of a dense plan; None where columns tell.
        layout: rows of real tokens, one a document; None if they are the batch's.
        source: `(rows,)` the row of the batch whose memory each row has; None without a layout.
        begun: `(rows,)` rows whose memory is the initial one although the batch's row has another; None for none.
        news: what is remembered of this segment, and of the memory.
        weights: attention weights are wanted.
    """

    unseen: torch.Tensor | None
    distance: torch.Tensor | None = None
    layout: RowLayout | None = None
    source: torch.Tensor | None = None
    begun: torch.Tensor | None = None
    news: News = News()
    weights: bool = False

    def span(self, columns: int, length: int) -> int:
        """Distances there are from the last query to the first column of the memory, both counted.

        Args:
            columns: of the memory.
            length: of the segment.
        """
        return columns + (length if self.layout is None else self.layout.gather_index.shape[1])


def plan_segment(
    batch: Batch, memory: SegmentMemoryLayer, reach: Reach, zeros: bool, dense: bool, weights: bool
) -> SegmentPlan:
    """Work out the plan of one forward pass.

    Args:
        batch: the inputs.
        memory: of the first layer; the others' have the same columns.
        reach: how far back a query looks.
        zeros: whether a document begins with a memory of zeros.
        dense: whether to compute under a dense mask, all rows as they are.
        weights: whether attention weights are wanted.

    Raises:
        ValueError: a dense plan, a memory of zeros and documents that begin inside a cached sequence.
    """
    segments, columns = batch.segments, memory.columns
    documents = None if segments.starts is None else segments.starts.long().cumsum(1)
    kept = continuing_tokens(segments.mask, documents)
    fresh = None
    if documents is not None:
        real = torch.ones_like(documents, dtype=torch.bool) if segments.mask is None else segments.mask
        fresh = (documents * real).amax(1) > 0
    news, carried = News(kept, fresh), batch.past > 0
    if dense:
        if documents is not None and zeros and carried:
            raise ValueError(
                "a document cannot begin inside a cached sequence with mem_init='zeros' where attention weights are wanted "
                "or the model is traced"
            )
        apart = documents if not zeros else None
        return _dense_plan(batch, memory.counted(), documents, apart, columns, reach)._replace(
            news=news, weights=weights
        )
    layout = segments.in_rows().layout
    counted = memory.counted()
    if layout is None:
        unseen = _unseen_columns(batch.hidden.shape[1], columns, reach, batch.hidden.device)
        return SegmentPlan(_with_memory(unseen, counted, batch.hidden.shape[1]), news=news)
    rows, length = layout.gather_index.shape
    source = layout.gather_index[:, 0] // batch.hidden.shape[1]
    goes_on = torch.zeros(rows, dtype=torch.bool, device=source.device)
    goes_on[layout.first_row[layout.first_row >= 0]] = True
    counted = None if counted is None else counted[source]
    begun = None
    if columns and not bool(goes_on.all()):
        if zeros:
            begun = ~goes_on if carried else None
        else:
            everything = torch.ones(rows, columns, dtype=torch.bool, device=source.device)
            counted = (everything if counted is None else counted) & goes_on.unsqueeze(1)
    unseen = _with_memory(_unseen_columns(length, columns, reach, source.device), counted, length)
    return SegmentPlan(unseen, layout=layout, source=source, begun=begun, news=news)


def _unseen_columns(length: int, columns: int, reach: Reach, device: torch.device) -> torch.Tensor | None:
    """`(length, columns + length)` true at later keys and, at the same length, at those too far back; None for nowhere."""
    if length == 1 and not (reach.same_length and columns >= reach.mem_len):
        return None
    unseen = torch.ones(length, columns + length, dtype=torch.bool, device=device)
    unseen = unseen.triu(columns + 1)
    if reach.same_length and columns + length > reach.mem_len:
        unseen |= torch.ones_like(unseen).tril(columns - reach.mem_len)
    return unseen


def _with_memory(unseen: torch.Tensor | None, counted: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """`(rows or 1, 1, length, keys)` of what columns hide, and the memory's columns that don't count."""
    unseen = None if unseen is None else unseen[None, None]
    if counted is None:
        return unseen
    empty = pad(~counted, (0, length))[:, None, None]
    return empty if unseen is None else unseen | empty


def _dense_plan(
    batch: Batch,
    counted: torch.Tensor | None,
    documents: torch.Tensor | None,
    apart: torch.Tensor | None,
    columns: int,
    reach: Reach,
) -> SegmentPlan:
    """Distances over real tokens of each row, of the memory's columns too; `apart` are documents that don't share it."""
    rows, length = batch.hidden.shape[:2]
    everything = batch.hidden.new_ones(rows, length, dtype=torch.bool)
    real = everything if batch.segments.mask is None else batch.segments.mask
    place = real.long().cumsum(1) - 1
    same = everything.unsqueeze(2) & everything.unsqueeze(1)
    if documents is not None:
        first = batch.segments.starts & real if batch.segments.starts is not None else ~everything
        place = place - torch.where(first, place, 0).cummax(1).values
        same = documents.unsqueeze(2) == documents.unsqueeze(1)
    before = torch.arange(-columns, 0, device=real.device).expand(rows, columns)
    distance = place.unsqueeze(2) - torch.cat([before, place], 1).unsqueeze(1)
    past = batch.hidden.new_ones(rows, columns, dtype=torch.bool) if counted is None else counted
    seen_past = past.unsqueeze(1).expand(rows, length, columns)
    if apart is not None:
        seen_past = seen_past & (apart == 0).unsqueeze(2)
    seen = torch.cat([seen_past, same & real.unsqueeze(1)], 2) & (distance >= 0) & real.unsqueeze(2)
    if reach.same_length:
        seen = seen & (distance < reach.mem_len)
    return SegmentPlan(~seen.unsqueeze(1), distance)


def distance_encodings(span: int, width: int, clamp_len: int | None, like: torch.Tensor) -> torch.Tensor:
    """Return R of the distances `span - 1` down to 0, `(span, width)`: sines, then cosines (Dai et al. 2019, appendix B).

    Args:
        span: number of distances.
        width: of an encoding, even.
        clamp_len: largest distance that is told apart, or None.
        like: a tensor of the type and device wanted.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    distances = torch.arange(span - 1, -1, -1, dtype=dtype, device=like.device)
    if clamp_len is not None:
        distances = distances.clamp(max=clamp_len)
    frequencies = 1 / 10000 ** (torch.arange(0, width, 2, dtype=dtype, device=like.device) / width)
    angles = torch.outer(distances, frequencies)
    return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)


class RelativeBiases(nn.Module):
    """The vectors u and v that stand for a query where it only asks for content, or only for a distance.

    Args:
        heads: number of heads.
        width: of a head.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.content_bias = nn.Parameter(torch.empty(heads, width))
        self.position_bias = nn.Parameter(torch.empty(heads, width))

    def forward(self, like: torch.Tensor) -> Biases:
        """Return u and v, `(heads, width)` each, in the type of `like`."""
        return self.content_bias.to(like.dtype), self.position_bias.to(like.dtype)


class RelativeAttention(nn.Module):
    """Multi-head attention over a segment and the memory before it, with a residual connection and a norm.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        heads, self.head_dim = config.num_attention_heads, int(config.head_dim or 1)
        inner = heads * self.head_dim
        self.q_net = nn.Linear(config.hidden_size, inner, bias=False)
        self.kv_net = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.r_net = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_net = nn.Linear(inner, config.hidden_size, bias=False)
        self.biases = RelativeBiases(heads, self.head_dim) if config.untie_r else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm, self.attention_dropout = config.pre_norm, config.attention_dropout
        self.scale, self.backend = self.head_dim**-0.5, config.backend

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: SegmentPlan,
        encodings: torch.Tensor | None,
        shared: Biases | None,
        past: torch.Tensor | None,
        memory: SegmentMemoryLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layer.

        Args:
            hidden_states: `(batch, length, hidden_size)`.
            plan: of this forward pass.
            encodings: `(distances, hidden_size)`; None if the memory has them, projected.
            shared: u and v of all layers; None where each has its own.
            past: `(batch, columns, hidden_size)` the memory; None without one.
            memory: which keeps keys and values; None in training, which makes them of `past` anew.

        Returns:
            `(batch, length, hidden_size)` and the weights `(batch, heads, length, keys)` if wanted.
        """
        normed = self.norm(hidden_states) if self.pre_norm else hidden_states
        query, key, value = self._heads(self.q_net(normed), 1)[0], *self._keys_and_values(normed, past, memory)
        relative = self._relative(encodings, memory, hidden_states.shape[0])
        biases = shared if self.biases is None else self.biases(query)
        if biases is None:
            raise ValueError("a layer without biases of its own needs those of the model, got None")
        mixed, weights = self._attend((query, key, value), relative, biases, plan)
        attended = hidden_states + self.dropout(self.o_net(mixed.transpose(1, 2).flatten(2)))
        return (attended if self.pre_norm else self.norm(attended)), weights

    def _heads(self, states: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """Split `(batch, length, parts * heads * head_dim)` into `parts` times `(batch, heads, length, head_dim)`."""
        return states.unflatten(-1, (parts, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def _keys_and_values(
        self, normed: torch.Tensor, past: torch.Tensor | None, memory: SegmentMemoryLayer | None
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values of the memory and the segment."""
        if past is not None and (memory is None or memory.keys is None):
            before = self.norm(past) if self.pre_norm else past
            if memory is None:
                return self._heads(self.kv_net(torch.cat([before, normed], 1)), 2)
            for name, states in zip(("keys", "values"), self._heads(self.kv_net(before), 2), strict=True):
                memory.extend(name, states)
        now = self._heads(self.kv_net(normed), 2)
        if memory is None:
            return now
        return memory.extend("keys", now[0]), memory.extend("values", now[1])

    def _relative(self, encodings: torch.Tensor | None, memory: SegmentMemoryLayer | None, rows: int) -> torch.Tensor:
        """Projected encodings `(heads, distances, head_dim)`, kept by the memory if there is one."""
        if encodings is None:
            if memory is None or memory.relative is None:
                raise ValueError("encodings of the distances are needed, got None")
            return memory.relative[0]
        relative = self.r_net(encodings).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        if memory is not None:
            memory.keep_relative(relative, rows)
        return relative

    def initial(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return one column of a memory of zeros: `hidden` `(1, 1, width)`, `keys`, `values` `(1, heads, 1, head_dim)`."""
        zeros = like.new_zeros(1, 1, like.shape[-1])
        keys, values = self._heads(self.kv_net(self.norm(zeros) if self.pre_norm else zeros), 2)
        return {"hidden": zeros, "keys": keys, "values": values}

    def _attend(
        self, heads: tuple[torch.Tensor, ...], relative: torch.Tensor, biases: Biases, plan: SegmentPlan
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend with queries, keys and values `(batch, heads, positions, head_dim)`."""
        dropout = self.attention_dropout if self.training else 0.0
        if plan.distance is not None:
            relative = relative[:, relative.shape[1] - heads[1].shape[2] :]
            weights = relative_attention_weights(
                heads[0], heads[1], relative, biases, plan.unseen, self.scale, plan.distance
            )
            return drop(weights, dropout, training=dropout > 0.0) @ heads[2], weights if plan.weights else None
        options: Any = {"unseen": plan.unseen, "scale": self.scale, "dropout": dropout, "backend": self.backend}
        if plan.layout is None:
            return relative_attention(heads[0], heads[1], heads[2], relative, biases, **options), None
        if not len(plan.layout.lengths):
            return torch.zeros_like(heads[0]), None
        rows = self._in_rows(heads, plan, plan.layout)
        return scatter_heads(relative_attention(*rows, relative, biases, **options), plan.layout), None

    def _in_rows(
        self, heads: tuple[torch.Tensor, ...], plan: SegmentPlan, layout: RowLayout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, and keys and values with the memory before them, each document in a row of its own."""
        query, *states = heads
        columns = states[0].shape[2] - query.shape[2]
        first = None if plan.begun is None else self.initial(self.norm.weight)
        rows = []
        for name, held in zip(("keys", "values"), states, strict=True):
            now = gather_heads(held[:, :, columns:], layout.gather_index)
            past = held[:, :, :columns][plan.source]
            if first is not None and plan.begun is not None:
                past = torch.where(plan.begun[:, None, None, None], first[name], past)
            rows.append(torch.cat([past, now], 2))
        return gather_heads(query, layout.gather_index), rows[0], rows[1]


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between, a residual connection and a norm.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        width = int(config.intermediate_size or 4 * config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)
        self.pre_norm = config.pre_norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform `(batch, length, hidden_size)`."""
        inner = self.fc1(self.norm(hidden_states) if self.pre_norm else hidden_states)
        out = hidden_states + self.dropout(self.fc2(self.dropout(inner.relu())))
        return out if self.pre_norm else self.norm(out)


class TransformerXLLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward layer.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.attention = RelativeAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: SegmentPlan,
        encodings: torch.Tensor | None,
        shared: Biases | None,
        past: torch.Tensor | None,
        memory: SegmentMemoryLayer | None,
    ) -> torch.Tensor:
        """Run the block over `(batch, length, hidden_size)`; see `RelativeAttention.forward` for the arguments."""
        return self.feed_forward(self.attention(hidden_states, plan, encodings, shared, past, memory)[0])
