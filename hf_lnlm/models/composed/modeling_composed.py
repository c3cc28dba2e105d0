"""Models made of several models that are trained as one and used apart: their base, and how they are saved.

A composed model is an ordinary `PreTrainedModel`: one optimizer, one checkpoint, one module for distributed training. Its
folder holds the whole (`config.json`, `model.safetensors`), for going on with training, and each part in a folder of its
own, which transformers loads by itself (`AutoModel….from_pretrained(run/part)`). All code is carried, in both places.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...nn.inputs import check_given, check_ids, check_keywords
from ...nn.masks import current_mask
from ..base import LNLMPreTrainedModel, give_umask_mode
from .configuration_composed import ComposedConfig


class ComposedModel(LNLMPreTrainedModel):
    """Base of the models made of parts.

    A subclass builds the parts, named as in the config, in `__init__` and calls `tie_parts`, then `post_init`.
    """

    config: ComposedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
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

    def asked(self, ids: Tensor, attention_mask: Tensor | None, given: Any) -> dict[str, Any]:
        """Arguments for parts: those given, and what the config wants returned.

        Args:
            ids: `(batch, length)`.
            attention_mask: `(batch, length)`, or None.
            given: by keyword, beside what `forward` names.

        Raises:
            ValueError: ids or mask that a family of the package's own would refuse; stock parts would read them somehow.
            TypeError: a tensor that no part would be given.
        """
        check_keywords(given)
        check_given(ids, None)
        check_ids(ids, self.config.vocab_size)
        current_mask(attention_mask, *ids.shape)
        names = ("output_hidden_states", "output_attentions")
        return {name: True for name in names if getattr(self.config, name, False)} | dict(given)

    def get_input_embeddings(self) -> nn.Module:
        """The main part's embedding; peft asks for it to find what is tied to it."""
        return getattr(self, self.config.main_part).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the main part's embedding."""
        getattr(self, self.config.main_part).set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings and outputs of every part, as in transformers."""
        for name in self.config.sub_configs:
            getattr(self, name).resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.config.mirror()
        self.vocab_size = self.config.vocab_size
        self.tie_weights()
        return self.get_input_embeddings()

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
            for name in self.config.sub_configs:
                self.part_to_save(name).save_pretrained(Path(save_directory) / name)
                give_umask_mode(Path(save_directory) / name)


def sum_of_means(sums: Iterable[Tensor], items: Iterable[Tensor]) -> Tensor:
    """The loss: each term's sum over its items, added up.

    Args:
        sums: summed loss of each term.
        items: items of each term; none count as one, so that an empty term adds nothing.
    """
    return torch.stack([total / count.clamp(min=1) for total, count in zip(sums, items, strict=True)]).sum()
