"""Is a checkpoint folder whole, safe and ready for the Hub? One finding a line.

`check_folder` examines a folder without running anything in it: headers are read by hand, models of registered
families are built on the meta device, carried code is parsed and never imported (unless `run_code` says so).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .check_code import examine_code
from .check_model import examine_config, examine_keys, examine_weights
from .findings import ADAPTER_CONFIG, Finding, Folder, Said, first_line, quiet
from .folder import BadFile, looks_pickled, read_json, read_text, shown, walk

CARD = "README.md"
_REQUIRED_CARD_KEYS = ("library_name", "pipeline_tag", "tags")


def check_folder(
    path: str | Path, run_code: bool = False, published: Callable[[str], bool] = lambda path: True
) -> list[Finding]:
    """Examine the checkpoint folder at `path`.

    Args:
        path: the folder.
        run_code: whether Python code that the folder carries may run. Leave False for a stranger's folder.
        published: takes a path relative to the folder; files for which it is false are left out of account.

    Returns:
        Findings in the order of the examinations; the folder is fit if none has level `fail`.
    """
    folder = Folder(Path(path), run_code, published)
    if not folder.path.is_dir():
        return [Finding("fail", "folder", f"{shown(path)} is not a folder")]
    findings: list[Finding] = []
    for topic, examine in EXAMINATIONS.items():
        try:
            findings += [Finding(level, topic, message) for level, message in examine(folder)]
        except (BadFile, OSError) as error:
            findings.append(Finding("fail", topic, shown(error)))
    return findings


def is_fit(findings: list[Finding]) -> bool:
    """Whether no finding is a failure."""
    return all(finding.level != "fail" for finding in findings)


def _examine_files(folder: Folder) -> Iterator[Said]:
    found, problems = walk(folder.path)
    folder.files = [entry for entry in found if folder.published(entry.path)]
    for problem in problems:
        yield ("fail", f"{problem}; a checkpoint holds plain files only")
    empty = [shown(entry.path) for entry in folder.files if entry.size == 0 and not entry.path.endswith(".py")]
    if empty:
        yield ("fail", f"empty: {', '.join(empty)}")
    if not folder.has("config.json") and not folder.is_adapter:
        yield ("fail", "no config.json")
    if not problems and not empty:
        size = sum(entry.size for entry in folder.files) / 1e6
        yield ("ok", f"{len(folder.files)} plain files, {size:.1f} MB")


def _examine_pickles(folder: Folder) -> Iterator[Said]:
    pickled = [shown(entry.path) for entry in folder.files if looks_pickled(folder.path / entry.path)]
    if pickled:
        yield ("fail", f"may run code when loaded: {', '.join(pickled)}; publish safetensors only")
    else:
        yield ("ok", "none")


def _examine_adapter(folder: Folder) -> Iterator[Said]:
    if not folder.is_adapter:
        return
    base = read_json(folder.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        yield ("fail", f"{ADAPTER_CONFIG} does not name its base model")
    elif base.startswith(("/", "./", "../", "~", "runs/")) or Path(base).exists():
        yield ("warn", f"its base is a folder of this machine ({shown(base)}); others can't load it")
    else:
        yield ("ok", f"on base {shown(base)}")


def _examine_tokenizer(folder: Folder) -> Iterator[Said]:
    if not folder.has("tokenizer.json"):
        others = [
            e.path for e in folder.files if e.path in ("vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
        ]
        yield ("warn", f"no tokenizer.json{' (only ' + ', '.join(others) + ')' if others else ''}")
        return
    try:
        from tokenizers import Tokenizer

        read_json(folder.path / "tokenizer.json")
        tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
        _load_tokenizer(folder)
    except BadFile:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise BadFile(f"tokenizer.json can't be read: {first_line(error)}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    size = (folder.config or {}).get("vocab_size")
    if isinstance(size, int) and largest >= size:
        yield ("fail", f"its largest id is {largest}, but config.vocab_size is {size}")
        return
    wrong = list(_special_id_problems(folder, tokenizer))
    for line in wrong:
        yield ("fail", line)
    if not wrong:
        yield ("ok", f"{largest + 1} ids fit vocab_size {size}" if size else f"{largest + 1} ids")


def _load_tokenizer(folder: Folder) -> None:
    """Load it as transformers does, where no code of its own is needed for that."""
    from transformers import AutoTokenizer

    settings = read_json(folder.path / "tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
    if not settings.get("auto_map") and folder.config is not None:
        with quiet():
            AutoTokenizer.from_pretrained(folder.path, local_files_only=True)


def _special_id_problems(folder: Folder, tokenizer: Any) -> Iterator[str]:
    """Special tokens of tokenizer_config.json that the tokenizer doesn't have, or that disagree with config.json."""
    if not folder.has("tokenizer_config.json"):
        yield "no tokenizer_config.json beside tokenizer.json"
        return
    settings = read_json(folder.path / "tokenizer_config.json")
    for name in ("pad", "bos", "eos"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            continue
        number = tokenizer.token_to_id(token)
        wanted = (folder.config or {}).get(f"{name}_token_id")
        if number is None:
            yield f"{name}_token {shown(token)} is not in the vocabulary"
        elif name == "pad" and isinstance(wanted, int) and wanted != number:
            yield f"{name}_token {shown(token)} has id {number}, but config.{name}_token_id is {wanted}"


def _examine_generation(folder: Folder) -> Iterator[Said]:
    if not folder.has("generation_config.json"):
        return
    settings = read_json(folder.path / "generation_config.json")
    size = (folder.config or {}).get("vocab_size")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = settings.get(name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and isinstance(size, int) and not 0 <= number < size:
                yield ("fail", f"{name} {number} is outside vocab_size {size}")
                return
    yield ("ok", "special ids fit")


def card_data(text: str) -> dict[str, Any]:
    """The YAML block at the top of a model card.

    Raises:
        BadFile: there is none, or it is not a YAML mapping.
    """
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if match is None:
        raise BadFile(f"{CARD} does not open with a YAML block between --- lines")
    try:
        data = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadFile(f"{CARD}: its YAML block is not valid: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise BadFile(f"{CARD}: its YAML block is not a mapping")
    return data


def _examine_card(folder: Folder) -> Iterator[Said]:
    if not folder.has(CARD):
        yield ("fail", f"no {CARD}; `hf-lnlm push` writes one")
        return
    text = read_text(folder.path / CARD, limit=1 << 20)
    data = card_data(text)
    required = [*_REQUIRED_CARD_KEYS, "base_model"] if folder.is_adapter else _REQUIRED_CARD_KEYS
    absent = [key for key in required if not data.get(key)]
    if absent:
        yield ("fail", f"{CARD} lacks {', '.join(absent)}")
    if "[More Information Needed]" in text:
        yield ("warn", f"{CARD} still has places to fill in")
    if not absent:
        yield ("ok", f"license {shown(data.get('license', 'not named'))}, {shown(data['pipeline_tag'])}")


EXAMINATIONS: dict[str, Callable[[Folder], Iterator[Said]]] = {
    "files": _examine_files,
    "pickles": _examine_pickles,
    "config": examine_config,
    "weights": examine_weights,
    "keys": examine_keys,
    "adapter": _examine_adapter,
    "tokenizer": _examine_tokenizer,
    "generation": _examine_generation,
    "card": _examine_card,
    "code": examine_code,
}
