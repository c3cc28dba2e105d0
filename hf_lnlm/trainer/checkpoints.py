"""Checkpoint folders that are whole or absent.

A checkpoint is written under a hidden staging folder, listed in a manifest (bytes and CRC-32 of every file), forced to
disk and renamed; it is renamed away before it is deleted. Whatever moment a process dies at, a folder called
`checkpoint-N` is either complete or recognisably damaged, and the one before it is untouched.

A checkpoint without a manifest (written by the stock Trainer) is examined by its own formats: the header of every
safetensors file must fit the file's length, every torch archive must have its directory, every JSON file must parse.
"""

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..hub.folder import BadFile, safetensors_entries

logger = logging.get_logger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
STAGING_NAME = ".staging"
_REPLACED = ".replaced-"
_DELETED = ".deleted-"
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
_CHUNK = 1 << 22


def step_of(folder: str | Path) -> int | None:
    """Return the step in the name of a checkpoint folder, None if it isn't called `checkpoint-<step>`."""
    match = _CHECKPOINT.match(Path(folder).name)
    return int(match.group(1)) if match else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders `checkpoint-<step>` of `output_dir`, oldest step first."""
    root = Path(output_dir)
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the regular files below `folder` in a fixed order, the manifest excepted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            yield path


def _crc32(path: Path) -> int:
    """Return the CRC-32 of a file, read in chunks."""
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _force(path: Path) -> None:
    """Force a file or a folder to disk; some file systems can't do it for folders, and it isn't needed there."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not folder:
            raise


def write_manifest(folder: str | Path) -> None:
    """Write the manifest of a finished folder and force everything in it to disk."""
    root = Path(folder)
    listing = {}
    for path in _files(root):
        listing[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        _force(path)
    manifest = root / MANIFEST_NAME
    manifest.write_text(json.dumps({"files": listing}, indent=1) + "\n", encoding="utf-8")
    _force(manifest)
    for sub in [path for path in root.rglob("*") if path.is_dir()]:
        _force(sub)
    _force(root)


def publish(staged: str | Path, final: str | Path) -> None:
    """Put a finished folder in its place; a folder already there is moved aside first and deleted last.

    Args:
        staged: The finished folder.
        final: Its place, on the same file system.
    """
    staged, final = Path(staged), Path(final)
    aside = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(staged, final)
    _force(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove(folder: str | Path) -> None:
    """Delete a checkpoint so that no half-deleted one is ever visible under its name."""
    folder = Path(folder)
    aside = folder.with_name(_DELETED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_staging(output_dir: str | Path) -> None:
    """Clear what a killed process left: staging folders, half-deleted ones, and an interrupted replacement."""
    root = Path(output_dir)
    if not root.is_dir():
        return
    for path in root.iterdir():
        if path.name.startswith(_REPLACED):
            original = root / path.name.removeprefix(_REPLACED)
            if not original.exists():
                os.rename(path, original)
                continue
        if path.name == STAGING_NAME or path.name.startswith((_REPLACED, _DELETED)):
            shutil.rmtree(path, ignore_errors=True)


def rotate(
    output_dir: str | Path,
    limit: int | None,
    step: int,
    best: str | None = None,
    damaged: Collection[str] = (),
) -> None:
    """Keep at most `limit` checkpoints: never delete that of `step` nor the best one.

    Those named in `damaged` go first, then those of later steps (the run was continued from further back).

    Args:
        output_dir: Folder of the checkpoints.
        limit: Most of them; None or 0 for no limit.
        step: Step of the checkpoint just written.
        best: Folder of the best one, if there is one.
        damaged: Names of folders that can't be resumed from.
    """
    if limit is None or limit <= 0:
        return
    found = list_checkpoints(output_dir)
    keep = {step, step_of(best) if best else None}
    older = [path for path in found if (step_of(path) or 0) <= step and path.name not in damaged]
    stale = [path for path in found if path not in older]
    surplus = len(found) - max(limit, len([path for path in found if step_of(path) in keep]))
    for path in [path for path in stale + older if step_of(path) not in keep][: max(surplus, 0)]:
        remove(path)


def _fault_in_file(path: Path) -> str | None:
    """Return what is wrong with one file judged by its own format, None if nothing is."""
    if path.suffix == ".safetensors":
        try:
            safetensors_entries(path)
        except BadFile as error:
            return str(error)
    if path.suffix in (".pt", ".pth", ".bin"):
        return None if zipfile.is_zipfile(path) else "it isn't a complete torch archive"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return "it isn't JSON"
    return None


def _fault_in_manifest(root: Path) -> str | None:
    """Return the first difference between a folder and its manifest."""
    try:
        entries = json.loads((root / MANIFEST_NAME).read_text(encoding="utf-8"))["files"].items()
        listing = [(name, int(entry["bytes"]), int(entry["crc32"])) for name, entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} can't be read"
    for name, size, crc in listing:
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _crc32(path) != crc:
            return f"{name} has changed since it was written (CRC-32 differs)"
    return None


def find_fault(folder: str | Path) -> str | None:
    """Return in a few words what is wrong with a checkpoint, None if it can be resumed from.

    Args:
        folder: A folder `checkpoint-<step>` written by this package or by the stock Trainer.
    """
    root = Path(folder)
    if not (root / "trainer_state.json").is_file():
        return "trainer_state.json is missing"
    if (root / MANIFEST_NAME).exists():
        return _fault_in_manifest(root)
    for path in _files(root):
        fault = _fault_in_file(path)
        if fault is not None:
            return f"{path.relative_to(root)}: {fault}"
    return None


def newest_complete(output_dir: str | Path) -> tuple[str | None, dict[str, str]]:
    """Return the newest checkpoint that can be resumed from and, by name, what is wrong with newer ones."""
    faults: dict[str, str] = {}
    for path in reversed(list_checkpoints(output_dir)):
        fault = find_fault(path)
        if fault is None:
            return str(path), faults
        faults[path.name] = fault
    return None, faults


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint that can be resumed from; warn once about newer ones that can't.

    Returns:
        The path of the folder, or None if `output_dir` holds no complete checkpoint.
    """
    chosen, faults = newest_complete(output_dir)
    warn_of(faults, output_dir, chosen)
    return chosen


def warn_of(faults: dict[str, str], output_dir: str | Path, chosen: str | None) -> None:
    """Say in one warning which checkpoints were skipped, why, and which one is used.

    Args:
        faults: Name of a checkpoint → what is wrong with it; empty for no warning.
        output_dir: Where they lie.
        chosen: Folder of the one that is used, if there is one.
    """
    if faults:
        instead = f"using {Path(chosen).name} instead" if chosen else "no complete checkpoint is left"
        skipped = "; ".join(f"{name} ({fault})" for name, fault in faults.items())
        logger.warning(f"Skipping damaged checkpoints in {output_dir}: {skipped}; {instead}.")
