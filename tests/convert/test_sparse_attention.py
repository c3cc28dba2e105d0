"""Stock BERT, RoBERTa, GPT-2 and GPT-Neo against their conversions, in float64."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from hf_lnlm.convert.sparse_attention import (
    gpt3_from_gpt2,
    gpt3_from_gpt_neo,
    linformer_checkpoint,
    linformer_config,
    linformer_from_stock,
    linformer_to_stock,
)
from hf_lnlm.data.tokenizers import build_tokenizer

LENGTH, VOCABULARY = 24, 40
ENCODER_HEADS = (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForMultipleChoice,
)


def noisy(model):
    """A fresh model with noise on every weight: a plain initialisation hides errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.double().eval()


def stock_encoder(kind, auto, **fields):
    torch.manual_seed(0)
    offset = 2 if kind == "roberta" else 0
    labels = 2 if auto is AutoModelForQuestionAnswering else 3
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=LENGTH + offset, type_vocab_size=2, num_labels=labels, pad_token_id=1, **fields,
    )  # fmt: skip
    return noisy(auto.from_config(config))


def outputs(model, inputs):
    found = model(**inputs)
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return torch.cat([found[name].flatten() for name in names if found.get(name) is not None])


def encoder_inputs(auto, length=LENGTH, padded=0):
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (2, length))
    mask = torch.ones_like(ids)
    types = torch.randint(0, 2, ids.shape)
    if padded:
        ids[0, -padded:], mask[0, -padded:] = 1, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if auto is AutoModelForMultipleChoice:
        return {name: torch.stack([x, x.flip(0)], dim=1) for name, x in inputs.items()}
    return inputs


@pytest.mark.parametrize("auto", ENCODER_HEADS)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_full_projection_equals_stock(kind, auto):
    stock = stock_encoder(kind, auto)
    inputs = encoder_inputs(auto)
    expected = outputs(stock, inputs)
    for order in ("fairseq", "paper"):
        for sharing in ("none", "headwise", "key_value", "layerwise"):
            fields = {"projected_size": LENGTH, "bias_order": order, "sharing": sharing}
            identity = linformer_from_stock(stock, initial="identity", **fields)
            assert (outputs(identity, inputs) - expected).abs().max() <= 1e-12
    pooled = linformer_from_stock(stock, projection="mean_pool", projected_size=LENGTH)
    for length, padded in ((LENGTH, 0), (LENGTH, 5), (17, 0), (17, 6)):
        shorter = encoder_inputs(auto, length, padded)
        real = shorter["attention_mask"].flatten().bool()
        ours, theirs = outputs(pooled, shorter), outputs(stock, shorter)
        if ours.numel() % real.numel() == 0 and auto not in (
            AutoModelForSequenceClassification,
            AutoModelForMultipleChoice,
        ):
            if auto is AutoModelForQuestionAnswering:
                real = real.repeat(2)
            ours, theirs = (x.view(real.numel(), -1)[real] for x in (ours, theirs))
        assert (ours - theirs).abs().max() <= 1e-12, (length, padded)


@pytest.mark.parametrize("auto", ENCODER_HEADS)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_there_and_back(kind, auto):
    stock = stock_encoder(kind, auto)
    back = linformer_to_stock(linformer_from_stock(stock, projected_size=6), kind)
    inputs = encoder_inputs(auto)
    if auto is AutoModel:
        back.pooler.load_state_dict(stock.pooler.state_dict())
    assert (outputs(back, inputs) - outputs(stock, inputs)).abs().max() <= 1e-12
    kept = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob", "initializer_range"),
        *("attention_probs_dropout_prob", "tie_word_embeddings", "id2label", "problem_type", "pad_token_id"),
        *("bos_token_id", "eos_token_id"),
    )
    assert {name: getattr(back.config, name) for name in kept} == {name: getattr(stock.config, name) for name in kept}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_untied_heads_and_problem_types_survive(kind):
    stock = stock_encoder(kind, AutoModelForMaskedLM, tie_word_embeddings=False, initializer_range=0.3)
    ours = linformer_from_stock(stock, projection="mean_pool", projected_size=LENGTH)
    inputs = encoder_inputs(AutoModelForMaskedLM)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    for model in (ours, linformer_to_stock(ours, kind)):
        assert (outputs(model, inputs) - outputs(stock, inputs)).abs().max() <= 1e-12
    problem = "multi_label_classification"
    stock = stock_encoder(kind, AutoModelForSequenceClassification, problem_type=problem)
    ours = linformer_from_stock(stock)
    assert ours.config.problem_type == linformer_to_stock(ours, kind).config.problem_type == problem


def test_mean_pool_start_averages_windows():
    stock = stock_encoder("bert", AutoModel)
    learned = linformer_from_stock(stock, projected_size=6)
    pooled = linformer_from_stock(stock, projected_size=6, projection="mean_pool")
    inputs = encoder_inputs(AutoModel)
    assert (outputs(learned, inputs) - outputs(pooled, inputs)).abs().max() <= 1e-12
    assert torch.allclose(learned.layers[0].attention.key_projection.weight.sum(0), torch.ones(6, dtype=torch.float64))


def test_checkpoints_from_folder_to_folder(tmp_path):
    stock = stock_encoder("roberta", AutoModelForMaskedLM)
    stock.save_pretrained(tmp_path / "stock")
    build_tokenizer("byte").save_pretrained(tmp_path / "stock")
    expected = linformer_from_stock(stock, projected_size=6)
    found = linformer_checkpoint(tmp_path / "stock", tmp_path / "ours", projected_size=6)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    inputs = encoder_inputs(AutoModelForMaskedLM)
    for model in (found.double().eval(), loaded.eval()):
        assert (outputs(model, inputs) - outputs(expected, inputs)).abs().max() <= 1e-12
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("ab")["input_ids"]
    gpt("gpt2", AutoModel, num_hidden_layers=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="must name a Bert"):
        linformer_checkpoint(tmp_path / "gpt2", tmp_path / "none")


def gpt(kind, auto, **fields):
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, max_position_embeddings=64, num_labels=3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields,
    )  # fmt: skip
    return noisy(auto.from_config(config))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_gpt2_import_is_exact(auto):
    stock = gpt("gpt2", auto, num_hidden_layers=3, n_inner=24)
    inputs = {"input_ids": torch.randint(5, VOCABULARY, (2, 40))}
    expected = outputs(stock, inputs)
    assert (outputs(gpt3_from_gpt2(stock), inputs) - expected).abs().max() <= 1e-12
    alternating = gpt3_from_gpt2(stock, attention_layers=None, band_size=40)
    assert (outputs(alternating, inputs) - expected).abs().max() <= 1e-12
    narrow = gpt3_from_gpt2(stock, attention_layers=None, band_size=8)
    assert (outputs(narrow, inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_gpt_neo_import_is_exact(auto):
    types = [[["global", "local"], 2]]
    stock = gpt("gpt_neo", auto, num_layers=4, attention_types=types, window_size=8, intermediate_size=24)
    inputs = {"input_ids": torch.randint(5, VOCABULARY, (2, 40))}
    ours = gpt3_from_gpt_neo(stock)
    assert [p[0].kind for p in map(ours.config.patterns, range(4))] == ["full", "local", "full", "local"]
    # GPT-Neo computes its scores in float32 whatever its dtype is, so float64 agreement ends there
    assert (outputs(ours, inputs) - outputs(stock, inputs)).abs().max() <= 2e-5
    single, theirs = gpt3_from_gpt_neo(stock.float()), stock.float()
    assert (outputs(single, inputs) - outputs(theirs, inputs)).abs().max() <= 2e-5


def test_refusals():
    stock = stock_encoder("bert", AutoModel)
    with pytest.raises(ValueError, match="initial must be one of"):
        linformer_from_stock(stock, initial="ones")
    with pytest.raises(ValueError, match="identity"):
        linformer_from_stock(stock, initial="identity", projected_size=6)
    with pytest.raises(ValueError, match="kind must be"):
        linformer_to_stock(linformer_from_stock(stock), "albert")
    with pytest.raises(ValueError, match="bidirectional Linformer"):
        linformer_to_stock(stock)
    with pytest.raises(ValueError, match="model must be one of"):
        linformer_from_stock(gpt("gpt2", AutoModel, num_hidden_layers=1))
    with pytest.raises(ValueError, match="bert or roberta"):
        linformer_config(AutoConfig.for_model("electra"))
    causal = copy.deepcopy(stock.config)
    causal.is_decoder = True
    with pytest.raises(ValueError, match="is_decoder"):
        linformer_config(causal)
    with pytest.raises(ValueError, match="gpt2"):
        gpt3_from_gpt2(stock)
    with pytest.raises(ValueError, match="gpt_neo"):
        gpt3_from_gpt_neo(stock)
