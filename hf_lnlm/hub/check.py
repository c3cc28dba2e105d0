"""Is a checkpoint folder whole, safe and ready for the Hub? One finding a line.

`check_folder` examines a folder without running anything in it: headers are read by hand, models of registered
families are built on the meta device, carried code is parsed and never imported (unless `run_code` says so).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from ..registry import family, is_ours
from .folder import (
    BadFile,
    Entry,
    TensorEntry,
    looks_pickled,
    read_json,
    read_text,
    safetensors_entries,
    shown,
    walk,
)

Level = Literal["ok", "warn", "fail"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
ACCELERATORS = {"numpy", "numba", "llvmlite", "triton", "mamba_ssm", "causal_conv1d"}  # carried code does without them
ALLOWED_IMPORTS = {"torch", "transformers", "huggingface_hub", *ACCELERATORS, *sys.stdlib_module_names}
_MAX_CODE_BYTES = 1 << 20
_COUNT_KEY = re.compile(r"(layers?|blocks?|groups|experts|depth|stages)$|^num_.*(layers|blocks)")
_REQUIRED_CARD_KEYS = ("license", "library_name", "pipeline_tag", "tags")


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        level: `ok`, `warn` (worth knowing) or `fail` (the folder is not fit).
        topic: what was examined, one word.
        message: what was found.
    """

    level: Level
    topic: str
    message: str


@dataclass
class Folder:
    """What the examination of one folder has found out so far."""

    path: Path
    run_code: bool = False
    published: Callable[[str], bool] = lambda path: True
    files: list[Entry] = field(default_factory=list)
    config: dict[str, Any] | None = None
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    weight_files: list[str] = field(default_factory=list)
    weights_whole: bool = True

    def has(self, name: str) -> bool:
        """Whether the folder holds the regular file `name`."""
        return any(entry.path == name for entry in self.files)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a peft adapter instead of a whole model."""
        return self.has(ADAPTER_CONFIG)


Examination = Callable[[Folder], Iterator[Finding]]


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
            findings.extend(examine(folder))
        except (BadFile, OSError) as error:
            findings.append(Finding("fail", topic, shown(error)))
    return findings


def is_fit(findings: list[Finding]) -> bool:
    """Whether no finding is a failure."""
    return all(finding.level != "fail" for finding in findings)


def _examine_files(folder: Folder) -> Iterator[Finding]:
    found, problems = walk(folder.path)
    folder.files = [entry for entry in found if folder.published(entry.path)]
    for problem in problems:
        yield Finding("fail", "files", f"{problem}; a checkpoint holds plain files only")
    empty = [shown(entry.path) for entry in folder.files if entry.size == 0 and not entry.path.endswith(".py")]
    if empty:
        yield Finding("fail", "files", f"empty: {', '.join(empty)}")
    if not folder.has("config.json") and not folder.is_adapter:
        yield Finding("fail", "files", "no config.json")
    if not problems and not empty:
        size = sum(entry.size for entry in folder.files) / 1e6
        yield Finding("ok", "files", f"{len(folder.files)} plain files, {size:.1f} MB")


def _examine_pickles(folder: Folder) -> Iterator[Finding]:
    pickled = [shown(entry.path) for entry in folder.files if looks_pickled(folder.path / entry.path)]
    if pickled:
        yield Finding("fail", "pickles", f"may run code when loaded: {', '.join(pickled)}; publish safetensors only")
    else:
        yield Finding("ok", "pickles", "none")


def _examine_config(folder: Folder) -> Iterator[Finding]:
    if not folder.has("config.json"):
        return
    config = read_json(folder.path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        yield Finding("fail", "config", "config.json has no model_type")
        return
    outside = [*_outside_references(folder), *_foreign_kernels(config)]
    for line in outside:
        yield Finding("fail", "config", line)
    folder.config = config
    refused = None if outside else _refusal(folder)
    if refused or outside:
        folder.config = None
    if refused:
        yield Finding("fail", "config", refused)
    elif not outside:
        yield Finding("ok", "config", f"{shown(model_type)}, {shown(', '.join(_architectures(config)) or 'no head')}")


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _outside_references(folder: Folder) -> Iterator[str]:
    """Lines about every `auto_map` entry that would fetch code from elsewhere, or names a missing file."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        if not folder.has(name):
            continue
        auto_map = read_json(folder.path / name).get("auto_map")
        for value in _auto_map_values(auto_map):
            if not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", value):
                yield f"{name}: auto_map {shown(value)} points outside the folder"
            elif not folder.has(value.split(".")[0] + ".py"):
                yield f"{name}: auto_map names {value}, but {value.split('.')[0]}.py is missing"


def _foreign_kernels(value: Any, depth: int = 0) -> Iterator[str]:
    """Names of kernels on the Hub (`attn_implementation: owner/kernel`), which transformers would fetch and run."""
    if isinstance(value, dict) and depth < 8:
        for key, item in value.items():
            if str(key).endswith(("implementation", "implementation_internal")) and "/" in str(item):
                yield f"config.json: {shown(key)} {shown(item)} points outside the folder"
            yield from _foreign_kernels(item, depth + 1)


def _auto_map_values(auto_map: Any) -> Iterator[str]:
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                yield str(item)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own reports; `check` says it in its own lines."""
    from huggingface_hub import constants
    from transformers.utils import logging as reports

    previous, bars = logging.root.manager.disable, reports.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    online, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # nothing a config names is fetched
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        constants.HF_HUB_OFFLINE = online
        if bars:
            reports.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown((lines or [type(error).__name__])[0][:300])


def _known_model_type(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _refusal(folder: Folder) -> str | None:
    """Why the config is refused by its own class, or None; nothing is built from it."""
    from transformers import AutoConfig

    config = folder.config or {}
    for key, value in config.items():
        if _COUNT_KEY.search(key) and isinstance(value, int) and value > 10_000:
            return f"config.json: {shown(key)} = {value}; no model has more than 10,000"
    if not _known_model_type(str(config.get("model_type"))) and not folder.run_code:
        return None
    try:
        with _quiet():
            AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.run_code, local_files_only=True)
    except Exception as error:  # whatever a stranger's file makes the parser raise is the finding
        return f"config.json is refused: {_first_line(error)}"
    return None


def _examine_weights(folder: Folder) -> Iterator[Finding]:
    folder.weights_whole = False
    if folder.is_adapter:
        expected = [ADAPTER_WEIGHTS]
    elif folder.has(INDEX):
        expected = _shards(folder)
    else:
        expected = [WEIGHTS]
    missing = [name for name in expected if not folder.has(name)]
    if missing:
        yield Finding("fail", "weights", f"missing: {', '.join(map(shown, missing))}")
        return
    for name in expected:
        for key, entry in safetensors_entries(folder.path / name).items():
            if key in folder.tensors:
                raise BadFile(f"{shown(key)} is in two files")
            folder.tensors[key] = entry
    folder.weight_files = expected
    stray = [e.path for e in folder.files if e.path.endswith(".safetensors") and e.path not in expected]
    if stray:
        yield Finding("warn", "weights", f"not part of the model: {', '.join(map(shown, stray))}")
    if folder.has(INDEX) and not folder.is_adapter:
        yield from _index_findings(folder)
    if not folder.tensors:
        raise BadFile(f"{expected[0]} holds no tensor")
    folder.weights_whole = True
    yield from _finite_findings(folder)


def _shards(folder: Folder) -> list[str]:
    weight_map = read_json(folder.path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{INDEX} has no weight_map")
    names = sorted({str(value) for value in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"[\w.\-]+\.safetensors", name):
            raise BadFile(f"{INDEX} points outside the folder: {shown(name)}")
    return names


def _index_findings(folder: Folder) -> Iterator[Finding]:
    weight_map = read_json(folder.path / INDEX)["weight_map"]
    absent = sorted(set(weight_map) - set(folder.tensors))
    unlisted = sorted(set(folder.tensors) - set(weight_map))
    if absent:
        yield Finding(
            "fail", "weights", f"the index names {len(absent)} tensors no file holds, e.g. {shown(absent[0])}"
        )
    if unlisted:
        yield Finding("fail", "weights", f"{len(unlisted)} tensors are not in the index, e.g. {shown(unlisted[0])}")


def _finite_findings(folder: Folder) -> Iterator[Finding]:
    import torch
    from safetensors import safe_open

    bad = []
    for name in folder.weight_files:
        with safe_open(str(folder.path / name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no dict)
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    bad.append(f"{shown(key)} ({int((~torch.isfinite(tensor.float())).sum())} of {tensor.numel()})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        yield Finding("fail", "weights", f"not finite: {', '.join(bad[:3])}{more}")
        return
    elements = sum(entry.elements for entry in folder.tensors.values())
    yield Finding("ok", "weights", f"{len(folder.tensors)} tensors, {elements:,} values, all finite")


def _examine_keys(folder: Folder) -> Iterator[Finding]:
    """Does the architecture of config.json take exactly the tensors of the files, in these shapes?"""
    if folder.config is None or folder.is_adapter or not folder.weights_whole:
        return
    names = _architectures(folder.config)
    if not names:
        yield Finding("fail", "keys", "config.json names no architecture")
        return
    if not _known_model_type(folder.config["model_type"]) and not folder.run_code:
        yield Finding("warn", "keys", "not compared: this family needs the code it carries (--run-code runs it)")
        return
    for key, value in folder.config.items():
        if _COUNT_KEY.search(key) and isinstance(value, int) and value > 100 + 10 * len(folder.tensors):
            yield Finding(
                "fail", "keys", f"config.json: {shown(key)} = {value}, the files hold {len(folder.tensors)} tensors"
            )
            return
    try:
        with _quiet():
            yield from _load_findings(folder, names[0])
    except Exception as error:  # building a stranger's config may fail in any way; that is the finding
        yield Finding("fail", "keys", f"the model can't be built: {_first_line(error)}")


def _model_class(folder: Folder, config: Any, name: str) -> Any:
    """The class called `name`, found through the Auto mappings (or the carried code, when it may run)."""
    import transformers

    if is_ours(config.model_type):
        row = family(config.model_type)
        known = {*row.models.values(), *row.extra_models}
        return getattr(importlib.import_module(row.modeling_module), name) if name in known else None
    if folder.run_code and not _known_model_type(config.model_type):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = next((value for value in _auto_map_values(config.auto_map) if value.endswith(f".{name}")), None)
        return get_class_from_dynamic_module(reference, str(folder.path)) if reference else None
    composed = transformers.AutoModelForPreTraining._model_mapping.get(type(config), None)
    return getattr(transformers, name, None) or (composed if getattr(composed, "__name__", "") == name else None)


def _load_findings(folder: Folder, name: str) -> Iterator[Finding]:
    import torch
    from transformers import AutoConfig, PreTrainedModel

    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.run_code, local_files_only=True)
    cls = _model_class(folder, config, name)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        yield Finding(
            "fail", "keys", f"config.json names {shown(name)}, which family {config.model_type} does not have"
        )
        return
    cls = cast(Any, cls)
    options = _without_pooler(folder, cls)
    with torch.device("meta"):
        skeleton = cls(config, **options)
    # A config much larger than its files would make the loader allocate what it has to invent.
    needed = sum(parameter.numel() for parameter in skeleton.parameters())
    held = sum(entry.elements for entry in folder.tensors.values())
    if needed > 2 * held + 1_000_000:
        yield Finding("fail", "keys", f"config.json describes {needed:,} parameters, the files hold {held:,} values")
        return
    _, report = cls.from_pretrained(
        folder.path, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True, low_cpu_mem_usage=True, **options,
    )  # fmt: skip
    yield from _report_findings(report, len(folder.tensors))


def _without_pooler(folder: Folder, cls: Any) -> dict[str, bool]:
    """Arguments of a class that can do without a pooler, for files that hold none (an encoder trained without it)."""
    optional = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    held = any(key.startswith("pooler.") for key in folder.tensors)
    return {"add_pooling_layer": False} if optional and not held else {}


def _report_findings(report: dict[str, Any], count: int) -> Iterator[Finding]:
    lines = {
        "missing_keys": "no file holds {} of the model's tensors, e.g. {}",
        "unexpected_keys": "the model does not use {} of the files' tensors, e.g. {}",
        "mismatched_keys": "{} tensors have another shape than the config asks for, e.g. {}",
    }
    fit = True
    for key, text in lines.items():
        found = sorted(report.get(key) or [], key=str)
        if found:
            fit = False
            first = found[0]
            example = f"{first[0]}: {list(first[1])} instead of {list(first[2])}" if isinstance(first, tuple) else first
            yield Finding("fail", "keys", text.format(len(found), shown(example)))
    if fit:
        yield Finding("ok", "keys", f"all {count} tensors used, all shapes right")


def _examine_adapter(folder: Folder) -> Iterator[Finding]:
    if not folder.is_adapter:
        return
    base = read_json(folder.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        yield Finding("fail", "adapter", f"{ADAPTER_CONFIG} does not name its base model")
    elif base.startswith(("/", "./", "../", "~", "runs/")) or Path(base).exists():
        yield Finding("warn", "adapter", f"its base is a folder of this machine ({shown(base)}); others can't load it")
    else:
        yield Finding("ok", "adapter", f"on base {shown(base)}")


def _examine_tokenizer(folder: Folder) -> Iterator[Finding]:
    if not folder.has("tokenizer.json"):
        others = [
            e.path for e in folder.files if e.path in ("vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
        ]
        yield Finding("warn", "tokenizer", f"no tokenizer.json{' (only ' + ', '.join(others) + ')' if others else ''}")
        return
    try:
        from tokenizers import Tokenizer

        read_text(folder.path / "tokenizer.json")
        tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    except BadFile:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise BadFile(f"tokenizer.json can't be read: {_first_line(error)}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    size = (folder.config or {}).get("vocab_size")
    if isinstance(size, int) and largest >= size:
        yield Finding("fail", "tokenizer", f"its largest id is {largest}, but config.vocab_size is {size}")
        return
    wrong = list(_special_id_problems(folder, tokenizer))
    for line in wrong:
        yield Finding("fail", "tokenizer", line)
    if not wrong:
        yield Finding("ok", "tokenizer", f"{largest + 1} ids fit vocab_size {size}" if size else f"{largest + 1} ids")


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


def _examine_generation(folder: Folder) -> Iterator[Finding]:
    if not folder.has("generation_config.json"):
        return
    settings = read_json(folder.path / "generation_config.json")
    size = (folder.config or {}).get("vocab_size")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = settings.get(name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and isinstance(size, int) and not 0 <= number < size:
                yield Finding("fail", "generation", f"{name} {number} is outside vocab_size {size}")
                return
    yield Finding("ok", "generation", "special ids fit")


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
        raise BadFile(f"{CARD}: its YAML block is not valid: {_first_line(error)}") from None
    if not isinstance(data, dict):
        raise BadFile(f"{CARD}: its YAML block is not a mapping")
    return data


def _examine_card(folder: Folder) -> Iterator[Finding]:
    if not folder.has(CARD):
        yield Finding("fail", "card", f"no {CARD}; `hf-lnlm push` writes one")
        return
    text = read_text(folder.path / CARD, limit=1 << 20)
    data = card_data(text)
    required = [*_REQUIRED_CARD_KEYS, "base_model"] if folder.is_adapter else _REQUIRED_CARD_KEYS
    absent = [key for key in required if not data.get(key)]
    if absent:
        yield Finding("fail", "card", f"{CARD} lacks {', '.join(absent)}")
    if "[More Information Needed]" in text:
        yield Finding("warn", "card", f"{CARD} still has places to fill in")
    if not absent:
        yield Finding("ok", "card", f"license {shown(data['license'])}, {shown(data['pipeline_tag'])}")


def _examine_code(folder: Folder) -> Iterator[Finding]:
    """Is every head's code there, importing nothing but what a stranger's machine has? Parsed, never run."""
    python_files = [entry for entry in folder.files if entry.path.endswith(".py")]
    model_type = (folder.config or {}).get("model_type")
    ours = is_ours(model_type) and not folder.is_adapter
    if ours:
        auto_map = (folder.config or {}).get("auto_map")
        absent = sorted(set(family(str(model_type)).auto_map()) - set(auto_map if isinstance(auto_map, dict) else {}))
        if absent:
            yield Finding("fail", "code", f"not carried: auto_map lacks {', '.join(absent)}")
            return
    bad = [line for entry in python_files for line in _code_problems(folder, entry)]
    for line in bad:
        yield Finding("fail", "code", line)
    if bad:
        return
    if python_files and not ours:
        yield Finding("warn", "code", f"carries {len(python_files)} Python files that `trust_remote_code` would run")
    elif ours:
        yield Finding("ok", "code", f"{len(python_files)} files carried, every head reachable")
    else:
        yield Finding("ok", "code", "none needed")


def _code_problems(folder: Folder, entry: Entry) -> Iterator[str]:
    name = shown(entry.path)
    if entry.size > _MAX_CODE_BYTES:
        yield f"{name} has {entry.size} bytes"
        return
    try:
        with _quiet():
            tree = ast.parse(read_text(folder.path / entry.path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield f"{name} is not Python: {_first_line(error)}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from _relative_import_problem(folder, entry.path, node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            for module in modules:
                if module.split(".")[0] not in ALLOWED_IMPORTS:
                    yield f"{name} line {node.lineno} imports {shown(module)}, which a reader may not have"


def _relative_import_problem(folder: Folder, path: str, node: ast.ImportFrom) -> Iterator[str]:
    name, beside = shown(path), path.rpartition("/")  # a part of a composed model carries its code in its own folder
    if node.level > 1 or not node.module or "." in node.module:
        yield f"{name} line {node.lineno}: an import that transformers can't carry"
    elif not folder.has(f"{beside[0]}{beside[1]}{node.module}.py"):
        yield f"{name} line {node.lineno}: {node.module}.py is missing"


EXAMINATIONS: dict[str, Examination] = {
    "files": _examine_files,
    "pickles": _examine_pickles,
    "config": _examine_config,
    "weights": _examine_weights,
    "keys": _examine_keys,
    "adapter": _examine_adapter,
    "tokenizer": _examine_tokenizer,
    "generation": _examine_generation,
    "card": _examine_card,
    "code": _examine_code,
}
