"""Base classes of every family: the config with its bounds, which carries the code, and the model.

What every family gets from here:

* `LNLMConfig`: the fields that transformers' mixins, `generate`, Trainer and peft expect, and one table of bounds that is
  checked before anything derived is built, so that a hostile `config.json` cannot make the process allocate.
* `LNLMConfig.save_pretrained`, through which every save of a model goes, writes the family's code beside the config.
* `LNLMPreTrainedModel`: `_init_weights` reaches every module, and `_no_weight_decay` names the parameters that weight
  decay must leave alone.
"""

import importlib
import os
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..nn.state import RECURRENT_LAYER_TYPE

MAX_LAYERS = 10_000
MAX_SIZE = 2**24
MAX_VOCABULARY = 2**26
MAX_LABELS = 2**20
BACKENDS = ("auto", "reference", "eager", "cpu", "gpu")

_PACKAGE = "hf_lnlm"

Config = TypeVar("Config")
Bound = tuple[float, float]


class ConfigError(ValueError, StrictDataclassError):
    """A config field has the wrong type or value. A `ValueError`, as users expect of a bad argument."""


def strict_config(cls: type[Config]) -> type[Config]:
    """Decorate a config class: huggingface_hub's `@strict`, with every refusal raised as a `ValueError`.

    Every config class needs it: without, field types are not checked and overridden validators are not found.

    Args:
        cls: the config class, its fields written as annotations.

    Returns:
        The same class.
    """
    checked: Any = strict(cls)
    original: Callable[..., None] = checked.__init__

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from error

    checked.__init__ = __init__
    return checked


def check_bound(name: str, value: Any, bound: Bound) -> None:
    """Raise if a number (or any number of a list) lies outside `[low, high]`.

    Args:
        name: the field, for the message.
        value: a number, a list of numbers, or anything else (which passes: its type is checked elsewhere).
        bound: lowest and highest allowed value.

    Raises:
        ValueError: naming field, range and value.
    """
    values = value if isinstance(value, (list, tuple)) else (value,)
    for number in values:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if not bound[0] <= number <= bound[1]:
            raise ValueError(f"{name} must be between {bound[0]} and {bound[1]}, got {number}")


def _check_num_labels(value: Any) -> None:
    if value is not None and type(value) is not int:
        raise ValueError(f"num_labels must be a whole number between 1 and {MAX_LABELS}, got {value!r}")
    check_bound("num_labels", value, (1, MAX_LABELS))


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise if `value` is none of `choices`.

    Raises:
        ValueError: naming field, choices and value.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _default_bound(name: str) -> Bound | None:
    """Bounds that follow from a field's name alone: sizes, layer counts, probabilities."""
    if name == "vocab_size":
        return (1, MAX_VOCABULARY)
    if name.endswith("_layers"):
        return (1, MAX_LAYERS)
    if name.endswith(("_size", "_dim", "_heads", "_length", "_width", "_embeddings")):
        return (1, MAX_SIZE)
    if "dropout" in name or name.endswith(("_drop", "_rate")):
        return (0.0, 1.0 - 1e-6)
    return None


@strict_config
class LNLMConfig(PreTrainedConfig):
    """Fields and checks that every family's config shares.

    Args:
        vocab_size: number of token ids; at most 2**26.
        hidden_size: width of the hidden states.
        num_hidden_layers: number of stacked layers; at most 10,000.
        pad_token_id, bos_token_id, eos_token_id: special ids, each below `vocab_size`, or None.
        tie_word_embeddings: whether the output projection shares the input embedding's weight.
        use_cache: whether `forward` returns its state or cache unless told otherwise.
        initializer_range: standard deviation of normal initialisations.
        backend: which implementation of the family's operations runs: `auto` picks the fastest that can run,
            `reference`, `eager`, `cpu` (numba) and `gpu` (Triton) demand one.

    Raises:
        ValueError: a field has a wrong type or is out of range; the message names field, value and range.
    """

    model_type = "lnlm"
    keys_to_ignore_at_inference = ["past_key_values"]
    _bounds: ClassVar[dict[str, Bound]] = {"initializer_range": (0.0, 100.0)}

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 2
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    initializer_range: float | int = 0.02
    backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_bounds()
        _check_num_labels(kwargs.get("num_labels"))
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME + "."):
            # What a loaded config says about code counts only where that code runs. Kept, a stranger's entries would be
            # followed for heads that the family lacks, and be published with the next save of a model trained from it.
            kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def check_bounds(self) -> None:
        """Check every numeric field against its bounds. Runs first, before anything derived is built.

        A field's bounds come from `_bounds` of the class (or its bases), else from its name: `*_size`, `*_layers`,
        `*dropout*` and the like. A family that derives values in `__post_init__` calls this before it does.

        Raises:
            ValueError: naming the field, its range and its value.
        """
        own: dict[str, Bound] = {}
        for base in reversed(type(self).__mro__):
            own.update(vars(base).get("_bounds", {}))
        for name in self.__dataclass_fields__:
            bound = own.get(name) or _default_bound(name)
            if bound is not None:
                check_bound(name, getattr(self, name, None), bound)
        check_choice("backend", self.backend, BACKENDS)
        self._check_token_ids()

    def _check_token_ids(self) -> None:
        for name in self.__dataclass_fields__:
            if name.endswith("_token_id"):
                check_bound(name, getattr(self, name), (0, self.vocab_size - 1))

    def validate_architecture(self) -> None:
        """Check the bounds again when a config is saved: attributes may have been set since it was made."""
        self.check_bounds()

    def validate_layer_type(self) -> None:
        """Accept the package's own cache layer types, which transformers' fixed list does not know."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config and, beside it, the code of its family, so that the folder loads where hf_lnlm is missing.

        A model's `save_pretrained` comes through here, after it noted which files are old, so that pushing it to the Hub
        uploads the code too. An adapter's does not: its folder holds no config and needs no code.

        Args:
            save_directory: folder to write to; made if it does not exist.
            push_to_hub: whether to upload the config and its code as well.
            kwargs: as in transformers' `PreTrainedConfig.save_pretrained`.

        Raises:
            ValueError: a field that was set since is out of range, or the code of the family cannot be flattened into
                one folder (see hub/bundle.py).
        """
        self.check_bounds()
        if not type(self).__module__.startswith(_PACKAGE + "."):  # carried code: transformers copies it as it is
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        bundle = importlib.import_module(_PACKAGE + ".hub.bundle")  # the one arrow upwards; not carried
        own = vars(self).get("auto_map")
        self.auto_map = bundle.auto_map(self)
        try:
            super().save_pretrained(save_directory)
        finally:
            del self.auto_map
            if own is not None:
                self.auto_map = own
        bundle.write_code(self.model_type, save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
            self.push_to_hub(repo_id, **kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of each layer, for `DynamicCache(config=...)`; length `num_hidden_layers`."""
        return [RECURRENT_LAYER_TYPE] * self.num_hidden_layers


class LNLMPreTrainedModel(PreTrainedModel):
    """Base of every model: initialises every module, names what weight decay spares; its config carries the code.

    Subclasses set `config: TheirConfig`, `base_model_prefix`, `_no_split_modules` and `_can_record_outputs`.
    """

    config: LNLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, LNLMConfig):
            config.check_bounds()  # `from_pretrained(folder, field=…)` sets fields after the config was made
        super().__init__(config, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers skips `_init_weights` on modules of custom packages that own no parameter directly; every
        # `_init_weights` here uses transformers.initialization only, so it is safe to treat it as stock code.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)

    def no_weight_decay(self) -> list[str]:
        """Return the names of the parameters that weight decay must not touch, in definition order."""
        patterns = [re.compile(pattern) for pattern in self._no_weight_decay]
        return [name for name, _ in self.named_parameters() if any(p.search(name) for p in patterns)]
