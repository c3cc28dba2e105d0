"""Configuration of a convolutional head on an encoder."""

# Copyright 2026 The hf_lnlm authors. Licensed under the Apache License, Version 2.0.

import importlib
import os
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from ..base import LNLMConfig, check_bound, check_choice, strict_config
from .own_encoder import CARRIED

MODES = ("last", "last_n", "all_cls", "scalar_mix")
MIRRORED = ("vocab_size", "hidden_size", "num_hidden_layers")
_PACKAGE = "hf_lnlm"


def encoder_config(given: dict[str, Any]) -> PreTrainedConfig:
    """Build an encoder's config from its fields.

    Args:
        given: the fields, with `model_type`.

    Raises:
        ValueError: the model type is missing or unknown here.
    """
    fields = dict(given)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"encoder must name its model_type, got the fields {sorted(map(str, given))[:8]}")
    if CARRIED is not None and CARRIED[0].model_type == model_type:  # type: ignore[attr-defined]
        return CARRIED[0](**fields)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"encoder: transformers knows no model type {model_type!r} here")
    return CONFIG_MAPPING[model_type](**fields)


@strict_config
class EncoderCNNConfig(LNLMConfig):
    """Configuration of `EncoderCNNModel` and its heads: an encoder of any kind and convolutions over its output.

    Args:
        encoder: the encoder's config, or its fields with `model_type`; None for a BERT of the sizes below, without
            dropout.
        vocab_size, hidden_size, num_hidden_layers: those of the encoder, whatever is given beside `encoder`.
        mode: what the windows slide over: the `last` layer; the `last_n` layers as so many input channels (the published
            BERT-CNN); `all_cls`, the first token's state in all layers, one frame a layer; or the `scalar_mix` of all.
        num_layers: layers that `last_n` reads; None for 4, or all if there are fewer.
        filter_sizes: frames that the windows see.
        num_filters: feature maps for each of `filter_sizes`.
        dropout: dropout of the features before the classifier.

    Raises:
        ValueError: a field is out of range, `last_n` asks for more layers than the encoder has, or the encoder's model
            type is unknown.
    """

    model_type = "lnlm_encoder_cnn"
    sub_configs_defaults = {"encoder": SubConfigSpec(config_class=AutoConfig, model_type="bert")}
    base_model_fsdp_plan = None
    _bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "num_filters": (1, 2**20),
        "filter_sizes": (1, 2**12),
    }

    encoder: PreTrainedConfig | dict | None = None
    mode: str = "last"
    num_layers: int | None = None
    filter_sizes: list[int] | tuple[int, ...] = (1, 2, 3, 4, 5)
    num_filters: int = 32
    dropout: float | int = 0.1
    tie_word_embeddings: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().check_bounds()
        if self.encoder is None:
            self.encoder = CONFIG_MAPPING["bert"](**self._default_encoder())
        elif isinstance(self.encoder, dict):
            self.encoder = encoder_config(self.encoder)
        self.mirror_encoder()
        if self.num_layers is None:
            self.num_layers = min(4, self.num_hidden_layers)
        encoder: Any = self.encoder
        attention = encoder._attn_implementation
        super().__post_init__(**kwargs)
        if kwargs.get("attn_implementation") is None and attention is not None:  # transformers has just unset it
            encoder._attn_implementation = attention

    def _default_encoder(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.hidden_size // 64 if self.hidden_size % 64 == 0 else 1,
            "intermediate_size": 4 * self.hidden_size,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": self.pad_token_id if self.pad_token_id is not None else 0,
        }

    def mirror_encoder(self) -> None:
        """Take over the encoder's sizes and special ids, which may have changed since."""
        encoder: Any = self.encoder
        for name in MIRRORED:
            if getattr(encoder, name, None) is None:
                raise ValueError(f"encoder: the config of a {encoder.model_type} has no {name}, got None")
            setattr(self, name, getattr(encoder, name))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(encoder, name, None))

    def check_bounds(self) -> None:
        """Check ranges and choices, and what they mean together; see the class for the fields."""
        if isinstance(self.encoder, PreTrainedConfig):
            self.mirror_encoder()
        super().check_bounds()
        check_choice("backend", self.backend, ("auto", "eager"))
        check_choice("mode", self.mode, MODES)
        check_bound("len(filter_sizes)", len(self.filter_sizes), (1, 64))
        if self.num_layers is not None and self.num_layers > self.num_hidden_layers:
            raise ValueError(
                f"num_layers must be at most the encoder's {self.num_hidden_layers} layers, got {self.num_layers}"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Pass a vocabulary's size on to the encoder, and refuse another width or depth than it has."""
        encoder = self.__dict__.get("encoder")
        if name in MIRRORED and isinstance(encoder, PreTrainedConfig) and getattr(encoder, name, value) != value:
            if name != "vocab_size":
                raise ValueError(f"{name} must be the encoder's, {getattr(encoder, name)}, got {value}")
            setattr(encoder, name, value)
        super().__setattr__(name, value)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the encoder's config, which embeddings and their number of tokens belong to."""
        inner: Any = self.encoder
        return self if inner is None else inner

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config and the code; that of the encoder too if it is one of the package's own.

        Args:
            save_directory: folder to write to; made if it does not exist.
            push_to_hub: whether to upload the config and its code as well.
            kwargs: as in transformers' `PreTrainedConfig.save_pretrained`.

        Raises:
            ValueError: a field is out of range, or the code cannot be flattened into one folder.
        """
        encoder: Any = self.encoder
        encoder.dtype = self.dtype  # as loading does: one checkpoint has one dtype
        if not type(self).__module__.startswith(_PACKAGE + "."):
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
            return
        super().save_pretrained(save_directory)
        bundle = importlib.import_module(_PACKAGE + ".hub.bundle")  # not carried
        bundle.write_inner_code(encoder, save_directory, f"{_PACKAGE}.models.hybrid.own_encoder")
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
            self.push_to_hub(repo_id, **kwargs)

    @property
    def encoder_size(self) -> int:
        """Width of the encoder's hidden states."""
        return int(getattr(self.encoder, "output_size", None) or self.hidden_size)

    @property
    def output_size(self) -> int:
        """Width of the pooled features."""
        return self.num_filters * len(self.filter_sizes)
