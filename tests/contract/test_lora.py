"""LoRA on every kind of weight: each adapter matrix learns, merging and reloading change nothing."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from .cases import Case, add_noise, build, cases, first_output, inputs_of, labels_of

TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
loss_case = pytest.mark.parametrize("case", cases(loss=True), ids=str)


def all_linear(case: Case) -> dict[str, Any]:
    """LoRA on every linear layer; peft trains a classifier in full and so must not adapt it."""
    spared = ["classifier", "score", "qa_outputs"] if case.auto in TASKS and not case.causal else None
    return {"target_modules": "all-linear", "exclude_modules": spared}


def of_the_row(case: Case) -> dict[str, Any]:
    """LoRA as the registry's row has it."""
    parameters = list(case.family.lora_parameters)
    return {"target_modules": list(case.family.lora_targets)} | (
        {"target_parameters": parameters} if parameters else {}
    )


def adapted(case: Case, targets: dict[str, Any], **fields: Any) -> Any:
    """Return a model with adapters, noise on both of their matrices, and the base frozen."""
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type=TASKS.get(case.auto), **targets)
    model = peft.get_peft_model(build(case, use_cache=False, **fields), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            add_noise(nn.ParameterList([parameter]), seed=len(name))
    return model


@loss_case
@pytest.mark.parametrize("targets", [all_linear, of_the_row], ids=["all-linear", "row"])
def test_every_adapter_learns_and_merges(case: Case, targets: Any, tmp_path):
    model = adapted(case, targets(case))
    inputs = inputs_of(case, batch=6, length=12)
    model.train()(**inputs, **labels_of(case, inputs)).loss.backward()
    matrices = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    assert matrices
    assert not [n for n, gradient in matrices.items() if gradient is None or not gradient.any()]

    tuned = first_output(model.eval(), **inputs)
    plain = first_output(build(case, use_cache=False), **inputs)
    assert not torch.allclose(tuned, plain, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(case, use_cache=False), tmp_path).eval()
    torch.testing.assert_close(first_output(again, **inputs), tuned, rtol=1e-6, atol=1e-6)
    merged = again.merge_and_unload()
    torch.testing.assert_close(first_output(merged, **inputs), tuned, rtol=1e-5, atol=1e-5)


@loss_case
def test_targets_of_the_row_reach_every_layer(case: Case):
    model = adapted(case, of_the_row(case))
    touched = {
        n.split("layers.")[1].split(".")[0] for n, _ in model.named_parameters() if "lora_" in n and "layers." in n
    }
    layers = {n.split("layers.")[1].split(".")[0] for n, _ in model.named_parameters() if "layers." in n}
    assert touched == layers


@pytest.mark.parametrize("case", cases(causal=True), ids=str)
def test_adapters_hold_while_decoding(case: Case):
    """Every path (whole, ragged, one step) must see the adapted weight."""
    model = adapted(case, all_linear(case)).eval()
    inputs = inputs_of(case, length=8)
    inputs["attention_mask"][0, :3] = 0
    inputs["attention_mask"][1, 4] = 0
    whole = first_output(model, **inputs)
    merged = adapted(case, all_linear(case)).merge_and_unload().eval()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(first_output(merged, **inputs)[real], whole[real], rtol=1e-5, atol=1e-5)
    ids = inputs["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(input_ids=ids, use_cache=True, **options).tolist() == merged.generate(ids, **options).tolist()


@pytest.mark.parametrize("case", cases(causal=True), ids=str)
def test_native_adapter(case: Case, tmp_path):
    """transformers' own `add_adapter` saves the adapter without a config, so it needs no code either."""
    model = build(case)
    model.add_adapter(peft.LoraConfig(r=3, target_modules=list(case.family.lora_targets)))
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "config.json" not in names
    assert not [name for name in names if name.endswith(".py")]
