"""Stock checkpoints to and from the sparse-attention families.

* `linformer_from_stock`, `linformer_to_stock`: BERT and RoBERTa, every head that both sides have. Everything but E and F
  is copied. With `projection="mean_pool"` and k = n the result computes exactly what the stock model does, at every
  length and under padding; a learned E = I does so for inputs of full length. A smaller k is a start for fine-tuning.
* `linformer_checkpoint`: the same from folder to folder, tokenizer included.
* `gpt3_from_gpt2`, `gpt3_from_gpt_neo`: exact imports.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models import bert, roberta

from ..data.tokenizers import fit_length
from ..models.sparse_attention import configuration_gpt3, configuration_linformer, modeling_gpt3, modeling_linformer
from ..models.sparse_attention.linformer_projection import LearnedProjection
from .weights import StateDict, filled, renamed

INITIAL_PROJECTIONS = ("mean_pool", "identity", "random")
"""What a learned E and F start from: windows' means, I (k = n), or as a fresh model."""

_ENCODER = (
    (r"embeddings\.word_embeddings\.", "embed_tokens."),
    (r"embeddings\.position_embeddings\.", "embed_positions."),
    (r"embeddings\.token_type_embeddings\.", "embed_types."),
    (r"embeddings\.LayerNorm\.", "embedding_norm."),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"layers.\1.attention.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.dense."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.attention.norm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.intermediate."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.output."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.norm."),
)
_BERT_HEADS = (
    (r"^model\.pooler\.dense\.", "pooler.dense."),
    (r"^cls\.predictions\.transform\.dense\.", "transform.0."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "transform.2."),
    (r"^cls\.predictions\.decoder\.", "lm_head."),
)
_ROBERTA_HEADS = (
    (r"^model\.pooler\.dense\.", "pooler.dense."),
    (r"^classifier\.dense\.", "pooler.dense."),
    (r"^classifier\.out_proj\.", "classifier."),
    (r"^lm_head\.dense\.", "transform.0."),
    (r"^lm_head\.layer_norm\.", "transform.2."),
    (r"^lm_head\.decoder\.", "lm_head."),
)
_GPT = (
    (r"^transformer\.", "model."),
    (r"(^|\.)wte\.", r"\1embed_tokens."),
    (r"(^|\.)wpe\.", r"\1embed_positions."),
    (r"(^|\.)h\.(\d+)\.", r"\1layers.\2."),
    (r"(^|\.)ln_f\.", r"\1norm."),
    (r"\.attn\.attention\.out_proj\.", ".attn.c_proj."),
    (r"\.attn\.attention\.", ".attn."),
)
_UNSAVED = ("position_ids", "token_type_ids", "cls.predictions.bias", "lm_head.bias")
_HEADS = (
    "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice",
)  # fmt: skip
_SAME_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size",
    "hidden_act", "initializer_range", "tie_word_embeddings", "id2label", "label2id", "problem_type",
)  # fmt: skip
_OTHER_FIELDS = {
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "layer_norm_epsilon": "layer_norm_eps",
}
"""Field of ours → BERT's, where they are called otherwise."""
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def linformer_from_stock(model: PreTrainedModel, *, initial: str = "mean_pool", **overrides: Any) -> PreTrainedModel:
    """Make a Linformer of a BERT or RoBERTa model with the same head.

    Args:
        model: a stock `Bert…` or `Roberta…` model: base, MaskedLM, SequenceClassification, TokenClassification,
            QuestionAnswering or MultipleChoice.
        initial: what learned projections start from, one of `INITIAL_PROJECTIONS`.
        overrides: fields of `LinformerConfig`, such as `projected_size` and `sharing`.

    Returns:
        The Linformer, in the same dtype and mode.

    Raises:
        ValueError: the model is none of these, or `initial` does not fit the projection.
    """
    kind, head = _kind_and_head(model)
    if initial not in INITIAL_PROJECTIONS:
        raise ValueError(f"initial must be one of {', '.join(INITIAL_PROJECTIONS)}, got {initial!r}")
    config = linformer_config(model.config, **overrides)
    state = _to_ours(model.state_dict(), kind, head, model.config)
    ours = filled(getattr(modeling_linformer, f"Linformer{head}")(config), state, model.dtype, fresh=["projection"])
    for module in ours.modules():
        if isinstance(module, LearnedProjection) and initial != "random":
            _initialise(module, initial)
    return ours.train(model.training)


def linformer_checkpoint(
    source: str | Path, target: str | Path, *, initial: str = "mean_pool", **overrides: Any
) -> PreTrainedModel:
    """Convert a saved BERT or RoBERTa, with the head it was saved with, and copy its tokenizer.

    Args:
        source: folder or Hub name of a checkpoint in safetensors.
        target: folder to write.
        initial: what learned projections start from, one of `INITIAL_PROJECTIONS`.
        overrides: fields of `LinformerConfig`.

    Returns:
        The Linformer.

    Raises:
        ValueError: the checkpoint is of another model, or does not say its head.
    """
    head = (AutoConfig.from_pretrained(source).architectures or ["none"])[0]
    if not head.startswith(("Bert", "Roberta")) or not hasattr(transformers, head):
        raise ValueError(f"architectures of {source} must name a Bert… or Roberta… class, got {head}")
    stock = getattr(transformers, head).from_pretrained(source, use_safetensors=True)
    model = linformer_from_stock(stock, initial=initial, **overrides)
    model.save_pretrained(target)
    fit_length(AutoTokenizer.from_pretrained(source), model.config).save_pretrained(target)
    return model


def linformer_config(config: Any, **overrides: Any) -> configuration_linformer.LinformerConfig:
    """Translate the config of a BERT or RoBERTa model.

    Args:
        config: a `BertConfig` or `RobertaConfig`.
        overrides: fields of `LinformerConfig` that replace the translated ones.

    Raises:
        ValueError: the config is of another model type, or of a decoder.
    """
    if config.model_type not in ("bert", "roberta"):
        raise ValueError(f"model_type must be bert or roberta, got {config.model_type!r}")
    if getattr(config, "is_decoder", False):
        raise ValueError("is_decoder must be False, got True: a plain Linformer cannot be causal")
    classifier = getattr(config, "classifier_dropout", None)
    fields = {name: getattr(config, name, None) for name in (*_SAME_FIELDS, *_SPECIAL)}
    fields |= {ours: getattr(config, theirs) for ours, theirs in _OTHER_FIELDS.items()}
    fields |= {
        "max_position_embeddings": config.max_position_embeddings - _offset(config),
        "embedding_dropout": config.hidden_dropout_prob,
        "classifier_dropout": config.hidden_dropout_prob if classifier is None else classifier,
    }
    return configuration_linformer.LinformerConfig(**{**fields, **overrides})


def linformer_to_stock(model: PreTrainedModel, kind: str = "bert") -> PreTrainedModel:
    """Make a BERT or RoBERTa model of a Linformer with the same head; E and F are left behind.

    Args:
        model: a bidirectional Linformer.
        kind: `bert` or `roberta`.

    Returns:
        The stock model, in the same dtype and mode. Layers that a Linformer head lacks (a base model's pooler) are fresh.

    Raises:
        ValueError: the model is no bidirectional Linformer, or `kind` is neither.
    """
    if kind not in ("bert", "roberta"):
        raise ValueError(f"kind must be bert or roberta, got {kind!r}")
    head = type(model).__name__.removeprefix("Linformer")
    if model.config.model_type != "lnlm_linformer" or head not in _HEADS or model.config.is_decoder:
        raise ValueError(f"model must be a bidirectional Linformer with a head of BERT's, got {type(model).__name__}")
    config = _stock_config(model.config, kind)
    name = kind.capitalize() + head
    theirs = getattr(bert if kind == "bert" else roberta, name)(config)
    forward = _to_ours({key: key for key in theirs.state_dict()}, kind, head, config)
    ours = model.state_dict()
    state = {stock: ours[name] for name, stock in forward.items() if name in ours}
    table = next(key for key in state if key.endswith("position_embeddings.weight"))
    missing = state[table].new_zeros(_offset(config), config.hidden_size)
    state[table] = torch.cat([missing, state[table]])
    return filled(theirs, state, model.dtype, fresh=["pooler", *_UNSAVED]).train(model.training)


def _stock_config(config: Any, kind: str) -> Any:
    fields = {name: getattr(config, name) for name in (*_SAME_FIELDS, "max_position_embeddings", "classifier_dropout")}
    fields |= {theirs: getattr(config, ours) for ours, theirs in _OTHER_FIELDS.items()}
    fields |= {name: getattr(config, name) for name in _SPECIAL if getattr(config, name) is not None}
    stock = AutoConfig.for_model(kind, **fields)
    stock.max_position_embeddings += _offset(stock)
    return stock


def _offset(config: Any) -> int:
    """Rows of RoBERTa's position table before its first position: they belong to padding."""
    return config.pad_token_id + 1 if config.model_type == "roberta" else 0


def _kind_and_head(model: PreTrainedModel) -> tuple[str, str]:
    name = type(model).__name__
    for kind in ("bert", "roberta"):
        head = name.removeprefix(kind.capitalize())
        if model.config.model_type == kind and head in _HEADS:
            return kind, head
    raise ValueError(f"model must be one of Bert… or Roberta… with {', '.join(_HEADS)}, got {name}")


def _to_ours(state: dict[str, Any], kind: str, head: str, config: Any) -> dict[str, Any]:
    """Rename a stock state dict (or {name: name}) to the names of the Linformer with the same head."""
    heads = _BERT_HEADS if kind == "bert" else _ROBERTA_HEADS
    choice = ((r"^classifier\.", "choice."),) if head == "ForMultipleChoice" else ()
    ours: dict[str, Any] = {}
    for stock, tensor in state.items():
        name = renamed(stock, ((rf"^{kind}\.", "model."), *_ENCODER, *heads, *choice))
        if stock.endswith(_UNSAVED) or (head == "Model" and name.startswith("pooler.")):
            continue
        shifted = name.endswith("embed_positions.weight") and isinstance(tensor, torch.Tensor)
        ours[name] = tensor[_offset(config) :] if shifted else tensor
    return ours


@torch.no_grad()
def _initialise(projection: LearnedProjection, initial: str) -> None:
    positions, slots = projection.weight.shape[-2:]
    if initial == "identity":
        if positions != slots:
            raise ValueError(
                f"initial='identity' needs projected_size = max_position_embeddings = {positions}, got {slots}"
            )
        projection.weight.copy_(torch.eye(positions).to(projection.weight))
        return
    slot = torch.arange(positions) * slots // positions
    member = nn.functional.one_hot(slot, slots).to(projection.weight)
    projection.weight.copy_(member / member.sum(0))


def gpt3_from_gpt2(model: PreTrainedModel, **overrides: Any) -> PreTrainedModel:
    """Make a GPT-3 of a GPT-2; equal to it wherever no layer is banded or the text is no longer than the band.

    Args:
        model: a `GPT2Model`, `GPT2LMHeadModel` or `GPT2ForSequenceClassification`.
        overrides: fields of `GPT3Config`; all layers are dense unless `attention_layers` says otherwise.

    Raises:
        ValueError: the model is another, or uses an option that GPT-3 blocks lack.
    """
    config = model.config
    if config.model_type != "gpt2":
        raise ValueError(f"model_type must be gpt2, got {config.model_type!r}")
    if config.scale_attn_by_inverse_layer_idx or config.add_cross_attention:
        raise ValueError("scale_attn_by_inverse_layer_idx and add_cross_attention have no counterpart, got True")
    fields = {
        **_common_fields(config),
        "attention_layers": ["dense"] * config.n_layer,
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "scale_attention": config.scale_attn_weights,
        "embedding_dropout": config.embd_pdrop,
        "residual_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
    }
    state = {}
    for name, tensor in model.state_dict().items():
        transposed = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
        state[renamed(name, _GPT)] = tensor.T.contiguous() if transposed else tensor
    return _gpt3(model, {**fields, **overrides}, state)


def gpt3_from_gpt_neo(model: PreTrainedModel, **overrides: Any) -> PreTrainedModel:
    """Make a GPT-3 of a GPT-Neo; exact: global layers are dense, local ones banded with `window_size`.

    Args:
        model: a `GPTNeoModel`, `GPTNeoForCausalLM` or `GPTNeoForSequenceClassification`.
        overrides: fields of `GPT3Config`.

    Raises:
        ValueError: the model is another.
    """
    config = model.config
    if config.model_type != "gpt_neo":
        raise ValueError(f"model_type must be gpt_neo, got {config.model_type!r}")
    fields = {
        **_common_fields(config),
        "attention_layers": ["dense" if kind == "global" else "banded" for kind in config.attention_layers],
        "band_size": config.window_size,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "scale_attention": False,
        "attention_bias": False,
        "embedding_dropout": config.embed_dropout,
        "residual_dropout": config.resid_dropout,
        "attention_dropout": config.attention_dropout,
    }
    stock = model.state_dict()
    state = {
        renamed(name, _GPT): tensor
        for name, tensor in stock.items()
        if not re.search(r"\.(q|k|v)_proj\.|\.bias$", name)
    }
    state |= {renamed(n, _GPT): t for n, t in stock.items() if n.endswith(".bias") and not n.endswith("attention.bias")}
    for name in [name for name in stock if name.endswith("q_proj.weight")]:
        parts = [stock[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
        state[renamed(name.replace("q_proj", "c_attn"), _GPT)] = torch.cat(parts)
    return _gpt3(model, {**fields, **overrides}, state)


def _common_fields(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        "activation_function", "initializer_range", "tie_word_embeddings", "id2label", "label2id", "problem_type",
        "layer_norm_epsilon", *_SPECIAL,
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _gpt3(model: PreTrainedModel, fields: dict[str, Any], state: StateDict) -> PreTrainedModel:
    name = type(model).__name__
    heads = {"ForSequenceClassification": "GPT3ForSequenceClassification", "Model": "GPT3Model"}
    kind = "GPT3ForCausalLM" if name.endswith(("LMHeadModel", "ForCausalLM")) else None
    kind = kind or next((ours for suffix, ours in heads.items() if name.endswith(suffix)), None)
    if kind is None:
        raise ValueError(f"model must be a base, causal-LM or sequence-classification model, got {name}")
    ours = getattr(modeling_gpt3, kind)(configuration_gpt3.GPT3Config(**fields))
    return filled(ours, state, model.dtype, fresh=["lm_head"]).train(model.training)
