"""Compiled kernels are kept by their content, in a folder that only this user can have written."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from hf_lnlm.ops.kernels import kept

SOURCE = """
from hf_lnlm.ops.kernels.compiled import STRICT, compiled, part

FACTOR = 3


@part(STRICT)
def scaled(x):
    return x * FACTOR


@compiled(STRICT)
def total(count):
    value = 0
    for i in range(count):
        value += scaled(i)
    return value
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept.folder.cache_clear()
    yield tmp_path / "cache" / "hf_lnlm"
    kept.folder.cache_clear()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Import a source under any name, as checkpoints carry code under names of their own."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(name: str, source: str = SOURCE):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_equal_code_is_compiled_once_whatever_its_module_is_called(place, module):
    first, second = module("first"), module("second", SOURCE.replace("\nFACTOR", "\n\n\nFACTOR"))
    assert first.total(10) == second.total(10) == 135
    assert sum(first.total.stats.cache_misses.values()) == 1
    assert sum(second.total.stats.cache_hits.values()) == 1
    (file,) = place.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "change", [("FACTOR = 3", "FACTOR = 4"), ("x * FACTOR", "x + FACTOR"), ("@part(STRICT)", "@part(set())")]
)
def test_whatever_a_kernel_reaches_is_its_content(module, change):
    assert kept.content_of(module("one").total.py_func) != kept.content_of(
        module("other", SOURCE.replace(*change)).total.py_func
    )


def test_two_revisions_of_one_name_live_side_by_side(place, module):
    old, new = module("code"), module("code", SOURCE.replace("FACTOR = 3", "FACTOR = 50"))
    assert (old.total(10), new.total(10)) == (135, 2250)
    again = module("code", SOURCE)
    assert again.total(10) == 135 and sum(again.total.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("fault", ["cut off", "head", "another's", "writable", "link"])
def test_damaged_files_are_compiled_again(place, module, tmp_path, fault):
    assert module("first").total(4) == 18
    (file,) = place.iterdir()
    content = file.read_bytes()
    if fault == "another's":
        assert module("other", SOURCE.replace("FACTOR = 3", "FACTOR = 4")).total(4) == 24
        (other,) = set(place.iterdir()) - {file}
        content = other.read_bytes()
    elif fault == "cut off":
        content = content[:-100]
    elif fault == "head":
        content = content.replace(b'"machine_code": ', b'"machine_code": 1', 1)
    elif fault == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    file.write_bytes(content)
    file.chmod(0o660 if fault == "writable" else 0o600)
    again = module("second")
    assert again.total(4) == 18 and sum(again.total.stats.cache_misses.values()) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX's")
@pytest.mark.parametrize("fault", ["written by others", "link", "file", "no place", "foreign"])
def test_a_folder_that_others_could_have_written_is_not_used(place, tmp_path, capsys, monkeypatch, fault):
    place.parent.mkdir()
    if fault == "written by others":
        place.mkdir()
        place.chmod(0o770)
    elif fault == "link":
        (tmp_path / "real").mkdir()
        place.symlink_to(tmp_path / "real")
    elif fault == "file":
        place.write_text("")
    elif fault == "foreign":
        place.mkdir(mode=0o700)
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    else:
        place.parent.rmdir()
        place.parent.write_text("")
    private = kept.folder()
    assert private == kept.folder() != place and private.stat().st_mode & 0o777 == 0o700
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(place) in said and "this process compiles its own" in said
    expected = {"written by others": "mode 770", "link": "no folder", "foreign": "belongs to user"}
    assert expected.get(fault, "") in said
