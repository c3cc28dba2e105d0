"""Publishing a checkpoint folder: what goes up, in one commit, with patience for a server that is busy.

huggingface_hub retries some uploads but not `create_commit`; one 503 there ends a push. Here every call is repeated
with growing pauses while the failure is one that passes (busy, timeout, broken connection), and a failure that
doesn't (401, 403, 404) becomes one line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..registry import COMPOSED
from .connection import bounded, lost_connection, tell
from .folder import BadFile, Entry, is_training_state, shown, walk
from .secrets import secret_file

Result = TypeVar("Result")

PASSING_STATUS = (408, 429, 500, 502, 503, 504)
TRIES = 6
LONGEST_PAUSE = 60.0
TRAINING_STATE_FILES = re.compile(
    r"(training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|trainer_state\.json"
    r"|recurrent_state\.pt|sealed\.json|.*\.tmp)$"
)
PARTS = frozenset(part for row in COMPOSED for part in row.config_class.sub_configs)
"""Folders of a checkpoint that hold the models which it is made of."""
_CHECKPOINT = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template"
    r"|preprocessor_config|processor_config|model\.safetensors\.index|evaluation|results|quantization_config)\.json"
    r"|(model|adapter_model)(-\d+-of-\d+)?\.safetensors|recipe\.yaml|metrics\.csv|curves\.png|vocab\.txt|merges\.txt"
    r"|(spiece|tokenizer|sentencepiece\.bpe)\.model|chat_template\.jinja|README\.md|(LICENSE|NOTICE)(\.\w+)?|\w+\.py"
)
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")


class PushFailed(RuntimeError):
    """The Hub refused or could not be reached; the message is one line for the user."""


@dataclass(frozen=True)
class Patience:
    """How often and how long to try again.

    Attributes:
        tries: attempts in all.
        pause: seconds before the second attempt; doubled each time, at most 60.
        sleep: called with seconds.
    """

    tries: int = TRIES
    pause: float = 1.0
    sleep: Callable[[float], None] = time.sleep


def is_state(path: str) -> bool:
    """Whether the file at `path` (relative to the folder) is the state of a run."""
    return is_training_state(path) or bool(TRAINING_STATE_FILES.match(path.rsplit("/", 1)[-1]))


def is_published(path: str) -> bool:
    """Whether the file at `path` (relative to the folder) may go to the Hub: not the state of a run, not hidden."""
    return not is_state(path) and not any(part.startswith(".") for part in path.split("/"))


def published_files(folder: str | Path, include: Collection[str] = ()) -> list[Entry]:
    """The files of `folder` that a push sends, in name order: those of a checkpoint, and those that `include` names.

    Raises:
        BadFile: the folder holds more than 10,000 files.
    """
    files, _ = walk(Path(folder))
    return [entry for entry in files if entry.path in include or is_of_a_checkpoint(entry.path)]


def foreign_files(folder: str | Path, include: Collection[str] = ()) -> list[str]:
    """The files of `folder` that a push leaves out because they are neither a checkpoint's nor a run's state."""
    files, _ = walk(Path(folder))
    return [e.path for e in files if e.path not in include and is_published(e.path) and not is_of_a_checkpoint(e.path)]


def secret_files(folder: str | Path, include: Collection[str] = ()) -> dict[str, str]:
    """The files of `folder`, the state of a run aside, that look like secrets: path → why."""
    files, _ = walk(Path(folder))
    open_ones = [e.path for e in files if e.path not in include and not is_state(e.path)]
    return {path: why for path in open_ones if (why := secret_file(Path(folder), path)) is not None}


def is_of_a_checkpoint(path: str) -> bool:
    """Whether a file belongs to a checkpoint by its name, at the top or in the folder of a part."""
    part, _, name = path.rpartition("/")
    return is_published(path) and "/" not in part and bool(_CHECKPOINT.fullmatch(name)) and (not part or part in PARTS)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: Exception) -> bool:
    status = _status(error)
    return status in PASSING_STATUS if status is not None else lost_connection(error)


def _asked_pause(error: Exception) -> float:
    """Seconds that the server's Retry-After header asks for, or 0."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except (TypeError, ValueError):
        return 0.0


def patiently(call: Callable[[], Result], what: str, patience: Patience) -> Result:
    """The result of `call`, repeated while it fails in a way that may pass.

    Args:
        call: does one request, or a group that may be repeated as a whole.
        what: for the message, e.g. `owner/name`.
        patience: attempts and pauses.

    Raises:
        PushFailed: one line saying what stood in the way.
    """
    for attempt in range(1, patience.tries + 1):
        try:
            with bounded():
                return call()
        except Exception as error:
            if not _passes(error):
                _refuse(error, what)
            if attempt == patience.tries:
                raise PushFailed(f"{what}: gave up after {attempt} attempts ({_short(error)})") from None
            pause = max(patience.pause * 2 ** (attempt - 1), _asked_pause(error))
            pause = min(pause, LONGEST_PAUSE)
            tell(f"{what}: try {attempt} of {patience.tries} failed ({_short(error)}); the next one in {pause:g} s")
            patience.sleep(pause)
    raise PushFailed(f"{what}: tries must be at least 1, got {patience.tries}")


def _refuse(error: Exception, what: str) -> None:
    """Raise a PushFailed for what the Hub or its client refuses; anything else as it is."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        raise PushFailed(f"{what}: offline mode is on (HF_HUB_OFFLINE)") from None
    if isinstance(error, LocalTokenNotFoundError):
        raise PushFailed(_sentence(401, what)) from None
    if isinstance(error, HfHubHTTPError):
        raise PushFailed(_sentence(_status(error), what, error)) from None
    raise error


def _short(error: Exception | None) -> str:
    text = " ".join(str(error).split()) if error else ""
    return shown(text[:160]) or type(error).__name__


def _sentence(status: int | None, what: str, error: Exception | None = None) -> str:
    known = {
        401: f"not logged in, or the token is wrong (401) for {what}: run `hf auth login`, or set HF_TOKEN",
        403: f"this token may not write to {what} (403): it needs the write role and membership",
        404: f"{what} does not exist, or this token can't see it (404): check name and token",
    }
    if status in known:
        return known[status]
    return f"{what}: the Hub refused with status {status} ({_short(error)})"


def check_secrets(folder: str | Path, include: Collection[str] = ()) -> None:
    """Refuse to publish a folder with files that look like secrets.

    Raises:
        BadFile: naming the first of them and why; `include` lets one through.
    """
    for path, why in secret_files(folder, include).items():
        raise BadFile(
            f"{shown(path)} looks like a secret ({why}): nothing was pushed; remove it, or --include {shown(path)}"
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    patience: Patience | None = None,
    include: Collection[str] = (),
) -> str:
    """Publish `folder` to the model repository `repo_id` in one commit, making the repository if there is none.

    Weight files that the repository holds and the folder doesn't are removed in the same commit: a loader would
    otherwise prefer an old `model.safetensors` to new shards.

    Args:
        folder: a checkpoint folder; the state of a run in it stays home.
        repo_id: `owner/name`.
        private: for a new repository; None leaves it to the account's default.
        revision: branch; None is `main`.
        message: commit message.
        token: None uses the one of `hf auth login` or HF_TOKEN.
        endpoint: address of the Hub; None uses HF_ENDPOINT or the public one.
        patience: attempts and pauses.
        include: files, relative to the folder, that go up although they are no checkpoint's or look like secrets.

    Returns:
        Address of the commit.

    Raises:
        PushFailed: one line saying what stood in the way.
        ValueError: the folder has nothing to publish or a file that looks like a secret, or `repo_id` is malformed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    patience = patience or Patience()
    check_secrets(folder, include)
    files = published_files(folder, include)
    if not files:
        raise ValueError(f"{folder} holds nothing to publish")
    api = HfApi(endpoint=endpoint, token=token, library_name="hf_lnlm")
    repo = patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, patience).repo_id
    if revision is not None:
        patiently(lambda: api.create_branch(repo, branch=revision, exist_ok=True), repo, patience)
    remote = patiently(lambda: api.list_repo_files(repo, revision=revision), repo, patience)
    kept = {entry.path for entry in files}
    stale = [path for path in remote if _WEIGHTS.match(path) and path not in kept]

    def commit() -> Any:
        # made anew at each attempt: an operation remembers that it was uploaded, and a server that failed forgets
        operations = [CommitOperationAdd(entry.path, str(Path(folder) / entry.path)) for entry in files]
        removals = [CommitOperationDelete(path) for path in stale]
        text = message or "Upload with hf_lnlm"
        return api.create_commit(repo, [*operations, *removals], commit_message=text, revision=revision)

    return str(patiently(commit, repo, patience).commit_url)
