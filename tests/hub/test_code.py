"""Carried code is told apart by its content: the package's, a release's, somebody else's."""

from __future__ import annotations

import hashlib
import json
import os
import re

import pytest

from hf_lnlm import GPT3Config, GPT3ForCausalLM, RNNConfig, RNNForCausalLM, __version__
from hf_lnlm.hub import code
from hf_lnlm.hub.check import check_folder
from hf_lnlm.hub.folder import BadFile
from hf_lnlm.registry import COMPOSED, FAMILIES

OLD = b'"""What an earlier release carried."""\n'


def save(folder, cls=RNNForCausalLM, config=RNNConfig):
    cls(config(vocab_size=16, hidden_size=8, num_hidden_layers=1, pad_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model")


@pytest.fixture
def earlier(folder, monkeypatch):
    """A folder whose nn_state.py and old_part.py were written by release 0.0.9."""
    digest = hashlib.sha256(OLD).hexdigest()
    versions = {"0.0.9": {"nn_state.py": [digest], "old_part.py": [digest]}, **code.released()}
    monkeypatch.setattr(code, "released", lambda: versions)
    (folder / "nn_state.py").write_bytes(OLD)
    (folder / "old_part.py").write_bytes(OLD)
    return folder


def finding(folder):
    found = [finding for finding in check_folder(folder) if finding.topic == "code"]
    return [(item.level, item.message) for item in found]


def test_digests_are_well_formed_and_the_installed_version_is_no_release_with_other_code():
    assert list(code.released()) == sorted(code.released(), key=lambda version: [*map(int, version.split("."))])
    for files in code.released().values():
        assert all(name.endswith(".py") and digests == sorted(set(digests)) for name, digests in files.items())
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digests in files.values() for digest in digests)
    assert code.released().get(__version__, code.installed_digests()) == code.installed_digests()


def test_every_family_that_saves_now_is_in_the_next_release():
    digests = code.installed_digests()
    names = {f"modeling_{row.name}.py" for row in (*FAMILIES, *COMPOSED)}
    assert names <= set(digests)


def test_a_release_is_appended_and_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "DIGESTS", tmp_path / "digests.json")
    code.DIGESTS.write_text("{}")
    code.released.cache_clear()
    code.add_release("9.0.0", {"a.py": ["0" * 64]})
    code.add_release("9.0.0", {"a.py": ["0" * 64]})
    assert json.loads(code.DIGESTS.read_text()) == {"9.0.0": {"a.py": ["0" * 64]}}
    with pytest.raises(ValueError, match=r"9\.0\.0 is released with other code"):
        code.add_release("9.0.0", {"a.py": ["1" * 64]})
    monkeypatch.undo()
    code.released.cache_clear()


@pytest.mark.parametrize(("cls", "config"), [(RNNForCausalLM, RNNConfig), (GPT3ForCausalLM, GPT3Config)])
def test_what_the_package_saves_is_its_own(tmp_path, cls, config):
    assert finding(save(tmp_path / "model", cls, config))[0][1].endswith(
        f"same as hf_lnlm {__version__}, every head reachable"
    )


@pytest.mark.parametrize("version", [None, "0.1.0"])
def test_changed_code_differs_whatever_version_it_claims(folder, version):
    path = folder / "modeling_rnn.py"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:40], "import os\n", *lines[40:]]))
    if version:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "hf_lnlm_version": version}))
    assert ("fail", "differs from every hf_lnlm: modeling_rnn.py, line 41") in finding(folder)


@pytest.mark.parametrize("name", ["custom_generate/generate.py", "extra.py", "deep/er/nn_state.py"])
def test_stray_python_fails_at_any_depth(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("print(1)\n")
    assert ("fail", f"stray Python file: {name} is not part of hf_lnlm") in finding(folder)


def test_a_release_of_ours_is_older_and_due(earlier):
    ((level, message),) = finding(earlier)
    assert level == "warn" and message.startswith("older: 2 files of hf_lnlm 0.0.9") and "--refresh-code" in message


def test_refreshing_leaves_weights_config_and_strangers(earlier):
    (earlier / "mine.py").write_text("print(1)\n")
    before = {name: (earlier / name).read_bytes() for name in ("model.safetensors", "config.json", "mine.py")}
    lines = code.refresh(earlier)
    assert lines[1:] == ["removed old_part.py of hf_lnlm 0.0.9", "left mine.py, which is not part of hf_lnlm"]
    assert {name: (earlier / name).read_bytes() for name in before} == before
    (earlier / "mine.py").unlink()
    assert finding(earlier)[0][0] == "ok"


def test_refreshing_touches_nothing_if_a_strangers_file_is_in_the_way(earlier):
    (earlier / "modeling_rnn.py").write_text("print(1)\n")
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    with pytest.raises(BadFile, match=r"modeling_rnn\.py differs from every released hf_lnlm"):
        code.refresh(earlier)
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


def test_refreshing_adds_the_heads_that_auto_map_lacks(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": config["auto_map"]["AutoConfig"]}})
    )
    assert code.refresh(folder)[-1].startswith("config.json: auto_map has AutoModel")
    assert json.loads((folder / "config.json").read_text()) == config


def test_only_folders_of_ours_without_links_are_refreshed(tmp_path, folder):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadFile, match="model_type bert is none of ours"):
        code.refresh(tmp_path / "other")
    os.symlink(folder / "nn_state.py", folder / "link.py")
    with pytest.raises(BadFile, match=r"link\.py is a link"):
        code.refresh(folder)


def as_hub_cache(folder, root):
    """Lay a folder out as the Hub's cache does and return the snapshot."""
    snapshot, blobs = root / "snapshots" / "0123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (blobs / digest).write_bytes(path.read_bytes())
        os.symlink(f"../../blobs/{digest}", snapshot / path.name)
    return snapshot


def test_the_cache_of_the_hub_is_read_through_its_links_and_never_written(folder, tmp_path):
    snapshot = as_hub_cache(folder, tmp_path / "models--me--it")
    assert check_folder(snapshot) == check_folder(folder)
    with pytest.raises(BadFile, match="refresh a copy of the folder"):
        code.refresh(snapshot)


@pytest.mark.parametrize("target", ["../../../secret", "/etc/hostname", "../../blobs/../../secret", "../0124/secret"])
def test_other_links_of_a_cache_are_refused(folder, tmp_path, target):
    snapshot = as_hub_cache(folder, tmp_path / "models--me--it")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "generation_config.json").unlink()
    os.symlink(target, snapshot / "generation_config.json")
    assert any(f.level == "fail" and "generation_config.json is a link" in f.message for f in check_folder(snapshot))
