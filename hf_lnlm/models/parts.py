"""Models with models of other families inside, stock or the package's own: their configuration, and how a part is built."""

import dataclasses
import difflib
import inspect
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .base import LNLMConfig, strict_config
from .own_parts import CARRIED

MIRRORED = ("vocab_size", "hidden_size", "num_hidden_layers")
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def part_config(name: str, given: dict[str, Any]) -> PreTrainedConfig:
    """Build a part's config from its fields.

    Args:
        name: of the part, for messages.
        given: the fields, with `model_type`.

    Raises:
        ValueError: the model type is missing or unknown here.
    """
    fields = dict(given)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"{name} must name its model_type, got the fields {sorted(map(str, given))[:8]}")
    config_class = part_config_class(model_type)
    if config_class is None:
        raise ValueError(f"{name}: transformers knows no model type {model_type!r} here")
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    known |= set(PreTrainedConfig().to_dict()) | {"torch_dtype", "num_labels"}
    for field in fields:  # a stock config would keep it and go on with the default
        close = [] if field in known else difflib.get_close_matches(str(field), known, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"{name}: a {model_type} has no field {field!r} (did you mean {close[0]!r}?)")
    return config_class(**fields)


def part_config_class(model_type: Any) -> Any:
    """Return the config class of a part's family: the carried one, else what transformers has; None for an unknown one."""
    if model_type in CARRIED:
        return CARRIED[model_type][0]
    known = model_type in CONFIG_MAPPING  # whose `get` finds nothing: it loads lazily
    return CONFIG_MAPPING[model_type] if known else None


def part_class(config: PreTrainedConfig, auto_class: str) -> type[PreTrainedModel] | None:
    """Return the class that an Auto class builds for a part: the carried one, else what transformers has; or None.

    Args:
        config: the part's.
        auto_class: as named in transformers.
    """
    if config.model_type not in CARRIED:
        found: Any = getattr(transformers, auto_class)._model_mapping.get(type(config), None)
        return found[0] if isinstance(found, tuple) else found
    cls = CARRIED[config.model_type][1].get(auto_class)
    if cls is not None:  # so that transformers' own mechanism saves the part with its code
        type(config).register_for_auto_class()
        cls.register_for_auto_class(auto_class)
    return cls


def build_part(name: str, config: Any, auto_class: str) -> Any:
    """Build a part with fresh weights, without a pooling layer if it can be left out.

    Raises:
        ValueError: its family has no such head.
    """
    cls = part_class(config, auto_class)
    if cls is None:
        raise ValueError(f"{name} must be of a family with {auto_class}, got {config.model_type}")
    pools = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    return cls._from_config(config, **({"add_pooling_layer": False} if pools else {}))


def name_of(module: nn.Module, root: nn.Module) -> str:
    """The dotted name of a module inside another.

    Raises:
        ValueError: it isn't in there.
    """
    for name, found in root.named_modules():
        if found is module:
            return name
    raise ValueError(f"{type(module).__name__} isn't a part of {type(root).__name__}")


def router_losses(config: Any) -> list[str]:
    """Return the fields that give a mixture of this package losses besides its head's; models made of others read none.

    Args:
        config: of any model.
    """
    ours = str(config.model_type).startswith("lnlm_")
    named = ("router_aux_loss_coef", "router_z_loss_coef") if ours else ()
    return [field for field in named if float(getattr(config, field, 0.0))]


def hidden_width(config: Any) -> int:
    """Width of the hidden states that a model of this configuration gives out."""
    return int(getattr(config, "output_size", None) or config.hidden_size)


def longest_input(config: Any) -> int | None:
    """Tokens that a model of this configuration has positions for, or None if it has no table of them.

    Args:
        config: any family's, ours or stock; of a model with others inside, the part that reads the text counts.
    """
    inner = config.get_text_config()
    inner = getattr(inner, str(getattr(inner, "main_part", "")), inner)
    table = getattr(inner, "max_position_embeddings", None) or getattr(inner, "n_positions", None)
    if not isinstance(table, int) or table < 1:
        return None
    # RoBERTa and its kin number positions from the pad id + 1
    return table - ((inner.pad_token_id or 0) + 1 if "roberta" in inner.model_type else 0)


def _with_later_fields(part: Any) -> Any:
    """A saved part's plain values with the fields of its family that are younger; anything else as it is."""
    config_class = part_config_class(part.get("model_type")) if isinstance(part, dict) else None
    complete = getattr(config_class, "with_later_fields", None)
    return part if complete is None else complete(part)


@strict_config
class NestedConfig(LNLMConfig):
    """Configuration of a model with others inside, each of which has a field of its own, listed in `sub_configs_defaults`.

    Args:
        vocab_size, hidden_size, num_hidden_layers: those of the main part, whatever is given beside it.

    Raises:
        ValueError: a field is out of range, or a part's model type is unknown.
    """

    main_part: ClassVar[str] = ""
    base_model_fsdp_plan = None  # type: ignore[assignment]  # transformers reads None as "no plan"

    tie_word_embeddings: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().check_bounds()
        self._refuse_unknown_parts(kwargs)
        for name in self.sub_configs:
            given = getattr(self, name)
            fields = self.default_part(name) if given is None else given
            setattr(self, name, part_config(name, fields) if isinstance(fields, dict) else fields)
        self.mirror()
        implementations = {name: part._attn_implementation for name, part in self.parts.items()}
        super().__post_init__(**kwargs)
        if kwargs.get("attn_implementation") is None:
            for name, part in self.parts.items():  # transformers has just unset them
                if implementations[name] is not None:
                    part._attn_implementation = implementations[name]

    @classmethod
    def with_later_fields(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a saved config's plain values, its parts' too, with the fields that are younger than it."""
        found = super().with_later_fields(saved)
        if isinstance(found.get("parts"), dict):  # as checkpoints of 0.1 have them
            found["parts"] = {name: _with_later_fields(part) for name, part in found["parts"].items()}
        return found | {name: _with_later_fields(found[name]) for name in cls.sub_configs_defaults if name in found}

    def _refuse_unknown_parts(self, given: dict[str, Any]) -> None:
        """Refuse what looks like a part, or a part's misspelt name: a default would be built in its place."""
        common = set(PreTrainedConfig().to_dict()) | {"label2id", "id2label", "num_labels", "torch_dtype"}
        for name, value in given.items():
            if name in common:
                continue
            like = difflib.get_close_matches(name, list(self.sub_configs), n=1)
            like = like or [part for part in self.sub_configs if part in name or name in part]
            is_part = isinstance(value, PreTrainedConfig) or (isinstance(value, dict) and "model_type" in value)
            if is_part or (like and (value is None or isinstance(value, (dict, str)))):
                hint = f" (did you mean {like[0]!r}?)" if like else ""
                raise ValueError(f"{self.model_type} has the parts {', '.join(self.sub_configs)}, got {name}{hint}")

    def default_part(self, name: str) -> dict[str, Any]:
        """Fields of a part that wasn't given, with `model_type`: a BERT of this config's sizes, without dropout."""
        return {
            "model_type": "bert",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.hidden_size // 64 if self.hidden_size % 64 == 0 else 1,
            "intermediate_size": 4 * self.hidden_size,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **{token: getattr(self, token) for token in TOKEN_IDS},
            "pad_token_id": self.pad_token_id if self.pad_token_id is not None else 0,
        }

    @property
    def parts(self) -> dict[str, Any]:
        """The parts' configs by name, as far as they are built."""
        found = {name: self.__dict__.get(name) for name in self.sub_configs}
        return {name: part for name, part in found.items() if isinstance(part, PreTrainedConfig)}

    def mirrored(self, name: str) -> Any:
        """Value of a field that is the main part's.

        Raises:
            ValueError: it has no such field.
        """
        main = self.parts[self.main_part]
        if getattr(main, name, None) is None:
            raise ValueError(f"{self.main_part}: the config of a {main.model_type} has no {name}, got None")
        return getattr(main, name)

    def mirror(self) -> None:
        """Take over the main part's sizes and special ids, which may have changed since."""
        for name in MIRRORED:
            super().__setattr__(name, self.mirrored(name))
        for name in TOKEN_IDS:
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.parts[self.main_part], name, None))

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        if self.main_part in self.parts:
            self.mirror()
        super().check_bounds()
        for name, part in self.parts.items():
            for field in router_losses(part):
                raise ValueError(
                    f"{name}: {field} must be 0 in a model made of others, whose loss has no place for it, "
                    f"got {getattr(part, field)}"
                )

    def __setattr__(self, name: str, value: Any) -> None:
        """Pass a vocabulary's size on to the parts, and refuse another width or depth than the main part has."""
        if name == "vocab_size":
            for part in self.parts.values():
                part.vocab_size = value
        elif name in MIRRORED and self.main_part in self.parts and self.mirrored(name) != value:
            raise ValueError(f"{name} must be the {self.main_part}'s, {self.mirrored(name)}, got {value}")
        super().__setattr__(name, value)
