"""Checkpoint folders: manifest, damage, rotation, clearing, what the Trainer does with them."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import save_file

from hf_lnlm.trainer import checkpoints
from hf_lnlm.trainer.trainer import LNLMTrainer
from tests.contract.cases import add_noise
from tests.trainer import families, scale


def make(folder: Path, listed: bool = True) -> Path:
    """Write a small checkpoint, as the stock Trainer would or as ours does."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    torch.save({"step": 1}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    if listed:
        checkpoints.write_manifest(folder)
    return folder


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the checkpoints module."""
    found: list[str] = []
    monkeypatch.setattr(checkpoints.logger, "warning", found.append)
    return found


def test_a_listed_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint-1")
    listing = json.loads((folder / checkpoints.MANIFEST_NAME).read_text())["files"]
    assert sorted(listing) == ["model.safetensors", "optimizer.pt", "trainer_state.json"]
    assert checkpoints.find_fault(folder) is None


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_file_cut_off_is_noticed(tmp_path: Path, name: str, listed: bool) -> None:
    folder = make(tmp_path / "checkpoint-1", listed)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-9])
    assert name in (checkpoints.find_fault(folder) or "")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_missing_or_changed_file_is_noticed(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "checkpoint-1")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert name in (checkpoints.find_fault(folder) or "")
    (folder / name).unlink()
    assert f"{name} is missing" in (checkpoints.find_fault(folder) or "")


@pytest.mark.parametrize("manifest", ["", "{}", '{"files": 3}', '{"files": {"../x": {}}}', "[]"])
def test_a_bad_manifest_is_damage_not_a_crash(tmp_path: Path, manifest: str) -> None:
    folder = make(tmp_path / "checkpoint-1")
    (folder / checkpoints.MANIFEST_NAME).write_text(manifest)
    assert checkpoints.find_fault(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0" + b'{"a": 3}        ']
)
def test_nonsense_safetensors_are_damage(tmp_path: Path, content: bytes) -> None:
    folder = make(tmp_path / "checkpoint-1", listed=False)
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in (checkpoints.find_fault(folder) or "")


def test_the_newest_whole_one_is_chosen_with_one_warning(tmp_path: Path, warned: list[str]) -> None:
    for step in (2, 10, 30, 200):
        make(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-30" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert len(warned) == 1
    assert "checkpoint-200" in warned[0] and "checkpoint-30" in warned[0] and "using checkpoint-10" in warned[0]


def test_nothing_to_choose(tmp_path: Path, warned: list[str]) -> None:
    assert checkpoints.last_complete_checkpoint(tmp_path) is None
    assert checkpoints.last_complete_checkpoint(tmp_path / "nowhere") is None
    assert warned == []


def test_publishing_replaces_and_leaves_nothing(tmp_path: Path) -> None:
    final = make(tmp_path / "checkpoint-5")
    (final / "old").touch()
    checkpoints.publish(make(tmp_path / ".staging" / "checkpoint-5"), final)
    assert checkpoints.find_fault(final) is None and not (final / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging", "checkpoint-5"]


def test_clearing_finishes_or_undoes_what_a_kill_left(tmp_path: Path) -> None:
    make(tmp_path / ".staging" / "checkpoint-9", listed=False)
    make(tmp_path / ".deleted-checkpoint-3")
    make(tmp_path / ".replaced-checkpoint-6")  # killed between the two renames: 6 must come back
    make(tmp_path / ".replaced-checkpoint-7")
    make(tmp_path / "checkpoint-7")
    (tmp_path / "notes.txt").touch()
    checkpoints.remove_staging(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7", "notes.txt"]
    checkpoints.remove_staging(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("limit", "step", "best", "damaged", "left"),
    [
        (None, 9, None, (), [3, 6, 9, 12]),
        (2, 9, None, (), [6, 9]),
        (1, 9, None, (), [9]),
        (1, 9, 3, (), [3, 9]),
        (2, 9, 3, (), [3, 9]),
        (3, 9, None, ("checkpoint-6",), [3, 9, 12]),
        (2, 12, None, ("checkpoint-9",), [6, 12]),
    ],
)
def test_rotation(
    tmp_path: Path, limit: int | None, step: int, best: int | None, damaged: Any, left: list[int]
) -> None:
    for number in (3, 6, 9, 12):
        make(tmp_path / f"checkpoint-{number}")
    path = None if best is None else str(tmp_path / f"checkpoint-{best}")
    checkpoints.rotate(tmp_path, limit, step, path, damaged)
    assert [checkpoints.step_of(found) for found in checkpoints.list_checkpoints(tmp_path)] == left


def trained(folder: Path, steps: int, **changed: Any) -> LNLMTrainer:
    model, rows = families.build("GPT2LMHeadModel")
    return scale.step(
        model, rows, str(folder), 4, 1, **{"max_steps": steps, "save_strategy": "steps", "save_steps": 2, **changed}
    )


def resumed(folder: Path, steps: int, checkpoint: Any = True) -> LNLMTrainer:
    model, rows = families.build("GPT2LMHeadModel")
    trainer = scale.trainer(model, rows, str(folder), 4, 1, max_steps=steps, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_a_damaged_newest_one_is_skipped_and_rotated_first(tmp_path: Path, warned: list[str]) -> None:
    trained(tmp_path, 6)
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"short")
    trainer = resumed(tmp_path, 8)
    assert len(warned) == 1 and "using checkpoint-4" in warned[0]
    assert trainer.state.global_step == 8
    assert checkpoints.find_fault(tmp_path / "checkpoint-6") is None


def test_resuming_nothing_or_damage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        resumed(tmp_path / "empty", 2)
    trained(tmp_path, 2)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 can't be used: trainer_state.json is missing"):
        resumed(tmp_path, 4, str(tmp_path / "checkpoint-2"))


def test_stock_checkpoints_can_be_resumed_and_ours_by_stock(tmp_path: Path) -> None:
    trained(tmp_path / "ours", 4)
    model, rows = families.build("GPT2LMHeadModel")
    arguments = T.TrainingArguments(
        str(tmp_path / "ours"), max_steps=6, use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False
    )
    stock = T.Trainer(model, arguments, train_dataset=rows)
    stock.remove_callback(T.PrinterCallback)
    assert stock.train(resume_from_checkpoint=True).global_step == 6
    for path in (tmp_path / "ours").rglob(checkpoints.MANIFEST_NAME):
        path.unlink()
    assert resumed(tmp_path / "ours", 8).state.global_step == 8


def test_where_a_file_puts_the_first_weights_changes_no_bit(tmp_path: Path, moved: Callable[[Path], None]) -> None:
    model, rows = families.build("BertForSequenceClassification, regression")
    add_noise(model, 1).save_pretrained(tmp_path / "base")
    moved(tmp_path / "base")
    read = type(model).from_pretrained(tmp_path / "base")
    for start in (model, read):
        scale.step(start, rows, str(tmp_path / "run"), 1, 1, max_steps=3)  # one row: the most sensitive products
    assert all(map(torch.equal, model.state_dict().values(), read.state_dict().values()))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, 2)
    write = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        write(value, path, *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step 4 couldn't be written; older ones are whole .*No space left"):
        resumed(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoints.find_fault(tmp_path / "checkpoint-2") is None


def test_the_best_checkpoint_is_known_by_its_final_path(tmp_path: Path) -> None:
    model, rows = families.build("GPT2LMHeadModel")
    trainer = scale.trainer(
        model, rows, str(tmp_path), 4, 1, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1,
    )  # fmt: skip
    trainer.eval_dataset = rows
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and Path(best).parent == tmp_path and Path(best).is_dir()
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert checkpoints.find_fault(best) is None


def test_nothing_is_said_about_tied_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, 2)
    T.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        resumed(tmp_path, 3)
    T.logging.disable_propagation()
    assert "missing keys" not in caplog.text


def test_uploads_start_after_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(
        T.Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, Path(folder).is_dir()))
    )
    monkeypatch.setattr(T.Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(T.Trainer, "_finish_current_push", lambda self: None)
    monkeypatch.setattr("transformers.trainer.suppress_progress_bars", nullcontext)
    trained(tmp_path, 2, push_to_hub=True)
    assert pushed == [(str(tmp_path / "checkpoint-2"), True)]
    shutil.rmtree(tmp_path)
