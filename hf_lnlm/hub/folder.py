"""Reading a stranger's checkpoint folder: nothing here follows a link, unpickles, or trusts a size it was told.

Used by `check` and `push`. Every function raises `BadFile` (a `ValueError`) with one line that names the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DRAFTS = ".draft-"
_DRAFT = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
MAX_FILES = 10_000
MAX_TEXT_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20
MAX_DIGITS = 40
"""Of a whole number: tokenizers without a limit have 10**30."""
TRAINING_STATE_FOLDERS = ("checkpoint-", "merged", "runs", "logs", ".git", ".cache", "__pycache__")
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_PICKLE_SUFFIXES = (
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".h5", ".keras",
)  # fmt: skip


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
            blob = _hub_blob(Path(entry.path), folder)
            if blob is not None:
                files.append(Entry(relative, blob.stat().st_size))
            elif entry.is_symlink():
                problems.append(f"{shown(relative)} is a link to {shown(os.readlink(entry.path))}")
            elif entry.is_dir(follow_symlinks=False):
                if not is_training_state(relative + "/"):
                    pending.append((Path(entry.path), relative + "/"))
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                files.append(Entry(relative, entry.stat(follow_symlinks=False).st_size))
            else:
                problems.append(f"{shown(relative)} is no regular file")
    return sorted(files, key=lambda item: item.path), problems


def _hub_blob(path: Path, root: Path) -> Path | None:
    """Return the file that a link of the Hub's cache stands for (`snapshots/REVISION/NAME` → `blobs/DIGEST`), or None."""
    snapshots = root.resolve().parent
    if snapshots.name != "snapshots" or not path.is_symlink():
        return None
    target = path.parent.resolve() / os.readlink(path)
    inside = Path(os.path.normpath(target)).parent == snapshots.parent / "blobs"
    return target if inside and target.is_file() and not Path(os.path.normpath(target)).is_symlink() else None


def is_plain(path: Path) -> bool:
    """Whether a path is a regular file and no link, but for links of the Hub's cache into its own blobs."""
    if not path.is_symlink():
        return path.is_file()
    roots = [parent for parent in path.absolute().parents if parent.parent.name == "snapshots"]
    return any(_hub_blob(path, root) is not None for root in roots)


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The UTF-8 text of the regular file at `path`.

    Args:
        path: Of the file.
        limit: Most bytes.

    Raises:
        BadFile: it is a link, larger than `limit` bytes, or not UTF-8.
    """
    if not is_plain(path):
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
        BadFile: unreadable, not JSON (which knows no NaN), not an object, with a key twice, or with text that is none.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=_whole_number)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except BadFile as error:
        raise BadFile(f"{path.name} {error}") from None
    except UnicodeEncodeError:
        raise BadFile(f"{path.name} holds half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path.name} is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise BadFile(f"{path.name} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadFile(f"holds {shown(next(name for name in names if names.count(name) > 1))} twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise BadFile("holds NaN, which is no number")
    return float(name)


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadFile(f"holds a number of {len(digits)} digits")
    return int(digits)


def json_text(value: Any, encoding: str = "utf-8", **options: Any) -> str:
    """Strict JSON: what is no finite number becomes null, text that the encoding doesn't know is escaped.

    Args:
        value: plain values.
        encoding: that it will be written in.
        options: of `json.dumps`.
    """
    plain = _finite(value)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, **options)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(plain, allow_nan=False, **options)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, with the umask's mode; a link in its place is refused, never followed.

    Raises:
        BadFile: there is a link or a folder of this name.
    """
    if path.is_symlink() or path.is_dir():
        raise BadFile(f"{shown(path)} is no regular file: nothing was written")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_whole(save: Callable[[Path], Any], folder: Path) -> None:
    """Let `save` write several files into a folder so that each is whole or absent there, with the umask's mode.

    Args:
        save: writes into the folder that it is given.
        folder: where they belong.

    Raises:
        BadFile: there is a link or a folder of the name of one.
    """
    with tempfile.TemporaryDirectory(prefix=_DRAFTS, dir=folder, ignore_cleanup_errors=True) as draft:
        save(Path(draft))
        for path in sorted(path for path in Path(draft).rglob("*") if path.is_file()):
            target = folder / path.relative_to(draft)
            if target.is_symlink() or target.is_dir():
                raise BadFile(f"{shown(target)} is no regular file: nothing was written there")
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            path.chmod(0o666 & ~_umask())  # safetensors makes weights for their owner alone
            os.replace(path, target)


def is_draft(name: str) -> bool:
    """Whether a file or folder of that name was left by a write that was interrupted."""
    return name.startswith(_DRAFTS) or bool(_DRAFT.fullmatch(name))


def clear_drafts(folder: Path) -> None:
    """Remove from a folder what interrupted writes left there; nothing else may be writing."""
    for path in folder.iterdir():
        if is_draft(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif is_draft(path.name):
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def looks_pickled(path: Path) -> bool:
    """Whether a file is, or may hold, a pickle: by its name's ending or by its first bytes.

    A safetensors file begins with the length of its header, which may read like a pickle's first bytes (640: 80 02).
    """
    if path.name.endswith(_PICKLE_SUFFIXES):
        return True
    with path.open("rb") as file:
        head = file.read(64)
    if path.name.endswith(".safetensors") and head[8:9] == b"{" and head[3:8] == bytes(5):
        return False
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
