"""Publishing over real HTTP on the loopback: what goes up, what survives, and what a refusal says."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants

from hf_lnlm.data.sources import load_documents
from hf_lnlm.errors import UsageProblem
from hf_lnlm.flows.models import load_config
from hf_lnlm.flows.recipe import ModelSection
from hf_lnlm.hub import connection
from hf_lnlm.hub.push import Patience, PushFailed, published_files, push_folder

from .loopback import TOKEN, LoopbackHub

# huggingface_hub sends LFS files in a way that its own HTTP library discourages
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
pauses: list[float] = []


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "training_args.bin").write_bytes(b"state")
    (tmp_path / ".hidden").write_text("no")
    pauses.clear()
    return tmp_path


@pytest.fixture(params=[False, True], ids=["regular", "lfs"])
def hub(request, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LoopbackHub(lfs=request.param) as server:
        yield server


def push(folder, hub, token=TOKEN, repo="user/model", **options):
    patience = Patience(tries=4, pause=0.5, sleep=pauses.append)
    return push_folder(folder, repo, token=token, endpoint=hub.url, patience=patience, **options)


def test_state_of_a_run_stays_home(folder, hub):
    assert [entry.path for entry in published_files(folder)] == ["config.json", "model.safetensors"]
    address = push(folder, hub)
    assert hub.files("user/model") == {
        "config.json": b'{"model_type": "gpt2"}',
        "model.safetensors": b"weights",
    }
    assert address.startswith(f"{hub.url}/user/model/commit/")
    assert len(hub.repositories["user/model"].commits) == 1


def test_second_push_replaces_and_removes_stale_weights(folder, hub):
    push(folder, hub)
    hub.files("user/model")["notes.txt"] = b"written by hand"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    push(folder, hub, message="Shards")
    assert set(hub.files("user/model")) == {"config.json", "model-00001-of-00001.safetensors", "notes.txt"}
    assert hub.repositories["user/model"].commits[-1] == "Shards"


def test_branch(folder, hub):
    push(folder, hub, revision="trial")
    assert "model.safetensors" in hub.files("user/model", "trial")
    assert not hub.files("user/model")


@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/", "/preupload/", "/tree/"])
def test_two_busy_answers_are_survived(folder, hub, where):
    hub.fail(where, 503, times=2)
    push(folder, hub)
    assert "model.safetensors" in hub.files("user/model")


def test_retry_after_is_obeyed_and_pauses_grow(folder, hub):
    hub.fail("/commit/", 503, times=2)
    push(folder, hub)
    assert pauses == [0.5, 1.0]
    pauses.clear()
    hub.fail("/commit/", 504, Retry_After="7")
    push(folder, hub)
    assert pauses == [7.0]


def test_gives_up_with_one_line(folder, hub):
    hub.fail("/commit/", 503, times=99)
    with pytest.raises(PushFailed, match=r"^user/model: gave up after 4 attempts \(.*503.*\)$"):
        push(folder, hub)


def test_no_server_is_one_line(folder):
    with LoopbackHub() as server:
        pass
    with pytest.raises(PushFailed, match=r"gave up after 4 attempts"):
        push(folder, server)
    assert len(pauses) == 3


@pytest.mark.parametrize(
    "status, words", [(401, "token is wrong"), (403, "may not write"), (404, "does not exist"), (400, "status 400")]
)
def test_refusals_are_one_line_and_not_repeated(folder, hub, status, words):
    hub.fail("/preupload/", status)
    with pytest.raises(PushFailed, match=words) as caught:
        push(folder, hub)
    assert "\n" not in str(caught.value)
    assert pauses == []


def test_wrong_token(folder, hub):
    with pytest.raises(PushFailed, match="token is wrong") as caught:
        push(folder, hub, token="hf_other")
    assert "hf_other" not in str(caught.value)
    assert not hub.repositories


def test_nothing_to_publish(tmp_path, hub):
    with pytest.raises(ValueError, match="nothing to publish"):
        push(tmp_path, hub)


@pytest.fixture
def silent(monkeypatch):
    """Address of a server that takes connections and never answers."""
    monkeypatch.setattr(connection, "TRY_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_hub_is_given_up_with_a_message_after_each_try(folder, silent, capsys):
    patience = Patience(tries=3, pause=0.5, sleep=pauses.append)
    with pytest.raises(PushFailed, match="user/model: gave up after 3 attempts"):
        push_folder(folder, "user/model", token=TOKEN, endpoint=silent, patience=patience)
    said = capsys.readouterr().err.splitlines()
    assert [line[:30] for line in said] == ["user/model: try 1 of 3 failed ", "user/model: try 2 of 3 failed "]
    assert pauses == [0.5, 1.0]


def test_what_a_silent_hub_should_give_is_refused_or_taken_from_the_cache(silent, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageProblem, match=r"user/model: .* doesn't answer \(gave up after"):
        load_config(ModelSection(checkpoint="user/model"))
    with pytest.raises(OSError, match=r"user/rows: .* doesn't answer"):
        load_documents("user/rows")
    snapshot = tmp_path / "models--user--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path), raising=False)
    connection.knock("user/model")
    assert constants.HF_HUB_OFFLINE and "user/model is taken from the cache" in capsys.readouterr().err
