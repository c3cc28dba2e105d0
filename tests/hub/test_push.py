"""Publishing over real HTTP on the loopback: what goes up, what survives, and what a refusal says."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

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
