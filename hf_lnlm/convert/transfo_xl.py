"""Transformer-XL checkpoints of transformers (to 4.36) and of kimiyoung/transformer-xl's PyTorch code, and their words.

The two have the same layers under the same names; the second has no prefix, begins with an empty memory, and numbers the
clusters of its softmax from the end. Tied weights may be there twice (`.bin`) or once (`.safetensors`).

* `transfo_xl`: a source → our language model.
* `transfo_xl_from_state`: the same of a state dict.
* `transfo_xl_words`: the words of a source's vocabulary as a tokenizer, read without unpickling anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..data.tokenizers import word_tokenizer
from ..models.hybrid.configuration_transfo_xl import TransformerXLConfig
from ..models.hybrid.modeling_transfo_xl import TransformerXLForCausalLM
from .plain_pickle import read_plain_pickle
from .sources import Source, read_tensors
from .weights import StateDict, filled

_PREFIX = "transformer."
_MODULE = "model.pt"
_WORDS = ("vocab.txt", "vocab.pkl", "vocab.bin", "vocab-cache.bin")
_FIELDS = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "d_embed": "embedding_size", "n_head": "num_attention_heads",
    "d_head": "head_dim", "d_inner": "intermediate_size", "n_layer": "num_hidden_layers", "mem_len": "mem_len",
    "same_length": "same_length", "untie_r": "untie_r", "pre_lnorm": "pre_norm", "dropout": "dropout",
    "dropatt": "attention_dropout", "layer_norm_epsilon": "layer_norm_epsilon", "init_std": "initializer_range",
    "eos_token_id": "eos_token_id", "bos_token_id": "bos_token_id", "pad_token_id": "pad_token_id",
}  # fmt: skip
"""Fields of the old config → ours."""
_MUST_BE = {"attn_type": 0, "sample_softmax": -1, "ext_len": 0, "adaptive": True}
_LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<part>dec_attn|pos_ff)\.(?P<rest>.+)$")
_PARTS = {
    "o_net.weight": "attention.o_net.weight", "r_net.weight": "attention.r_net.weight",
    "r_w_bias": "attention.biases.content_bias", "r_r_bias": "attention.biases.position_bias",
    "CoreNet.0.weight": "feed_forward.fc1.weight", "CoreNet.0.bias": "feed_forward.fc1.bias",
    "CoreNet.3.weight": "feed_forward.fc2.weight", "CoreNet.3.bias": "feed_forward.fc2.bias",
}  # fmt: skip


def transfo_xl(source: Source) -> TransformerXLForCausalLM:
    """The language model that a folder or file holds.

    Raises:
        ValueError: a pickled module, weights that are missing or unknown, or a config that has no counterpart.
    """
    whole = source.path / _MODULE
    if source.weights is None and whole.is_file():
        return transfo_xl_from_state(read_tensors(whole), source.config, source.fields)
    return transfo_xl_from_state(source.state, source.config, source.fields)


def transfo_xl_from_state(
    state: StateDict, config: Mapping[str, Any], fields: Mapping[str, Any]
) -> TransformerXLForCausalLM:
    """The language model of a state dict of either project.

    Args:
        state: name → tensor.
        config: the content of its config.json; empty for kimiyoung's, whose sizes are the weights' and whose clusters, if
            they stand in one table, memory and norms `fields` must tell.
        fields: of `TransformerXLConfig`, which win.

    Raises:
        ValueError: weights are missing or unknown, or the config has no counterpart here.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    original = not any(name.startswith(_PREFIX) for name in state)
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    sizes = _sizes_of_weights(state, original) | _sizes_of_config(config)
    clusters = 1 + len(sizes.get("adaptive_cutoffs") or fields.get("adaptive_cutoffs") or [])
    softmax = _Softmax(state, clusters, original)
    ours = TransformerXLConfig(**{**sizes, **softmax.fields(sizes), **fields})
    weights = _layers(state, ours) | softmax.embeddings() | softmax.head(ours)
    dtype = next(iter(weights.values())).dtype
    left = sorted(set(state) - softmax.read - _layer_names(state) - {"r_w_bias", "r_r_bias"})
    if left:
        raise ValueError(f"weights that no Transformer-XL has: {', '.join(left[:4])}")
    return filled(TransformerXLForCausalLM(ours), weights, dtype).eval()


def _sizes_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ours that an old config tells."""
    for name, wanted in _MUST_BE.items():
        value = config.get(name, wanted)
        if value != wanted and not (name == "sample_softmax" and value <= 0):
            raise ValueError(f"{name} must be {wanted}: nothing else has a counterpart here, got {value!r}")
    sizes: dict[str, Any] = {ours: config[old] for old, ours in _FIELDS.items() if config.get(old) is not None}
    if config:
        clamp = config.get("clamp_len", 0)
        sizes |= {"clamp_len": clamp if clamp > 0 else None, "mem_init": "zeros"}
        if config.get("cutoffs"):
            narrowing = config.get("div_val", 1)
            sizes |= {"adaptive_cutoffs": list(config["cutoffs"]), "adaptive_div_value": narrowing}
    return sizes


def _sizes_of_weights(state: StateDict, original: bool) -> dict[str, Any]:
    """Fields of ours that the shapes tell."""
    layers = [int(match["layer"]) for name in state if (match := _LAYER.match(name))]
    tables = sorted(name for name in state if re.match(r"word_emb\.emb_layers\.\d+\.weight$", name))
    bias = next((state[name] for name in state if name.endswith("r_w_bias")), None)
    if not layers or not tables or bias is None:
        raise ValueError("weights of a Transformer-XL are missing: layers, word_emb.emb_layers or r_w_bias")
    rows = [len(state[name]) for name in tables]
    widths = [state[name].shape[1] for name in tables]
    first = state["layers.0.pos_ff.CoreNet.0.weight"]
    found: dict[str, Any] = {
        "vocab_size": sum(rows), "hidden_size": first.shape[1], "intermediate_size": first.shape[0],
        "embedding_size": widths[0], "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": bias.shape[0], "head_dim": bias.shape[1], "untie_r": "r_w_bias" not in state,
    }  # fmt: skip
    if len(tables) > 1:
        ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        found |= {"adaptive_cutoffs": ends[:-1], "adaptive_div_value": widths[0] // widths[1]}
    if original:
        found |= {"mem_init": "empty", "same_length": False}  # as its scripts train
    return found


def _layer_names(state: StateDict) -> set[str]:
    return {name for name in state if _LAYER.match(name)}


def _layers(state: StateDict, config: TransformerXLConfig) -> StateDict:
    """Weights of the layers and the shared biases, under our names."""
    found: StateDict = {}
    queries = config.num_attention_heads * int(config.head_dim or 1)
    for name in _layer_names(state):
        match = _LAYER.match(name)
        if match is None:
            continue
        ours, rest = f"model.layers.{match['layer']}.", match["rest"]
        if rest == "qkv_net.weight":
            found[f"{ours}attention.q_net.weight"] = state[name][:queries]
            found[f"{ours}attention.kv_net.weight"] = state[name][queries:]
        elif rest.startswith("layer_norm."):
            part = "attention" if match["part"] == "dec_attn" else "feed_forward"
            found[f"{ours}{part}.norm.{rest.removeprefix('layer_norm.')}"] = state[name]
        elif rest in _PARTS:
            found[ours + _PARTS[rest]] = state[name]
        else:
            raise ValueError(f"weights that no Transformer-XL has: {name}")
    if not config.untie_r:
        shared = {"content_bias": "r_w_bias", "position_bias": "r_r_bias"}
        found |= {f"model.biases.{ours}": state[name] for ours, name in shared.items()}
    return found


class _Softmax:
    """Embeddings and softmax of a state dict, whichever of their tied names it holds.

    Args:
        state: names without prefix.
        clusters: number of parts of the vocabulary, the shortlist among them.
        original: whether the clusters' scores stand in reverse order.
    """

    def __init__(self, state: StateDict, clusters: int, original: bool) -> None:
        self.state, self.clusters, self.original = state, clusters, original
        self.read: set[str] = set()
        self.tables = sum(name.startswith("word_emb.emb_layers.") for name in state)
        self.projected = any("_projs." in name for name in state)

    def _get(self, *names: str) -> torch.Tensor:
        """The first of the names that is there."""
        self.read.update(names)
        found = next((self.state[name] for name in names if name in self.state), None)
        if found is None:
            raise ValueError(f"{names[0]} is missing")
        return found

    def _embedding(self, part: int) -> torch.Tensor:
        return self._get(f"word_emb.emb_layers.{part}.weight", f"crit.out_layers.{part}.weight")

    def _output(self, part: int) -> torch.Tensor:
        return self._get(f"crit.out_layers.{part}.weight", f"word_emb.emb_layers.{part}.weight")

    def _inner(self, part: int) -> str:
        """Name of the embeddings' projection of a part."""
        return f"word_emb.emb_projs.{part if self.tables > 1 else 0}"

    def _outer(self, part: int) -> torch.Tensor:
        return self._get(f"crit.out_projs.{part}", self._inner(part))

    def fields(self, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Which weights are tied, told by whether they are equal."""
        tied = all(torch.equal(self._embedding(i), self._output(i)) for i in range(self.tables))
        found: dict[str, Any] = {"tie_word_embeddings": tied, "loss_head": "full" if self.clusters == 1 else "adaptive"}
        if self.clusters > 1:
            found.setdefault("adaptive_div_value", sizes.get("adaptive_div_value", 1))
        if self.clusters > 1 and tied and self.projected:
            same = [torch.equal(self._get(self._inner(i)), self._outer(i)) for i in range(self.clusters)]
            found["tie_projections"] = same
        return found

    def embeddings(self) -> StateDict:
        """The embeddings under our names."""
        if self.tables == 1:
            found = {"model.embed_tokens.weight": self._embedding(0)}
            return found | ({"model.embedding_projection.weight": self._get(self._inner(0))} if self.projected else {})
        found = {f"model.embed_tokens.layers.{i}.weight": self._embedding(i) for i in range(self.tables)}
        for i in range(self.tables):
            found[f"model.embed_tokens.projections.{i}.weight"] = self._get(self._inner(i))
        return found

    def head(self, config: TransformerXLConfig) -> StateDict:
        """The softmax under our names."""
        if self.clusters == 1:
            return self._full_head(config.tie_word_embeddings)
        found: StateDict = {}
        for i in range(self.tables):
            found[f"lm_head.layers.{i}.weight"] = self._output(i)
            found[f"lm_head.layers.{i}.bias"] = self._get(f"crit.out_layers.{i}.bias")
        if self.projected:
            found |= {f"lm_head.projections.{i}.weight": self._outer(i) for i in range(self.clusters)}
        for part in ("weight", "bias"):
            scores = self._get(f"crit.cluster_{part}")
            found[f"lm_head.clusters.{part}"] = scores.flip(0) if self.original else scores
        return found

    def _full_head(self, tied: bool) -> StateDict:
        found = {"lm_head.bias": self._get("crit.out_layers.0.bias"), "lm_head.weight": self._output(0)}
        if self.projected and tied:
            found["output_projection.weight"] = self._outer(0).t()
        elif self.projected:  # without ties ours goes from the hidden states to the words at once
            found["lm_head.weight"] = self._output(0) @ self._outer(0).t()
        return {name: tensor.contiguous() for name, tensor in found.items()}


def transfo_xl_words(source: Source) -> PreTrainedTokenizerFast | None:
    """The words of a source's vocabulary as a tokenizer that splits at white space, as its corpus was written.

    `vocab.txt` has a word a line, in the order of the ids. `vocab.pkl` and `vocab.bin` are the old tokenizer's fields; only
    plain data is read of them.

    Args:
        source: a folder or file; words lie beside a file.

    Returns:
        The tokenizer, or None if there is no vocabulary.

    Raises:
        ValueError: a vocabulary that holds anything but words in order.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    path = next((folder / name for name in _WORDS if (folder / name).is_file()), None)
    if path is None:
        return None
    if path.suffix == ".txt":
        words: Any = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        lower = False
    else:
        held = read_plain_pickle(path)
        words, lower = _listed(held, path), bool(held.get("lower_case"))
    wrong = next((i for i, word in enumerate(words) if not isinstance(word, str) or not word), None)
    if wrong is not None or len(set(words)) != len(words):
        what = f"word {wrong} is {words[wrong]!r}" if wrong is not None else "a word stands there twice"
        raise ValueError(f"{path} must hold each word once, in the order of the ids: {what}")
    return word_tokenizer(words, unknown=_found(words, "<unk>", "<UNK>"), end=_found(words, "<eos>"), lower=lower)


def _found(words: list[str], *candidates: str) -> str | None:
    return next((word for word in candidates if word in words), None)


def _listed(held: Any, path: Path) -> list[Any]:
    """Words in the order of the ids, from `idx2sym`, which `sym2idx` must not contradict."""
    words = held.get("idx2sym") if isinstance(held, dict) else None
    numbers = held.get("sym2idx") if isinstance(held, dict) else None
    if not isinstance(words, list) or not isinstance(numbers, dict):
        raise ValueError(f"{path} must hold the fields idx2sym (a list) and sym2idx of a word vocabulary")
    for number, word in enumerate(words):
        if not isinstance(word, str) or numbers.get(word) != number:
            raise ValueError(f"{path}: idx2sym[{number}] is {word!r}, which sym2idx says is {numbers.get(word)!r}")
    return words
