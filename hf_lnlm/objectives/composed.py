"""Models made of several models that are trained as one and used apart: their base, and how they are saved.

A composed model is an ordinary `PreTrainedModel`: one optimizer, one checkpoint, one module for distributed training. Its
folder holds the whole (`config.json`, `model.safetensors`), for going on with training, and each part in a folder of its
own, which transformers loads by itself (`AutoModel….from_pretrained(run/part)`), code carried included.

The configuration holds the parts' configurations as plain values, so that it needs no family's code to be read.
"""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel

from ..models.base import strict_config


@strict_config
class ComposedConfig(PreTrainedConfig):
    """Configuration of a model made of parts.

    Args:
        parts: name of a part → its configuration as plain values, `model_type` included.
        initializer_range: standard deviation of the initial weights of what belongs to no part.
        tie_word_embeddings: whether the parts share embeddings.
    """

    model_type = "lnlm_composed"
    main_part: ClassVar[str] = ""
    is_causal: ClassVar[bool] = False

    parts: dict[str, Any] | None = None
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True

    def part(self, name: str) -> Any:
        """The configuration of a part, built anew.

        Raises:
            ValueError: there is no such part, or its family isn't known.
        """
        values = copy.deepcopy((self.parts or {}).get(name) or {})
        kind = values.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"{self.model_type}: part {name!r} has no known model_type, got {kind!r}")
        return CONFIG_MAPPING[kind].from_dict(values)

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the main part, and so of all."""
        return int(((self.parts or {}).get(self.main_part) or {}).get("vocab_size", 0))

    @property
    def max_position_embeddings(self) -> int | None:
        """Rows of the main part's position table, or None if it has none."""
        return ((self.parts or {}).get(self.main_part) or {}).get("max_position_embeddings")


class ComposedModel(PreTrainedModel):
    """Base of the models made of parts.

    A subclass sets `part_names`, builds the parts in `__init__` and calls `tie_parts`, then `post_init`.
    """

    config: ComposedConfig
    part_names: ClassVar[tuple[str, ...]] = ()
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def tie_parts(self, tied: dict[str, str]) -> None:
        """Declare parameters of one part to be those of another.

        Args:
            tied: full name of a parameter → full name of the one that it becomes.
        """
        self._tied_weights_keys = tied

    def get_input_embeddings(self) -> nn.Module:
        """The main part's embedding; peft asks for it to find what is tied to it."""
        return getattr(self, self.config.main_part).get_input_embeddings()

    def start_from(self, encoder: PreTrainedModel) -> None:
        """Take over the weights of a model of the main part's configuration, its head too if that is the same.

        Args:
            encoder: a model with the main part's head, another or none.
        """
        main = getattr(self, self.config.main_part)
        main.base_model.load_state_dict(encoder.base_model.state_dict(), strict=False)
        if type(encoder) is type(main):
            main.load_state_dict(encoder.state_dict(), strict=False)

    def part_to_save(self, name: str) -> PreTrainedModel:
        """The part as a model that works by itself."""
        return getattr(self, name)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save the whole and, in folders named after them, the parts.

        Args:
            save_directory: folder to write to.
            is_main_process: whether this process writes anything.
            args, kwargs: as in transformers' `save_pretrained`.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            for name in self.part_names:
                self.part_to_save(name).save_pretrained(Path(save_directory) / name)


def register_composed(config_class: Any, model_class: Any) -> None:
    """Make `AutoConfig` and `AutoModelForPreTraining` know a composed model. Safe to call twice."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForPreTraining.register(config_class, model_class, exist_ok=True)


def sum_of_means(sums: Iterable[Tensor], items: Iterable[Tensor]) -> Tensor:
    """The loss: each term's sum over its items, added up.

    Args:
        sums: summed loss of each term.
        items: items of each term; none count as one, so that an empty term adds nothing.
    """
    return torch.stack([total / count.clamp(min=1) for total, count in zip(sums, items, strict=True)]).sum()


def name_of(module: nn.Module, root: nn.Module) -> str:
    """The dotted name of a module inside another.

    Raises:
        ValueError: it isn't in there.
    """
    for name, found in root.named_modules():
        if found is module:
            return name
    raise ValueError(f"{type(module).__name__} isn't a part of {type(root).__name__}")


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as plain values, without what belongs to a place on a disk."""
    values = config.to_dict()
    return {k: v for k, v in values.items() if k not in ("_name_or_path", "auto_map", "architectures")}
