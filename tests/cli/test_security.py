"""SECURITY.md's table, row by row: each is tried."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_lnlm
from hf_lnlm.data.sources import load_documents
from hf_lnlm.ops.kernels import kept

from .running import run, settings, succeed

TABLE = (Path(__file__).resolve().parents[2] / "SECURITY.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1].strip() for line in TABLE.splitlines() if line.startswith("| ")][1:]


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.fixture
def folder(rnn, tmp_path) -> Path:
    shutil.copytree(rnn, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "RAN"


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def checkpoint_of_ours(folder, mark):
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(mark)!r}, 'w').close()\n" + path.read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("hf_lnlm.models.")
    succeed("generate", folder, "--prompt", "a", "--max-new-tokens", 1)


def checkpoint_without_us(folder, mark):
    (folder / "strange.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    edit(folder / "config.json", model_type="strange", auto_map={"AutoConfig": "strange.Config"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder)
    assert run("generate", folder, "--prompt", "a").status == 2


def pickled_weights(folder, mark):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil(mark)}))
    assert run("check", folder).status == 1 and run("push", folder, "me/it", "--dry-run").status == 1
    for command in (["generate", folder, "--prompt", "a"], ["evaluate", folder, "--data", "stdlib"]):
        assert run(*command).status == 2


def a_config(folder, mark):
    sound = json.loads((folder / "config.json").read_text())
    for field, value in (("num_hidden_layers", 10**9), ("vocab_size", 2**40), ("hidden_size", 2**30)):
        (folder / "config.json").write_text(json.dumps(sound))
        edit(folder / "config.json", **{field: value})
        with pytest.raises(ValueError, match=f"{field} must be between"):
            AutoConfig.from_pretrained(folder)
        assert run("generate", folder, "--prompt", "a").status == 2


def links_and_paths(folder, mark):
    (folder.parent / "secret.txt").write_text("private")
    (folder / "notes.json").symlink_to(folder.parent / "secret.txt")
    found = run("check", folder)
    assert found.status == 1 and "notes.json is a link" in found.out
    (folder / "notes.json").unlink()
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')
    found = run("check", folder)
    assert found.status == 1 and "points outside the folder" in found.out


def a_tokenizer(folder, mark):
    (folder / "strange.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "strange.Tokenizer"]})
    run("generate", folder, "--prompt", "a", "--max-new-tokens", 1)
    with contextlib.suppress(ValueError, OSError, ImportError):  # refused is as good as read by a stock class
        AutoTokenizer.from_pretrained(folder)


def a_data_file(folder, mark):
    place = folder.parent
    (place / "rows.pkl").write_bytes(pickle.dumps(Evil(mark)))
    (place / "rows.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (place / "rows.json").write_bytes(pickle.dumps(Evil(mark)))
    (place / "rows.parquet").write_bytes(pickle.dumps(Evil(mark)))
    for name in ("rows.pkl", "rows.json", "rows.parquet"):
        with pytest.raises(ValueError):
            load_documents(str(place / name))
    load_documents(str(place / "rows.py"))  # read as text


def a_recipe(folder, mark):
    recipe = folder.parent / "wanted.yaml"
    for text in (
        f"model: !!python/object/apply:os.mknod ['{mark}']\n", "model: {family: lnlm_rnn, trust_remote_code: true}\n",
        "training: {hub_token: hf_x}\n", "training: {learning_rate: fast}\n",
    ):  # fmt: skip
        recipe.write_text(text)
        found = run("pretrain", recipe, "--data", "stdlib", "--output", folder.parent / "out")
        assert found.status == 2 and not (folder.parent / "out").exists()


def a_recipe_beside(folder, mark):
    hub = "hub: {push: true, repo_id: me/it}\ntraining: {report_to: [tensorboard], output_dir: elsewhere}\n"
    data = folder.parent / "rows.txt"
    data.write_text("a line\n" * 200)
    (folder / "recipe.yaml").write_text(
        f"objective: {{name: causal}}\ndata: {{source: '{data}', block_size: 8}}\n{hub}"
    )
    found = succeed("evaluate", folder)
    assert str(data) in found.out + found.err
    assert not Path("elsewhere").exists() and not list(folder.parent.rglob("events.out*"))
    (folder / "recipe.yaml").write_text("objective: {name: causal}\nmodel: {trust_remote_code: true}\n")
    edit(folder / "config.json", model_type="strange", auto_map={"AutoConfig": "strange.Config"})
    assert run("evaluate", folder, "--data", data).status == 2


def a_training_checkpoint(folder, mark):
    [last] = [path for path in folder.glob("checkpoint-*") if path.is_dir()][-1:]
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save({"x": Evil(mark)}, last / name)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(last / name, weights_only=True)
    assert run("pretrain", "--resume", "--output", folder, *settings("training.max_steps=3")).status != 99


def another_user(folder, mark):
    place = folder.parent / "cache" / "hf_lnlm"
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(place.parent)}):
        assert kept.folder.__wrapped__() == place and place.stat().st_mode & 0o777 == 0o700
        place.chmod(0o777)
        assert kept.folder.__wrapped__() != place
        place.rmdir()
        place.symlink_to(folder)
        assert kept.folder.__wrapped__() != place


def module_of_the_user(folder, mark):
    (folder.parent / "plain.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    words = ("--data", "stdlib", "--output", folder.parent / "out")
    recipe = folder.parent / "wanted.yaml"
    for text in ("import: plain\nmodel: {family: lnlm_rnn}\n", "import: [./plain.py]\nmodel: {family: lnlm_rnn}\n"):
        recipe.write_text(text)
        found = run("pretrain", recipe, *words)
        assert found.status == 2 and "--import alone" in found.err
    found = run("pretrain", "--family", "lnlm_rnn", *words, "--import", "plain")
    assert found.status == 2 and "./plain.py" in found.err


TRIED = {
    "a checkpoint of one of our families, loaded with hf_lnlm installed": checkpoint_of_ours,
    "a checkpoint, loaded with `trust_remote_code=True` where hf_lnlm is missing": checkpoint_without_us,
    "a checkpoint with pickled weights (`.bin`, `.pt`)": pickled_weights,
    "a `config.json`": a_config,
    "a folder with links or index paths that lead outside": links_and_paths,
    "a tokenizer": a_tokenizer,
    "a data file": a_data_file,
    "a recipe that you start": a_recipe,
    "a recipe beside a checkpoint that you evaluate": a_recipe_beside,
    "another user of this machine, by files in the folder where compiled kernels are kept (`~/.cache/hf_lnlm`, or "
    "`$XDG_CACHE_HOME/hf_lnlm`)": another_user,
    "a Python module of yours that `--import` names": module_of_the_user,
    "a training checkpoint (`optimizer.pt`, `rng_state.pth`)": a_training_checkpoint,
}


def test_every_row_is_tried():
    hf_lnlm.register()
    assert sorted(ROWS) == sorted(TRIED)


@pytest.mark.parametrize("row", ROWS)
def test_row(row, folder, mark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TRIED[row](folder, mark)
    assert not mark.exists(), "a stranger's code ran"
