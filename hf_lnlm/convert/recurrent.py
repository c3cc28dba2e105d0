"""LSTM and GRU weights of plain torch, to and from ours; exact, since both order their gates alike.

* `from_torch_rnn`, `to_torch_rnn`: a state dict of `nn.LSTM` or `nn.GRU` (any layers, one or two directions).
* `from_word_language_model`: a state dict of PyTorch's word_language_model example (`encoder`, `rnn`, `decoder`).
"""

from __future__ import annotations

import re

import torch

StateDict = dict[str, torch.Tensor]

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

    The config it fits: `embedding_size` and `hidden_size` as trained with `--emsize` and `--nhid`,
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
