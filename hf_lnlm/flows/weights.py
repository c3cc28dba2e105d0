"""Do a checkpoint's weights fit the model that is made of them? Looked at before and after transformers loads them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..errors import UsageProblem
from ..hub.check_model import ADAPTER_WEIGHTS, report_lines, stored_otherwise, too_large
from ..hub.folder import read_json, safetensors_entries, shown
from ..hub.loadable import held_tensors
from .output import warn

_ON_BASE = "base_model.model."


def require_alike(folder: Path, auto: Any, trust_remote_code: bool) -> None:
    """Refuse files that hold a much smaller model than the config's or weights of another type, before they are loaded.

    Args:
        folder: of the checkpoint.
        auto: the Auto class, or class of models, that will load it.
        trust_remote_code: whether code that the folder carries may run.

    Raises:
        UsageProblem: names both sizes, or the tensor.
    """
    import torch
    from transformers import AutoConfig

    tensors = held_tensors(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not tensors or getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        own = not hasattr(auto, "from_config")
        skeleton = auto(config) if own else auto.from_config(config, trust_remote_code=trust_remote_code)
    line = too_large(skeleton, tensors)
    if line := line or stored_otherwise(read_json(folder / "config.json"), skeleton, tensors):
        raise UsageProblem(f"{folder}: {line}")


def require_numbers(name: str, model: Any) -> None:
    """Refuse weights that aren't finite, or that are whole numbers where fractions belong.

    Args:
        name: of the checkpoint.
        model: as loaded.

    Raises:
        UsageProblem: lists them.
    """
    import torch

    if getattr(model, "hf_quantizer", None) is None:
        whole = [
            key for key, value in model.named_parameters() if not (value.is_floating_point() or value.is_complex())
        ]
        if whole:
            raise UsageProblem(f"{name} holds whole numbers where weights belong: {_some(whole)}")
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    bad = [key for key, value in model.state_dict().items() if value.dtype in plain and not value.isfinite().all()]
    if bad:
        raise UsageProblem(f"{name} holds weights that are not finite: {_some(bad)}")


def with_adapter(model: Any, report: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """A base with its adapter, and the report without what the adapter brings.

    Args:
        model: the base.
        report: of its loading.
        name: folder of the adapter.

    Raises:
        UsageProblem: the adapter's weights are not those that its config asks for.
    """
    from peft import PeftModel, get_peft_model_state_dict

    held = set(safetensors_entries(Path(name) / ADAPTER_WEIGHTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is missing is listed below
        wrapped = PeftModel.from_pretrained(model, name)
    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    bases = {_ON_BASE + key.replace(".base_layer.", ".") for key in wrapped.get_base_model().state_dict()}
    lines = report_lines({"missing_keys": wanted - held, "unexpected_keys": held - wanted - bases})
    if lines:
        raise UsageProblem(f"{name} is no adapter of its base: {'; '.join(lines)}")
    brought = {key.removeprefix(_ON_BASE) for key in held}
    kept = {"missing_keys": set(report["missing_keys"]) - brought}
    return wrapped, {**report, **kept, "mismatched_keys": [r for r in report["mismatched_keys"] if r[0] not in brought]}


def require_fit(name: str, model: Any, report: dict[str, Any], allow_new_weights: bool) -> None:
    """Refuse a model whose weights are not all the checkpoint's.

    Args:
        name: of the checkpoint.
        model: as loaded.
        report: transformers' report of the loading.
        allow_new_weights: a head may be new; which weights are is then said on standard error.

    Raises:
        UsageProblem: lists missing, unexpected and mis-shaped weights.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    missing = set(report["missing_keys"])
    head = {key for key in missing if not key.startswith(inner.base_model_prefix + ".")}
    unexpected = set(report["unexpected_keys"])
    found = {**report, "unexpected_keys": unexpected - _of_another_head(inner) if unexpected else unexpected}
    lines = report_lines(found | {"missing_keys": missing - head if allow_new_weights else missing})
    if lines:
        hint = "" if missing - head or len(lines) > 1 or not head else " (--allow-new-weights draws a new head)"
        raise UsageProblem(f"{name} doesn't fit its config: {'; '.join(lines)}{hint}")
    if head:
        warn(f"{name} has no {_some(sorted(head))}: drawn at random")


def _of_another_head(model: Any) -> set[str]:
    """Weights of the heads that a family is pre-trained with, which a checkpoint may hold beside the one in use."""
    import torch
    from transformers import MODEL_FOR_PRETRAINING_MAPPING

    known: Any = MODEL_FOR_PRETRAINING_MAPPING
    if type(model.config) not in known:
        return set()
    with torch.device("meta"):
        other = known[type(model.config)](model.config).state_dict()
    prefix = model.base_model_prefix + "."
    return {key for key in other if not key.startswith(prefix)}


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
