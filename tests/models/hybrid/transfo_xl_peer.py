"""Transformer-XL as transformers 4.36 computed it, in its layout: time first, einsum, the memory projected in every call.

Written from its equations, in our own words, for parity and as the benchmark's peer. Parameters have that version's names,
so that a state dict of it is a checkpoint of that layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, linear, log_softmax


class Shape(NamedTuple):
    """Fields of the old config, under its names."""

    vocab_size: int
    cutoffs: list[int]
    d_model: int
    d_embed: int
    n_head: int
    d_head: int
    d_inner: int
    n_layer: int
    div_val: int = 1
    mem_len: int = 0
    clamp_len: int = -1
    same_length: bool = False
    pre_lnorm: bool = False
    untie_r: bool = True
    tie_projs: list[bool] | None = None

    @property
    def edges(self) -> list[int]:
        """Where clusters begin, and the end."""
        return [0, *self.cutoffs, self.vocab_size]


def shift(x: torch.Tensor) -> torch.Tensor:
    """Scores `(queries, keys, batch, heads)` by distance as scores by key, by a column of zeros and another view."""
    queries, keys = x.shape[:2]
    padded = torch.cat([x.new_zeros(queries, 1, *x.shape[2:]), x], 1)
    return padded.view(keys + 1, queries, *x.shape[2:])[1:].view_as(x)


class Attention(nn.Module):
    """Relative attention of one layer; every call projects the memory and the distances again."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.n_head * shape.d_head
        self.shape = shape
        self.qkv_net = nn.Linear(shape.d_model, 3 * inner, bias=False)
        self.o_net = nn.Linear(inner, shape.d_model, bias=False)
        self.r_net = nn.Linear(shape.d_model, inner, bias=False)
        self.layer_norm = nn.LayerNorm(shape.d_model, eps=1e-5)
        if shape.untie_r:
            self.r_r_bias = nn.Parameter(torch.zeros(shape.n_head, shape.d_head))
            self.r_w_bias = nn.Parameter(torch.zeros(shape.n_head, shape.d_head))

    def forward(
        self, w: torch.Tensor, r: torch.Tensor, mask: torch.Tensor, mems: torch.Tensor | None, shared: Any
    ) -> torch.Tensor:
        """Run `(length, batch, d_model)`."""
        shape, length, batch = self.shape, w.shape[0], w.shape[1]
        heads = (shape.n_head, shape.d_head)
        states = w if mems is None else torch.cat([mems, w])
        projected = self.qkv_net(self.layer_norm(states) if shape.pre_lnorm else states)
        query, key, value = (x.view(-1, batch, *heads) for x in projected.chunk(3, -1))
        query, distances = query[-length:], self.r_net(r).view(-1, *heads)
        r_w_bias, r_r_bias = shared or (self.r_w_bias, self.r_r_bias)
        by_content = torch.einsum("ibnd,jbnd->ijbn", query + r_w_bias, key)
        by_position = shift(torch.einsum("ibnd,jnd->ijbn", query + r_r_bias, distances))
        scores = (by_content + by_position) * shape.d_head**-0.5
        scores = scores.masked_fill(mask[:, :, None, None], torch.finfo(scores.dtype).min)
        mixed = torch.einsum("ijbn,jbnd->ibnd", scores.softmax(1), value)
        attended = w + self.o_net(mixed.reshape(length, batch, -1))
        return attended if shape.pre_lnorm else self.layer_norm(attended)


class FeedForward(nn.Module):
    """Two layers and a ReLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.pre = shape.pre_lnorm
        drops = nn.Dropout(0.0), nn.Dropout(0.0)
        layers = nn.Linear(shape.d_model, shape.d_inner), nn.ReLU(), drops[0], nn.Linear(shape.d_inner, shape.d_model)
        self.CoreNet = nn.Sequential(*layers, drops[1])
        self.layer_norm = nn.LayerNorm(shape.d_model, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run `(length, batch, d_model)`."""
        return x + self.CoreNet(self.layer_norm(x)) if self.pre else self.layer_norm(x + self.CoreNet(x))


class Layer(nn.Module):
    """A block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dec_attn, self.pos_ff = Attention(shape), FeedForward(shape)


class Words(nn.Module):
    """Adaptive embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.emb_layers, self.emb_projs = shape, nn.ModuleList(), nn.ParameterList()
        parts = [(0, shape.vocab_size)] if shape.div_val == 1 else list(zip(shape.edges, shape.edges[1:], strict=False))
        for i, (low, high) in enumerate(parts):
            width = shape.d_embed // shape.div_val**i
            self.emb_layers.append(nn.Embedding(high - low, width))
            if shape.div_val > 1 or shape.d_embed != shape.d_model:
                self.emb_projs.append(nn.Parameter(torch.empty(shape.d_model, width)))
        self.parts = parts

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed `(length, batch)`."""
        out = 0.0
        for i, (low, high) in enumerate(self.parts):
            own = (ids >= low) & (ids < high)
            found = embedding((ids - low).clamp(0, high - low - 1), self.emb_layers[i].weight)
            found = linear(found, self.emb_projs[i]) if len(self.emb_projs) else found
            out = out + found * own.unsqueeze(-1)
        return out * self.shape.d_model**0.5


class Softmax(nn.Module):
    """Projected adaptive softmax."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.out_layers, self.out_projs = shape, nn.ModuleList(), nn.ParameterList()
        parts = len(shape.cutoffs) + 1
        if shape.cutoffs:
            self.cluster_weight = nn.Parameter(torch.zeros(len(shape.cutoffs), shape.d_embed))
            self.cluster_bias = nn.Parameter(torch.zeros(len(shape.cutoffs)))
        for i in range(parts):
            width = shape.d_embed // shape.div_val**i
            if shape.div_val > 1 or shape.d_embed != shape.d_model:
                self.out_projs.append(nn.Parameter(torch.empty(shape.d_model, width)))
            if shape.div_val > 1:
                self.out_layers.append(nn.Linear(width, shape.edges[i + 1] - shape.edges[i]))
        if shape.div_val == 1:
            self.out_layers.append(nn.Linear(shape.d_embed, shape.vocab_size))

    def _part(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.shape.div_val > 1:
            return self.out_layers[i].weight, self.out_layers[i].bias
        own = slice(self.shape.edges[i], self.shape.edges[i + 1])
        return self.out_layers[0].weight[own], self.out_layers[0].bias[own]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(..., vocab_size)`."""
        narrow = [hidden @ p for p in self.out_projs] or [hidden] * (len(self.shape.cutoffs) + 1)
        weight, bias = self._part(0)
        if not self.shape.cutoffs:
            return log_softmax(linear(narrow[0], weight, bias), -1)
        first = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        head = log_softmax(linear(narrow[0], *first), -1)
        start = self.shape.cutoffs[0]
        parts = [head[..., :start]]
        for i in range(1, len(self.shape.cutoffs) + 1):
            tail = log_softmax(linear(narrow[i], *self._part(i)), -1)
            parts.append(head[..., start + i - 1, None] + tail)
        return torch.cat(parts, -1)


class Body(nn.Module):
    """The model without its softmax."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.word_emb = shape, Words(shape)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.n_layer)])
        if not shape.untie_r:
            self.r_w_bias = nn.Parameter(torch.zeros(shape.n_head, shape.d_head))
            self.r_r_bias = nn.Parameter(torch.zeros(shape.n_head, shape.d_head))
        self.pos_emb = nn.Module()
        frequencies = 1 / 10000 ** (torch.arange(0, shape.d_model, 2, dtype=torch.float64) / shape.d_model)
        self.pos_emb.register_buffer("inv_freq", frequencies)


class Peer(nn.Module):
    """The language model.

    Args:
        shape: its sizes.
        seed: of its weights.
        scale: standard deviation of its weights.
    """

    def __init__(self, shape: Shape, seed: int = 0, scale: float = 0.1) -> None:
        super().__init__()
        self.shape, self.transformer, self.crit = shape, Body(shape), Softmax(shape)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                centre = 1.0 if name.endswith("layer_norm.weight") else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + centre)
        for i, layer in enumerate(self.crit.out_layers):
            layer.weight = self.transformer.word_emb.emb_layers[i].weight
        ties = shape.tie_projs or [False] + [True] * len(shape.cutoffs)
        projections = self.transformer.word_emb.emb_projs
        for i in range(len(self.crit.out_projs)):
            if ties[i]:
                self.crit.out_projs[i] = projections[0 if shape.div_val == 1 else i]

    def config(self) -> dict[str, Any]:
        """The content of that version's config.json."""
        ties = self.shape.tie_projs or [False] + [True] * len(self.shape.cutoffs)
        known = {**self.shape._asdict(), "tie_projs": ties}
        extra = {"adaptive": True, "attn_type": 0, "tie_word_embeddings": True, "eos_token_id": 0, "tie_weight": True}
        return {"model_type": "transfo-xl", "architectures": ["TransfoXLLMHeadModel"], **known, **extra}

    def hidden(
        self, ids: torch.Tensor, mems: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Last hidden states `(length, batch, d_model)` of ids `(batch, length)`, and the new memories."""
        shape, body, w = self.shape, self.transformer, self.transformer.word_emb(ids.t())
        length = ids.shape[1]
        if mems is None and shape.mem_len:
            mems = [w.new_zeros(shape.mem_len, ids.shape[0], shape.d_model) for _ in body.layers]
        held = mems[0].shape[0] if mems else 0
        keys = held + length
        mask = torch.ones(length, keys, dtype=torch.bool).triu(1 + held)
        if shape.same_length:
            beyond = keys - shape.mem_len
            mask |= torch.ones(length, keys, dtype=torch.bool).tril(-(length - beyond if beyond > 0 else length))
        positions = torch.arange(keys - 1, -1, -1.0, dtype=w.dtype)
        if shape.clamp_len > 0:
            positions = positions.clamp(max=shape.clamp_len)
        angles = torch.outer(positions, body.pos_emb.inv_freq)
        r = torch.cat([angles.sin(), angles.cos()], -1).to(w.dtype)
        shared = None if shape.untie_r else (body.r_w_bias, body.r_r_bias)
        new = []
        for i, layer in enumerate(body.layers):
            past = mems[i] if mems else None
            if mems:
                new.append(torch.cat([mems[i], w])[-shape.mem_len :].detach())
            w = layer.pos_ff(layer.dec_attn(w, r, mask, past, shared))
        return w, new

    def forward(
        self, ids: torch.Tensor, mems: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Log-probabilities `(batch, length, vocab_size)` of the next words, and the new memories."""
        hidden, mems = self.hidden(ids, mems)
        return self.crit(hidden.transpose(0, 1)), mems

    def loss(
        self, ids: torch.Tensor, mems: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Mean loss of the next words inside the segment, and the new memories."""
        found, mems = self(ids, mems)
        return cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), mems
