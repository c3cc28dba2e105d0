"""LoRA on every kind of weight: nothing changes at first, each adapter matrix learns, merging and reloading are exact."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from packaging import version
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import hf_lnlm

from .cases import Case, add_noise, build, cases, first_output, inputs_of, labels_of, one_case_a_family, rows_of

BACKENDS = ("eager", "cpu")
loss_case = pytest.mark.parametrize("case", cases(loss=True), ids=str)
family_case = pytest.mark.parametrize("case", one_case_a_family(), ids=str)


def head_of(case: Case) -> list[str]:
    """Modules that peft must train in full and so must not adapt."""
    return list(hf_lnlm.lora_plan(build(case)).trained)


def all_linear(case: Case) -> Any:
    """LoRA on every linear layer."""
    spared = head_of(case)
    return peft.LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", exclude_modules=spared, modules_to_save=spared
    )


def shaken(model: Any) -> Any:
    """Noise on both matrices of every adapter: the second one starts at zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            add_noise(nn.ParameterList([parameter]), seed=len(name))
    return model


def adapted(case: Case, **fields: Any) -> Any:
    """A model with adapters on everything that they reach; at first they change nothing."""
    model = build(case, use_cache=False, **fields)
    return peft.get_peft_model(model, hf_lnlm.lora_config(model, r=3))


def decided(model: Any) -> set[str]:
    """Weight matrices whose fate the plan has decided, by their names in the plain model."""
    plan = hf_lnlm.lora_plan(model, 3)
    found = set(plan.left_out)
    for name, module in model.named_modules():
        hit = any(f".{name}".endswith(f".{short}") for short in plan.modules)
        whole = any(f".{top}." in f".{name}." for top in plan.trained)
        found |= {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False) if hit or whole}
    names = [name for name, _ in model.named_parameters()]
    return found | {name for name in names if any(f".{name}".endswith(f".{short}") for short in plan.parameters)}


@loss_case
def test_every_matrix_has_a_place(case: Case):
    model = build(case)
    matrices = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.dim() > 1}
    assert matrices <= decided(model)
    assert all(len(why) > 5 for why in hf_lnlm.lora_plan(model).left_out.values())


@loss_case
def test_every_adapter_learns_merges_and_reloads(case: Case, tmp_path):
    plain = build(case, use_cache=False)
    inputs = inputs_of(case, batch=6, length=12)
    before, frozen = first_output(plain, **inputs), {n: p.clone() for n, p in plain.named_parameters()}
    model = adapted(case)
    torch.testing.assert_close(first_output(model.eval(), **inputs), before, rtol=1e-5, atol=1e-5)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = tuple(hf_lnlm.lora_plan(plain).trained)
    assert not [n for n in learns if "lora_" not in n and not any(f".{head}." in n for head in heads)]

    shaken(model).train()(**inputs, **labels_of(case, inputs)).loss.backward()
    assert not [n for n, p in model.named_parameters() if n in learns and (p.grad is None or not p.grad.any())]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.01)
    tuned = first_output(model.eval(), **inputs)
    assert not torch.allclose(tuned, before, atol=1e-3)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(case, use_cache=False), tmp_path).eval()
    torch.testing.assert_close(first_output(again, **inputs), tuned, rtol=1e-6, atol=1e-6)
    with again.disable_adapter():
        torch.testing.assert_close(first_output(again, **inputs), before, rtol=1e-5, atol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(first_output(merged, **inputs), tuned, rtol=1e-5, atol=1e-5)
    assert {n for n, _ in merged.named_parameters()} == set(frozen)


def runs_on(case: Case, backend: str) -> bool:
    """Whether a family has the backend and it can run here."""
    try:
        first_output(build(case, use_cache=False, backend=backend), **inputs_of(case))
    except ValueError:
        return False
    return True


@family_case
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_merged_equals_unmerged_on_every_backend(case: Case, backend: str):
    if not runs_on(case, backend):
        assert backend != "eager", "every family has the eager backend"
        return
    model, inputs = shaken(adapted(case, backend=backend)).eval(), inputs_of(case, batch=3, length=12)
    inputs["attention_mask"][0, -4:] = 0
    real = inputs["attention_mask"].bool() if case.per_token else slice(None)
    apart = first_output(model, **inputs)
    torch.testing.assert_close(
        first_output(model.merge_and_unload(), **inputs)[real], apart[real], rtol=1e-5, atol=1e-5
    )


@family_case
def test_adapters_switch(case: Case):
    """Two adapters on one model: each is what it is alone, and switched off the model is plain."""
    inputs, model = inputs_of(case), shaken(adapted(case)).eval()
    first = first_output(model, **inputs)
    model.add_adapter("second", hf_lnlm.lora_config(build(case), r=3))
    model.set_adapter("second")
    second = first_output(model, **inputs)
    torch.testing.assert_close(second, first_output(build(case), **inputs), rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    torch.testing.assert_close(first_output(model, **inputs), first, rtol=1e-6, atol=1e-6)


@family_case
def test_gradient_checkpointing_changes_no_gradient(case: Case):
    found = []
    for on in (False, True):
        model, inputs = shaken(adapted(case)).train(), inputs_of(case)
        if on:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, **labels_of(case, inputs)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@family_case
@pytest.mark.slow
def test_adapter_folder_resumes_and_auto_classes_load_it(case: Case, tmp_path):
    from hf_lnlm import LNLMTrainer, LNLMTrainingArguments

    build(case).save_pretrained(tmp_path / "base")

    def trained(folder: str, steps: int, resume: bool = False) -> Any:
        base = case.cls.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)  # the first matrices are drawn
        model = peft.get_peft_model(base, hf_lnlm.lora_config(base, r=3))
        options = {"max_steps": steps, "save_steps": 2, "use_cpu": True, "seed": 3, "learning_rate": 1e-2}
        arguments = LNLMTrainingArguments(tmp_path / folder, report_to="none", lr_scheduler_type="constant", **options)
        trainer = LNLMTrainer(model=model, args=arguments, train_dataset=rows_of(case))
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer.model

    straight = trained("straight", 4)
    trained("cut", 2)
    resumed = trained("cut", 4, resume=True)
    for (name, wanted), found in zip(straight.named_parameters(), resumed.parameters()):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)
    resumed.save_pretrained(tmp_path / "adapter")
    inputs = inputs_of(case)
    if case.auto in AUTO_PEFT:
        labels = {} if case.generates else {"num_labels": 3}
        loaded = AUTO_PEFT[case.auto].from_pretrained(tmp_path / "adapter", **labels).eval()
    else:  # peft has no Auto class for the head
        loaded = peft.PeftModel.from_pretrained(
            case.cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ).eval()
    torch.testing.assert_close(first_output(loaded, **inputs), first_output(resumed.eval(), **inputs))


AUTO_PEFT = {
    "AutoModelForCausalLM": peft.AutoPeftModelForCausalLM,
    "AutoModelForSeq2SeqLM": peft.AutoPeftModelForSeq2SeqLM,
    "AutoModelForQuestionAnswering": peft.AutoPeftModelForQuestionAnswering,
    "AutoModelForSequenceClassification": peft.AutoPeftModelForSequenceClassification,
    "AutoModelForTokenClassification": peft.AutoPeftModelForTokenClassification,
}
"""Heads that peft has an Auto class for; `AutoPeftModel` imports any other's module if it is told that it may."""


@loss_case
def test_auto_classes_load_every_head(case: Case, tmp_path):
    build(case).save_pretrained(tmp_path / "base")
    base = case.cls.from_pretrained(tmp_path / "base")
    model = shaken(peft.get_peft_model(base, hf_lnlm.lora_config(base, r=3))).eval()
    model.save_pretrained(tmp_path / "adapter")
    options: dict[str, Any] = {"num_labels": 3} if case.auto.endswith("Classification") else {}
    if case.auto not in AUTO_PEFT:
        options["import_allowlist"] = [case.family.modeling_module]
    loaded = AUTO_PEFT.get(case.auto, peft.AutoPeftModel).from_pretrained(tmp_path / "adapter", **options).eval()
    inputs = inputs_of(case)
    assert type(loaded.get_base_model()) is case.cls
    torch.testing.assert_close(first_output(loaded, **inputs), first_output(model, **inputs), rtol=1e-6, atol=1e-6)


@family_case
def test_plain_config_and_all_linear_work(case: Case):
    """peft's own table knows our families, and all-linear reaches every layer with a gradient."""
    for config in (peft.LoraConfig(r=3), all_linear(case)):
        model, inputs = shaken(peft.get_peft_model(build(case, use_cache=False), config)), inputs_of(case, 6, 12)
        model.train()(**inputs, **labels_of(case, inputs)).loss.backward()
        matrices = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
        assert matrices
        assert not [n for n, gradient in matrices.items() if gradient is None or not gradient.any()]


@pytest.mark.parametrize("case", cases(causal=True), ids=str)
def test_adapters_hold_while_decoding(case: Case):
    """Every path (whole, ragged, one step) must see the adapted weight."""
    model = shaken(adapted(case)).eval()
    inputs = inputs_of(case, length=8)
    inputs["attention_mask"][0, :3] = 0
    inputs["attention_mask"][1, 4] = 0
    whole = first_output(model, **inputs)
    merged = shaken(adapted(case)).merge_and_unload().eval()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(first_output(merged, **inputs)[real], whole[real], rtol=1e-5, atol=1e-5)
    ids = inputs["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(input_ids=ids, use_cache=True, **options).tolist() == merged.generate(ids, **options).tolist()


@pytest.mark.parametrize("case", cases(causal=True), ids=str)
def test_native_adapter(case: Case, tmp_path):
    """transformers' own `add_adapter` saves the adapter without a config, so it needs no code either."""
    model, config = build(case), peft.LoraConfig(r=3, target_modules=list(case.family.lora_targets))
    if version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION):  # 5.24 wants one that isn't released yet
        with pytest.raises(ValueError, match=f"please use a version >= {MIN_PEFT_VERSION}"):
            model.add_adapter(config)
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    else:
        model.add_adapter(config)
        model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "config.json" not in names
    assert not [name for name in names if name.endswith(".py")]
