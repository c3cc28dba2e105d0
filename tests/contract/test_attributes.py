"""What clients read of stock configs, models, caches and tokenizers is here too, or the table says why it isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import hf_lnlm
from hf_lnlm.nn.inputs import CACHE_FIELD

from .cases import Case, build, cases, token_ids

OTHER_NAMES = "GPT-2's or BERT's own name of a field or part that each family has under its paper's name"
NO_PART = "a switch or size of a part that not every family has: attention, MLP, segment types, a longest input"
NO_SUMMARY = "GPT-2's summary head for multiple choice, which no family has"
NO_ENCODER = "attention to another model's output, which no family has"
EXPLAINED = {
    **dict.fromkeys(
        [
            *("n_embd", "n_head", "n_inner", "n_layer", "n_positions", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
            *("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "layer_norm_epsilon"),
            *("activation_function", "hidden_act", "classifier_dropout"),
            *("transformer", "h", "wte", "wpe", "ln_f", "drop", "embed_dim", "bert", "cls", "encoder", "embeddings"),
            *("pooler", "score", "classifier"),
        ],
        OTHER_NAMES,
    ),
    **dict.fromkeys(
        [
            *("num_attention_heads", "intermediate_size", "max_position_embeddings", "type_vocab_size"),
            *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "is_decoder"),
        ],
        NO_PART,
    ),
    **dict.fromkeys(
        [f"summary_{end}" for end in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")], NO_SUMMARY
    ),
    "add_cross_attention": NO_ENCODER,
    "gradient_checkpointing": "held by the encoder inside; `is_gradient_checkpointing` and the methods tell and set it",
}
"""Public attribute of a stock object → why an object of ours need not have it."""

IN_TOKENIZER_JSON = {"do_lower_case", "strip_accents", "tokenize_chinese_chars"}
"""Settings of BERT's own normaliser; ours are read off `tokenizer.backend_tokenizer.normalizer`."""

SIZES = {"vocab_size": 61, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
GPT2 = transformers.GPT2Config(
    **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, bos_token_id=1, eos_token_id=2
)
BERT = transformers.BertConfig(**SIZES)
STOCK: dict[str, tuple[type, ...]] = {
    "AutoModel": (transformers.GPT2Model, transformers.BertModel),
    "AutoModelForCausalLM": (transformers.GPT2LMHeadModel,),
    "AutoModelForMaskedLM": (transformers.BertForMaskedLM,),
    "AutoModelForQuestionAnswering": (transformers.GPT2ForQuestionAnswering, transformers.BertForQuestionAnswering),
    "AutoModelForMultipleChoice": (transformers.BertForMultipleChoice,),
    "AutoModelForSequenceClassification": (
        transformers.GPT2ForSequenceClassification,
        transformers.BertForSequenceClassification,
    ),
    "AutoModelForTokenClassification": (
        transformers.GPT2ForTokenClassification,
        transformers.BertForTokenClassification,
    ),
}
every_case = pytest.mark.parametrize("case", cases(both_ways=False), ids=str)


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def missing(ours: Any, stock: Any) -> set[str]:
    return public(stock) - public(ours)


def test_what_stock_configs_and_models_have_is_here_or_explained():
    found: set[str] = set()
    for case in cases(both_ways=False):
        model = build(case)
        for stock_class in STOCK.get(case.auto, ()):
            stock = stock_class(GPT2 if stock_class.__name__.startswith("GPT2") else BERT)
            lacking = missing(model.config, stock.config) | missing(model, stock)
            assert not lacking - set(EXPLAINED), f"{case} lacks what {stock_class.__name__} has"
            found |= lacking
    assert found == set(EXPLAINED), "the table explains what isn't missing"


@every_case
def test_what_clients_read_of_a_model_answers(case: Case):
    model = build(case)
    for name in ("device", "dtype", "name_or_path", "dummy_inputs", "base_model", "is_gradient_checkpointing"):
        assert getattr(model, name) is not None, name
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.get_memory_footprint() >= 4 * model.num_parameters()
    assert model.get_input_embeddings().num_embeddings == model.config.get_text_config().vocab_size
    assert model.can_generate() is case.generates
    output = model.get_output_embeddings()
    assert (output is not None) is (case.generates or case.auto == "AutoModelForMaskedLM")
    copy = type(model.config).from_dict(model.config.to_dict())
    assert copy.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("case", cases(causal=True), ids=str)
def test_caches_have_what_stock_ones_have(case: Case):
    with torch.no_grad():
        own = build(case)(input_ids=token_ids(2, 3), use_cache=True)[CACHE_FIELD]
        stock = transformers.GPT2LMHeadModel(GPT2)(token_ids(2, 3), use_cache=True)[CACHE_FIELD]
    assert not missing(own, stock) | missing(own.layers[0], stock.layers[0])
    layer = own.layers[0]
    assert (layer.device, layer.dtype) == (torch.device("cpu"), torch.float32)
    layer.offload()
    layer.prefetch()
    assert own.get_seq_length() == 3
    own.reset()
    assert own.get_seq_length() == 0 and layer.device is None


@pytest.mark.parametrize("kind", ["byte", "char", "word", "protein"])
def test_tokenizers_have_what_stock_ones_have(kind: str):
    texts = None if kind in ("byte", "protein") else ["to be or not to be"]
    own = hf_lnlm.build_tokenizer(kind, texts)
    assert not missing(own, transformers.GPT2Tokenizer())
    assert missing(own, transformers.BertTokenizer()) == IN_TOKENIZER_JSON
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id"):
        assert isinstance(getattr(own, name), int), name
    assert own.is_fast and own.model_max_length and own.padding_side and own.all_special_tokens
