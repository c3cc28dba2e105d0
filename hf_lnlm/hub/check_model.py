"""Config and weights of a checkpoint folder: whole, finite, and of one model; built on the meta device."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ..registry import PREFIX, ROWS, family, is_ours
from .findings import Folder, Said, architectures, auto_map_values, first_line, known_model_type, quiet
from .folder import BadFile, TensorEntry, read_json, safetensors_entries, shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FLOATS = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_COUNT_KEY = re.compile(r"(layers?|blocks?|groups|experts|depth|stages)$|^num_.*(layers|blocks)")


def _another_family(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong where `auto_map` names a config class of the package, of another family than `model_type`."""
    named = {reference.rpartition("--")[2].rpartition(".")[2] for reference in auto_map_values(config.get("auto_map"))}
    wanted = {row.model_type for row in ROWS if row.config in named}
    if wanted and config["model_type"].startswith(PREFIX) and config["model_type"] not in wanted:
        yield f"model_type must be {' or '.join(sorted(wanted))}, as auto_map says, got {shown(config['model_type'])}"


def examine_config(folder: Folder) -> Iterator[Said]:
    """Does its own class accept config.json, and does it point nowhere outside the folder?"""
    if not folder.has("config.json"):
        return
    config = read_json(folder.path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        yield ("fail", "config.json has no model_type")
        return
    outside = [*_outside_references(folder), *_foreign_kernels(config), *_another_family(config)]
    for line in outside:
        yield ("fail", line)
    folder.config = config
    refused = None if outside else _refusal(folder)
    if refused or outside:
        folder.config = None
    if refused:
        yield ("fail", refused)
    elif not outside:
        yield ("ok", f"{shown(model_type)}, {shown(', '.join(architectures(config)) or 'no head')}")


def _outside_references(folder: Folder) -> Iterator[str]:
    """Lines about every `auto_map` entry that would fetch code from elsewhere, or names a missing file."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        if not folder.has(name):
            continue
        auto_map = read_json(folder.path / name).get("auto_map")
        for value in auto_map_values(auto_map):
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


def _refusal(folder: Folder) -> str | None:
    """Why the config is refused by its own class, or None; nothing is built from it."""
    from transformers import AutoConfig

    config = folder.config or {}
    for key, value in config.items():
        if _COUNT_KEY.search(key) and isinstance(value, int) and value > 10_000:
            return f"config.json: {shown(key)} = {value}; no model has more than 10,000"
    if not known_model_type(str(config.get("model_type"))) and not folder.run_code:
        return None
    try:
        with quiet():
            AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.run_code, local_files_only=True)
    except Exception as error:  # whatever a stranger's file makes the parser raise is the finding
        return f"config.json is refused: {first_line(error)}"
    return None


def examine_weights(folder: Folder) -> Iterator[Said]:
    """Are all files of weights there, whole, and every value finite?

    Raises:
        BadFile: a file is cut off, a tensor stands in two files, or there is none.
    """
    folder.weights_whole = False
    if folder.is_adapter:
        expected = [ADAPTER_WEIGHTS]
    elif folder.has(INDEX):
        expected = shards(folder.path)
    else:
        expected = [WEIGHTS]
    missing = [name for name in expected if not folder.has(name)]
    if missing:
        yield ("fail", f"missing: {', '.join(map(shown, missing))}")
        return
    for name in expected:
        for key, entry in safetensors_entries(folder.path / name).items():
            if key in folder.tensors:
                raise BadFile(f"{shown(key)} is in two files")
            folder.tensors[key] = entry
    folder.weight_files = expected
    stray = [e.path for e in folder.files if e.path.endswith(".safetensors") and e.path not in expected]
    if stray:
        yield ("warn", f"not part of the model: {', '.join(map(shown, stray))}")
    if folder.has(INDEX) and not folder.is_adapter:
        yield from _index_findings(folder)
    if not folder.tensors:
        raise BadFile(f"{expected[0]} holds no tensor")
    folder.weights_whole = True
    yield from _finite_findings(folder)


def shards(folder: Path) -> list[str]:
    """The files that the index of a folder names.

    Raises:
        BadFile: it names none, or one outside the folder.
    """
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{INDEX} has no weight_map")
    names = sorted({str(value) for value in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"[\w.\-]+\.safetensors", name):
            raise BadFile(f"{INDEX} points outside the folder: {shown(name)}")
    return names


def _index_findings(folder: Folder) -> Iterator[Said]:
    weight_map = read_json(folder.path / INDEX)["weight_map"]
    absent = sorted(set(weight_map) - set(folder.tensors))
    unlisted = sorted(set(folder.tensors) - set(weight_map))
    if absent:
        yield ("fail", f"the index names {len(absent)} tensors no file holds, e.g. {shown(absent[0])}")
    if unlisted:
        yield ("fail", f"{len(unlisted)} tensors are not in the index, e.g. {shown(unlisted[0])}")


def _finite_findings(folder: Folder) -> Iterator[Said]:
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
        yield ("fail", f"not finite: {', '.join(bad[:3])}{more}")
        return
    elements = sum(entry.elements for entry in folder.tensors.values())
    yield ("ok", f"{len(folder.tensors)} tensors, {elements:,} values, all finite")


def examine_keys(folder: Folder) -> Iterator[Said]:
    """Does the architecture of config.json take exactly the tensors of the files, in these shapes?"""
    if folder.config is None or folder.is_adapter or not folder.weights_whole:
        return
    names = architectures(folder.config)
    if not names:
        yield ("fail", "config.json names no architecture")
        return
    if not known_model_type(folder.config["model_type"]) and not folder.run_code:
        yield ("warn", "not compared: this family needs the code it carries (--run-code runs it)")
        return
    if line := oversized(folder.config, len(folder.tensors)):
        yield ("fail", line)
        return
    try:
        with quiet():
            yield from _load_findings(folder, names[0])
    except Exception as error:  # building a stranger's config may fail in any way; that is the finding
        yield ("fail", f"the model can't be built: {first_line(error)}")


def oversized(config: dict[str, Any], tensors: int) -> str | None:
    """What a config counts many more of than there are tensors, or None: building it would never end.

    Args:
        config: content of config.json.
        tensors: in the files.
    """
    for key, value in config.items():
        if _COUNT_KEY.search(key) and isinstance(value, int) and value > 100 + 10 * tensors:
            return f"config.json: {shown(key)} = {value}, the files hold {tensors} tensors"
    return None


def _model_class(folder: Folder, config: Any, name: str) -> Any:
    """The class called `name`, found through the Auto mappings (or the carried code, when it may run)."""
    import transformers

    if is_ours(config.model_type):
        row = family(config.model_type)
        known = {*row.models.values(), *row.extra_models}
        return getattr(importlib.import_module(row.modeling_module), name) if name in known else None
    if folder.run_code and not known_model_type(config.model_type):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = next((value for value in auto_map_values(config.auto_map) if value.endswith(f".{name}")), None)
        return get_class_from_dynamic_module(reference, str(folder.path)) if reference else None
    return getattr(transformers, name, None)


def _load_findings(folder: Folder, name: str) -> Iterator[Said]:
    import torch
    from transformers import AutoConfig, PreTrainedModel

    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.run_code, local_files_only=True)
    cls = _model_class(folder, config, name)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        yield ("fail", f"config.json names {shown(name)}, which family {config.model_type} does not have")
        return
    cls = cast(Any, cls)
    options = _without_pooler(folder, cls)
    with torch.device("meta"):
        skeleton = cls(config, **options)
    line = too_large(skeleton, folder.tensors)
    if line := line or stored_otherwise(folder.config or {}, skeleton, folder.tensors):
        yield ("fail", line)
        return
    _, report = cls.from_pretrained(
        folder.path, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True, low_cpu_mem_usage=True, **options,
    )  # fmt: skip
    yield from _report_findings(report, len(folder.tensors))


def too_large(skeleton: Any, tensors: dict[str, TensorEntry]) -> str | None:
    """Why a model is not the one whose tensors these are, or None: a loader would take memory for all that it lacks.

    Args:
        skeleton: the model on the meta device.
        tensors: of the files.
    """
    needed = sum(parameter.numel() for parameter in skeleton.parameters())
    held = sum(entry.elements for entry in tensors.values())
    if needed > 2 * held + 1_000_000:
        return f"config.json describes {needed:,} parameters, the files hold {held:,} values"
    return None


def stored_otherwise(config: dict[str, Any], skeleton: Any, tensors: dict[str, TensorEntry]) -> str | None:
    """Which tensor is stored in a type that is neither the config's nor float32, or as whole numbers; None if none is.

    Args:
        config: content of config.json.
        skeleton: the model on the meta device.
        tensors: of the files.
    """
    said = config.get("dtype") or config.get("torch_dtype")
    wanted = _FLOATS.get(str(said))
    if config.get("quantization_config"):
        return None
    prefix = f"{skeleton.base_model_prefix}."
    parameters = {key for name, _ in skeleton.named_parameters() for key in (name, name.removeprefix(prefix))}
    for name, entry in tensors.items():
        if wanted and entry.dtype in {*_FLOATS.values()} - {wanted, "F32"}:
            return f"config.json says {said}, but {shown(name)} is stored as {entry.dtype}"
        if not re.search("F", entry.dtype) and parameters & {name, name.removeprefix(prefix)}:
            return f"{shown(name)} is stored as {entry.dtype}: whole numbers are no weights"
    return None


def _without_pooler(folder: Folder, cls: Any) -> dict[str, bool]:
    """Arguments of a class that can do without a pooler, for files that hold none (an encoder trained without it)."""
    optional = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    held = any(key.startswith("pooler.") for key in folder.tensors)
    return {"add_pooling_layer": False} if optional and not held else {}


def report_lines(report: dict[str, Any]) -> list[str]:
    """What transformers' report of a loading says does not fit, a line for each kind.

    Args:
        report: its `output_loading_info`.
    """
    texts = {
        "missing_keys": "no file holds {} of the model's tensors, e.g. {}",
        "unexpected_keys": "the model does not use {} of the files' tensors, e.g. {}",
        "mismatched_keys": "{} tensors have another shape than the config asks for, e.g. {}",
    }
    lines = []
    for key, text in texts.items():
        if found := sorted(report.get(key) or [], key=str):
            lines.append(text.format(len(found), ", ".join(map(_example, found[:3]))))
    return lines


def _example(found: Any) -> str:
    """A tensor of the report: its name, or with it the shapes that it has and should have."""
    if isinstance(found, tuple):
        return shown(f"{found[0]}: {list(found[1])} instead of {list(found[2])}")
    return shown(found)


def _report_findings(report: dict[str, Any], count: int) -> Iterator[Said]:
    lines = report_lines(report)
    yield from (("fail", line) for line in lines)
    if not lines:
        yield ("ok", f"all {count} tensors used, all shapes right")
