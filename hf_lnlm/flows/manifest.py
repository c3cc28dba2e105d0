"""What a run wrote into its folder, by name and SHA-256: all that `--overwrite` may remove."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UsageProblem
from ..hub.folder import BadFile, is_draft, read_json, shown, write_text
from ..hub.push import is_of_a_checkpoint

RUN_MANIFEST = ".hf_lnlm_run.json"
LOCK_FILE = ".hf_lnlm_run.lock"
_OF_A_RUN = (PREFIX_CHECKPOINT_DIR + "-", "merged/")


class Leftover(NamedTuple):
    """An earlier run's folder, sorted by what `--overwrite` does.

    Attributes:
        removed: files that the run wrote and that are as it left them.
        kept: all other files.
    """

    removed: list[Path]
    kept: list[Path]


def files_of(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder that is no folder, links included and never followed; manifest and lock excepted."""
    for here, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(here) / name).is_symlink()]
        yield from (Path(here) / name for name in sorted([*files, *links]) if not _is_aside(name))


def _is_aside(name: str) -> bool:
    return name in (RUN_MANIFEST, LOCK_FILE) or is_draft(name)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def recording(folder: Path, begun: bool = False) -> Iterator[None]:
    """Add what is written into a run's folder inside the block to its manifest.

    Args:
        folder: the run's; one without a manifest gets none.
        begun: make the manifest if there is none, for a folder that the run has made.
    """
    if begun and not (folder / RUN_MANIFEST).exists():
        record(folder, [])
    before = _stamps(folder)
    try:
        yield
    finally:
        if begun or (folder / RUN_MANIFEST).is_file():
            record(folder, [path for path, stamp in _stamps(folder).items() if before.get(path) != stamp])


def record(folder: Path, paths: list[Path]) -> None:
    """Add files to a run's manifest, and drop those from it that are gone."""
    listed = _listed(folder) if (folder / RUN_MANIFEST).exists() else {}
    kept = {name: value for name, value in listed.items() if (folder / name).is_file()}
    kept |= {path.relative_to(folder).as_posix(): digest(path) for path in paths if not path.is_symlink()}
    write_text(folder / RUN_MANIFEST, json.dumps({"files": dict(sorted(kept.items()))}, indent=1) + "\n")


class RecordCheckpoints(TrainerCallback):
    """Adds each checkpoint to the manifest of its run when it has been written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the checkpoint of this step."""
        folder = Path(args.output_dir)
        if state.is_world_process_zero and (folder / RUN_MANIFEST).is_file():
            record(folder, list(files_of(folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")))


def leftover(folder: Path) -> Leftover:
    """Sort the files of an earlier run's folder; changes nothing.

    Raises:
        UsageProblem: the folder has no manifest, one that names something outside or behind a link, or files in the way of
            a new run that the earlier one did not write as they are.
    """
    if not (folder / RUN_MANIFEST).exists() and not (folder / RUN_MANIFEST).is_symlink():
        raise UsageProblem(
            f"{folder} has no {RUN_MANIFEST} that says what a run wrote there: delete it yourself if you mean it"
        )
    listed = {folder / _inside(folder, name): value for name, value in _listed(folder).items()}
    found = list(files_of(folder))
    removed = [path for path in found if path in listed and path.is_file() and digest(path) == listed[path]]
    kept = [path for path in found if path not in removed]
    for path in kept:
        name = path.relative_to(folder).as_posix()
        if path in listed or name.startswith(_OF_A_RUN) or is_of_a_checkpoint(name):
            what = "has changed since the run wrote it" if path in listed else "was not written by the run"
            raise UsageProblem(
                f"{folder / shown(name)} {what} and would be lost: move it away, or give another --output"
            )
    return Leftover(removed, kept)


def clear(folder: Path, found: Leftover) -> None:
    """Remove what an earlier run wrote, and the folders that are empty then."""
    for path in found.removed:
        path.unlink(missing_ok=True)
    (folder / RUN_MANIFEST).unlink(missing_ok=True)
    for here, _, _ in os.walk(folder, topdown=False):
        if here != str(folder) and not os.path.islink(here) and not os.listdir(here):
            os.rmdir(here)


def _stamps(folder: Path) -> dict[Path, tuple[int, int, int]]:
    stamps = {}
    for path in files_of(folder):
        status = path.lstat()
        stamps[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return stamps


def _listed(folder: Path) -> dict[str, str]:
    """Return name → SHA-256 of a manifest.

    Raises:
        UsageProblem: it can't be read.
    """
    try:
        files = read_json(folder / RUN_MANIFEST).get("files")
    except BadFile as error:
        raise UsageProblem(f"{folder}: {error}") from None
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise UsageProblem(f"{folder / RUN_MANIFEST} lists no files with their SHA-256")
    return files


def _inside(folder: Path, name: str) -> PurePosixPath:
    """Return a listed name as a relative path.

    Raises:
        UsageProblem: it leads out of the folder, or through a link.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UsageProblem(f"{folder / RUN_MANIFEST} names {shown(name)}, which lies outside: nothing was removed")
    for part in [path, *path.parents]:
        if (folder / part).is_symlink() and str(part) != ".":
            raise UsageProblem(
                f"{folder / RUN_MANIFEST} names {shown(name)}, but {shown(part)} is a link: nothing was removed"
            )
    return path
