"""Recurrent state from batch to batch: gradients, resets, evaluation, checkpoints, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_lnlm.data.bptt_streams import BPTTStreams
from hf_lnlm.data.tokenizers import build_tokenizer
from hf_lnlm.trainer.recurrent_state import CarriedState, initial_state, state_file, stream_fault
from hf_lnlm.trainer.trainer import LNLMTrainer
from tests.trainer import families, runs, scale

LANES = {"objective": "causal", "data": "lanes", "workers": 0, "accumulation": 1, "dropout": 0.0}


def trainer_of(folder: Path, **changed: Any) -> LNLMTrainer:
    return runs.trainer_of(LANES, str(folder), **{"save_strategy": "no", "logging_steps": 1, **changed})


def batches(dataset: Any, collate: Any, number: int) -> list[Any]:
    return [collate([dataset[k * runs.BATCH + row] for row in range(runs.BATCH)]) for k in range(number)]


def states(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in layer.states.values()]


def test_losses_and_gradients_are_those_of_the_windows_by_hand(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, max_steps=5, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9
    )
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "loss" in entry]
    again = trainer_of(tmp_path)
    model, cache = again.model.train(), None
    for entry, batch in zip(found, batches(again.train_dataset, again.data_collator, 5), strict=True):
        batch = {name: value for name, value in batch.items() if name not in ("num_bytes", "reset")}
        cache = cache or DynamicCache(config=model.config)
        outputs = model(**batch, past_key_values=cache, use_cache=True)
        model.zero_grad()
        outputs.loss.backward()
        cache = outputs.past_key_values
        for layer in cache.layers:
            layer.detach_()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        assert entry["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad


def test_carrying_changes_the_loss_and_epochs_begin_anew(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.0, "num_train_epochs": 2, "max_steps": -1}
    carried = trainer_of(tmp_path, **settings)
    carried.train()
    losses = [entry["loss"] for entry in carried.state.log_history if "loss" in entry]
    half = len(losses) // 2
    assert losses[:half] == losses[half:], "the second epoch must begin without the state of the first"
    without = trainer_of(tmp_path, **settings, carry_state=False)
    without.train()
    others = [entry["loss"] for entry in without.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(others[0], rel=1e-6)
    assert all(loss != other for loss, other in zip(losses[1:half], others[1:half]))


def test_evaluation_has_its_own_state_and_disturbs_nothing(tmp_path: Path) -> None:
    case = {**LANES, "dropout": 0.2}
    ends = []
    for evaluating in (False, True):
        changed = (
            {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": runs.BATCH} if evaluating else {}
        )
        trainer = runs.trainer_of(case, str(tmp_path), max_steps=6, save_strategy="no", **changed)
        trainer.eval_dataset = trainer.train_dataset
        trainer.train()
        ends.append((trainer.model.state_dict(), states(trainer._carried.cache)))
    for key, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][key]), key
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(one, other)


def test_evaluation_carries_state_through_its_lanes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=runs.BATCH)
    metrics = trainer.evaluate(trainer.train_dataset)
    again, total, count = metrics["eval_loss"], 0.0, 0
    model, cache = trainer.model.eval(), DynamicCache(config=trainer.model.config)
    number = len(trainer.train_dataset) // runs.BATCH
    num_bytes = 0
    for batch in batches(trainer.train_dataset, trainer.data_collator, number):
        num_bytes += int(batch.pop("num_bytes").sum())
        batch.pop("reset")
        items = int(batch["shift_labels"].ne(-100).sum())
        with torch.no_grad():
            outputs = model(**batch, past_key_values=cache, use_cache=True)
        total, count, cache = total + outputs.loss.item() * items, count + items, outputs.past_key_values
    assert again == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert metrics["eval_bits_per_byte"] == pytest.approx(total / num_bytes / 0.6931471805599453, rel=1e-5)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == again


def test_a_masked_token_gives_the_initial_state(tmp_path: Path) -> None:
    model = trainer_of(tmp_path).model.train()
    cache = initial_state(model, 4, torch.device("cpu"))
    assert model.training
    assert states(cache) and all(tensor.shape[0] == 4 for tensor in states(cache))
    assert all(bool((tensor == 0).all()) for tensor in states(cache))


def test_rows_are_reset_one_by_one(tmp_path: Path) -> None:
    model = trainer_of(tmp_path).model.eval()
    first, second = torch.randint(5, 200, (2, 3, 7))
    carried = CarriedState()
    with torch.no_grad():
        carried.keep(model(first, past_key_values=carried.start(model, 3), use_cache=True).past_key_values)
        cache = carried.start(model, 3, torch.tensor([False, True, False]))
        found = model(second, past_key_values=cache, use_cache=True).logits
        whole = model(torch.cat([first, second], 1)).logits[:, 7:]
        fresh = model(second).logits
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], fresh[1], rtol=1e-4, atol=1e-5)
    assert carried.start(model, 5, torch.ones(5, dtype=torch.bool)).layers[0].batch_size is None
    with pytest.raises(ValueError, match="3 rows and the batch 2"):
        carried.start(model, 2)


def test_saved_and_loaded_state_is_bit_identical(tmp_path: Path) -> None:
    model = trainer_of(tmp_path).model.eval()
    carried, loaded = CarriedState(), CarriedState()
    carried.save(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    with torch.no_grad():
        ids = torch.randint(5, 200, (3, 7))
        carried.keep(model(ids, past_key_values=carried.start(model, 3), use_cache=True).past_key_values)
    path = state_file(tmp_path, 1, 2)
    assert path.name == "recurrent_state_1.safetensors"
    carried.save(path)
    loaded.load(path, model, torch.device("cpu"))
    for one, other in zip(carried.cache.layers, loaded.cache.layers, strict=True):
        assert (one.kind, one.seen_tokens) == (other.kind, other.seen_tokens)
        assert all(torch.equal(value, other.states[name]) for name, value in one.states.items())
    with pytest.raises(ValueError, match=r"nowhere.* is missing"):
        loaded.load(tmp_path / "nowhere", model, torch.device("cpu"))


def test_what_cannot_carry_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequential"):
        trainer_of(tmp_path, train_sampling_strategy="random")
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        trainer_of(tmp_path, auto_find_batch_size=True)
    with pytest.raises(ValueError, match=r"num_streams must be batch size x processes = 2 x 1 = 2, got 3"):
        trainer_of(tmp_path, per_device_train_batch_size=2)
    model, rows = families.build("GPT2LMHeadModel")
    with pytest.raises(ValueError, match="needs a stateful model, got GPT2LMHeadModel"):
        scale.trainer(model, rows, str(tmp_path), 2, 1, carry_state=True)
    assert "needs a dataset of contiguous streams" in (stream_fault(rows, 2, 1) or "")
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=2)
    tokenizer = build_tokenizer("byte", sentinels=20)
    with pytest.raises(ValueError, match="evaluation: num_streams"):
        trainer.evaluate(BPTTStreams(runs.texts(), tokenizer, 8, 4))
    with pytest.raises(ValueError, match="recurrent states only"):
        CarriedState().keep(DynamicCache())
