"""The code that a checkpoint carries, held against what the package would write and against what was ever released.

`digests.json` lists, for each release, the SHA-256 of every file that a checkpoint saved by it could carry. A file of that
list is ours, whoever hands it over; any other file that isn't what the installed package writes is somebody else's,
whatever version it claims. `python -m hf_lnlm.hub.code --release` appends the installed version's at a release.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from .. import __version__
from ..registry import COMPOSED, FAMILIES, family, is_ours
from .bundle import PARTS, carried_files, carried_parts, code_files, flat_name
from .folder import BadFile, Entry, read_json, shown, walk, write_bytes, write_text

DIGESTS = Path(__file__).with_name("digests.json")


@dataclass(frozen=True)
class CarriedCode:
    """How the Python files of a folder stand to the package's.

    Attributes:
        expected: file name → content that the installed package writes for this config.
        same: files that are just that.
        older: files that a release wrote, path → the newest such release.
        differing: files of an expected name with content that no release wrote, each with its first differing line.
        stray: files that are none of ours.
        missing: expected files that are absent.
    """

    expected: dict[str, bytes]
    same: tuple[str, ...]
    older: dict[str, str]
    differing: dict[str, int]
    stray: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def is_current(self) -> bool:
        """Whether the folder holds what the installed package writes, and no other Python file."""
        return not (self.older or self.differing or self.stray or self.missing)

    @property
    def is_released(self) -> bool:
        """Whether every Python file is the installed package's or a release's."""
        return bool(self.same or self.older) and not (self.differing or self.stray)


@cache
def released() -> dict[str, dict[str, list[str]]]:
    """Return `digests.json`: version → file name → SHA-256 digests, oldest version first."""
    return json.loads(DIGESTS.read_text(encoding="utf-8"))


def release_of(name: str, content: bytes) -> str | None:
    """Return the newest release that wrote this content under this file name, or None."""
    digest = hashlib.sha256(content).hexdigest()
    return next((version for version, files in reversed(released().items()) if digest in files.get(name, ())), None)


def compare(folder: Path, config: Any, files: Iterable[Entry]) -> CarriedCode:
    """Hold the Python files of a checkpoint folder against the package's; nothing is imported.

    Args:
        folder: the checkpoint's.
        config: its config, of one of our families.
        files: those of the folder that count.
    """
    expected = _expected(folder, config)
    same, older, differing, stray = [], {}, {}, []
    for entry in (entry for entry in files if entry.path.endswith(".py")):
        content = (folder / entry.path).read_bytes()
        name = entry.path.rpartition("/")[2]
        release = release_of(name, content)
        if expected.get(entry.path) == content:
            same.append(entry.path)
        elif release is not None:
            older[entry.path] = release
        elif entry.path in expected:
            differing[entry.path] = _first_difference(content, expected[entry.path])
        else:
            stray.append(entry.path)
    missing = sorted(set(expected) - {*same, *older, *differing})
    return CarriedCode(expected, tuple(same), older, differing, tuple(stray), tuple(missing))


def _expected(folder: Path, config: Any) -> dict[str, bytes]:
    """Return what the package writes for a checkpoint and for the parts beside it, each a checkpoint of its own."""
    files = dict(code_files(config))
    for part in config.sub_configs:
        own = getattr(config, part)
        if is_ours(own.model_type) and (folder / part / "config.json").is_file():
            files |= {f"{part}/{name}": content for name, content in code_files(own).items()}
    return files


def _first_difference(found: bytes, expected: bytes) -> int:
    ours = expected.splitlines()
    pairs = enumerate(found.splitlines(), start=1)
    return next((number for number, line in pairs if ours[number - 1 : number] != [line]), len(found.splitlines()) + 1)


def refresh(path: str | Path) -> list[str]:
    """Replace the code that a checkpoint carries by the installed package's; of the config only `auto_map` may change.

    Only files that a release wrote are replaced or removed; every other Python file stays.

    Returns:
        one line for each thing done or left.

    Raises:
        BadFile: no checkpoint of ours, a link in it, or a file in the way that no release wrote. Nothing has changed then.
    """
    folder = Path(path)
    config = _own_config(folder)
    code = compare(folder, config, walk(folder)[0])
    if code.differing:
        name, line = next(iter(code.differing.items()))
        raise BadFile(f"{shown(name)} differs from every released hf_lnlm (line {line}): move it away first")
    for name, content in code.expected.items():
        if name not in code.same:
            write_bytes(folder / name, content)
    removed = [name for name in code.older if name not in code.expected]
    for name in removed:
        (folder / name).unlink()
    written = len(code.expected) - len(code.same)
    lines = [f"{written} files rewritten as hf_lnlm {__version__} has them, {len(code.same)} were the same"]
    lines += [f"removed {shown(name)} of hf_lnlm {code.older[name]}" for name in removed]
    lines += [f"left {shown(name)}, which is not part of hf_lnlm" for name in code.stray]
    return [*lines, *_complete_auto_map(folder, config)]


def _own_config(folder: Path) -> Any:
    """Return the config of a folder that may be rewritten."""
    links = [line for line in walk(folder)[1] if " is a link to " in line]
    if links or folder.parent.name == "snapshots":
        raise BadFile(
            f"{links[0] if links else f'{shown(folder)} is the cache of the Hub'}: refresh a copy of the folder"
        )
    values = read_json(folder / "config.json")
    if not is_ours(values.get("model_type")):
        raise BadFile(
            f"config.json: model_type {shown(values.get('model_type'))} is none of ours, its code can't be refreshed"
        )
    return family(values["model_type"]).config_class.from_pretrained(folder, local_files_only=True)


def _complete_auto_map(folder: Path, config: Any) -> list[str]:
    """Add the heads that config.json's `auto_map` lacks."""
    values = read_json(folder / "config.json")
    found = values.get("auto_map")
    given: dict[str, Any] = found if isinstance(found, dict) else {}
    heads = {**family(config.model_type).auto_map(), **given}
    if heads == given:
        return []
    write_text(folder / "config.json", json.dumps({**values, "auto_map": heads}, indent=2) + "\n")
    return [f"config.json: auto_map has {', '.join(sorted(set(heads) - set(given)))} too"]


def add_release(version: str, files: dict[str, list[str]]) -> None:
    """Append a release to `digests.json`.

    Raises:
        ValueError: the version is listed with other digests already.
    """
    known = dict(released())
    if known.get(version, files) != files:
        raise ValueError(f"hf_lnlm {version} is released with other code: raise __version__ first")
    DIGESTS.write_text(json.dumps({**known, version: files}, indent=1) + "\n", encoding="utf-8")
    released.cache_clear()


def installed_digests() -> dict[str, list[str]]:
    """Return file name → SHA-256 digests of what checkpoints saved by the installed package may carry."""
    digests: dict[str, set[str]] = {}
    for row in (*FAMILIES, *COMPOSED):
        for name, content in carried_files(row.model_type).items():
            digests.setdefault(name, set()).add(hashlib.sha256(content).hexdigest())
    types = sorted(row.model_type for row in FAMILIES)
    for inner in [*combinations(types, 1), *combinations(types, 2)]:
        digests[flat_name(PARTS) + ".py"].add(hashlib.sha256(carried_parts(inner)).hexdigest())
    return {name: sorted(found) for name, found in sorted(digests.items())}


def main() -> None:
    """Append the installed version's digests to `digests.json`."""
    parser = argparse.ArgumentParser(prog="python -m hf_lnlm.hub.code", description=main.__doc__)
    parser.add_argument("--release", action="store_true", required=True, help="append the installed version")
    parser.parse_args()
    add_release(__version__, installed_digests())


if __name__ == "__main__":
    main()
