"""From a recipe's model section to a config, a model, a tokenizer: new ones, or those of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..registry import family as family_row
from ..registry import is_ours
from .errors import UsageProblem, did_you_mean
from .output import quiet_libraries, say
from .recipe import ModelSection
from .sizes import stock_config_class, stock_fields


def _known_fields(config_class: Any) -> set[str]:
    fields = {item.name for item in dataclasses.fields(config_class)}
    return fields | set(getattr(config_class, "attribute_map", {})) | {"num_labels", "id2label", "label2id"}


def check_fields(config_class: Any, values: Mapping[str, Any], key: str = "model.config") -> None:
    """Refuse config fields that the class doesn't have; transformers itself would keep them silently.

    Raises:
        UsageProblem: naming the field, the closest one and the class.
    """
    known = _known_fields(config_class)
    for name in values:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UsageProblem(f"unknown key {key}.{name}{hint}: {config_class.__name__} has no such field")


def special_ids(config_class: Any, tokenizer: Any) -> dict[str, int]:
    """Vocabulary size and special ids of `tokenizer`, as far as the config class has fields for them."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    known = _known_fields(config_class)
    defaults = {item.name: item.default for item in dataclasses.fields(config_class)}
    chosen = {name: number for name, number in ids.items() if name in known}
    if defaults.get("is_encoder_decoder") is True:  # T5's config has no field for it, its model wants it all the same
        chosen["decoder_start_token_id"] = ids["pad_token_id"]
    return {"vocab_size": len(tokenizer)} | {name: number for name, number in chosen.items() if number is not None}


def new_config(
    section: ModelSection, tokenizer: Any, block_size: int, direction: str, auto_class: str, **labels: Any
) -> Any:
    """The config of a model from scratch.

    Args:
        section: the recipe's; family and size are set.
        tokenizer: gives vocabulary size and special ids.
        block_size: tokens of a training row.
        direction: how the objective needs the model to read: `forward`, `both` or `encoder-decoder`.
        auto_class: the Auto class of the head it needs.
        labels: fields of the config that say which labels the head has.

    Raises:
        UsageProblem: an unknown family or field.
        ValueError: a field out of range, from the config class.
    """
    model_type, size = str(section.family), str(section.size or "tiny")
    if is_ours(model_type):
        row = family_row(model_type)
        config_class: Any = row.config_class
        fields = dict(row.sizes[size])
        if direction == "both" and row.bidirectional and auto_class in row.models:
            fields |= row.bidirectional
    else:
        config_class = stock_config_class(model_type)
        fields = stock_fields(config_class, size, block_size)
    check_fields(config_class, section.config)
    values = special_ids(config_class, tokenizer) | fields | labels | section.config
    try:
        return config_class(**values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UsageProblem(f"model.config: {' '.join(str(error).split())}") from None


def new_model(config: Any, auto_class: str) -> Any:
    """A model with fresh weights; draws from torch's global generator.

    Raises:
        UsageProblem: the family has no such head.
    """
    import transformers

    auto = getattr(transformers, auto_class)
    if type(config) not in auto._model_mapping:
        raise UsageProblem(f"{config.model_type} has no {auto_class}")
    return auto.from_config(config)


def adapter_settings(checkpoint: str) -> dict[str, Any] | None:
    """The adapter_config.json of a peft adapter folder, or None for anything else."""
    from ..hub.folder import read_json

    path = Path(checkpoint) / "adapter_config.json"
    return read_json(path) if path.is_file() else None


def load_config(section: ModelSection) -> Any:
    """The config of the checkpoint that `section` names (an adapter's: of its base), with `model.config` over it.

    Raises:
        UsageProblem: there is no such checkpoint, it is none, or it has no such field.
    """
    from transformers import AutoConfig

    name = str(section.checkpoint)
    settings = adapter_settings(name)
    name = str(settings["base_model_name_or_path"]) if settings else name
    _check_place(name)
    common: dict[str, Any] = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **common)
    except (OSError, ValueError) as error:
        raise UsageProblem(load_problem(name, error)) from None
    if not section.config or section.head:  # the fields of a head's family are not the checkpoint's
        return config
    check_fields(type(config), section.config)
    try:
        return AutoConfig.from_pretrained(name, **common, **section.config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UsageProblem(f"model.config: {' '.join(str(error).split())}") from None


def _check_place(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageProblem(f"{name} holds no checkpoint (no config.json)")
    elif path.exists():
        raise UsageProblem(f"{name} is a file; a checkpoint is a folder")
    elif name.count("/") > 1 or name.startswith((".", "/", "~", "runs/")):
        raise UsageProblem(f"no such checkpoint folder: {name}")


def load_problem(name: str, error: Exception) -> str:
    """One line that says why the checkpoint `name` can't be loaded, made of what transformers raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in str(error):
        return f"{name} carries Python code of its own: read it, then allow it with --trust-remote-code"
    if not Path(name).exists() and isinstance(error, OSError):
        return f"no checkpoint {name!r}: it is no folder here, and the Hub doesn't have it or can't be reached"
    return f"{name} can't be loaded: {text[:300]}"


def load_model(section: ModelSection, auto_class: str, **options: Any) -> Any:
    """The checkpoint that `section` names, with the head `auto_class` (an adapter's: merged view on its base).

    Args:
        section: names the checkpoint, and config fields to change.
        auto_class: e.g. `AutoModelForCausalLM`.
        options: more config fields to change, e.g. `num_labels`.

    Raises:
        UsageProblem: it can't be loaded; one line.
    """
    import transformers

    name = str(section.checkpoint)
    settings = adapter_settings(name)
    base = str(settings["base_model_name_or_path"]) if settings else name
    _check_place(base)
    if settings and not (Path(name) / "adapter_model.safetensors").is_file():  # peft would load a pickle in its place
        raise UsageProblem(f"{name} has no adapter_model.safetensors; pickled adapters (.bin) are not loaded")
    common = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    options = section.config | options
    try:
        auto = getattr(transformers, auto_class)
        with quiet_libraries():
            # pickles are not even asked for, see SECURITY.md
            model, report = auto.from_pretrained(
                base, output_loading_info=True, use_safetensors=True, **common, **options
            )
            if settings:
                from peft import PeftModel

                return PeftModel.from_pretrained(model, name)
        fresh = sorted({*report["missing_keys"], *(row[0] for row in report["mismatched_keys"])})
        if fresh:
            say(f"new        {', '.join(fresh[:4])}{' …' if len(fresh) > 4 else ''} (not in {name})")
        return model
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageProblem(load_problem(name, error)) from None


def load_main_part(section: ModelSection, model: Any, auto_class: str) -> Any:
    """Give a fresh composed model the weights of a checkpoint; returns the model.

    Args:
        section: names the checkpoint.
        model: composed, its main part of the checkpoint's configuration.
        auto_class: of the head that the objective needs, which the checkpoint may have or not.
    """
    model.start_from(load_model(section, auto_class))
    return model


def load_tokenizer(place: str, section: ModelSection | None = None) -> Any:
    """The tokenizer saved at `place`.

    Raises:
        UsageProblem: there is none.
    """
    from transformers import AutoTokenizer

    trust = bool(section and section.trust_remote_code)
    revision = section.revision if section else None
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageProblem(f"no tokenizer can be loaded from {place}: {(lines or ['?'])[0][:200]}") from None
