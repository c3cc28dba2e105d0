"""A recipe: every choice of a run in one YAML file, typed section by section.

Precedence, lowest first: the size's defaults, the recipe file, the command's own flags, `--set key=value`.
The resolved recipe is written beside the checkpoint; running it again gives the same weights.
"""

from __future__ import annotations

import codecs
import copy
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..data.section import DataSection
from ..errors import UsageProblem, did_you_mean
from ..hub.secrets import secret_in
from .coerce import RecipeLoader, coerce, parse_yaml, read_yaml

RECIPE_FILE = "recipe.yaml"
_MINIMUM_BLOCK = 8


@dataclass
class ModelSection:
    """Which model: a family from scratch, or a checkpoint to go on from; `labels` are a new head's classes in order.

    `head` names a family of ours that takes the checkpoint as its encoder (`lnlm_encoder_cnn`). `trust_remote_code` is the
    caller's alone: no recipe may hold it and none is written with it.
    """

    family: str | None = None
    size: Literal["tiny", "small", "base"] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    head: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    labels: list[str] | None = None


@dataclass
class TokenizerSection:
    """Which tokenizer: a kind trained on the run's own text, or a saved one; `saved` is that of a run that goes on."""

    kind: str | None = None
    vocab_size: int | None = None
    template: str | None = None
    path: str | None = None
    saved: str | None = field(default=None, init=False)

    def place(self, model: ModelSection) -> str:
        """Where a checkpoint's tokenizer lies: that of the run that goes on, the recipe's own, else the checkpoint's."""
        return self.saved or self.path or str(model.checkpoint)


@dataclass
class ObjectiveSection:
    """What is learnt; every key besides `name` is an option of that objective or task."""

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoraSection:
    """Low-rank adapters instead of full fine-tuning; without targets every weight matrix is adapted.

    `alpha` is twice `r` unless given; `embeddings` adapts tables of embeddings too, as far as they aren't tied.
    """

    enabled: bool = False
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    embeddings: bool = False
    targets: str | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    merge: bool = False


@dataclass
class HubSection:
    """Where the finished checkpoint goes."""

    repo_id: str | None = None
    private: bool | None = None
    push: bool = False
    license: str | None = None


@dataclass
class Recipe:
    """All sections; `training` holds TrainingArguments by their own names."""

    model: ModelSection = field(default_factory=ModelSection)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    data: DataSection = field(default_factory=DataSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    lora: LoraSection = field(default_factory=LoraSection)
    training: dict[str, Any] = field(default_factory=dict)
    hub: HubSection = field(default_factory=HubSection)


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which the recipe loader would take for a number."""

    yaml_implicit_resolvers = {
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
        + RecipeLoader.yaml_implicit_resolvers.get(first, [])
        for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **RecipeLoader.yaml_implicit_resolvers}
    }


def field_types(kind: type) -> dict[str, Any]:
    """Name to resolved annotation of every field of the dataclass `kind`."""
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind) if item.init}


def typed_section(kind: type, values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """`values` checked key by key against the dataclass `kind`.

    Raises:
        UsageProblem: an unknown key (with the closest known one) or a value of the wrong type.
    """
    known = field_types(kind)
    typed = {}
    for key, value in values.items():
        _check_grant(f"{section}.{key}", value)
        if key not in known:
            raise UsageProblem(f"unknown key {section}.{key}{did_you_mean(str(key), known)}")
        typed[key] = coerce(value, known[key], f"{section}.{key}")
    return typed


def _check_grant(key: str, value: Any) -> None:
    """Refuse what no recipe may hold: trust in a stranger's code, and secrets, which would be written with it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_grant(f"{key}.{name}", item)
    if key.endswith("trust_remote_code"):
        raise UsageProblem(f"{key} can't be given by a recipe: trust is granted by --trust-remote-code alone")
    found = secret_in(key.rpartition(".")[2], value)
    if found is not None:
        raise UsageProblem(f"{key} holds {found}, which a recipe would keep: log in by `hf auth login` or set HF_TOKEN")


def _mapping(value: Any, section: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageProblem(f"{section}: wanted a mapping of keys, got {value!r}")
    return value


def _objective_section(values: dict[str, Any]) -> ObjectiveSection:
    options = {key: value for key, value in values.items() if key not in ("name", "options")}
    options |= _mapping(values.get("options"), "objective.options")
    for key, value in options.items():
        _check_grant(f"objective.{key}", value)
    return ObjectiveSection(coerce(values.get("name"), str | None, "objective.name"), options)


def _training_section(values: dict[str, Any]) -> dict[str, Any]:
    from ..trainer.arguments import INERT, LNLMTrainingArguments, check_schedule, check_together, check_values

    for key in values:
        if key in INERT:
            raise UsageProblem(f"training.{key} has no effect: {INERT[key]}")
    typed = typed_section(LNLMTrainingArguments, values, "training")
    try:
        check_values(typed, "training.")
        check_together(typed)
        options = typed.get("lr_scheduler_kwargs")
        if "lr_scheduler_type" in typed or options:
            check_schedule(typed.get("lr_scheduler_type", "linear"), options, typed.get("warmup_steps", 0))
    except ValueError as error:
        raise UsageProblem(str(error)) from None
    return typed


def typed_recipe(values: Mapping[str, Any]) -> Recipe:
    """A Recipe from nested plain values.

    Args:
        values: section name to mapping, as a YAML file holds it.

    Raises:
        UsageProblem: naming the first wrong section, key or value.
    """
    recipe, sections = Recipe(), field_types(Recipe)
    for name, value in values.items():
        if name == "import":
            raise UsageProblem("import can't be given by a recipe: a module of yours is taken by --import alone")
        if name not in sections:
            raise UsageProblem(f"unknown section {name!r}{did_you_mean(str(name), sections)}")
        content = _mapping(value, name)
        if name == "objective":
            recipe.objective = _objective_section(content)
        elif name == "training":
            recipe.training = _training_section(content)
        else:
            setattr(recipe, name, sections[name](**typed_section(sections[name], content, name)))
    return recipe


def assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `values["a"]["b"] = value` for the dotted key `a.b`, making sections on the way."""
    *path, last = dotted.split(".")
    here = values
    for name in path:
        if not isinstance(here.get(name), dict):
            here[name] = {}
        here = here[name]
    here[last] = value


def apply_settings(values: dict[str, Any], settings: Sequence[str]) -> None:
    """Apply `--set section.key=value` strings to nested plain values, in order; values are read as YAML.

    Raises:
        UsageProblem: a string without `=`, or a key without a section.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or "." not in key or not all(key.split(".")):
            raise UsageProblem(f"--set wants section.key=value, got {setting!r}")
        assign(values, key, parse_yaml(text, f"--set {key}"))


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe | None, flags: Mapping[str, Any], settings: Sequence[str]
) -> Recipe:
    """A recipe, overridden by flags and settings.

    Args:
        source: a YAML file, its content as nested values, or None to start empty.
        flags: dotted key to value.
        settings: `--set` strings.

    Raises:
        UsageProblem: what is wrong, naming file, key and value.
    """
    if isinstance(source, (str, Path)):
        values = read_yaml(source)
    else:
        values = copy.deepcopy(plain(source) if isinstance(source, Recipe) else dict(source or {}))
    for key, value in flags.items():
        assign(values, key, value)
    apply_settings(values, settings)
    recipe = typed_recipe(values)
    _check_ranges(recipe)
    _check_effects(recipe, values)
    return recipe


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the file at `path`, as it stands.

    Raises:
        UsageProblem: what is wrong, naming file, key and value.
    """
    return typed_recipe(read_yaml(path))


def _check_effects(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuse options that nothing would read in this run; `given` are the plain values the recipe was made of."""
    adapter = [key for key in given.get("lora") or {} if key not in ("enabled", "merge")]
    if not recipe.lora.enabled and not recipe.lora.merge and "enabled" in (given.get("lora") or {}):
        recipe.lora = LoraSection()  # switched off in so many words, by --no-lora over a recipe
    elif adapter and not recipe.lora.enabled:
        raise UsageProblem(f"lora.{adapter[0]} has no effect without lora.enabled: give --lora")
    if recipe.data.validation == 0:
        for key in ("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"):
            if recipe.training.get(key):
                raise UsageProblem(f"training.{key} has no effect without validation data (data.validation is 0)")


def _check_ranges(recipe: Recipe) -> None:
    positive = {
        "tokenizer.vocab_size": recipe.tokenizer.vocab_size,
        "data.limit": recipe.data.limit,
        "lora.r": recipe.lora.r,
    }
    for key, value in positive.items():
        if value is not None and value < 1:
            raise UsageProblem(f"{key} must be at least 1, got {value}")
    if recipe.data.block_size is not None and recipe.data.block_size < _MINIMUM_BLOCK:
        raise UsageProblem(f"data.block_size must be at least {_MINIMUM_BLOCK}, got {recipe.data.block_size}")
    _check_lora(recipe.lora)
    try:
        codecs.lookup(recipe.data.encoding)
    except (LookupError, ValueError):
        raise UsageProblem(
            f"data.encoding must be an encoding that Python knows, got {recipe.data.encoding!r}"
        ) from None
    share = recipe.data.validation
    if isinstance(share, float) and not 0 <= share < 1:
        raise UsageProblem(f"data.validation as a share must lie in [0, 1), got {share}")
    if recipe.model.family and recipe.model.checkpoint:
        raise UsageProblem("give model.family (from scratch) or model.checkpoint (go on from it), not both")
    if recipe.model.head and not recipe.model.checkpoint:
        raise UsageProblem("model.head needs model.checkpoint: the encoder that it is put on")


def _check_lora(section: LoraSection) -> None:
    if section.alpha is not None and not (0 < section.alpha < float("inf")):
        raise UsageProblem(f"lora.alpha must be a number above 0, got {section.alpha}")
    if not 0 <= section.dropout < 1:
        raise UsageProblem(f"lora.dropout must lie in [0, 1), got {section.dropout}")


def plain(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values of `recipe`, without the keys that are at their default."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(recipe):
        section = getattr(recipe, item.name)
        if isinstance(section, ObjectiveSection):
            values = {"name": section.name, **section.options}
        elif dataclasses.is_dataclass(section):
            empty: Any = getattr(Recipe(), item.name)
            values = {key: value for key, value in vars(section).items() if value != getattr(empty, key)}
            values = {key: value for key, value in values.items() if key not in ("trust_remote_code", "saved")}
        else:
            values = dict(section)
        if values:
            result[item.name] = values
    return result


def dump_recipe(recipe: Recipe, header: str = "") -> str:
    """`recipe` as YAML text that reads back equal; `header` lines become comments."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.dump(plain(recipe), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)
