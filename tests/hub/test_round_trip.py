"""Push over real HTTP, then load elsewhere: another process, a fresh cache, no hf_lnlm; bit-identical logits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_lnlm import RNNConfig, RNNForCausalLM
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.hub.card import write_card
from hf_lnlm.hub.push import push_folder
from hf_lnlm.registry import family

from .loopback import TOKEN, LoopbackHub, environment

# huggingface_hub sends LFS files in a way that its own HTTP library discourages
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

IDS = torch.arange(7, 19)[None]
# Pushes a saved model the way transformers does it itself, in a process whose Hub is the loopback.
SENDER = """
import sys, hf_lnlm
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("user/direct")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("user/direct")
"""
# Loads everything in a process that can't import hf_lnlm, and prints the logits' bytes.
READER = """
import sys, json, transformers, torch
sys.modules["hf_lnlm"] = None
transformers.logging.set_verbosity_error()
from peft import AutoPeftModelForCausalLM
ids, trust, found = torch.arange(7, 19)[None], {"trust_remote_code": True}, {}
def digest(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0].numpy().tobytes().hex()
for repo in ("user/pushed", "user/direct", "user/merged"):
    found[repo] = digest(transformers.AutoModelForCausalLM.from_pretrained(repo, **trust))
found["user/adapter"] = digest(AutoPeftModelForCausalLM.from_pretrained("user/adapter", **trust))
for head in json.loads(sys.argv[1]):
    model = getattr(transformers, head).from_pretrained("user/pushed", **trust)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
found["tokens"] = transformers.AutoTokenizer.from_pretrained("user/pushed", **trust)("héllo").input_ids
print(json.dumps(found))
"""


def digest(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0].numpy().tobytes().hex()


def test_pushed_here_loaded_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    tokenizer = build_tokenizer("byte")
    base = RNNForCausalLM(RNNConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1))
    wanted = {"user/pushed": digest(base), "user/direct": digest(base)}
    base.save_pretrained(tmp_path / "pushed")
    tokenizer.save_pretrained(tmp_path / "pushed")
    targets = list(family("lnlm_rnn").lora_targets)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wanted["user/adapter"] = digest(tuned)
    assert wanted["user/adapter"] != wanted["user/pushed"]
    tuned.save_pretrained(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": "user/pushed"}))
    merged = tuned.merge_and_unload()
    wanted["user/merged"] = digest(merged)
    merged.save_pretrained(tmp_path / "merged")

    with LoopbackHub() as hub:
        for name in ("pushed", "adapter", "merged"):
            hub.lfs = name != "pushed"
            write_card(tmp_path / name, f"user/{name}")
            push_folder(tmp_path / name, f"user/{name}", token=TOKEN, endpoint=hub.url)
        _child(SENDER, str(tmp_path / "pushed"), environment(hub, str(tmp_path / "sender")))
        heads = json.dumps(list(family("lnlm_rnn").models))
        out = _child(READER, heads, environment(hub, str(tmp_path / "reader"), token=None))
    found = json.loads(out.splitlines()[-1])
    assert found.pop("tokens") == tokenizer("héllo").input_ids
    assert found == wanted


def _child(code, argument, variables):
    command = [sys.executable, "-c", code, argument]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
