"""Configuration of two language models, one reading each way."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from ..base import strict_config
from .configuration_composed import ComposedConfig


@strict_config
class BidirectionalConfig(ComposedConfig):
    """Configuration of `BidirectionalForPreTraining`.

    Args:
        forwards, backwards: configurations of causal models of one vocabulary, or fields with `model_type`; None for
            Llamas of the sizes below.

    Raises:
        ValueError: a field is out of range, or the two have different vocabularies.
    """

    model_type = "lnlm_bidirectional"
    main_part: ClassVar[str] = "forwards"
    sub_configs_defaults = {
        "forwards": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "backwards": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    is_causal: ClassVar[bool] = True
    keys_to_ignore_at_inference = ["backward_logits", "backward_hidden_states", "sums"]

    forwards: PreTrainedConfig | dict | None = None
    backwards: PreTrainedConfig | dict | None = None

    def default_part(self, name: str) -> dict[str, Any]:
        """Fields of a Llama; see the class."""
        return super().default_part(name) | {"model_type": "llama"}
