"""Tiny encoders of every kind that EncoderCNN is tested with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf

from hf_lnlm.models.hybrid.modeling_encoder_cnn import (
    EncoderCNNForSequenceClassification,
    EncoderCNNForTokenClassification,
)
from hf_lnlm.models.recurrent.configuration_rnn import RNNConfig
from hf_lnlm.models.sparse_attention.configuration_linformer import LinformerConfig
from hf_lnlm.models.state_space.configuration_ssm import SelectiveSSMConfig
from tests.contract.cases import add_noise

MODES = ("last", "last_n", "all_cls", "scalar_mix")
_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
_DEBERTA = _COMMON | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
STOCK: dict[str, Any] = {
    "bert": lambda: hf.BertConfig(**_COMMON),
    "roberta": lambda: hf.RobertaConfig(**_COMMON),
    "albert": lambda: hf.AlbertConfig(**_COMMON, embedding_size=8),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=61, dim=16, n_layers=3, n_heads=2, hidden_dim=24, dropout=0.0, attention_dropout=0.0
    ),
    "electra": lambda: hf.ElectraConfig(**_COMMON, embedding_size=8),
    "convbert": lambda: hf.ConvBertConfig(**_COMMON, embedding_size=8),
    "deberta": lambda: hf.DebertaConfig(**_DEBERTA, type_vocab_size=0),
    "deberta-v2": lambda: hf.DebertaV2Config(**_DEBERTA),
    "modernbert": lambda: hf.ModernBertConfig(
        **{name: value for name, value in _COMMON.items() if "dropout" not in name}, **_SPECIAL
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, dropout_rate=0.0, use_cache=False
    ),
}
OURS: dict[str, Any] = {
    "rnn": lambda: RNNConfig(vocab_size=61, hidden_size=16, num_hidden_layers=3, bidirectional=True),
    "linformer": lambda: LinformerConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, projected_size=8, embedding_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0,
    ),
    "ssm": lambda: SelectiveSSMConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=3, state_size=4, bidirectional="tied"
    ),
}  # fmt: skip
ENCODERS = STOCK | OURS


@cache
def config_of(name: str) -> Any:
    """The config of a tiny encoder."""
    return ENCODERS[name]()


@cache
def encoder_of(name: str) -> Any:
    """A tiny encoder with noise on its weights, as its own library builds it."""
    torch.manual_seed(0)
    return add_noise(hf.AutoModel.from_config(config_of(name)), 1).eval()


def classifier_on(name: str, mode: str = "last", **fields: Any) -> Any:
    """A sequence classifier on a tiny encoder, noise on the head too."""
    return _built(EncoderCNNForSequenceClassification, name, mode, **fields)


def tagger_on(name: str, mode: str = "last", **fields: Any) -> Any:
    """A token classifier on a tiny encoder."""
    return _built(EncoderCNNForTokenClassification, name, mode, **fields)


def _built(cls: Any, name: str, mode: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    given = {"num_labels": 3, "num_filters": 4, "filter_sizes": [1, 2, 3], "dropout": 0.0} | fields
    model = cls.from_encoder_pretrained(encoder_of(name), mode=mode, **given)
    for part in (model.base_model.window_head, model.classifier):
        add_noise(part, 2)
    if model.base_model.layer_mix is not None:
        add_noise(model.base_model.layer_mix, 3)
    return model
