"""EncoderCNN on every encoder: padding, copied weights, checkpoints, training, and code carried for our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import hf_lnlm
from hf_lnlm.models.hybrid.modeling_encoder_cnn import EncoderCNNForSequenceClassification
from tests.contract import cases
from tests.contract.cases import add_noise, token_ids

from .encoders import ENCODERS, MODES, OURS, STOCK, classifier_on, encoder_of, tagger_on

ELSEWHERE = Path(cases.__file__).with_name("elsewhere.py")
every_encoder = pytest.mark.parametrize("name", ENCODERS)
every_mode = pytest.mark.parametrize("mode", MODES)


def batch():
    """Ids and mask `(3, 9)`: a whole row, one of six tokens, one of two, which is shorter than a window."""
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, 2:] = 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, mask):
    return model(ids, mask).logits


@every_encoder
@every_mode
def test_scores_do_not_depend_on_padding(name, mode):
    model = classifier_on(name, mode)
    ids, mask = batch()
    plain = logits(model, ids, mask)
    longer = torch.cat([ids, token_ids(3, 7, seed=9)], 1), torch.cat([mask, torch.zeros(3, 7, dtype=torch.long)], 1)
    left = torch.cat([token_ids(3, 4, seed=8), ids], 1), torch.cat([torch.zeros(3, 4, dtype=torch.long), mask], 1)
    for other in (longer, left):
        torch.testing.assert_close(logits(model, *other), plain, rtol=0, atol=1e-5)
    for row, length in enumerate((9, 6, 2)):
        alone = logits(model, ids[row : row + 1, :length], None)
        torch.testing.assert_close(alone, plain[row : row + 1], rtol=0, atol=1e-5)
    assert plain.std() > 1e-3


@every_encoder
def test_tags_do_not_depend_on_padding(name):
    model = tagger_on(name, "last_n")
    ids, mask = batch()
    plain = logits(model, ids, mask)
    left = logits(
        model,
        torch.cat([token_ids(3, 4, seed=8), ids], 1),
        torch.cat([torch.zeros(3, 4, dtype=torch.long), mask], 1),
    )
    torch.testing.assert_close(left[:, 4:] * mask[:, :, None], plain * mask[:, :, None], rtol=0, atol=1e-5)


@every_encoder
def test_the_encoder_inside_is_the_one_given(name):
    model, source = classifier_on(name), encoder_of(name)
    ids = token_ids(2, 9)
    source = source.get_encoder() if name == "t5" else source
    with torch.no_grad():
        torch.testing.assert_close(model.model.encoder(ids).last_hidden_state, source(ids).last_hidden_state)


@every_encoder
def test_a_checkpoint_is_one_folder_and_a_stock_encoder_stays_stock(name, tmp_path):
    model = classifier_on(name, "last_n")
    ids, mask = batch()
    model.save_pretrained(tmp_path)
    again, report = EncoderCNNForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(again.eval(), ids, mask), logits(model, ids, mask))
    assert type(again.model.encoder) is type(model.model.encoder)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert {"modeling_encoder_cnn.py", "configuration_encoder_cnn.py", "models_own_parts.py"} <= files
    assert any(f"modeling_{name}.py" in file for file in files) == (name in OURS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }  # fmt: skip


@every_encoder
def test_every_weight_learns_with_and_without_checkpointing(name):
    model = classifier_on(name, "scalar_mix").train()
    ids, mask = batch()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, mask, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        if name != "albert":  # its layers have no checkpointing in transformers
            model.gradient_checkpointing_enable()
    silent = [key for key, p in model.named_parameters() if key not in gradients[0] and p.requires_grad]
    assert all("pooler" in key or "position" in key or "token_type" in key for key in silent), silent
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6)
    assert name == "albert" or model.model.encoder.is_gradient_checkpointing


@every_encoder
def test_lora_reaches_every_encoder_and_merges(name):
    """What the flag `--lora` does: adapters inside the encoder, windows and classifier in full."""
    model = classifier_on(name, "scalar_mix")
    ids, mask = batch()
    plain = logits(model, ids, mask)
    adapted = peft.get_peft_model(model, hf_lnlm.lora_config(model, 2))
    torch.testing.assert_close(logits(adapted.eval(), ids, mask), plain, rtol=1e-5, atol=1e-5)
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    for part in ("window_head", "layer_mix", "classifier"):
        assert any(part in key for key in trained)
    adapters = {key: add_noise(torch.nn.ParameterList([p]), 5)[0] for key, p in trained.items() if "lora_" in key}
    assert adapters and all(".encoder." in key for key in adapters)
    adapted.train()(ids, mask, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    scores = logits(adapted.eval(), ids, mask)
    assert not torch.allclose(scores, plain, atol=1e-3)
    torch.testing.assert_close(logits(adapted.merge_and_unload().eval(), ids, mask), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_code_of_our_own_encoder_is_carried_and_builds_it(name, tmp_path):
    ids, mask = batch()
    jobs = []
    for auto, model in (
        ("AutoModelForSequenceClassification", classifier_on(name, "last_n")),
        ("AutoModelForTokenClassification", tagger_on(name, "scalar_mix")),
    ):
        place = tmp_path / auto
        model.save_pretrained(place)
        given = {"input_ids": ids, "attention_mask": mask}
        torch.save({"inputs": given, "output": logits(model, ids, mask)}, place / "saved.pt")
        common = {"auto": auto, "folder": str(place), "tensors": str(place / "saved.pt")}
        jobs += [{"kind": kind, **common} for kind in ("same_head", "from_config")]
    (tmp_path / "plan.json").write_text(json.dumps(jobs))
    run_elsewhere(tmp_path)


def run_elsewhere(root: Path) -> None:
    """Run the plan in `root` where hf_lnlm cannot be imported; the encoder's class must be a carried one."""
    hub = {"HF_HOME": str(root / "hf"), "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | hub
    command = [sys.executable, str(ELSEWHERE), str(root / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert set(results.values()) == {"ok"}, results


def test_stock_encoders_need_no_code_of_their_own():
    assert len(STOCK) == 10
    assert all(type(encoder_of(name)).__module__.startswith("transformers.models.") for name in STOCK)
