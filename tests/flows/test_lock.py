"""One run at a time in an output folder, whoever holds it and however the holder ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager

import pytest

import hf_lnlm
from hf_lnlm.flows.lock import FolderLock
from hf_lnlm.flows.manifest import LOCK_FILE, RUN_MANIFEST
from hf_lnlm.hub.push import foreign_files, published_files

from ..cli.running import run, settings, succeed


@contextmanager
def held(folder):
    """The id of another process that holds a folder; killed at the end."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        FolderLock(folder).take()
        os.write(writing, b"held")
        signal.pause()
    try:
        assert os.read(reading, 4) == b"held"
        yield holder
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(reading)
        os.close(writing)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_run_says_who_holds_the_folder_and_leaves_it_alone(rnn, text_file, tmp_path):
    folder, demo = shutil.copytree(rnn, tmp_path / "run"), tmp_path / "demo"
    demo.mkdir()
    (demo / "demo.json").write_text("{}")
    new = ["pretrain", rnn / "recipe.yaml"]
    finetune = ["finetune", "--checkpoint", rnn, "--task", "causal", "--data", text_file]
    with held(folder) as holder, held(demo) as demonstrator:
        before = contents(tmp_path)
        for words in (
            new,
            [*new, "--overwrite"],
            ["pretrain", "--resume"],
            finetune,
            [*finetune, "--overwrite"],
        ):
            refused = run(*words, "--output", folder)
            assert refused.status == 2 and refused.err.count("\n") == 1, refused.err
            assert f"in use by a run (process {holder} on {socket.gethostname()})" in refused.err
        with pytest.raises(ValueError, match="in use by a run"):
            hf_lnlm.pretrain(rnn / "recipe.yaml", output=folder, overwrite=True)
        for words in ([], ["--resume"], ["--overwrite"]):
            assert f"process {demonstrator} on" in run("demo", "--output", demo, *words).err
        assert contents(tmp_path) == before
    assert (folder / LOCK_FILE).is_file(), "a killed holder leaves its file"
    succeed("pretrain", "--resume", "--output", folder, *settings("training.max_steps=3"))
    assert not (folder / LOCK_FILE).exists() and LOCK_FILE not in (folder / RUN_MANIFEST).read_text()


def test_a_folder_that_another_run_filled_meanwhile_is_not_written_into(rnn, tmp_path, monkeypatch):
    from hf_lnlm.flows import pretrain

    def slow(recipe, prepare=pretrain.pretraining_setup):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.yaml").write_text("another's")
        return prepare(recipe)

    monkeypatch.setattr(pretrain, "pretraining_setup", slow)
    assert "filled by something else" in run("pretrain", rnn / "recipe.yaml", "--output", tmp_path / "run").err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_a_lock_is_of_one_process_and_ends_with_it(tmp_path):
    with FolderLock(tmp_path / "run") as lock, FolderLock(tmp_path / "run") as second:
        assert lock.take() and not lock.take()
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            second.take()
        child = os.fork()
        if not child:  # a worker must not keep the lock when its parent is killed
            os._exit(lock._handle is not None or (lock.release(), lock.path.is_file())[1] is False)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(ValueError, match="in use"):
            second.refuse_if_held()
    assert FolderLock(tmp_path / "run").take()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="is a link"):
        FolderLock(tmp_path / "other").take()
    assert not (tmp_path / "victim").exists()


def test_other_processes_of_a_run_hold_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not FolderLock(tmp_path / "run").take() and not (tmp_path / "run").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FolderLock(tmp_path) as lock:
        assert lock.take() and "its file system has no locks" in capsys.readouterr().err
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* delete {LOCK_FILE}"):
            FolderLock(tmp_path).take()
    ended = subprocess.Popen(["true"])
    ended.wait()
    for content, stale in (("", True), (f"{ended.pid} {socket.gethostname()}", True), ("1 elsewhere", False)):
        (tmp_path / LOCK_FILE).write_text(content)
        with FolderLock(tmp_path) as lock:
            if stale:
                assert lock.take()
                continue
            with pytest.raises(ValueError, match="in use by a run \\(process 1 on elsewhere\\), as far as can be told"):
                lock.take()
        assert (tmp_path / LOCK_FILE).read_text() == content


def test_a_lock_is_neither_published_nor_foreign_nor_of_the_run(rnn, tmp_path):
    folder = shutil.copytree(rnn, tmp_path / "run")
    (folder / LOCK_FILE).write_text("1 elsewhere")
    assert {line.split()[0] for line in succeed("check", folder).out.splitlines()} == {"ok"}
    assert LOCK_FILE not in [entry.path for entry in published_files(folder)] + foreign_files(folder)
    succeed("pretrain", rnn / "recipe.yaml", "--output", folder, "--overwrite")
    assert LOCK_FILE not in json.loads((folder / RUN_MANIFEST).read_text())["files"]
