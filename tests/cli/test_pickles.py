"""Commands load safetensors only, as SECURITY.md says: a pickle is neither run nor read, and said to be the trouble."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
import transformers

from .running import run

PROMPT = ("--prompt", "ab", "--max-new-tokens", 2)


@pytest.fixture
def model(rnn):
    return transformers.AutoModelForCausalLM.from_pretrained(rnn)


def test_pickled_weights_are_not_loaded(rnn, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(rnn, folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    result = run("generate", folder, *PROMPT)
    assert result.status == 2
    assert "no file named model.safetensors" in result.err


def test_a_pickled_adapter_is_not_loaded(rnn, model, tmp_path):
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["input_gates"], r=2))
    adapted.peft_config["default"].base_model_name_or_path = str(rnn)
    adapted.save_pretrained(tmp_path)
    torch.save(peft.get_peft_model_state_dict(adapted), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    result = run("generate", tmp_path, *PROMPT)
    assert result.status == 2
    assert "pickled adapters (.bin) are not loaded" in result.err
