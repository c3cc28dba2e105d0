"""Base classes of every family: the config with its bounds, which carries the code, and the model.

What every family gets from here:

* `LNLMConfig`: the fields that transformers' mixins, `generate`, Trainer and peft expect, and one table of bounds that is
  checked before anything derived is built, so that a hostile `config.json` cannot make the process allocate.
* `LanguageModelConfig`: the choice of softmax, for families that predict tokens.
* `LNLMConfig.save_pretrained`, through which every save of a model goes, writes the family's code beside the config.
* `LNLMPreTrainedModel`: what was loaded computes the same bits as what was saved; `_init_weights` reaches every module, and
  `_no_weight_decay` names the parameters that weight decay must leave alone.
"""

import importlib
import math
import os
import re
from collections.abc import Callable
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging

from ..nn.inputs import as_masked, without_positions
from ..nn.state import RECURRENT_LAYER_TYPE
from ..ops.backend import Operation, check_backend, check_backend_name, family_backends

logger = logging.get_logger(__name__)

MAX_LAYERS = 10_000
MAX_SIZE = 2**24
MAX_VOCABULARY = 2**26
MAX_LABELS = 2**20
LOSS_HEADS = ("auto", "full", "chunked", "adaptive")
LOSS_DTYPES = ("float32", "bfloat16")
TESTED_TRANSFORMERS = ("5.21", "5.24")  # oldest and newest minor version
ALIGNMENT = 64  # bytes: where torch's allocator begins every tensor on a CPU

_PACKAGE = "hf_lnlm"

Config = TypeVar("Config")
Bound = tuple[float, float]


def warn_of_untested(version: str) -> None:
    """Say so when transformers is newer or older than the versions that this code was tested with.

    Args:
        version: of transformers, such as "5.23.0".
    """
    oldest, newest = TESTED_TRANSFORMERS
    found, low, high = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (version, oldest, newest))
    if not low <= found <= high:
        logger.warning_once(
            "hf_lnlm's code was tested with transformers %s to %s, this is %s: compare cached with uncached generation "
            "before you rely on it",
            oldest,
            newest,
            version,
        )


warn_of_untested(transformers.__version__)  # once a process: where this module is first imported


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


class _Unset(dict[str, str]):
    """The empty `auto_map` of a config without one; writing to it gives the config its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def __setitem__(self, auto_class: str, reference: str) -> None:
        self.config.auto_map = {**vars(self.config).get("auto_map", {}), auto_class: reference}


class _AutoMapField:
    """Clients read `config.auto_map` of every model that isn't stock; a config has one while it is carried or saved."""

    def __get__(self, config: Any, owner: type) -> dict[str, str]:
        return _Unset(config)


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
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    auto_map = _AutoMapField()
    _bounds: ClassVar[dict[str, Bound]] = {"initializer_range": (0.0, 100.0)}
    _operations: ClassVar[tuple[Operation, ...]] = ()  # what the family is made of, which says what `backend` may be
    _compiled_variants: ClassVar[tuple[dict[str, str], ...]] = ({},)  # fields that between them reach all its kernels
    _later_fields: ClassVar[dict[str, Any]] = {}  # fields that saved configs may lack → what such a config means

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

    if TYPE_CHECKING:

        @property  # type: ignore[misc]  # transformers' setter stays
        def num_labels(self) -> int:
            """Number of classes; transformers' annotation says that it may be None, which it never is once made."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_bounds()
        _check_num_labels(kwargs.get("num_labels"))
        if not type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME + "."):
            # What a loaded config says about code counts only where that code runs. Kept, a stranger's entries would be
            # followed for heads that the family lacks, and be published with the next save of a model trained from it.
            kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the config that a saved one, as plain values, describes; see transformers' `PreTrainedConfig.from_dict`.

        Args:
            config_dict: as saved, perhaps by an older version: a field that is missing means what was so without it.
            kwargs: as in transformers.
        """
        return super().from_dict(cls.with_later_fields(config_dict), **kwargs)

    @classmethod
    def with_later_fields(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a saved config's plain values with the fields that are younger than it."""
        return {**cls._later_fields, **saved}

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
        check_backend_name(self.backend, family_backends(self._operations))
        self._check_token_ids()
        self._check_unread()

    def _backend_facts(self) -> tuple[Any, ...]:
        """What the family's operations look at when they choose a backend, as far as the config knows it."""
        return ()

    def unread(self) -> dict[str, str]:
        """Return the fields that this config's variant of the model doesn't read: name → what they are for.

        A saved config holds every field, so one that is left at its default passes; one that was set is refused.
        """
        return {}

    def _check_unread(self) -> None:
        for name, purpose in self.unread().items():
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(f"{name} is for {purpose}: it must be left at {default!r}, got {value!r}")

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
        for name in self.sub_configs:  # as loading does: one checkpoint has one dtype
            getattr(self, name).dtype = self.dtype
        if not type(self).__module__.startswith(_PACKAGE + "."):  # carried code: transformers copies it as it is
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        bundle = importlib.import_module(_PACKAGE + ".hub.bundle")  # the one arrow upwards; not carried
        own = vars(self).get("auto_map")
        vars(self)["auto_map"] = bundle.auto_map(self)
        try:
            super().save_pretrained(save_directory)
        finally:
            del vars(self)["auto_map"]
            if own is not None:
                vars(self)["auto_map"] = own
        bundle.write_code(self, save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
            self.push_to_hub(repo_id, **kwargs)

    @property
    def input_width(self) -> int:
        """Width of `inputs_embeds`."""
        return int(getattr(self, "embedding_size", None) or self.hidden_size)

    @property
    def reads_both_ways(self) -> bool:
        """Whether a position's output depends on what follows it; such a model has no state to carry."""
        return False

    @property
    def state_kind(self) -> str:
        """What a cache's states must have been written by to be read."""
        return self.model_type

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of each layer, for `DynamicCache(config=...)`; length `num_hidden_layers`."""
        return [RECURRENT_LAYER_TYPE] * self.num_hidden_layers


@strict_config
class LanguageModelConfig(LNLMConfig):
    """Fields of the families that have a softmax over the vocabulary.

    Args:
        loss_head: `full` logits, `chunked` (never all logits while training), `auto` (chunked where a training batch
            would have more than 2**26 logits, with the same loss and gradients), or `adaptive` softmax (Grave et al. 2017).
        loss_chunk_size: tokens a chunk of the chunked head.
        loss_dtype: `float32` or `bfloat16` products in the chunked head.
        adaptive_cutoffs: where the adaptive softmax's clusters begin, ascending, below `vocab_size`.
        adaptive_div_value: factor by which each cluster narrows.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    _bounds: ClassVar[dict[str, Bound]] = {"adaptive_div_value": (1.0, 1e6)}

    loss_head: str = "auto"
    loss_chunk_size: int = 256
    loss_dtype: str = "float32"
    adaptive_cutoffs: list[int] | tuple[int, ...] | None = None
    adaptive_div_value: float | int = 4.0

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        check_choice("loss_head", self.loss_head, LOSS_HEADS)
        check_choice("loss_dtype", self.loss_dtype, LOSS_DTYPES)
        super().check_bounds()
        if self.loss_head == "adaptive":
            self.check_adaptive()

    def check_adaptive(self) -> None:
        """Check the fields of an adaptive softmax against each other and the width of the hidden states that reach it.

        Raises:
            ValueError: cutoffs that are no clusters, tied embeddings, or a last cluster without width.
        """
        check_cutoffs(self)
        _check_untied(self, self.head_width)

    def unread(self) -> dict[str, str]:
        """The precision of a head that the config doesn't choose; see `LNLMConfig.unread`."""
        found = {} if self.loss_head == "chunked" else {"loss_dtype": "loss_head='chunked'"}
        adaptive = ("adaptive_cutoffs", "adaptive_div_value") if self.loss_head != "adaptive" else ()
        return super().unread() | found | dict.fromkeys(adaptive, "loss_head='adaptive'")

    @property
    def head_width(self) -> int:
        """Width of the hidden states that reach the softmax."""
        return self.hidden_size


def check_cutoffs(config: "LanguageModelConfig") -> int:
    """Return how many clusters an adaptive softmax has beside its shortlist.

    Raises:
        ValueError: cutoffs that are no clusters.
    """
    cutoffs = list(config.adaptive_cutoffs or [])
    fits = cutoffs and cutoffs == sorted(set(cutoffs)) and cutoffs[0] > 0 and cutoffs[-1] < config.vocab_size
    if not fits:
        raise ValueError(
            f"adaptive_cutoffs must ascend strictly between 0 and vocab_size ({config.vocab_size}), "
            f"got {config.adaptive_cutoffs}"
        )
    return len(cutoffs)


def _check_untied(config: "LanguageModelConfig", width: int) -> None:
    """Check an adaptive softmax with weights of its own against the width of the hidden states that reach it."""
    clusters = len(config.adaptive_cutoffs or [])
    if config.tie_word_embeddings:
        raise ValueError("loss_head='adaptive' has its own projections: tie_word_embeddings must be false, got true")
    narrowing = config.adaptive_div_value
    hopeless = math.log2(narrowing) * clusters > 64  # asked first: the power might not fit a float
    if hopeless or int(width // narrowing**clusters) < 1:
        raise ValueError(
            f"adaptive_div_value leaves the last of {clusters} clusters no width: it must be smaller or the hidden "
            f"size larger, got {narrowing}"
        )


@torch.no_grad()
def realign(model: nn.Module) -> None:
    """Copy a model's weights that begin at odd addresses to where torch would have put them.

    safetensors maps a file as it is, so a weight begins wherever the ones before it end, and on some processors a matrix
    product's last bits depend on that. What shares memory goes on sharing it. Plain tensors in a CPU's memory only:
    quantised and distributed weights, other devices and weights that are not there (meta) are left as they are.

    Args:
        model: changed in place; each of its parameters and buffers that moves costs one copy.
    """
    moved: dict[int, torch.UntypedStorage] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_quantized:
            continue
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place % ALIGNMENT == 0:
            continue
        if place not in moved or moved[place].nbytes() < storage.nbytes():
            moved[place] = storage.clone()
        # tensor.data = keeps the parameter, and with it every tie
        tensor.data = tensor.new_empty(0).set_(moved[place], tensor.storage_offset(), tensor.shape, tensor.stride())


def read_empty_texts(model: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Let `forward` read empty texts, ids and mask `(batch, 0)` as tokenizers give them, as rows without any real token.

    The outputs of a batch of them have no positions, where there is one output a position. A hook, so that every other
    call is as deep as it was.

    Args:
        model: about to run.
        args, given: of its `forward`.

    Returns:
        Other arguments, or None where they stay.
    """
    masked = as_masked(given)
    if masked is None:
        return None
    if not model._follows_input:
        return args, masked

    def cut(module: nn.Module, inputs: Any, options: Any, outputs: Any) -> Any:
        once.remove()
        return without_positions(outputs)

    once = model.register_forward_hook(cut, with_kwargs=True, always_call=True)
    return args, masked


def give_umask_mode(folder: str | os.PathLike) -> None:
    """Give the weights in a folder the mode that other new files have; safetensors makes them for their owner alone.

    Args:
        folder: a saved model's; nothing happens where there is none.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for file in Path(folder).glob("*.safetensors"):
        if file.stat().st_mode & 0o777 == 0o600 and not file.is_symlink():
            file.chmod(0o666 & ~mask)


class LNLMPreTrainedModel(PreTrainedModel):
    """Base of every model: initialises every module, names what weight decay spares; its config carries the code.

    Subclasses set `config: TheirConfig`, `base_model_prefix`, `_no_split_modules` and `_can_record_outputs`.
    """

    config: LNLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _no_weight_decay: ClassVar[tuple[str, ...]] = ()
    _follows_input: ClassVar[bool] = True  # False where outputs have other positions than the input: a decoder's

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, LNLMConfig):
            config.check_bounds()  # `from_pretrained(folder, field=…)` sets fields after the config was made
            check_backend(config.backend, config._operations, *config._backend_facts())
        super().__init__(config, *args, **kwargs)
        # A config's attributes are slow to read, which a decoded token would feel.
        self.state_kind, self.layer_types = config.state_kind, config.layer_types
        self.reads_both_ways = config.reads_both_ways
        self.register_forward_pre_hook(read_empty_texts, with_kwargs=True)

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Make ready for several processes, as in transformers.

        Args:
            distributed_config: a `DistributedConfig`, its fields, or None.
            args, kwargs: as in transformers.

        Raises:
            ValueError: pipeline stages are asked for: what a call says of its positions is read once, before all layers.
        """
        plain = isinstance(distributed_config, dict)
        stages = distributed_config.get("pp_size") if plain else getattr(distributed_config, "pp_size", None)
        if (stages or 1) > 1:
            raise ValueError(f"pp_size must be 1: a {cls.__name__} has no pipeline stages, got {stages}")
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    @property
    def num_token_ids(self) -> int:
        """Number of ids that `embed` knows."""
        return int(self.config.vocab_size)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings `(batch, length, width)` of ids `(batch, length)`."""
        embeddings: Any = self.embed_tokens
        return embeddings(input_ids)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as transformers does, then `realign` its weights.

        Args:
            args, kwargs: as in transformers' `from_pretrained`.

        Returns:
            The model, or with `output_loading_info=True` the model and what transformers reports of the loading.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        realign(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, the weights with the umask's mode.

        Args:
            save_directory: folder to write to.
            args, kwargs: as in transformers' `save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        give_umask_mode(save_directory)

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
