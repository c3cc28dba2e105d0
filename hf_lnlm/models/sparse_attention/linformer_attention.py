"""Linformer's attention, and the causal variant by segments.

Glossary (paper symbol: variable): n: positions, k: slots; E, F: `key_projection`, `value_projection`; E K: `slot_keys`.

Complexity: O(length * slots) time and memory; the causal variant O(length * (segment_size + length *
segment_summaries / segment_size)), its cached steps O(length).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ...nn.effective_weight import unwrapped
from ...nn.masks import continuing_tokens
from ...ops.sparse_attention.reference import masked_attention_weights
from .attention import AttentionPlan, in_rows
from .cache import SparseAttentionCacheLayer
from .configuration_linformer import LinformerConfig
from .linformer_projection import LearnedProjection, TokenPlan, WindowProjection, build_projection

Projection = LearnedProjection | WindowProjection

PIECE_TOKENS = 1024
"""Tokens taken at once through what treats every token alike (a tuning value): what is made in between then fits a
processor's cache and memory that is used again, where that of a long text is fetched from the system each time."""


def in_pieces(function: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """Apply a function of single tokens to `(batch, length, width)`, on a CPU a piece of the text at a time."""
    pieces = states.shape[0] * states.shape[1] // PIECE_TOKENS
    if states.device.type != "cpu" or pieces < 2 or _is_traced():
        return function(states)
    return torch.cat([function(piece) for piece in states.chunk(pieces, dim=1)], dim=1)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def attend_slots(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    dropout: float,
    dense: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention over few keys.

    Args:
        query: `(batch, heads, length, head_dim)`.
        key: `(batch, heads, slots, head_dim)`.
        value: as `key`.
        visible: bool, broadcastable to `(batch, heads, length, slots)`; None for all. Every query sees at least one.
        dropout: probability of dropping an attention weight.
        dense: compute by the eager implementation.

    Returns:
        `(batch, length, heads * head_dim)` and, if dense, the weights `(batch, heads, length, slots)`.
    """
    if not dense:
        out = scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2), None
    seen = torch.ones((), dtype=torch.bool, device=query.device) if visible is None else visible
    weights = masked_attention_weights(query, key, seen, query.shape[-1] ** -0.5)
    weights = drop(weights, dropout, training=dropout > 0.0)
    return (weights @ value).transpose(1, 2).flatten(2), weights


class LinformerAttention(nn.Module):
    """softmax(Q (E K)^T / sqrt(d)) (F V), followed by the output projection, residual and norm of BERT.

    Where heads share E, it acts on the hidden states first, E (x W) = (E x) W, which costs less.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: LinformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.sharing, self.paper_order = config.sharing, config.bias_order == "paper"
        self.attention_dropout = config.attention_dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.build(config)

    def build(self, config: LinformerConfig) -> None:
        """Make the projections that this layer owns."""
        if config.sharing != "layerwise":
            self.key_projection = build_projection(config, self.layer_idx)
        if config.sharing in ("none", "headwise"):
            self.value_projection = build_projection(config, self.layer_idx)

    def split(self, states: torch.Tensor) -> torch.Tensor:
        """Split `(batch, length, width)` into `(batch, heads, length, head_dim)`."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: TokenPlan,
        shared: Projection | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over `(batch, length, hidden_size)`.

        Args:
            hidden_states: the layer's input.
            plan: of this forward pass.
            shared: the model's projection, with `sharing="layerwise"`.
            past_key_values: not used: a bidirectional model has no past.

        Returns:
            the same shape, and if wanted P F `(batch, heads, length, length)`, P the softmax over slots: the factor
            of each token's value in each output. Its rows need not add up to 1.
        """
        occupied = plan.occupied(hidden_states)
        if self.sharing == "none":
            slot_keys = self._project_heads(self.key, self.key_projection, hidden_states, occupied, plan)
            slot_values = self._project_heads(self.value, self.value_projection, hidden_states, occupied, plan)
            filled = unwrapped(self.key_projection).filled(occupied)
        else:
            slot_keys, slot_values, filled = self._project_shared(hidden_states, occupied, plan, shared)
        dropout = self.attention_dropout if self.training else 0.0
        visible = None if filled is None or (plan.real is None and not plan.moved) else filled[:, None, None, :]
        if not plan.dense:
            return in_pieces(lambda x: self._attend(x, slot_keys, slot_values, visible, dropout), hidden_states), None
        query = self.split(self.query(hidden_states))
        out, weights = attend_slots(query, slot_keys, slot_values, visible, dropout, True)
        if plan.weights and weights is not None:
            out, weights = self._through_tokens(weights, hidden_states, occupied, plan, shared)
        weights = weights if plan.weights else None
        return self.norm(hidden_states + self.dropout(self.dense(out))), weights

    def _attend(
        self,
        hidden: torch.Tensor,
        slot_keys: torch.Tensor,
        slot_values: torch.Tensor,
        visible: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        """From tokens to tokens, given the slots: what a query sees depends on the row alone."""
        out, _ = attend_slots(self.split(self.query(hidden)), slot_keys, slot_values, visible, dropout, False)
        return self.norm(hidden + self.dropout(self.dense(out)))

    def _through_tokens(
        self,
        weights: torch.Tensor,
        hidden: torch.Tensor,
        occupied: torch.Tensor,
        plan: TokenPlan,
        shared: Projection | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same output from P F and the tokens' values, so that the returned weights are part of the graph."""
        over_tokens = weights @ self._slot_values_of_tokens(occupied, plan, shared)
        values = self.split(self.value(hidden))
        if self.paper_order:
            return (over_tokens @ values).transpose(1, 2).flatten(2), over_tokens
        bias = self.split(_bias_of(self.value, hidden).view(1, 1, -1))
        out = over_tokens @ (values - bias) + weights.sum(-1, keepdim=True) * bias
        return out.transpose(1, 2).flatten(2), over_tokens

    def _slot_values_of_tokens(
        self, occupied: torch.Tensor, plan: TokenPlan, shared: Projection | None
    ) -> torch.Tensor:
        """F as it applies to this batch: how much of each token's value is in each slot, `(batch, heads or 1,
        slots, length)`."""
        batch, length = plan.positions.shape
        tokens = torch.eye(length, dtype=occupied.dtype, device=occupied.device).expand(batch, -1, -1)
        tokens = plan.by_position(tokens)
        if self.sharing == "none":
            heads = tokens.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
            return self.value_projection(heads, occupied.unsqueeze(1))
        project: Projection = self.key_projection if shared is None else shared
        project = self.value_projection if self.sharing == "headwise" else project
        return project(tokens, occupied).unsqueeze(1)

    def _project_shared(
        self, hidden: torch.Tensor, occupied: torch.Tensor, plan: TokenPlan, shared: Projection | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """E and F act on the hidden states; E = F costs one product instead of two."""
        project: Projection = self.key_projection if shared is None else shared
        tokens = plan.by_position(hidden)
        for_key = for_value = project(tokens, occupied)
        value_project = project
        if self.sharing == "headwise":
            value_project = self.value_projection
            for_value = value_project(tokens, occupied)
        slot_keys = self._with_bias(self.key, for_key, project, occupied)
        slot_values = self._with_bias(self.value, for_value, value_project, occupied)
        return self.split(slot_keys), self.split(slot_values), unwrapped(project).filled(occupied)

    def _with_bias(
        self, linear: nn.Module, slots: torch.Tensor, project: Projection, occupied: torch.Tensor
    ) -> torch.Tensor:
        """(E x) W + b, or E(xW + b) = (E x) W + (E 1) b."""
        projected = linear(slots)
        if not self.paper_order:
            return projected
        return projected + (project(occupied, occupied) - 1.0) * _bias_of(linear, slots)

    def _project_heads(
        self, linear: nn.Module, project: Projection, hidden: torch.Tensor, occupied: torch.Tensor, plan: TokenPlan
    ) -> torch.Tensor:
        """One matrix for each head: it acts on the projected heads."""
        bias = _bias_of(linear, hidden)
        states = linear(hidden) if self.paper_order else linear(hidden) - bias
        slots = project(self.split(plan.by_position(states)), occupied.unsqueeze(1))
        return slots if self.paper_order else slots + self.split(bias.view(1, 1, -1))


def _bias_of(linear: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """The bias `(width,)` by a call of the module, so that adapters and offloading hooks have their say."""
    return linear(like.new_zeros(1, like.shape[-1]))[0]


class LinformerSegmentAttention(LinformerAttention):
    """The causal variant: exact attention within a query's own segment, summaries of every completed segment.

    A summary is a learned mixture of a segment's keys (E) or values (F), the same for every segment. Since only
    completed segments are seen through their summaries, no information flows backwards.
    """

    def build(self, config: LinformerConfig) -> None:
        """Make E and F over the positions of a segment; `sharing` "none" has one for each head, else heads share."""
        self.segment, summaries = config.segment
        heads = config.num_attention_heads if config.sharing == "none" else 1
        sizes = (self.segment, summaries, heads)
        self.segment_key_projection = LearnedProjection(*sizes)
        self.segment_value_projection = LearnedProjection(*sizes)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        plan: AttentionPlan,
        shared: Projection | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over `(batch, length, hidden_size)`; see `LinformerAttention.forward`."""
        heads = [self.split(linear(hidden_states)) for linear in (self.query, self.key, self.value)]
        layer: Any = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        layer = SparseAttentionCacheLayer() if layer is None else layer
        past = layer.seen_tokens > 0
        if plan.dense and plan.documents is not None:
            raise ValueError("packed documents need the default attention implementation and no output_attentions")
        layer.extend(heads[1], heads[2], continuing_tokens(plan.real, plan.documents))
        dropout = self.attention_dropout if self.training else 0.0
        if past or plan.dense:
            at = layer.positions[:, -heads[0].shape[2] :], layer.positions
            out, weights = self._masked(heads[0], layer.keys, layer.values, *at, dropout, plan)
        else:
            states = heads[0], heads[1], heads[2]
            rows = in_rows(lambda q, k, v: self._by_segment(q, k, v, dropout), states, plan.segments.layout)
            out, weights = rows.transpose(1, 2).flatten(2), None
        return self.norm(hidden_states + self.dropout(self.dense(out))), weights if plan.weights else None

    def _summaries(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum up `(batch, heads, segments, segment, head_dim)` as `(batch, heads, segments * summaries, head_dim)`."""
        keys, values = (
            project(x.transpose(1, 2)).transpose(1, 2).flatten(2, 3)
            for project, x in ((self.segment_key_projection, key), (self.segment_value_projection, value))
        )
        return keys, values

    def _by_segment(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        """Rows of tokens without a past: segments side by side, each against itself and the summaries before it."""
        length, size = query.shape[2], self.segment
        query, key, value = (pad(x, (0, 0, 0, -length % size)).unflatten(2, (-1, size)) for x in (query, key, value))
        count = query.shape[2]
        own = torch.ones(size, size, dtype=torch.bool, device=query.device).tril().expand(count, -1, -1)
        summaries = self._summaries(key, value)
        slots = summaries[0].shape[2] // count
        segment = torch.arange(count, device=query.device)
        earlier = (segment.repeat_interleave(slots) < segment.unsqueeze(1)).unsqueeze(1).expand(-1, size, -1)
        keys, values = (
            torch.cat([x, s.unsqueeze(2).expand(-1, -1, count, -1, -1)], dim=3)
            for x, s in zip((key, value), summaries, strict=True)
        )
        mask = torch.cat([own, earlier], dim=2)
        out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
        return out.flatten(2, 3)[:, :, :length]

    def _masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_positions: torch.Tensor,
        key_positions: torch.Tensor,
        dropout: float,
        plan: AttentionPlan,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same by logical positions under one mask: for padding, caches and tracing."""
        count = -(-key.shape[2] // self.segment)
        summaries = self._summaries(*(self._by_position(x, key_positions, count) for x in (key, value)))
        own = query_positions.div(self.segment, rounding_mode="floor").unsqueeze(2)
        near = key_positions.div(self.segment, rounding_mode="floor").unsqueeze(1) == own
        near = near & (key_positions.unsqueeze(1) <= query_positions.unsqueeze(2)) & (key_positions >= 0).unsqueeze(1)
        segment = torch.arange(count, device=query.device).repeat_interleave(summaries[0].shape[2] // count)
        visible = torch.cat([near, (segment < own).expand(near.shape[0], near.shape[1], -1)], dim=2)
        visible = visible | (query_positions < 0).unsqueeze(2)  # padded queries look anywhere: nothing reads them
        keys, values = torch.cat([key, summaries[0]], dim=2), torch.cat([value, summaries[1]], dim=2)
        out, found = attend_slots(query, keys, values, visible.unsqueeze(1), dropout, plan.dense)
        if found is not None and plan.weights:
            entries = key.shape[2]
            tokens = torch.eye(entries, dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
            tokens = self._by_position(tokens, key_positions, count)
            found = found[..., :entries] + found[..., entries:] @ self._summaries(tokens, tokens)[1]
            out = (found @ value).transpose(1, 2).flatten(2)
        return out, found

    def _by_position(self, states: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
        """Lay entries out as `(batch, heads, count segments, segment, width)` by position; zeros where there is
        none."""
        places = count * self.segment
        index = torch.where(positions < 0, places, positions)[:, None, :, None].expand_as(states)
        room = states.new_zeros(*states.shape[:2], places + 1, states.shape[3])
        return room.scatter(2, index, states)[:, :, :-1].unflatten(2, (count, self.segment))


class LinformerLayer(GradientCheckpointingLayer):
    """Attention and MLP, each followed by residual and norm, as in BERT.

    Args:
        config: the model's configuration.
        layer_idx: which layer, from 0.
    """

    def __init__(self, config: LinformerConfig, layer_idx: int) -> None:
        super().__init__()
        attention = LinformerSegmentAttention if config.is_decoder else LinformerAttention
        self.attention = attention(config, layer_idx)
        width = int(config.intermediate_size or 4 * config.hidden_size)
        self.intermediate = nn.Linear(config.hidden_size, width)
        self.output = nn.Linear(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: Any,
        shared: nn.Module | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """Run the layer over `(batch, length, hidden_size)`; see `LinformerAttention.forward`."""
        hidden_states, _ = self.attention(hidden_states, plan, shared, past_key_values)
        return in_pieces(self._transform, hidden_states)

    def _transform(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden + self.dropout(self.output(self.activation(self.intermediate(hidden)))))
