"""`--overwrite` removes what a run wrote and left as it was, and nothing else."""

from __future__ import annotations

import json
import os

import pytest

from hf_lnlm.flows.manifest import RUN_MANIFEST, clear, leftover, record, recording


@pytest.fixture
def run(tmp_path):
    """A run's folder: two files of the run, one of the user's."""
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years")
    with recording(folder, begun=True):
        (folder / "config.json").write_text("{}")
        (folder / "checkpoint-2" / "optimizer.pt").write_text("state")
    return folder


def listing(folder):
    return json.loads((folder / RUN_MANIFEST).read_text())["files"]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def forge(folder, *files):
    (folder / RUN_MANIFEST).write_text(json.dumps({"files": dict.fromkeys(files, "0" * 64) | listing(folder)}))


def refuses(folder, message):
    before = names(folder)
    with pytest.raises(ValueError, match=message):
        leftover(folder)
    assert names(folder) == before


def test_what_a_run_wrote_goes_and_the_rest_stays(run):
    assert sorted(listing(run)) == ["checkpoint-2/optimizer.pt", "config.json"]
    found = leftover(run)
    clear(run, found)
    assert names(run) == ["thesis.txt"] and found.kept == [run / "thesis.txt"]


def test_what_is_written_outside_the_block_is_not_the_runs(run):
    (run / "notes.txt").write_text("mine")
    with recording(run):
        (run / "evaluation.json").write_text("{}")
    assert "notes.txt" not in listing(run) and "evaluation.json" in listing(run)
    (run / "config.json").unlink()
    record(run, [])
    assert "config.json" not in listing(run)


def test_a_folder_without_a_manifest_gets_none_from_an_evaluation(tmp_path):
    with recording(tmp_path):
        (tmp_path / "evaluation.json").write_text("{}")
    assert names(tmp_path) == ["evaluation.json"]
    refuses(tmp_path, "delete it yourself")


@pytest.mark.parametrize("name", ["config.json", "checkpoint-2/optimizer.pt"])
def test_a_changed_file_stays_and_is_named(run, name):
    (run / name).write_text("changed by hand")
    refuses(run, f"{name} has changed since the run wrote it")


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-3/optimizer.pt", "merged/x", "README.md"])
def test_files_in_the_way_that_the_run_did_not_write_are_named(run, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    refuses(run, f"{name} was not written by the run")


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "a/../../outside.txt", "", "a\0b"])
def test_names_that_lead_outside_refuse_the_whole(run, name):
    (run.parent / "outside.txt").write_text("mine")
    forge(run, name)
    refuses(run, "lies outside: nothing was removed")


def test_links_refuse_the_whole(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    os.symlink(tmp_path / "elsewhere", run / "folder")
    forge(run, "folder/file")
    refuses(run, "folder is a link: nothing was removed")
    (run / "folder").unlink()
    (run / "config.json").unlink()
    os.symlink(tmp_path / "elsewhere" / "file", run / "config.json")
    refuses(run, r"config\.json is a link: nothing was removed")


def test_a_link_that_nobody_lists_is_left_alone(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    os.symlink(tmp_path / "elsewhere", run / "folder")
    clear(run, leftover(run))
    assert (tmp_path / "elsewhere" / "file").exists() and (run / "folder").is_symlink()


@pytest.mark.parametrize("text", ["", "[]", '{"files": [1]}', '{"files": {"a": 1}}', "\udce4"])
def test_a_manifest_that_cannot_be_read_refuses_the_whole(run, text):
    (run / RUN_MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    refuses(run, RUN_MANIFEST.replace(".", r"\."))
