"""Configuration of a masked language model that also judges pairs of texts."""

from typing import ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from ..base import check_choice, strict_config
from .configuration_composed import ComposedConfig

LABELS = ("next_sentence_label", "sentence_order_label")


@strict_config
class SentencePairConfig(ComposedConfig):
    """Configuration of `SentencePairForPreTraining`.

    Args:
        encoder: its configuration, or fields with `model_type`; None for a BERT of the sizes below.
        label: name of the pairs' labels, `next_sentence_label` or `sentence_order_label`.

    Raises:
        ValueError: a field is out of range.
    """

    model_type = "lnlm_sentence_pair"
    main_part: ClassVar[str] = "encoder"
    sub_configs_defaults = {"encoder": SubConfigSpec(config_class=AutoConfig, model_type="bert")}
    keys_to_ignore_at_inference = ["sums"]

    encoder: PreTrainedConfig | dict | None = None
    label: str = "next_sentence_label"

    def check_bounds(self) -> None:
        """Check ranges; see the class."""
        super().check_bounds()
        check_choice("label", self.label, LABELS)
