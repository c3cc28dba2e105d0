"""fairseq's `lstm` translation models (`lstm`, `lstm_wiseman_iwslt_de_en`, `lstm_luong_wmt_en_de`) to ours.

fairseq's LSTM decoder always feeds the attentional vector of the step before, scores by a product with one matrix
(`general`), and begins with the encoder's final states, through one linear map each where the widths differ.

| fairseq | ours |
|---|---|
| `encoder.embed_tokens.weight`, `decoder.embed_tokens.weight` | the same, under `model.` |
| `encoder.lstm.{weight,bias}_{ih,hh}_lN[_reverse]` | `model.encoder.layers.N.{forwards,backwards}.*_gates.*` |
| `decoder.encoder_{hidden,cell}_proj.*` | `model.decoder.bridge.maps.{0,1}.*` |
| `decoder.layers.N.{weight,bias}_{ih,hh}` | `model.decoder.walk.layers.N.forwards.{input,recurrent}_gates.*` |
| `decoder.attention.input_proj.weight` (of the decoder's state) | `model.decoder.walk.attention.key.weight`, transposed |
| `decoder.attention.output_proj.weight` | `model.decoder.walk.vector.combine.weight` |
| `decoder.additional_fc.*`, `decoder.fc_out.*` | `lm_head.*`, both maps multiplied into one |

Ids are those of fairseq's dictionary: 0 begins, 1 pads, 2 ends, 3 is unknown; the decoder begins with 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..models.recurrent.configuration_seq2seq import RNNSeq2SeqConfig
from ..models.recurrent.modeling_seq2seq import RNNSeq2SeqForConditionalGeneration
from .recurrent import from_torch_rnn
from .weights import StateDict, filled

SOURCE, TARGET = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
_CELL = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<part>weight|bias)_(?P<kind>ih|hh)$")
_FIXED = {
    "decoder.encoder_hidden_proj.weight": "bridge.maps.0.weight",
    "decoder.encoder_hidden_proj.bias": "bridge.maps.0.bias",
    "decoder.encoder_cell_proj.weight": "bridge.maps.1.weight",
    "decoder.encoder_cell_proj.bias": "bridge.maps.1.bias",
    "decoder.attention.output_proj.weight": "walk.vector.combine.weight",
}
_READ = (SOURCE, TARGET, "decoder.attention.input_proj.weight")
_OUTPUT = re.compile(r"decoder\.(fc_out|additional_fc)\.(weight|bias)$")
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def fairseq_lstm(state: StateDict, fields: Mapping[str, Any]) -> RNNSeq2SeqForConditionalGeneration:
    """The model that a state dict of fairseq's LSTM translation model holds.

    Args:
        state: of the model, named as fairseq names it.
        fields: of `RNNSeq2SeqConfig` beyond what the shapes tell: dropouts, other special ids.

    Raises:
        ValueError: a weight is missing, unknown, or has no counterpart; names it.
    """
    _check(state)
    encoder = {name.removeprefix("encoder.lstm."): t for name, t in state.items() if name.startswith("encoder.lstm.")}
    found = from_torch_rnn(encoder, "model.encoder.") | {f"model.{name}": state[name] for name in (SOURCE, TARGET)}
    for name, tensor in state.items():
        cell = _CELL.match(name)
        if cell is not None:
            gates = "input_gates" if cell["kind"] == "ih" else "recurrent_gates"
            found[f"model.decoder.walk.layers.{cell['layer']}.forwards.{gates}.{cell['part']}"] = tensor
        elif name in _FIXED:
            found[f"model.decoder.{_FIXED[name]}"] = tensor
    key = state.get("decoder.attention.input_proj.weight")
    if key is not None:  # fairseq maps h_t to the source's width, ours the source to h_t's: the same product
        found["model.decoder.walk.attention.key.weight"] = key.mT.contiguous()
    found |= _output_layer(state)
    config = RNNSeq2SeqConfig(**{**_fields(state, encoder, "lm_head.weight" not in found), **SPECIAL, **fields})
    model = RNNSeq2SeqForConditionalGeneration(config)
    return filled(model, found, state[TARGET].dtype).eval()


def _check(state: StateDict) -> None:
    """Refuse what is no LSTM translation model of fairseq, and the parts of one that have no counterpart."""
    wanted = (SOURCE, TARGET, "encoder.lstm.weight_ih_l0", "decoder.layers.0.weight_ih", "decoder.layers.0.weight_hh")
    if missing := [name for name in wanted if name not in state]:
        raise ValueError(f"not the state dict of fairseq's LSTM translation model: {', '.join(missing)} missing")
    if adaptive := [name for name in state if name.startswith("decoder.adaptive_softmax.")]:
        raise ValueError(f"fairseq's adaptive softmax has no counterpart, got {adaptive[0]}")
    strange = [
        name
        for name in state
        if not (name in _FIXED or name in _READ or name.startswith("encoder.lstm."))
        and not (_CELL.match(name) or _OUTPUT.match(name))
    ]
    if strange:
        raise ValueError(f"{strange[0]} is no weight of fairseq's LSTM translation model")
    widths = [state[name].shape[1] for name in (SOURCE, TARGET)]
    if widths[0] != widths[1]:
        raise ValueError(f"source and target embeddings must be equally wide, got {widths[0]} and {widths[1]}")


def _fields(state: StateDict, encoder: StateDict, tied: bool) -> dict[str, Any]:
    """Fields of the config that has weights of these shapes."""
    source, target = state[SOURCE], state[TARGET]
    hidden, width = state["decoder.layers.0.weight_hh"].shape[1], target.shape[1]
    inputs = state["decoder.layers.0.weight_ih"].shape[1]
    if inputs != width + hidden:
        raise ValueError(f"decoder.layers.0.weight_ih must read {width} + {hidden} features, got {inputs}")
    mapped = "decoder.encoder_hidden_proj.weight" in state
    layers = [int(name[len("weight_ih_l") :]) for name in encoder if re.fullmatch(r"weight_ih_l\d+", name)]
    cells = [int(found["layer"]) for found in map(_CELL.match, state) if found is not None]
    return {
        "vocab_size": target.shape[0],
        "source_vocab_size": None if source.shape[0] == target.shape[0] else source.shape[0],
        "share_embeddings": source.shape == target.shape and torch.equal(source, target),
        "tie_word_embeddings": tied,
        "embedding_size": width,
        "project_embeddings": False,
        "hidden_size": hidden,
        "num_hidden_layers": 1 + max(cells),
        "encoder_layers": 1 + max(layers),
        "encoder_hidden_size": encoder["weight_hh_l0"].shape[1],
        "bidirectional": "weight_ih_l0_reverse" in encoder,
        "bridge": "linear" if mapped else "copy",
        "attention": "general" if "decoder.attention.input_proj.weight" in state else "none",
        "input_feeding": True,
    }


def _output_layer(state: StateDict) -> StateDict:
    """`lm_head` of the maps after the decoder; nothing where the output is the target's embedding alone."""
    between = [state.get(f"decoder.additional_fc.{part}") for part in ("weight", "bias")]
    weight, bias = (state.get(f"decoder.fc_out.{part}") for part in ("weight", "bias"))
    if between[0] is None and weight is None:
        return {}
    weight = state[TARGET] if weight is None else weight
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    if between[0] is not None:
        wide, shift = (part.double() if part is not None else weight.new_zeros(()).double() for part in between)
        exact = weight.double()
        bias = (bias.double() + (exact @ shift if shift.dim() else 0)).to(bias.dtype)
        weight = (exact @ wide).to(weight.dtype)
    return {"lm_head.weight": weight, "lm_head.bias": bias}
