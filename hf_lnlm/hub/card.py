"""The model card of a checkpoint folder, from what lies in it: config, recipe, evaluation, adapter.

A card written here carries a mark and is written anew by the next push; take the mark out and it is yours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..lora.plan import TASK_TYPES
from ..registry import family, is_composed, is_ours
from .folder import BadFile, json_text, read_json, read_text, write_text

CARD = "README.md"
MARK = "<!-- Written by hf-lnlm from the files beside it; remove this line to keep your own changes. -->"
EVALUATION_FILE = "evaluation.json"
RECIPE_FILE = "recipe.yaml"

HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", "text-classification"),
    "ForPreTraining": ("AutoModelForPreTraining", "feature-extraction"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text-generation"),
    "": ("AutoModel", "feature-extraction"),
}
"""Ending of an architecture's name → the Auto class that loads it, the Hub's name for what it does."""


def _head(architecture: str) -> tuple[str, str]:
    return next(found for ending, found in HEADS.items() if architecture.endswith(ending))


def pipeline_tag(architecture: str) -> str:
    """The Hub's task name for a model class, `feature-extraction` for a bare model."""
    return _head(architecture)[1]


def auto_class(architecture: str) -> str:
    """The Auto class for a model class, `AutoModel` for a bare one."""
    return _head(architecture)[0]


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _recipe(folder: Path) -> dict[str, Any]:
    if not (folder / RECIPE_FILE).is_file():
        return {}
    value = yaml.safe_load(read_text(folder / RECIPE_FILE))
    return value if isinstance(value, dict) else {}


def _numbers(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in (evaluation.get("metrics") or {}).items() if isinstance(v, (int, float))}


def _results(name: str, pipeline: str, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `model-index` of the card: one result with every measured number."""
    if not (numbers := _numbers(evaluation)):
        return []
    data = str(evaluation.get("data", "text"))
    metrics = [{"type": key, "value": float(f"{value:.6g}"), "name": key} for key, value in numbers.items()]
    return [
        {
            "name": name,
            "results": [{"task": {"type": pipeline}, "dataset": {"name": data, "type": data}, "metrics": metrics}],
        }
    ]


def _shown_source(recipe: Mapping[str, Any]) -> str:
    """Where the data came from, without the folders of the machine it lay on."""
    source = (recipe.get("data") or {}).get("source")
    names = [str(item) for item in (source if isinstance(source, list) else [source]) if item]
    return ", ".join(Path(name).name for name in names)


def _metadata(folder: Path, name: str, license: str | None, architecture: str) -> dict[str, Any]:
    config, evaluation = _optional_json(folder / "config.json"), _optional_json(folder / EVALUATION_FILE)
    adapter = _optional_json(folder / "adapter_config.json")
    model_type = str(config.get("model_type", ""))
    tags = ["hf_lnlm", *([model_type] if model_type else []), *(["lora", "peft"] if adapter else [])]
    data: dict[str, Any] = {"license": license} if license else {}
    data |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": pipeline_tag(architecture),
        "tags": tags,
    }
    if adapter:
        data["base_model"] = Path(str(adapter.get("base_model_name_or_path"))).name or "unknown"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(adapter.get("base_model_name_or_path"))):
            data["base_model"] = adapter["base_model_name_or_path"]
    results = _results(name, data["pipeline_tag"], evaluation)
    return data | ({"model-index": results} if results else {})


def _usage(repo_id: str, architecture: str, model_type: str, adapter: bool) -> str:
    if architecture.endswith("ForSequenceTransduction"):  # reads vectors: no Auto class and no tokenizer
        return f'from hf_lnlm import {architecture}\n\nmodel = {architecture}.from_pretrained("{repo_id}")'
    auto = auto_class(architecture)
    trust = ", trust_remote_code=True" if is_ours(model_type) else ""
    if adapter:
        auto = auto.replace("AutoModel", "AutoPeftModel")
    lines = [
        f"from {'peft' if adapter else 'transformers'} import {auto}" + ("" if adapter else ", AutoTokenizer"),
        *(["from transformers import AutoTokenizer"] if adapter else []),
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")',
        f'model = {auto}.from_pretrained("{repo_id}"{trust})',
    ]
    if auto.endswith("ForCausalLM"):
        lines += [
            'inputs = tokenizer("Once", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def _opening(model_type: str, architecture: str) -> str:
    if not is_ours(model_type):
        return f"A {model_type or 'language'} model ({architecture}) trained with hf_lnlm."
    row = family(model_type)
    parts = (
        "Each folder beside this file is one of the models it is made of and a checkpoint of its own; "
        "`AutoModel….from_pretrained(..., subfolder=...)` loads it.\n"
    )
    return (
        f"{row.title} ({architecture}), a family that hf_lnlm adds to transformers, after {row.paper}.\n"
        f"{parts if is_composed(model_type) else ''}"
        "The checkpoint carries its code: `trust_remote_code=True` runs it where hf_lnlm is not installed; where it "
        "is, the installed class is used and nothing carried runs."
    )


def _evaluation_table(evaluation: Mapping[str, Any]) -> str:
    if not (numbers := _numbers(evaluation)):
        return "Not measured."
    rows = [f"| {name.replace('_', ' ')} | {value:.5g} |" for name, value in numbers.items()]
    return "\n".join([f"On {evaluation.get('data', 'held-out text')}:", "", "| measure | value |", "|---|---|", *rows])


def model_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> str:
    """The text of a model card for the checkpoint in `folder`.

    Args:
        folder: holds config.json or adapter_config.json, and perhaps recipe.yaml and evaluation.json.
        repo_id: what the usage example loads; the folder's name if None.
        license: identifier of the weights' licence; the recipe's `hub.license`, else none is named.

    Raises:
        BadFile: a file of the folder is not what it claims to be.
    """
    folder = Path(folder)
    config, recipe = _optional_json(folder / "config.json"), _recipe(folder)
    adapter = (folder / "adapter_config.json").is_file()
    architecture = (config.get("architectures") or recipe.get("architectures") or [""])[0]
    if adapter:
        architecture = _adapter_architecture(folder)
    model_type = str(config.get("model_type", ""))
    name = (repo_id or folder.resolve().name).split("/")[-1]
    license = license or (recipe.get("hub") or {}).get("license")
    header = yaml.safe_dump(_metadata(folder, name, license, architecture), sort_keys=False, allow_unicode=True)
    source = _shown_source(recipe)
    trained = f"Trained on {source} by the recipe below." if source else "How it was trained was not recorded."
    recorded = f"\n\n```yaml\n{yaml.safe_dump(_public(recipe), sort_keys=False).strip()}\n```" if recipe else ""
    made = ", ".join(f"{package} {version(package)}" for package in ("hf_lnlm", "transformers", "torch"))
    return "\n".join(
        [
            f"---\n{header}---\n{MARK}\n",
            f"# {name}\n\n{_opening(model_type, architecture)}\n",
            f"## Use\n\n```python\n{_usage(repo_id or name, architecture, model_type, adapter)}\n```\n",
            f"## Training\n\n{trained}{recorded}\n",
            f"## Evaluation\n\n{_evaluation_table(_optional_json(folder / EVALUATION_FILE))}\n",
            "## Limits\n\nIt repeats the errors and biases of its training text; check what it writes.\n",
            f"Made with {made}.\n",
        ]
    )


def _adapter_architecture(folder: Path) -> str:
    """A class-name ending that stands for an adapter's task."""
    kind = read_json(folder / "adapter_config.json").get("task_type")
    return next((ending for ending, task in TASK_TYPES.items() if task == kind), "")


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without places of this machine."""
    shown = {key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items() if key != "hub"}
    for section, key in (("data", "source"), ("model", "checkpoint"), ("tokenizer", "path")):
        value = (shown.get(section) or {}).get(key)
        if value:
            names = [Path(str(item)).name for item in (value if isinstance(value, list) else [value])]
            shown[section][key] = names if isinstance(value, list) else names[0]
    for key in ("output_dir", "hub_token", "logging_dir"):
        (shown.get("training") or {}).pop(key, None)
    return shown


def write_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> bool:
    """Write README.md into `folder` unless one is there that a person has written.

    Args:
        folder: See `model_card`, as for the others.
        repo_id: What the usage example loads.
        license: Of the weights.

    Returns:
        Whether it was written.

    Raises:
        BadFile: README.md is a link, or a file of the folder is not what it claims to be.
    """
    path = Path(folder) / CARD
    if path.is_symlink():
        raise BadFile(f"{CARD} is a link")
    if path.is_file():
        text = read_text(path)
        if MARK not in text and "[More Information Needed]" not in text:  # peft's own empty card counts as none
            return False
    write_text(path, model_card(folder, repo_id, license))
    return True


def write_evaluation(folder: str | Path, evaluation: Mapping[str, Any]) -> None:
    """Write `evaluation.json` into `folder`.

    Args:
        folder: Of the checkpoint.
        evaluation: `data` and `metrics`, name → number.
    """
    text = json_text(dict(evaluation), indent=2, sort_keys=True)
    write_text(Path(folder) / EVALUATION_FILE, text + "\n")
