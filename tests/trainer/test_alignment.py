"""TRL's trainers on every causal family: losses fall, nothing leaks between packed documents, the result reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_lnlm.data.preferences import REWARDS, preference_rows
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.registry import FAMILIES, family, is_ours
from hf_lnlm.trainer.alignment import METHODS, check_model, check_packing, preference_trainer, rows_for

from ..cli.running import copy_library, small_library
from ..contract.cases import tiny_fields

CAUSAL = [row.model_type for row in FAMILIES if "AutoModelForCausalLM" in row.models]
STOCK = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}}
TOKENIZER = build_tokenizer("byte")
IDS = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROWS = [{"prompt": f"{a}{b}", "chosen": f" {a * 6}", "rejected": f" {b * 5}"} for a, b in ("ab", "cd", "ef", "gh") * 4]
every_family = pytest.mark.parametrize("model_type", [*CAUSAL, *STOCK])
pytestmark = pytest.mark.filterwarnings("ignore")


def config_of(model_type: str, **fields: Any) -> Any:
    """A tiny config; embeddings as wide as the rest, since TRL reads the output layer's weight."""
    if not is_ours(model_type):
        return transformers.AutoConfig.for_model(model_type, **{**STOCK[model_type], **IDS, **fields})
    own = {"max_position_embeddings": 128} if "max_position_embeddings" in tiny_fields(model_type) else {}
    given = {k: v for k, v in tiny_fields(model_type).items() if k not in ("embedding_size", "num_labels")}
    return family(model_type).config_class(**{**given, **own, **IDS, **fields})


def saved(model_type: str, folder: Path, auto_class: str = "AutoModelForCausalLM", **fields: Any) -> Any:
    """A tiny model, loaded from a folder as TRL wants it."""
    torch.manual_seed(0)
    auto = getattr(transformers, auto_class)
    auto.from_config(config_of(model_type, **fields)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return auto.from_pretrained(folder)


def trained(method: str, model_type: str, folder: Path, **fields: Any) -> tuple[Any, list[float]]:
    """(TRL's trainer after a few steps, its losses)."""
    kind = METHODS[method]
    labels = {"num_labels": 1} if method == "reward" else {}
    model = saved(model_type, folder / "base", kind.auto_class, **labels)
    options = {"output_dir": str(folder / "run"), "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1}
    options |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 8}
    if kind.rewarded:
        options |= {"num_generations": 4, "max_completion_length": 8}
    trainer = preference_trainer(kind, model, TOKENIZER, ROWS, options | fields, reward=REWARDS["letters"])
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_moved_and_reloads(trainer: Any, folder: Path) -> None:
    """Weights differ from the base's; the saved folder carries its code and gives the same numbers."""
    name = "AutoModelForCausalLM" if hasattr(trainer.model, "lm_head") else AUTO_SEQ
    auto = getattr(transformers, name)
    base = auto.from_pretrained(folder / "base")
    moved = [not torch.equal(a, b) for a, b in zip(base.parameters(), trainer.model.parameters())]
    assert any(moved)
    trainer.save_model(str(folder / "out"))
    if is_ours(base.config.model_type):
        assert list((folder / "out").glob("modeling_*.py"))
    again, ids = auto.from_pretrained(folder / "out").eval(), torch.tensor([[9, 8, 7, 6, 50]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


AUTO_SEQ = "AutoModelForSequenceClassification"


@every_family
@pytest.mark.slow
def test_dpo_learns_and_checkpointing_changes_nothing(model_type, tmp_path):
    options = {"max_steps": 5, "learning_rate": 2e-2, "beta": 0.5}
    found = {}
    for on in (True, False):
        trainer, losses = trained("dpo", model_type, tmp_path / str(on), gradient_checkpointing=on, **options)
        found[on] = losses
        assert trainer.model.is_gradient_checkpointing is on, "or the comparison would say nothing"
    assert found[True] == pytest.approx(found[False], rel=1e-3)
    assert found[True][0] == pytest.approx(0.6931, abs=0.02)
    assert found[True][-1] <= 0.65
    assert_moved_and_reloads(trainer, tmp_path / "False")


@every_family
@pytest.mark.parametrize("method", [name for name in METHODS if name != "dpo"])
@pytest.mark.slow
def test_the_other_methods_run_and_move(method, model_type, tmp_path):
    if METHODS[method].auto_class == AUTO_SEQ and is_ours(model_type):
        assert AUTO_SEQ in family(model_type).models, "every causal family can be a reward model"
    trainer, losses = trained(method, model_type, tmp_path, max_steps=2)
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    assert_moved_and_reloads(trainer, tmp_path)


def test_dpo_on_one_family(tmp_path):
    trainer, losses = trained("dpo", "lnlm_rnn", tmp_path, max_steps=5, learning_rate=2e-2, beta=0.5)
    assert losses[-1] <= 0.65
    assert_moved_and_reloads(trainer, tmp_path)


PACKED = {"lnlm_rnn", "gpt2"}
"""Families known to read packed rows exactly: a refusal of these is a fault. Any other is exact or refused."""


@every_family
def test_packing_is_exact_or_refused(model_type):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(model_type)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    try:
        check_packing(model)
    except ValueError as refusal:
        assert "packing=false" in str(refusal)
        assert model_type not in PACKED, "it was exact before"
        return
    one, two = torch.tensor([[9, 8, 7, 6]]), torch.tensor([[50, 51, 52]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    lengths = torch.tensor([0, 4, 7], dtype=torch.int32)
    extra = {"seq_idx": (positions.cumsum(1) * 0 + torch.tensor([[0] * 4 + [1] * 3])).int()}
    extra |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 4, "max_length_k": 4}
    with torch.no_grad():
        packed = model(input_ids=torch.cat([one, two], 1), position_ids=positions, use_cache=False, **extra).logits
        apart = [model(input_ids=ids, use_cache=False).logits for ids in (one, two)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_packed_training_of_a_recurrent_model(tmp_path):
    trainer, losses = trained("sft", "lnlm_rnn", tmp_path, packing=True, packing_strategy="bfd", max_length=32)
    assert all(torch.isfinite(torch.tensor(losses)))
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > 1


@pytest.mark.parametrize("packs", [{"packing": True}, {"eval_packing": True}], ids=str)
def test_packing_without_borders_is_refused(packs, tmp_path):
    with pytest.raises(ValueError, match="pads whatever padding_free says"):
        trained("dpo", "lnlm_rnn", tmp_path, padding_free=True)
    with pytest.raises(ValueError, match="packing_strategy=wrapped joins texts without marking their borders"):
        trained("sft", "lnlm_rnn", tmp_path, packing_strategy="wrapped", max_length=32, **packs)


@pytest.mark.parametrize("loss_head", ["chunked", "adaptive"])
def test_other_loss_heads_work_or_are_refused(loss_head, tmp_path):
    fields = {"loss_head": loss_head, "tie_word_embeddings": False}
    fields |= {"adaptive_cutoffs": [20, 100]} if loss_head == "adaptive" else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of("lnlm_rnn", **fields))
    if loss_head == "adaptive":
        with pytest.raises(ValueError, match=r"has none \(loss_head='adaptive'\)"):
            check_model(model)
        return
    check_model(model)
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "use_cpu": True, "logging_steps": 1}
    trainer = preference_trainer(METHODS["sft"], model, TOKENIZER, ROWS, {**options, "disable_tqdm": True})
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(5.57, abs=0.1)  # ln 263


def test_models_that_trl_would_compute_wrongly_are_refused():
    model = transformers.AutoModelForCausalLM.from_config(config_of("lnlm_rnn", embedding_size=12))
    with pytest.raises(ValueError, match="does more than that"):
        check_model(model)


def test_rows_and_rewards(tmp_path):
    assert len(rows_for(METHODS["kto"], ROWS)) == 2 * len(ROWS)
    assert rows_for(METHODS["sft"], ROWS)[0] == {"prompt": "ab", "completion": " aaaaaa"}
    assert rows_for(METHODS["grpo"], ROWS)[0] == {"prompt": "ab"}
    with pytest.raises(ValueError, match=r"row 1: dpo wants prompt, chosen, rejected .*got \['text'\]"):
        rows_for(METHODS["dpo"], [{"text": "a"}])
    assert REWARDS["letters"](["ab c", "A1", ""]) == [1.0, 0.0, 0.0]
    assert REWARDS["brevity"](["a b", "a " * 24, ""]) == [1.0, 0.5, 0.0]
    with small_library(copy_library(tmp_path)):
        made = list(preference_rows())
    assert len(made) > 50
    assert all(row["chosen"] != row["rejected"] and row["prompt"].endswith("# ") for row in made)


def test_a_missing_reward_is_named(tmp_path):
    model = saved("lnlm_rnn", tmp_path)
    with pytest.raises(ValueError, match="grpo needs a reward"):
        preference_trainer(METHODS["grpo"], model, TOKENIZER, ROWS, {"output_dir": str(tmp_path)})
