"""From a recipe's model section to a config, a model, a tokenizer: new ones, or those of a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..data.tokenizers import without_length_remark
from ..errors import UsageProblem, did_you_mean
from ..hub.check_model import ADAPTER_WEIGHTS
from ..hub.connection import knock
from ..hub.folder import BadFile
from ..hub.loadable import require_loadable
from ..registry import family as family_row
from ..registry import is_ours
from .output import quiet_libraries, say
from .recipe import ModelSection
from .sizes import stock_config_class, stock_fields
from .weights import require_alike, require_fit, require_numbers, with_adapter


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
        if name in getattr(config_class, "sub_configs_defaults", {}) and isinstance(values[name], Mapping):
            _check_part(values[name], f"{key}.{name}")


def _check_part(values: Mapping[str, Any], key: str) -> None:
    """Refuse fields that a part's own class doesn't have."""
    model_type = str(values.get("model_type"))
    if values.get("model_type") is None:
        raise UsageProblem(f"{key} must name its model_type, got {', '.join(map(str, values)) or 'nothing'}")
    inner = family_row(model_type).config_class if is_ours(model_type) else stock_config_class(model_type)
    check_fields(inner, {name: value for name, value in values.items() if name != "model_type"}, key)


def special_ids(config_class: Any, tokenizer: Any) -> dict[str, int]:
    """Vocabulary size and special ids of `tokenizer`, as far as the config class has fields for them."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    known = _known_fields(config_class)
    defaults = {item.name: item.default for item in dataclasses.fields(config_class)}
    chosen = {name: number for name, number in ids.items() if name in known}
    if defaults.get("is_encoder_decoder") is True:  # T5's config has no field for it, its model wants it all the same
        chosen["decoder_start_token_id"] = ids["pad_token_id"]
    return {"vocab_size": len(tokenizer)} | {name: number for name, number in chosen.items() if number is not None}


def config_to_train(section: ModelSection) -> Any:
    """The config of the checkpoint, or of the family's defaults, to ask what would fit it before anything is read.

    Args:
        section: the recipe's; checkpoint or family is set.
    """
    if section.checkpoint is not None:
        return load_config(section)
    if is_ours(section.family):
        return family_row(str(section.family)).config_class(**section.config)
    return stock_config_class(str(section.family))()


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
    if not os.path.lexists(path):
        return None
    settings = read_json(path)
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise UsageProblem(f"{path} does not name its base model")
    require_loadable(path.parent)
    return settings


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
    except Exception as error:  # whatever a damaged file makes a config class raise
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
        if not os.path.lexists(path / "config.json"):
            raise UsageProblem(f"{name} holds no checkpoint (no config.json)")
        require_loadable(path)
    elif path.exists():
        raise UsageProblem(f"{name} is a file; a checkpoint is a folder")
    elif name.count("/") > 1 or name.startswith((".", "/", "~", "runs/")):
        raise UsageProblem(f"no such checkpoint folder: {name}")
    else:
        knock(name)


def load_problem(name: str, error: Exception) -> str:
    """One line that says why the checkpoint `name` can't be loaded, made of what transformers raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in str(error):
        return f"{name} carries Python code of its own: read it, then allow it with --trust-remote-code"
    if not Path(name).exists() and isinstance(error, OSError):
        return f"no checkpoint {name!r}: it is no folder here, and the Hub doesn't have it or can't be reached"
    return f"{name} can't be loaded: {text[:300]}"


def load_model(section: ModelSection, auto_class: str, **options: Any) -> Any:
    """The checkpoint that `section` names, to be trained with the head `auto_class`; says which weights are new.

    Args:
        section: names the checkpoint, and config fields to change.
        auto_class: e.g. `AutoModelForCausalLM`.
        options: more config fields to change, e.g. `num_labels`.

    Raises:
        UsageProblem: it can't be loaded, or holds weights that are no numbers; one line.
    """
    model, report = _loaded(section, auto_class, section.config | options)
    fresh = sorted({*report["missing_keys"], *(row[0] for row in report["mismatched_keys"])})
    if fresh:
        say(f"new        {', '.join(fresh[:4])}{' …' if len(fresh) > 4 else ''} (not in {section.checkpoint})")
    return model


def load_trained(section: ModelSection, auto_class: str | type, allow_new_weights: bool = False, **options: Any) -> Any:
    """The checkpoint that `section` names, to be asked or measured as it is (an adapter's: on its base).

    Args:
        section: names the checkpoint, and config fields to change.
        auto_class: e.g. `AutoModelForCausalLM`, or a class of models.
        allow_new_weights: draw weights of a head that the checkpoint doesn't have, and say so on standard error.
        options: more config fields to change.

    Raises:
        UsageProblem: it can't be loaded, or its weights are not the model's: missing, unexpected, of another shape or
            no numbers; lists them.
    """
    options = section.config | options | {"ignore_mismatched_sizes": True}  # they are listed below
    model, report = _loaded(section, auto_class, options)
    require_fit(str(section.checkpoint), model, report, allow_new_weights)
    return model


def _loaded(section: ModelSection, auto_class: str | type, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The checkpoint's model, perhaps with its adapter, and transformers' report of what was loaded."""
    import transformers

    name = str(section.checkpoint)
    settings = adapter_settings(name)
    base = str(settings["base_model_name_or_path"]) if settings else name
    _check_place(base)
    if settings and not (Path(name) / ADAPTER_WEIGHTS).is_file():  # peft would load a pickle in its place
        raise UsageProblem(f"{name} has no {ADAPTER_WEIGHTS}; pickled adapters (.bin) are not loaded")
    common = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    try:
        auto: Any = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
        with quiet_libraries():
            if Path(base).is_dir():
                require_alike(Path(base), auto, section.trust_remote_code)
            # pickles are not even asked for, see SECURITY.md
            model, report = auto.from_pretrained(
                base, output_loading_info=True, use_safetensors=True, **common, **options
            )
            if settings:
                model, report = with_adapter(model, report, name)
    except (UsageProblem, BadFile):
        raise
    except Exception as error:  # whatever a damaged file makes a library raise
        raise UsageProblem(load_problem(name, error)) from None
    require_numbers(name, model)
    return model, report


def renew_head(model: Any) -> None:
    """Draw those weights anew whose shapes follow the number of classes, as the family draws them."""
    import torch

    wider = copy.deepcopy(model.config)
    wider.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in type(model)(wider).named_parameters()}
    for name, value in model.named_parameters():
        if shapes[name] != value.shape:
            module = model.get_submodule(name.rpartition(".")[0])
            for mine in (module, *module.parameters(recurse=False)):
                mine._is_hf_initialized = False
            with torch.no_grad():
                model._init_weights(module)


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

    if Path(place).is_dir():
        require_loadable(Path(place))
    trust = bool(section and section.trust_remote_code)
    revision = section.revision if section else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageProblem(f"no tokenizer can be loaded from {place}: {(lines or ['?'])[0][:200]}") from None
    return without_length_remark(tokenizer)


def load_padding_tokenizer(place: str, section: ModelSection) -> Any:
    """As `load_tokenizer`, its end token for padding where it has no pad token."""
    tokenizer = load_tokenizer(place, section)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
