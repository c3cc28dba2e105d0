"""Configuration of generator and discriminator of replaced-token detection."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from ..base import strict_config
from .configuration_composed import ComposedConfig


@strict_config
class ReplacedTokenConfig(ComposedConfig):
    """Configuration of `ReplacedTokenForPreTraining`.

    Args:
        generator, discriminator: their configurations, or fields with `model_type`; None for a BERT of the sizes
            below and a generator (ELECTRA's) a quarter as wide, which reads the BERT's embeddings.
        temperature: T, of the generator's samples; above 0.
        weight: λ, of the discriminator's loss; 0 or more.
        tie_word_embeddings: whether the two share embeddings.

    Raises:
        ValueError: a field is out of range, or the two have different vocabularies.
    """

    model_type = "lnlm_replaced_token"
    main_part: ClassVar[str] = "discriminator"
    sub_configs_defaults = {
        "generator": SubConfigSpec(config_class=AutoConfig, model_type="electra"),
        "discriminator": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }
    keys_to_ignore_at_inference = ["corrupted", "replaced", "generator_logits", "sums"]

    generator: PreTrainedConfig | dict | None = None
    discriminator: PreTrainedConfig | dict | None = None
    temperature: float | int = 1.0
    weight: float | int = 50.0

    def default_part(self, name: str) -> dict[str, Any]:
        """Fields of a BERT or a narrow generator; see the class."""
        fields = super().default_part(name)
        if name == "generator":
            width = max(1, self.hidden_size // 4)
            fields |= {"model_type": "electra", "embedding_size": self.hidden_size, "hidden_size": width}
            fields |= {"num_attention_heads": 1, "intermediate_size": 4 * width}
        return fields

    def check_bounds(self) -> None:
        """Check ranges; see the class."""
        super().check_bounds()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be 0 or more, got {self.weight}")
