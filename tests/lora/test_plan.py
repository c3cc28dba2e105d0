"""LoRA on stock families by `lora_config`, the refusals, and peft's table of targets."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import hf_lnlm
from hf_lnlm.registry import FAMILIES

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
BERT = {**SIZES, "vocab_size": 61, "max_position_embeddings": 40}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
XLNET = {"vocab_size": 61, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt2": (
        {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, **IDS},
        ["CausalLM", "SequenceClassification"],
    ),
    "bert": (BERT, ["MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "MultipleChoice"]),
    "roberta": (BERT, ["MaskedLM", "QuestionAnswering"]),
    "albert": ({**BERT, "embedding_size": 8}, ["MaskedLM", "SequenceClassification"]),
    "electra": ({**BERT, "embedding_size": 8}, ["PreTraining", "MaskedLM", "SequenceClassification"]),
    "xlnet": (XLNET, ["CausalLM", "SequenceClassification"]),
    "t5": ({**T5, "decoder_start_token_id": 0}, ["Seq2SeqLM", "SequenceClassification"]),
    "mamba": ({"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, ["CausalLM"]),
}
ROUNDING = 2.0**-20  # of the largest gradient
PAIRS = [(name, head) for name, (_, heads) in MODELS.items() for head in heads]


def build(name: str, head: str) -> Any:
    torch.manual_seed(1)
    fields = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "dropout_rate"), 0.0)
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_last_dropout"), 0.0)
    config = transformers.AutoConfig.for_model(name, **{**fields, **IDS, **MODELS[name][0]})
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    return noisy(model.parameters(), model)


@torch.no_grad()
def noisy(parameters: Any, model: Any) -> Any:
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def inputs_of(head: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 2, 10) if head == "MultipleChoice" else (4, 10)
    ids = torch.randint(5, 61, shape, generator=generator)
    if head == "SequenceClassification":
        ids[:, -1] = 2  # T5 classifies by its end token
    return {"input_ids": ids}


def labels_of(name: str, head: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = torch.arange(4)
    if head == "QuestionAnswering":
        return {"start_positions": rows, "end_positions": rows + 1}
    if head == "PreTraining":
        return {"labels": ids % 2} if name == "electra" else {"labels": ids, "next_sentence_label": rows % 2}
    if head == "TokenClassification":
        return {"labels": ids % 2}
    return {"labels": rows % 2 if head in ("SequenceClassification", "MultipleChoice") else ids}


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs)
    names = ("logits", "prediction_logits", "start_logits")
    return next(found[name] for name in names if found.get(name) is not None)


@pytest.mark.parametrize("name, head", PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_stock_families(name, head, tmp_path):
    model = build(name, head)
    inputs = inputs_of(head)
    if name == "t5" and head == "Seq2SeqLM":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    labels = labels_of(name, head, inputs["input_ids"])
    before, plan = output(model, inputs), hf_lnlm.lora_plan(model, 3)
    adapted = peft.get_peft_model(model, hf_lnlm.lora_config(model, r=3))
    torch.testing.assert_close(output(adapted, inputs), before, rtol=1e-5, atol=1e-5)
    noisy((p for n, p in adapted.named_parameters() if "lora_" in n), adapted)
    adapted.train()(**inputs, **labels).loss.backward()
    sizes = {
        n: 0.0 if p.grad is None else float(p.grad.abs().max())
        for n, p in adapted.named_parameters()
        if p.requires_grad
    }
    silent = [n for n, size in sizes.items() if size <= ROUNDING * max(sizes.values())]
    # segments are not given; one bias for all choices or positions cancels but for rounding: these have nothing to learn
    cancels = {"MultipleChoice": "classifier", "QuestionAnswering": "qa_outputs"}
    untaught = [f"base_model.model.{cancels[head]}.modules_to_save.default.bias"] if head in cancels else []
    for place, module in adapted.named_modules():
        if getattr(module, "parameter_name", "") in ("r_s_bias", "seg_embed"):
            untaught += [f"{place}.lora_{letter}.default.weight" for letter in "AB"]
    assert sorted(silent) == sorted(untaught)
    changed = [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n]
    assert all(any(f".{top}." in n for top in plan.trained) for n in changed)

    tuned = output(adapted, inputs)
    assert not torch.allclose(tuned, before, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(name, head), tmp_path)
    torch.testing.assert_close(output(again, inputs), tuned, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output(again.merge_and_unload(), inputs), tuned, rtol=1e-5, atol=1e-5)


def test_what_is_left_out_says_why():
    mamba = hf_lnlm.lora_plan(build("mamba", "CausalLM")).left_out
    assert "peft refuses it for mamba" in mamba["backbone.layers.0.mixer.out_proj.weight"]
    assert "without calling the layer" in mamba["backbone.layers.1.mixer.dt_proj.weight"]
    assert "tied to another weight" in mamba["backbone.embeddings.weight"]
    xlnet = hf_lnlm.lora_plan(build("xlnet", "CausalLM")).left_out
    assert "wrap the whole block" in xlnet["transformer.mask_emb"]
    bert = hf_lnlm.lora_plan(build("bert", "SequenceClassification"))
    assert "embeddings=True" in bert.left_out["bert.embeddings.word_embeddings.weight"]
    assert bert.trained == ("classifier",)


def test_embeddings_on_demand(tmp_path):
    model = build("bert", "SequenceClassification")
    config = hf_lnlm.lora_config(model, r=3, embeddings=True)
    assert {"word_embeddings", "position_embeddings", "token_type_embeddings"} <= set(config.target_modules)
    adapted, inputs = peft.get_peft_model(model, config), inputs_of("SequenceClassification")
    noisy((p for n, p in adapted.named_parameters() if "lora_" in n), adapted)
    tuned = output(adapted, inputs)
    torch.testing.assert_close(output(adapted.merge_and_unload(), inputs), tuned, rtol=1e-5, atol=1e-5)


class Ragbag(nn.Module):
    """Layers of every kind that peft treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.wide = nn.Conv1d(8, 8, 3, padding=1)
        self.deep = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Linear(8, 2)
        self.image = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.attention(x, x, x)[0] + self.wide(x.mT).mT + self.deep(x.mT).mT
        return self.lstm(mixed)[0].sum(-1, keepdim=True) + self.narrow(mixed)


def test_layers_of_other_kinds():
    torch.manual_seed(0)
    model, x = Ragbag().eval(), torch.randn(5, 4, 8)
    plan = hf_lnlm.lora_plan(model, 4)
    assert set(plan.modules) == {"attention", "wide", "narrow"}
    assert set(plan.parameters) == {"weight_ih_l0", "weight_hh_l0", "deep.weight"}
    assert plan.ranks == {"narrow": 2}
    assert list(plan.left_out) == ["image.weight"]
    before = model(x)
    adapted = peft.get_peft_model(model, hf_lnlm.lora_config(model, 4))
    torch.testing.assert_close(adapted(x), before, rtol=1e-5, atol=1e-5)
    noisy((p for n, p in adapted.named_parameters() if "lora_" in n), adapted)
    adapted(x).sum().backward()
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    tuned = adapted(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), tuned, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.rest = nn.ModuleList([self.first, nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest[1](self.rest[0](self.first(x).tanh()).tanh())


def test_a_layer_in_two_places_is_left_out():
    torch.manual_seed(0)
    plan, x = hf_lnlm.lora_plan(Twice(), 4), torch.randn(5, 8)
    assert plan.modules == ("rest.1",)
    assert list(plan.left_out) == ["first.weight"] and "stands in two places" in plan.left_out["first.weight"]

    @torch.no_grad()
    def error(config: Any) -> float:
        model = peft.get_peft_model(Twice(), config)
        noisy((p for n, p in model.named_parameters() if "lora_" in n), model)
        apart = model(x)
        return float((model.merge_and_unload()(x) - apart).abs().max())

    assert error(hf_lnlm.lora_config(Twice(), 4)) < 1e-5
    assert error(peft.LoraConfig(r=4, target_modules=["first"])) > 1e-3, "peft's own rule, the reason for ours"


def test_wrong_requests_are_refused():
    model = build("mamba", "CausalLM")
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        hf_lnlm.lora_config(model, r=0)
    with pytest.raises(ValueError, match=r"dropout must be 0 where raw matrices are adapted \(.*A_log"):
        hf_lnlm.lora_config(model, dropout=0.1)
    wrapped = peft.get_peft_model(model, hf_lnlm.lora_config(model))
    with pytest.raises(ValueError, match="wants the model itself"):
        hf_lnlm.lora_config(wrapped)


def test_peft_knows_our_families_and_nothing_is_imported_for_it():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    assert {row.model_type: list(row.lora_targets) for row in FAMILIES}.items() <= TABLE.items()
    code = """
        import sys, hf_lnlm
        assert not [name for name in sys.modules if name.split(".")[0] == "peft"]
        import peft
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE
        assert "lnlm_rnn" in TABLE and TABLE["gpt2"] == ["c_attn"]
        assert not [f for f in sys.meta_path if type(f).__module__.startswith("hf_lnlm.lora")]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=120)
