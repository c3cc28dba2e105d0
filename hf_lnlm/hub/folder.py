"""Reading a stranger's checkpoint folder: nothing here follows a link, unpickles, or trusts a size it was told.

Used by `check` and `push`. Every function raises `BadFile` (a `ValueError`) with one line that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_FILES = 10_000
MAX_TEXT_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20
TRAINING_STATE_FOLDERS = ("checkpoint-", "merged", "runs", "logs", ".git", ".cache", "__pycache__")
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_PICKLE_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".joblib",
    ".dill",
    ".npy",
    ".npz",
    ".h5",
    ".keras",
)


class BadFile(ValueError):
    """A file is not what it claims to be; the message names it."""


@dataclass(frozen=True)
class Entry:
    """One regular file of a folder: path relative to it (with `/`), and size in bytes."""

    path: str
    size: int


def shown(name: object) -> str:
    """`name` as printable text: a hostile file name must not write to the terminal."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def is_training_state(relative: str) -> bool:
    """Whether `relative` lies in a folder that isn't published: a run's state or another checkpoint (`merged/…`)."""
    top, slash, _ = relative.partition("/")
    return bool(slash) and (top in TRAINING_STATE_FOLDERS or top.startswith(TRAINING_STATE_FOLDERS[0]))


def _scan(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            yield prefix + entry.name, entry


def walk(folder: Path) -> tuple[list[Entry], list[str]]:
    """All regular files below `folder`, training state excepted, without following any link.

    Returns:
        The files in name order, and one line for every entry that is no regular file or folder.

    Raises:
        BadFile: more than 10,000 entries.
    """
    files: list[Entry] = []
    problems: list[str] = []
    pending = [(folder, "")]
    seen = 0
    while pending:
        here, prefix = pending.pop()
        for relative, entry in _scan(here, prefix):
            seen += 1
            if seen > MAX_FILES:
                raise BadFile(f"more than {MAX_FILES} files")
            if entry.is_symlink():
                problems.append(f"{shown(relative)} is a link to {shown(os.readlink(entry.path))}")
            elif entry.is_dir(follow_symlinks=False):
                if not is_training_state(relative + "/"):
                    pending.append((Path(entry.path), relative + "/"))
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                files.append(Entry(relative, entry.stat(follow_symlinks=False).st_size))
            else:
                problems.append(f"{shown(relative)} is no regular file")
    return sorted(files, key=lambda item: item.path), problems


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The UTF-8 text of the regular file at `path`.

    Raises:
        BadFile: it is a link, larger than `limit` bytes, or not UTF-8.
    """
    if path.is_symlink() or not path.is_file():
        raise BadFile(f"{shown(path.name)} is no regular file")
    if path.stat().st_size > limit:
        raise BadFile(f"{shown(path.name)} has {path.stat().st_size} bytes, more than {limit}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{shown(path.name)} is not UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises:
        BadFile: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadFile(f"{path.name} is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise BadFile(f"{path.name} is not a JSON object")
    return value


def looks_pickled(path: Path) -> bool:
    """Whether a file is, or may hold, a pickle: by its name's ending or by its first bytes."""
    if path.name.endswith(_PICKLE_SUFFIXES):
        return True
    with path.open("rb") as file:
        head = file.read(64)
    return (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05") or head.startswith(b"PK\x03\x04")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: its dtype's name and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def _header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise BadFile(f"{path.name} is cut off or no safetensors file (header of {length} bytes, file of {size})")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise BadFile(f"{path.name}: its header is not JSON") from None
    if not isinstance(header, dict):
        raise BadFile(f"{path.name}: its header is not a JSON object")
    return header, size - 8 - length


def _tensor(path: Path, name: str, row: Any) -> tuple[TensorEntry, tuple[int, int]]:
    problem = BadFile(f"{path.name}: the header's entry for {shown(name)} is malformed")
    if not isinstance(row, dict):
        raise problem
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if dtype not in _DTYPE_BITS or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise problem
    if not all(type(item) is int and item >= 0 for item in [*shape, *offsets]):
        raise problem
    entry = TensorEntry(dtype, tuple(shape))
    if offsets[1] - offsets[0] != (entry.elements * _DTYPE_BITS[dtype] + 7) // 8:
        raise BadFile(f"{path.name}: {shown(name)} of shape {list(shape)} does not fit its bytes")
    return entry, (offsets[0], offsets[1])


def safetensors_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file holds, from its header alone.

    Raises:
        BadFile: cut off, overlapping, with gaps, or with a shape that doesn't fit its bytes.
    """
    header, data_bytes = _header(path)
    tensors, spans = {}, []
    for name, row in header.items():
        if name != "__metadata__":
            tensors[name], span = _tensor(path, name, row)
            spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise BadFile(f"{path.name}: tensors overlap or leave a gap at byte {end}")
        end = stop
    if end != data_bytes:
        raise BadFile(f"{path.name} is cut off or padded: tensors need {end} bytes, the file holds {data_bytes}")
    return tensors
