"""LSTM and GRU weights of plain torch, to and from ours; exact, since both order their gates alike.

* `from_torch_rnn`, `to_torch_rnn`: a state dict of `nn.LSTM` or `nn.GRU` (any layers, one or two directions).
* `from_word_language_model`, `to_word_language_model`: a state dict of PyTorch's word_language_model example (`encoder`,
  `rnn`, `decoder`).
* `torch_rnn`, `word_language_model`: the same as models, their sizes told from the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..models.recurrent.configuration_rnn import RNNConfig
from ..models.recurrent.modeling_rnn import RNNForCausalLM, RNNModel
from .weights import StateDict, filled

_TORCH = re.compile(r"(?P<part>weight|bias)_(?P<kind>ih|hh)_l(?P<layer>\d+)(?P<reverse>_reverse)?$")
_OURS = re.compile(
    r"(?P<prefix>.*?)layers\.(?P<layer>\d+)\.(?P<direction>forwards|backwards)\."
    r"(?P<gates>input|recurrent)_gates\.(?P<part>weight|bias)$"
)


def from_torch_rnn(state_dict: StateDict, prefix: str = "") -> StateDict:
    """Rename a state dict of `nn.LSTM` or `nn.GRU` to the names of `RNNModel`'s layers.

    Args:
        state_dict: `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0`, ... Without biases ours are zero.
        prefix: put before each name: `""` for `RNNModel`, `"model."` for a model with a head.

    Returns:
        `layers.0.forwards.input_gates.weight`, ...; the same tensors.

    Raises:
        ValueError: a name is not one of nn.LSTM's or nn.GRU's; projections (`weight_hr_l0`) have no counterpart.

    >>> from torch import nn
    >>> sorted(from_torch_rnn(nn.LSTM(4, 4).state_dict()))[:2]
    ['layers.0.forwards.input_gates.bias', 'layers.0.forwards.input_gates.weight']
    """
    renamed: StateDict = {}
    for name, tensor in state_dict.items():
        match = _TORCH.match(name)
        if match is None:
            raise ValueError(f"{name!r} is not a weight of nn.LSTM or nn.GRU without projections")
        direction = "backwards" if match["reverse"] else "forwards"
        gates = "input_gates" if match["kind"] == "ih" else "recurrent_gates"
        renamed[f"{prefix}layers.{match['layer']}.{direction}.{gates}.{match['part']}"] = tensor
    for name in [name for name in renamed if name.endswith(".weight")]:
        weight = renamed[name]
        renamed.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(weight.shape[0]))
    return renamed


def to_torch_rnn(state_dict: StateDict) -> StateDict:
    """Rename the recurrent weights of one of our models to those of `nn.LSTM` or `nn.GRU`; other weights are left out."""
    renamed: StateDict = {}
    for name, tensor in state_dict.items():
        match = _OURS.match(name)
        if match is not None:
            kind = "ih" if match["gates"] == "input" else "hh"
            suffix = "_reverse" if match["direction"] == "backwards" else ""
            renamed[f"{match['part']}_{kind}_l{match['layer']}{suffix}"] = tensor
    return renamed


def from_word_language_model(state_dict: StateDict) -> StateDict:
    """Rename a state dict of PyTorch's word_language_model example (LSTM or GRU) to that of `RNNForCausalLM`.

    The config it fits: `embedding_size` and `hidden_size` as trained with `--emsize` and `--nhid`, `embedding_scale=1`,
    `project_embeddings=False`, and `tie_word_embeddings=False`: a tied example's decoder has a bias, and its weight loads
    as a copy.

    Args:
        state_dict: `encoder.weight`, `rnn.*`, `decoder.weight`, `decoder.bias`.

    Returns:
        The state dict of `RNNForCausalLM`; the same tensors.

    Raises:
        ValueError: a weight is missing or unknown; the message names it.
    """
    fixed = {
        "encoder.weight": "model.embed_tokens.weight",
        "decoder.weight": "lm_head.weight",
        "decoder.bias": "lm_head.bias",
    }
    missing = sorted(set(fixed) - set(state_dict))
    if missing:
        raise ValueError(f"not a word_language_model state dict: {', '.join(missing)} missing")
    recurrent = {name.removeprefix("rnn."): t for name, t in state_dict.items() if name not in fixed}
    return {new: state_dict[old] for old, new in fixed.items()} | from_torch_rnn(recurrent, "model.")


def to_word_language_model(state_dict: StateDict, scale: float = 1.0) -> StateDict:
    """Rename the state dict of an `RNNForCausalLM` to that of PyTorch's word_language_model example.

    Args:
        state_dict: of the model.
        scale: its `config.input_scale`, which the example's embeddings have in them.

    Raises:
        ValueError: the model has a part that the example lacks; names it.
    """
    fixed = {
        "model.embed_tokens.weight": "encoder.weight",
        "lm_head.weight": "decoder.weight",
        "lm_head.bias": "decoder.bias",
    }
    recurrent = {f"rnn.{name}": tensor for name, tensor in to_torch_rnn(state_dict).items()}
    strange = [name for name in state_dict if name not in fixed and not _OURS.match(name)]
    missing = [name for name in fixed if name not in state_dict]
    if strange or missing or any(name.endswith("_reverse") for name in recurrent):
        odd = ", ".join(strange or missing) or "two directions"
        raise ValueError(
            f"the example has embeddings, one-directional layers and a decoder, and no other part; got {odd}"
        )
    found = {new: state_dict[old] for old, new in fixed.items()} | recurrent
    return found if scale == 1 else found | {"encoder.weight": found["encoder.weight"] * scale}


def torch_rnn(state: StateDict, fields: Mapping[str, Any]) -> RNNModel:
    """The base model that computes what an `nn.LSTM` or `nn.GRU` does; its embeddings are new.

    Args:
        state: of the module; a prefix that all names share is dropped.
        fields: of `RNNConfig`; `vocab_size` must be among them.

    Raises:
        ValueError: a name is another module's, or the shapes don't fit.
    """
    if "vocab_size" not in fields:
        raise ValueError(
            "the module has no embeddings: say how many tokens there are, vocab_size=N, or give a tokenizer"
        )
    shared = {name.rpartition(".")[0] for name in state}
    bare = {name.rpartition(".")[2]: tensor for name, tensor in state.items()} if len(shared) == 1 else state
    config = RNNConfig(**{**_sizes(from_torch_rnn(bare)), **fields})
    return filled(RNNModel(config), from_torch_rnn(bare), _dtype(bare), fresh=["embed_tokens"]).eval()


def word_language_model(state: StateDict, fields: Mapping[str, Any]) -> RNNForCausalLM:
    """The language model that a state dict of the word_language_model example holds.

    Args:
        state: of the example's RNNModel.
        fields: of `RNNConfig`.

    Raises:
        ValueError: a weight is missing or unknown, or the shapes don't fit.
    """
    found = from_word_language_model(state)
    inner = {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.layers.")}
    config = RNNConfig(**{**_sizes(inner), "vocab_size": len(state["encoder.weight"]), **fields})
    return filled(RNNForCausalLM(config), found, _dtype(state)).eval()


def _sizes(layers: StateDict) -> dict[str, Any]:
    """Fields of the config that has layers of these shapes."""
    first, hidden = (layers[f"layers.0.forwards.{kind}_gates.weight"] for kind in ("input", "recurrent"))
    gates = hidden.shape[0] // hidden.shape[1]
    if gates not in (3, 4):
        raise ValueError(
            f"a layer must be an LSTM's (4 gates) or a GRU's (3), got {gates}: a plain RNN has no counterpart"
        )
    return {
        "cell_type": "lstm" if gates == 4 else "gru",
        "embedding_size": first.shape[1],
        "hidden_size": hidden.shape[1],
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in layers),
        "bidirectional": any(".backwards." in name for name in layers),
        "project_embeddings": False,
        "embedding_scale": 1.0,
        "tie_word_embeddings": False,
    }


def _dtype(state: StateDict) -> Any:
    return next(iter(state.values())).dtype
