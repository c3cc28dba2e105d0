"""peft's other tuners by their plain configs: what they train learns, saves and merges, or they say why they don't fit."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from hf_lnlm.lora.plan import TASK_TYPES

from .cases import Case, add_noise, build, cases, first_output, inputs_of, labels_of

every_head = pytest.mark.parametrize("case", cases(loss=True, both_ways=False, composed=True), ids=str)
PROMPTED_HEADS = ("AutoModelForSequenceClassification", "AutoModelForQuestionAnswering")
OWN = {"IA3": "ia3_", "LN_TUNING": "ln_tuning_layers.", "LORA": "lora_"}


def task_name(case: Case) -> str | None:
    """peft's name of what a head is for."""
    return next((kind for ending, kind in TASK_TYPES.items() if case.cls.__name__.endswith(ending)), None)


def tuned(case: Case, config: Any, **fields: Any) -> Any:
    return peft.get_peft_model(build(case, use_cache=False, **fields), config)


def check_learning(model: Any, case: Case, own: str) -> None:
    """One step: the tuner's parameters and a task's new head learn, and nothing else does."""
    inputs = inputs_of(case, batch=6, length=12)
    add_noise(nn.ParameterList([p for n, p in model.named_parameters() if own in n]), seed=2)  # some start at zero
    before = first_output(model.eval(), **inputs)
    model.train()(**inputs, **labels_of(case, inputs)).loss.backward()
    learns = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(own in name for name in learns)
    assert not [name for name in learns if own not in name and "modules_to_save" not in name]
    assert not [n for n, p in learns.items() if own in n and (p.grad is None or not p.grad.any())]
    assert not [n for n, p in model.named_parameters() if n not in learns and p.grad is not None]
    with torch.no_grad():
        for parameter in learns.values():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    assert not torch.equal(first_output(model.eval(), **inputs), before)


def reloaded(model: Any, case: Case, folder: Any) -> Any:
    """The same adapter from its folder on a model of the same weights gives the same output."""
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(build(case, use_cache=False), folder).eval()
    inputs = inputs_of(case, batch=6, length=12)
    torch.testing.assert_close(first_output(again, **inputs), first_output(model, **inputs), rtol=1e-6, atol=1e-6)
    return again


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # of any LayerNorm, stock ones too
@every_head
@pytest.mark.parametrize("kind", ["IA3", "LN_TUNING", "LORA"])
def test_a_plain_config_learns_reloads_and_merges(case: Case, kind: str, tmp_path):
    config_class = {"IA3": peft.IA3Config, "LN_TUNING": peft.LNTuningConfig, "LORA": peft.LoraConfig}[kind]
    config = config_class(task_type=task_name(case))
    if kind == "LN_TUNING" and not case.family.norm_layers:
        with pytest.raises(ValueError, match=f"ln tuning does not fit {case.family.model_type}, which has no norm"):
            tuned(case, config)
        return
    model = tuned(case, config)
    check_learning(model, case, OWN[kind])
    again, inputs = reloaded(model, case, tmp_path), inputs_of(case, batch=6, length=12)
    wanted = first_output(again, **inputs)
    torch.testing.assert_close(first_output(again.merge_and_unload(), **inputs), wanted, rtol=1e-5, atol=1e-5)


PROMPTS: dict[str, Any] = {
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
}
prompt_kind = pytest.mark.parametrize("kind", PROMPTS)


def prompted(case: Case, kind: str, **fields: Any) -> Any:
    """A model with four learnt vectors or keys and values before every text, moved away from where they begin."""
    model = tuned(case, PROMPTS[kind](task_type=task_name(case), num_virtual_tokens=4), **fields)
    add_noise(model.prompt_encoder, seed=4)
    return model.eval()


def attends(case: Case) -> bool:
    return case.family.takes_prefix or case.composite


def remembers(case: Case) -> bool:
    """Whether it attends, over a cache that is a memory of hidden states."""
    return not attends(case) and any("attention" in kind for kind in build(case).config.layer_types)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # which generate gives
@prompt_kind
@pytest.mark.parametrize("case", [c for c in cases(causal=True) if attends(c)], ids=str)
def test_prompts_and_prefixes_learn_and_hold_while_decoding(case: Case, kind: str, tmp_path):
    model = prompted(case, kind)
    check_learning(model, case, "prompt_encoder")
    reloaded(model, case, tmp_path)
    ids = inputs_of(case, length=6)
    whole = ids["input_ids"]
    for _ in range(5):
        logits = first_output(model, input_ids=whole, attention_mask=torch.ones_like(whole))
        whole = torch.cat([whole, logits[:, -1:].argmax(-1)], 1)
    found = model.generate(**ids, use_cache=True, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert found.tolist() == whole.tolist()
    padded = {name: nn.functional.pad(values, (3, 0)) for name, values in ids.items()}
    torch.testing.assert_close(first_output(model, **padded)[:, -6:], first_output(model, **ids)[:, -6:])


@pytest.mark.parametrize(
    "case", [c for c in cases(both_ways=False) if c.auto in PROMPTED_HEADS and attends(c)], ids=str
)
def test_prompts_and_prefixes_of_other_heads(case: Case, tmp_path):
    check_learning(prompted(case, "PROMPT_TUNING"), case, "prompt_encoder")
    if case.composite or case.family.config_class(is_decoder=False).reads_both_ways:
        with pytest.raises(ValueError, match=f"prefix tuning does not fit {case.family.model_type} as built"):
            prompted(case, "PREFIX_TUNING")
        return
    model = prompted(case, "PREFIX_TUNING")
    check_learning(model, case, "prompt_encoder")
    reloaded(model, case, tmp_path)


def deaf_cases() -> list[Case]:
    """One head of each family without attention, of those that peft has a name for."""
    found: dict[str, Case] = {}
    for case in cases(both_ways=False):
        if not attends(case) and not remembers(case) and task_name(case):
            found.setdefault(case.family.name, case)
    return list(found.values())


@prompt_kind
@pytest.mark.parametrize("case", deaf_cases(), ids=str)
def test_prompts_are_refused_without_attention(case: Case, kind: str):
    with pytest.raises(ValueError, match=f"does not fit {case.family.model_type}, which has no attention of its own"):
        prompted(case, kind)


@pytest.mark.parametrize("case", [c for c in cases(causal=True) if remembers(c)], ids=str)
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_a_memory_takes_prompts_and_no_prefix(case: Case, kind: str):
    check_learning(prompted(case, kind), case, "prompt_encoder")
    with pytest.raises(ValueError, match=f"prefix tuning does not fit {case.family.model_type} as built, whose cache"):
        prompted(case, "PREFIX_TUNING")


def test_a_hybrid_takes_prompts_and_no_prefix():
    case = next(c for c in cases(causal=True) if c.family.name == "ssm")
    check_learning(prompted(case, "PROMPT_TUNING", attn_layer_indices=[1]), case, "prompt_encoder")
    with pytest.raises(ValueError, match="prefix tuning does not fit lnlm_ssm as built"):
        prompted(case, "PREFIX_TUNING", attn_layer_indices=[1])
