"""May a checkpoint folder be loaded? What transformers would read of it is looked at first, before memory is taken.

`check` says all that is wrong with a folder; this stops at the first thing that would make a loader read outside the
folder, fail in words that name no file, or take memory for weights that nobody has.
"""

from __future__ import annotations

import re
from pathlib import Path

from .check_model import ADAPTER_WEIGHTS, INDEX, WEIGHTS, oversized, shards
from .findings import ADAPTER_CONFIG
from .folder import BadFile, TensorEntry, is_plain, read_json, safetensors_entries, shown

JSON_FILES = frozenset(
    {
        "config.json", "generation_config.json", ADAPTER_CONFIG, "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "processor_config.json", INDEX,
    }
)  # fmt: skip
"""Files of a checkpoint that hold a JSON object."""
_READ = re.compile(r"(vocab|merges)\.txt|(spiece|tokenizer)\.model|.*\.(jinja|safetensors|py)")
_KINDS = {"model_type": str, "architectures": list, "auto_map": dict, "id2label": dict, "label2id": dict}


def require_loadable(folder: Path) -> None:
    """Refuse a checkpoint folder that can't be loaded, or must not be.

    Raises:
        BadFile: names the file: one that is a link, cut off, no JSON object, of another kind than the config says …
    """
    for path in sorted(folder.iterdir()):
        if path.name in JSON_FILES or _READ.fullmatch(path.name):
            if not is_plain(path):
                raise BadFile(f"{shown(path)} is no regular file")
            if path.stat().st_size == 0 and path.suffix != ".py":
                raise BadFile(f"{shown(path)} is empty")
        if path.name in JSON_FILES:
            read_json(path)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    for field, kind in _KINDS.items():
        value = config.get(field)
        if value is not None and not isinstance(value, kind):
            raise BadFile(f"{folder / 'config.json'}: {field} must be a {kind.__name__}, got {shown(value)[:60]}")
    if not all(isinstance(name, str) for name in config.get("architectures") or []):
        raise BadFile(f"{folder / 'config.json'}: architectures must be names")
    tensors = held_tensors(folder)
    if tensors and not (folder / ADAPTER_CONFIG).exists() and (line := oversized(config, len(tensors))):
        raise BadFile(f"{folder}: {line}")


def held_tensors(folder: Path) -> dict[str, TensorEntry]:
    """What a folder's safetensors files hold, from their headers; empty if there are none.

    Raises:
        BadFile: one is cut off or missing, or the index names a file outside the folder.
    """
    if (folder / ADAPTER_CONFIG).exists():
        names = [ADAPTER_WEIGHTS] if (folder / ADAPTER_WEIGHTS).exists() else []
    elif (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        names = shards(folder) if (folder / INDEX).exists() else []
    found: dict[str, TensorEntry] = {}
    for name in names:
        if not is_plain(folder / name):
            raise BadFile(f"{shown(folder / name)} is missing, or no regular file")
        found |= safetensors_entries(folder / name)
    if names and not found:
        raise BadFile(f"{shown(folder / names[0])} holds no tensor")
    return found
