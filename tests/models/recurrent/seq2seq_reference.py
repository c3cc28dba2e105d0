"""A recurrent sequence-to-sequence model, equation by equation, one row and one step at a time, in float64.

References as in `modeling_seq2seq.py`: Luong, Pham and Manning 2015; Bahdanau, Cho and Bengio 2015.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def cell(kind: str, direction: Any, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One step of an LSTM or GRU."""
    inputs = direction.input_gates.weight @ x + direction.input_gates.bias
    hidden = direction.recurrent_gates.weight @ states[0] + direction.recurrent_gates.bias
    if kind == "gru":
        (ri, zi, ni), (rh, zh, nh) = inputs.chunk(3), hidden.chunk(3)
        z = torch.sigmoid(zi + zh)
        return ((1 - z) * torch.tanh(ni + torch.sigmoid(ri + rh) * nh) + z * states[0],)
    i, f, g, o = (inputs + hidden).chunk(4)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def embed(side: Any, i: int) -> Tensor:
    """Embedding of a token, as the first layer reads it."""
    vector, projection = side.embed_tokens.weight[i], side.embedding_projection
    return vector if projection is None else projection.weight @ vector


def encode(model: Any, ids: list[int]) -> tuple[Tensor, list[list[Tensor]]]:
    """Return the source's states, `(length, width)`, and each layer's final states."""
    config, encoder = model.config, model.encoder
    hidden, final = [embed(encoder, i) for i in ids], []
    for layer in encoder.layers:
        columns, ended = [], []
        for direction, step in ((layer.forwards, 1), (layer.backwards, -1)):
            if direction is None:
                continue
            states = tuple(hidden[0].new_zeros(config.encoder_hidden_size) for _ in config.state_names)
            outputs = []
            for x in hidden[::step]:
                states = cell(config.cell_type, direction, x, states)
                outputs.append(states[0])
            columns.append(outputs[::step])
            ended.append(states)
        hidden = [torch.cat(parts) for parts in zip(*columns, strict=True)]
        final.append([torch.cat(parts) for parts in zip(*ended, strict=True)])
    return torch.stack(hidden), final


def align(attention: Any, kind: str, h: Tensor, source: Tensor, window: int) -> Tensor:
    """Return the weights of the source's positions, `(source length,)`."""
    if kind in ("concat", "additive"):
        summed = [attention.query.weight @ h + attention.key.weight @ s for s in source]
        return torch.softmax(torch.stack([attention.energy.weight[0] @ torch.tanh(x) for x in summed]), 0)
    if kind == "dot":
        return torch.softmax(source @ h, 0)
    scores = torch.stack([h @ (attention.key.weight @ s) for s in source])
    if kind == "general":
        return torch.softmax(scores, 0)
    length = len(source)
    p = length / (1 + math.exp(-float(attention.centre.weight[0] @ torch.tanh(attention.position.weight @ h))))
    inside = [s for s in range(length) if abs(s - p) <= window]
    weights = torch.softmax(scores[inside], 0)
    found = torch.zeros_like(scores)
    for place, weight in zip(inside, weights, strict=True):
        found[place] = weight * math.exp(-((place - p) ** 2) / (2 * (window / 2) ** 2))
    return found


def run(model: Any, ids: list[int], decoder_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return attentional vectors `(length, hidden)` and alignments `(length, source length)` of an `RNNSeq2SeqModel`."""
    config, decoder = model.config, model.decoder
    source, final = encode(model, ids)
    states = []
    for layer in range(config.num_hidden_layers):
        ended = final[config.encoder_layer_beside(layer)]
        if config.bridge in ("linear", "tanh"):
            ended = [m.weight @ s + m.bias for m, s in zip(decoder.bridge.maps, ended, strict=True)]
        if config.bridge == "tanh":
            ended = [torch.tanh(s) for s in ended]
        if config.bridge == "zero":
            ended = [source.new_zeros(config.hidden_size) for _ in config.state_names]
        states.append(tuple(ended))
    fed, walk, outputs, weights = source.new_zeros(config.hidden_size), decoder.walk, [], []
    for i in decoder_ids:
        x, alignment = embed(decoder, i), None
        if config.attention == "additive":  # of the previous state, before the cell
            alignment = align(walk.attention, "additive", states[-1][0], source, config.local_window)
            x = torch.cat([x, alignment @ source])
        x = torch.cat([x, fed]) if config.input_feeding else x
        for number, layer in enumerate(walk.layers):
            states[number] = cell(config.cell_type, layer.forwards, x, states[number])
            x = states[number][0]
        if config.attention not in ("none", "additive"):
            alignment = align(walk.attention, config.attention, x, source, config.local_window)
        fed = x if alignment is None else torch.tanh(walk.vector.combine.weight @ torch.cat([alignment @ source, x]))
        outputs.append(fed)
        weights.append(source.new_zeros(len(source)) if alignment is None else alignment)
    return torch.stack(outputs), torch.stack(weights)
